"""The demo's page, from a real cache; the guard of its folder; the driver that runs and kills."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import demo, demo_page

from mimir_shared.plan_file import read_plan
from mimir_shared.storage.folder import LocalStorage
from tests.pages import Outline, visit_page
from tests.programs import run

CAPTION = '<script>alert("caption")</script> & "quotes"'


@pytest.fixture(scope="module")
def demo_folder(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo's folder as it is before training: a cache of eight clips and a damaged one."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    demo.make_fresh(folder)
    shutil.copytree(toy_world, folder / "toy")
    demo.damage_a_clip(folder / "toy" / "clips")
    metadata = folder / "toy" / "clips" / "metadata.jsonl"
    lines = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
    lines[0]["text"] = CAPTION
    metadata.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    done = run(
        "mimir-precompute", "encode", folder / "toy" / "clips", "--cache", folder / "cache", "--preset", "tiny",
        "--shard-size", 4, "--models", folder / "toy" / "models", "--max-quarantined", 0.2,
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder


def write_training(folder: Path) -> None:
    """A run's metrics and a sample, as `mimir-train` leaves them."""
    (folder / "run").mkdir()
    lines = []
    for step in range(60):
        line: dict[str, float] = {"step": step, "loss": 1 / (1 + step / 10), "step_s": 0.1, "data_wait_s": 0.0}
        line["samples_per_s"] = 80.0
        if step % 20 == 0:
            line |= {"fuser/encoder_zero_proj_norm": step / 20, "fuser/decoder_zero_proj_norm": step / 30}
            line |= {"fuser/t5_share": 1.0, "fuser/decoder_share": 0.0, "fuser/encoder_residual_share": 0.0}
        lines.append(json.dumps(line) + "\n")
    (folder / "run" / "metrics.jsonl").write_text("".join(lines))
    (folder / "run" / "config.yaml").write_text("data:\n  validation_shards: 1\n")
    (folder / "samples").mkdir()
    shutil.copy(folder / "toy" / "clips" / "000001.mp4", folder / "samples" / "one.mp4")
    entry = {"prompt": "A new <b>prompt</b>", "index": 0, "file": "one.mp4"}
    (folder / "samples" / "samples.jsonl").write_text(json.dumps(entry) + "\n", encoding="utf-8")


def write_story(folder: Path) -> None:
    """A story in which encode was killed after one commit."""
    commits = sorted(demo.find_commits(folder / "cache"), key=lambda commit: (commit.feature, commit.shard))
    for number, commit in enumerate(commits):
        commit.at_s = 100.0 + 10 * number
    story = {
        "steps": [{"title": "Encode", "command": "mimir-precompute encode <x>", "shows": "It goes on.", "seconds": 5.0,
                   "output": "one\ntwo\n", "killed": True}],
        "runs": [{"begin_s": 90.0, "end_s": 105.0, "killed": True},
                 {"begin_s": 106.0, "end_s": 250.0, "killed": False}],
        "commits": [{"feature": one.feature, "shard": one.shard, "at_s": one.at_s} for one in commits],
        "shards": 3, "snapshot": "1a2b3c4d5e6f", "uninterrupted_snapshot": "1a2b3c4d5e6f",
    }  # fmt: skip
    (folder / demo.STORY_NAME).write_text(json.dumps(story))


