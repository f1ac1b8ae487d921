"""`mimir-train plot`: runs side by side, whatever became of them, as PNG and as a page that stands alone."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mimir_shared.errors import CacheError, InputError
from mimir_shared.page.render import chart_colours
from mimir_train.cli import app as cli
from mimir_train.plot.command import plot_runs
from mimir_train.plot.panels import MOST_POINTS, panel_groups
from mimir_train.plot.runs import differing_settings, read_runs, short_names
from tests.pages import Outline, visit_page

Figures = dict[str, float | int | str]


def losses(step: int) -> Figures:
    """What every step has, and what some have."""
    figures: Figures = {
        "step": step, "epoch": 0, "bucket": "9x32x32", "loss": 1 / (1 + step / 50), "grad_norm": 0.5, "lr": 1e-3,
        "step_s": 0.5, "data_wait_s": 0.005, "data_wait_share": 0.01, "samples_per_s": 16.0, "tokens_per_s": 900.0,
        "memory_gb": 1.5,
    }  # fmt: skip
    if step % 10 == 9:
        figures |= {"validation/loss": 0.9, "validation/loss_t100": 0.5, "validation/loss_t900": 1.3}
    if step % 20 == 0:
        figures |= {"fuser/decoder_zero_proj_norm": step / 100, "fuser/t5_share": 0.75}
    return figures


def write_run(folder: Path, steps: int, figures: Callable[[int], Figures] = losses, *, tail: str = "") -> Path:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(figures(step)) + "\n" for step in range(steps))
    (folder / "metrics.jsonl").write_text(text + tail)
    settings = {"run": {"output_dir": str(folder)}, "optimizer": {"learning_rate": 1e-3 * steps}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def colours_in(path: Path) -> set[str]:
    with Image.open(path) as picture:
        found = picture.convert("RGB").getcolors(1 << 22) or []
    return {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in found}


def test_runs_of_different_length_are_drawn_together(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "long", 300), write_run(tmp_path / "short", 40), write_run(tmp_path / "one", 1)]
    written = plot_runs(runs, tmp_path / "out")
    assert [path.name for path in written.pictures] == ["loss.png", "fuser.png", "optimizer.png", "throughput.png"]
    assert set(chart_colours()[:3]) <= colours_in(tmp_path / "out/loss.png")
    page = Outline(written.page.read_text())
    assert all(name in page.text for name in ("long", "short", "one", "Norm of Zβ", "Validation loss at timestep 900"))
    assert "1 setting differs" in page.text
    assert "optimizer.learning_rate" in page.text
    assert "run.output_dir" not in page.text
    labels = page.attributes("svg", "aria-label")
    # means over 15 steps: one in twenty of the longest run
    long, short = (sum(1 / (1 + step / 50) for step in range(end - 15, end)) / 15 for end in (300, 40))
    assert f"Training loss: long from 1 to {long:.4g}; short from 1 to {short:.4g}; one from 1 to 1." in labels
    # no line for a run that never made a figure, and no panel for a figure that none has
    assert any(label.startswith("Validation loss: long") and "one" not in label for label in labels)
    assert "MFU" not in [label.partition(":")[0] for label in labels]


def test_a_single_point_is_a_dot(tmp_path: Path) -> None:
    written = plot_runs([write_run(tmp_path / "one", 1)], tmp_path / "out")
    assert "circle" in [tag for tag, _ in Outline(written.page.read_text()).elements]
    assert chart_colours()[0] in colours_in(tmp_path / "out/loss.png")


def test_steps_that_were_trained_again_count_once_and_a_cut_line_not_at_all(tmp_path: Path) -> None:
    again = "".join(json.dumps(losses(step) | {"loss": 0.25}) + "\n" for step in range(5, 8))
    (run,) = read_runs([write_run(tmp_path / "run", 10, tail=again + '{"step": 8, "lo')])
    assert [step for step, _ in run.points("loss")] == list(range(1, 9))
    assert [value for _, value in run.points("loss")][5:] == [0.25] * 3
    assert run.steps_done == 8


def test_names_tell_runs_apart_and_a_run_given_twice_is_drawn_once(tmp_path: Path) -> None:
    assert short_names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    assert short_names([Path("/a/one"), Path("/b/two")]) == ["one", "two"]
    run = write_run(tmp_path / "run", 3)
    assert len(read_runs([run, run / "metrics.jsonl", run / ".." / "run"])) == 1


def test_a_figure_that_nobody_told_us_of_has_a_panel_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5, lambda step: losses(step) | {"spikes": step, "note": "text"})
    more = [group for group in panel_groups(read_runs([run]), window=1) if group.name == "more"]
    assert [[panel.kind.title for panel in group.panels] for group in more] == [["spikes"]]


def test_validation_of_an_average_stands_beside_that_of_the_weights(tmp_path: Path) -> None:
    def averaged(step: int) -> Figures:
        more = {name.replace("/", "/ema_"): value for name, value in losses(step).items() if "validation" in name}
        return losses(step) | more

    groups = panel_groups(read_runs([write_run(tmp_path / "run", 20, averaged)]), window=1)
    assert [panel.kind.title for panel in groups[0].panels] == [
        "Training loss", "Validation loss", "Validation loss of the average", "Validation loss at timestep 100",
        "Validation loss at timestep 900", "Validation loss of the average at timestep 100",
        "Validation loss of the average at timestep 900",
    ]  # fmt: skip
    assert "more" not in [group.name for group in groups]


def test_long_runs_make_light_pages_and_lose_no_spike_of_the_mean(tmp_path: Path) -> None:
    def spiky(step: int) -> Figures:
        return losses(step) | {"loss": 900.0 if step == 7_777 else 1.0}

    groups = panel_groups(read_runs([write_run(tmp_path / "run", 20_000, spiky)]), window=1)
    (line,) = groups[0].panels[0].lines
    assert len(line.points) <= MOST_POINTS
    assert (7_778, 900.0) in line.points


def test_any_name_and_more_runs_than_colours_are_drawn(tmp_path: Path) -> None:
    names = ["$x_1$", "_hidden", "<b>bold", "{{ 7*7 }}", "ünï", "a b", "seven", "eight"]
    written = plot_runs([write_run(tmp_path / name, 3) for name in names], tmp_path / "out")
    page = Outline(written.page.read_text())
    assert all(name in page.text for name in names)
    assert any("dashed" in value for value in page.attributes("path", "class"))
    assert "b" not in {tag for tag, _ in page.elements}


def test_equal_records_give_equal_pages(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", 30), write_run(tmp_path / "b", 20)]
    first, second = (plot_runs(runs, tmp_path / name) for name in ("one", "two"))
    assert first.page.read_bytes() == second.page.read_bytes()
    assert first.pictures[0].read_bytes() == second.pictures[0].read_bytes()


def test_settings_that_only_one_run_has_are_told(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a", 2), write_run(tmp_path / "b", 2)])
    (tmp_path / "b/config.yaml").write_text(yaml.safe_dump({"optimizer": {"learning_rate": 2e-3, "ema": 0.99}}))
    assert differing_settings(runs) == []
    changed = read_runs([run.path for run in runs])
    assert ("optimizer.ema", ["–", "0.99"]) in differing_settings(changed)


def test_settings_that_are_lists_are_told_whole(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 2) for name in "abc"]
    for run, profiles in zip(runs, ([], ["power:0.1"], ["power:0.1", "fixed:0.9"]), strict=True):
        (run / "config.yaml").write_text(yaml.safe_dump({"ema": {"profiles": profiles}}))
    expected = [("ema.profiles", ["–", "power:0.1", "power:0.1, fixed:0.9"])]
    assert differing_settings(read_runs(runs)) == expected


def test_what_is_no_run_or_damaged_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing: no metrics.jsonl there; give the folder of a run"):
        plot_runs([tmp_path / "nothing"], tmp_path / "out")
    with pytest.raises(InputError, match=r"metrics.jsonl: no step is recorded yet"):
        plot_runs([write_run(tmp_path / "empty", 0, tail='{"step"')], tmp_path / "out")
    with pytest.raises(CacheError, match=r"metrics.jsonl: line 3 is no JSON object"):
        plot_runs([write_run(tmp_path / "odd", 2, tail='damage\n{"step": 3}\n')], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_beside_one_run_and_into_a_folder_for_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(write_run(tmp_path / name, 3)) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    for given, folder in ((runs[:1], tmp_path / "a/plots"), (runs, tmp_path / "plots")):
        monkeypatch.setattr(sys, "argv", ["mimir-train", "plot", *given])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        assert (folder / "plot.html").is_file()
    assert capsys.readouterr().out.splitlines()[1].startswith("plots/plot.html: and loss.png, fuser.png")


def test_the_page_stands_alone_in_a_browser(tmp_path: Path) -> None:
    written = plot_runs([write_run(tmp_path / "a", 60), write_run(tmp_path / "b", 30)], tmp_path / "out")
    visit = visit_page(written.page, tmp_path)
    assert visit.console == []
    assert visit.requests == []