@pytest.fixture(scope="module")
def page(demo_folder: Path) -> str:
    write_training(demo_folder)
    write_story(demo_folder)
    assert demo_page.main([str(demo_folder)]) == 0
    return (demo_folder / "index.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_loads_nothing(page: str) -> None:
    outline = Outline(page)
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    assert "@import" not in page
    for tag, attribute in (("img", "src"), ("source", "srcset"), ("link", "href")):
        assert all(value.startswith("data:") for value in outline.attributes(tag, attribute))
    assert not outline.attributes("script", "src")
    assert "<script" not in page
    (policy,) = [a["content"] for tag, a in outline.elements if tag == "meta" and "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_page_shows_every_clip_moving_beside_its_source(page: str) -> None:
    outline = Outline(page)
    alts = outline.attributes("img", "alt")
    assert len(alts) == len(outline.attributes("img", "src")), "a picture without a description"
    for index in range(8):
        (alt,) = [alt for alt in alts if f"{index:06d}.mp4" in alt]
        assert "decoded from its latents" in alt
    decibels = [float(value) for value in re.findall(r"decoded, ([\d.]+) dB", outline.text)]
    assert len(decibels) == 8
    assert min(decibels) > 20


def test_captions_and_prompts_are_escaped(page: str) -> None:
    outline = Outline(page)
    assert CAPTION in outline.text
    assert "A new <b>prompt</b>" in outline.text
    assert not any(tag in ("script", "b") for tag, _ in outline.elements)


def test_the_page_leads_to_the_report_where_there_is_one(page: str, demo_folder: Path) -> None:
    assert Outline(page).attributes("a", "href") == []
    (report,) = [step for step in demo.plan_steps(demo_folder) if step.name == "report"]
    done = run(*shlex.split(report.command))
    assert done.code == 0, done.err
    assert Outline(demo_page.build_page(demo_folder)).attributes("a", "href") == ["report.html"]
    assert (demo_folder / "report.html").is_file()
    assert "report.html" in demo.OWN_NAMES


def test_the_page_shows_the_damaged_clip_and_why(page: str) -> None:
    text = " ".join(Outline(page).text.split())
    assert "damaged.mp4 latents decode truncated" in text
    assert "Clips in the cache 8 of 9" in text


def test_the_page_tells_of_kill_training_and_samples(page: str) -> None:
    text = " ".join(Outline(page).text.split())
    assert "1 shard was committed" in text
    assert "both have the snapshot 1a2b3c4d5e6f" in text
    assert "60 steps" in text
    assert "Both projections grow from zero" in text
    assert "mimir-precompute encode <x>" in text


def test_a_page_without_training_leaves_it_out(demo_folder: Path, tmp_path: Path) -> None:
    for name in ("cache", "toy"):
        (tmp_path / name).symlink_to(demo_folder / name)
    text = Outline(demo_page.build_page(tmp_path)).text
    assert "Every clip" in text
    assert "Samples" not in text
    assert "What was run" not in text


def test_the_page_opens_in_a_browser_without_a_complaint(page: str, demo_folder: Path, tmp_path: Path) -> None:
    visit = visit_page(demo_folder / "index.html", tmp_path)
    assert visit.console == []
    assert visit.requests == []


def test_a_folder_of_someone_else_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "precious").write_text("mine")
    assert demo.main([str(tmp_path)]) == 2
    assert "not made by this demo" in capsys.readouterr().err
    assert (tmp_path / "cache" / "precious").read_text() == "mine"


def test_a_file_in_place_of_the_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo").write_text("mine")
    assert demo.main([str(tmp_path / "demo")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_a_second_demo_removes_what_the_first_made_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    demo.make_fresh(folder)
    (folder / "cache").mkdir()
    (folder / "cache" / "plan").write_text("old")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("kept")
    (folder / "run").symlink_to(tmp_path / "elsewhere")
    (folder / "notes.txt").write_text("kept")
    demo.make_fresh(folder)
    assert sorted(path.name for path in folder.iterdir()) == [demo.MARKER, "notes.txt"]
    assert (tmp_path / "elsewhere" / "kept").read_text() == "kept"


def test_the_steps_are_the_path_that_the_readme_tells() -> None:
    steps = demo.plan_steps(Path("demo"))
    programs = [" ".join(step.command.split()[:2]) for step in steps]
    assert programs == [
        "mimir-precompute toy", "mimir-precompute plan", "mimir-precompute encode", "mimir-precompute status",
        "mimir-precompute encode", "mimir-precompute verify", "mimir-precompute report", "mimir-precompute encode",
        "mimir-train run",
        "mimir-train sample", "python scripts/demo_page.py",
    ]  # fmt: skip
    by_name = {step.name: step for step in steps}
    assert by_name["kill"].command == by_name["resume"].command
    assert not any("https:" in step.command for step in steps)


def test_the_first_shard_holds_the_clips_whose_captions_are_sampled(tmp_path: Path) -> None:
    names = [*(f"{index:06d}.mp4" for index in range(demo.NUM_CLIPS)), "damaged.mp4"]
    clips = tmp_path / "toy" / "clips"
    clips.mkdir(parents=True)
    for name in names:
        (clips / name).touch()
    lines = [json.dumps({"file_name": name, "text": "A clip."}) + "\n" for name in names]
    (clips / "metadata.jsonl").write_text("".join(lines))
    (plan,) = [step for step in demo.plan_steps(tmp_path) if step.name == "plan"]
    done = run(*shlex.split(plan.command))
    assert done.code == 0, done.err
    first = read_plan(LocalStorage(tmp_path / "cache")).shard_clips(0)
    assert sorted(clip.key for clip in first) == [f"{index:06d}.mp4" for index in demo.TRAINED_CLIPS]


def test_encode_is_killed_once_shards_are_committed(tmp_path: Path) -> None:
    """A stand-in commits four shards, slowly; it must be killed before the last."""
    program = (
        "import pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[1]) / 'latents' / 'abc' / 'manifests'\n"
        "folder.mkdir(parents=True)\n"
        "for shard in range(4):\n"
        "    (folder / f'{shard:06d}.0.parquet').write_text('')\n"
        "    time.sleep(1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], text=True) as process:
        demo.kill_in_the_middle(process, tmp_path)
    assert process.returncode == -9
    assert demo.KILL_AFTER_SHARDS <= len(demo.find_commits(tmp_path)) < 4


def test_a_failing_command_ends_the_demo_with_its_exit_code(tmp_path: Path) -> None:
    step = demo.Step(name="x", title="x", command="mimir-precompute status nowhere", shows="x")
    with pytest.raises(demo.DemoError, match="ended with exit code 2"):
        demo.run_step(step, tmp_path, demo.Story())
