"""What a run tells while it goes: the figures of a step, who gets them, and what a person reads."""

import io
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mimir_shared.errors import CacheError, InputError, MachineError
from mimir_shared.transformer_flops import training_flops
from mimir_train.batch import BatchLoader, find_layout
from mimir_train.cache_reader import open_cache
from mimir_train.fit import fit
from mimir_train.json_lines import JsonLines, read_lines, read_steps
from mimir_train.loop import train
from mimir_train.metrics.console_line import ConsoleLine
from mimir_train.metrics.model_flops import transformer_sizes
from mimir_train.metrics.sinks import Wandb
from mimir_train.metrics.step_figures import StepMeter
from mimir_train.metrics.step_report import RankLoad, RankReport, StepReport, exchange
from mimir_train.order.clip_order import TrainingOrder
from mimir_train.parallel.launch import Place
from mimir_train.parallel.processes import Parallel
from tests.programs import environment
from tests.train.caches import NUM_INSTRUCTIONS, T5_ROWS, VIDEO, metrics_of, resumed_config, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_RANK = Parallel(place=Place(), device=torch.device("cpu"))


def rank_report(data_wait_s: float, forward_s: float, memory_bytes: int = 10**9) -> RankReport:
    load = RankLoad(
        tokens=100, model_flops=4e12, data_wait_s=data_wait_s, forward_s=forward_s, memory_bytes=memory_bytes
    )
    return RankReport(
        clip_losses=(0.5, 1.5), attempts=(0, 3), grad_norm=0.7, stop_requested=True, save_failed=True, load=load
    )


# --- the figures of a step ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def meter_and_batch(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[StepMeter, Any]:
    """Of two-layer transformers on a device that can do 10^12 operations a second; a batch of 8 clips."""
    config = tiny_config(small_cache, tmp_path_factory.mktemp("meter") / "run", run__peak_tflops=1.0)
    cache = open_cache(str(small_cache))
    fitted = fit(config, cache)
    order = TrainingOrder(cache.buckets(), seed=0, global_batch_size=8)
    batch = next(BatchLoader(cache, order, find_layout(cache, llm=True)).batches(0, 1))
    return StepMeter(fitted.config, fitted.layout, fitted.fuser, ONE_RANK), batch


def test_a_step_counts_the_tokens_and_operations_of_its_clips(meter_and_batch: Any, small_cache: Path) -> None:
    meter, batch = meter_and_batch
    load = meter.load(batch, data_wait_s=0.25, forward_s=0.5)
    text_tokens = T5_ROWS + NUM_INSTRUCTIONS
    assert load.tokens == 8 * (text_tokens + 3 * 4 * 4)  # 9 frames are 3 of latents, of 8x8 and patches of 2
    config = fit(tiny_config(small_cache, Path("nowhere")), open_cache(str(small_cache))).config.model.transformer
    assert load.model_flops == 8 * training_flops(transformer_sizes(config), (3, 8, 8), text_tokens)
    assert load.memory_bytes > 50e6  # of a process with torch in it


def test_rates_and_shares_are_over_all_ranks_and_the_whole_step(meter_and_batch: Any) -> None:
    meter, batch = meter_and_batch
    ranks = (rank_report(0.1, 0.4, 2 * 10**9), rank_report(0.9, 1.0), rank_report(0.2, 0.3))
    figures = meter.figures(batch, StepReport(ranks), {"dit": 1e-3, "fuser": 1e-2}, 4.0)
    assert figures["samples_per_s"] == 6 / 4
    assert figures["tokens_per_s"] == 300 / 4
    assert figures["mfu"] == pytest.approx(12e12 / (3 * 1e12 * 4.0))
    assert (figures["data_wait_s"], figures["data_wait_share"]) == (0.9, 0.225)  # of who waited longest
    assert figures["memory_gb"] == 2.0
    assert (figures["slowest_rank"], figures["slowest_rank_s"]) == (1, 1.9)
    assert figures["fastest_rank_s"] == 0.5


def test_without_a_peak_there_is_no_mfu_and_one_rank_is_not_called_slow(small_cache: Path, tmp_path: Path) -> None:
    train(tiny_config(small_cache, tmp_path / "run", run__max_train_steps=1))
    (line,) = metrics_of(tmp_path / "run")
    assert {"tokens_per_s", "data_wait_share", "memory_gb"} <= line.keys()
    assert not {"mfu", "slowest_rank"} & line.keys()


def test_ranks_tell_one_another_their_load() -> None:
    own = rank_report(0.125, 0.5)
    assert exchange(ONE_RANK, own, 2).ranks == (own,)


def test_a_run_reports_its_share_of_a_stated_peak(small_cache: Path, tmp_path: Path) -> None:
    train(tiny_config(small_cache, tmp_path / "run", run__max_train_steps=2, run__peak_tflops=0.01))
    for line in metrics_of(tmp_path / "run"):
        assert 0 < line["mfu"] < 100  # of a hundredth of a teraflop: no processor is that slow or that fast
    with pytest.raises(InputError, match=r"run.peak_tflops must be positive, got 0"):
        tiny_config(small_cache, tmp_path / "run", run__peak_tflops=0)


# --- files --------------------------------------------------------------------------------------------------------


def lines_file(folder: Path, *texts: str) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(texts))
    return path


def test_a_last_line_that_was_cut_is_left_out_and_any_other_is_named(tmp_path: Path) -> None:
    good = '{"step": 0, "loss": 1.0}\n'
    assert read_lines(lines_file(tmp_path, good, '{"step": 1, "lo')) == [{"step": 0, "loss": 1.0}]
    assert read_lines(lines_file(tmp_path)) == read_lines(tmp_path / "missing") == []
    for damaged in ('{"step": 1, "lo\n', "[1]\n", '{"loss": 1}\n', "\0\0\n", '{"step": "two"}\n'):
        with pytest.raises(CacheError, match=r'metrics.jsonl: line 2 is no JSON object with a "step"'):
            read_lines(lines_file(tmp_path, good, damaged, good))


def test_of_a_step_that_was_trained_twice_the_newest_counts_with_what_came_behind_it(tmp_path: Path) -> None:
    steps = [(0, "old"), (1, "old"), (2, "old"), (3, "old"), (1, "new"), (2, "new")]
    path = lines_file(tmp_path, *(json.dumps({"step": step, "of": of}) + "\n" for step, of in steps))
    assert [(line["step"], line["of"]) for line in read_steps(path)] == [(0, "old"), (1, "new"), (2, "new")]


def test_going_on_drops_the_lines_behind_the_checkpoint_and_a_cut_one(tmp_path: Path) -> None:
    path = lines_file(tmp_path, '{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    lines = JsonLines(path, first_step=2)
    lines.add({"step": 2, "loss": 0.5})
    lines.close()
    assert read_lines(path) == [{"step": 0}, {"step": 1}, {"step": 2, "loss": 0.5}]


# --- the person who watches ---------------------------------------------------------------------------------------


def step_of(step: int, step_s: float = 0.01, **more: float) -> dict[str, float | int | str]:
    return {
        "step": step, "loss": float(step), "step_s": step_s, "samples_per_s": 8 / step_s, "tokens_per_s": 4096 / step_s,
        "data_wait_share": 0.004, "memory_gb": 12.34, **more,
    }  # fmt: skip


class Clock:
    """Time that passes when it is told to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def watch(steps: int, step_s: float, *, terminal: bool = False, first_step: int = 0) -> str:
    """What a console shows of a run."""
    shown, clock = io.StringIO(), Clock()
    console = Console(file=shown, force_terminal=terminal, width=160, highlight=False)
    line = ConsoleLine(console, first_step, steps, clock)
    for step in range(first_step, steps):
        clock.now_s += step_s
        line.add(step_of(step, step_s, mfu=0.412))
    line.close()
    return shown.getvalue()


def test_short_steps_are_told_together_every_ten_seconds() -> None:
    lines = watch(steps=3000, step_s=2**-7).splitlines()
    assert len(lines) == 4  # after the first step, after 10 and 20 s, at the end
    assert lines[0].startswith("step 1/3000 · loss 0.0000 · ")
    # means and rates over the steps since the line before
    assert lines[1] == (
        "step 1281/3000 · loss 640.5000 · 1,024 samples/s · 524,288 tokens/s · MFU 41.2% · data wait 0.4% · 12.3 GB · "
        "13 s left"
    )
    assert lines[-1].startswith("step 3000/3000 · ")
    assert "left" not in lines[-1]


def test_long_steps_are_told_one_by_one_with_the_time_left() -> None:
    lines = watch(steps=40, step_s=90.0, first_step=37).splitlines()
    assert [line.split(" · ")[0] for line in lines] == ["step 38/40", "step 39/40", "step 40/40"]
    assert lines[0].endswith(" · 3 min left")


def test_on_a_terminal_there_is_a_bar_and_no_line_a_step() -> None:
    shown = watch(steps=200, step_s=0.01, terminal=True)
    assert "MFU 41.2%" in shown
    assert "200/200" in shown
    assert shown.count("\n") < 20


def test_a_validation_is_told_whenever_it_is_made() -> None:
    shown = io.StringIO()
    line = ConsoleLine(Console(file=shown, width=160), 0, 10, Clock())
    line.add(step_of(0))
    line.add(step_of(1, **{"validation/loss": 0.25, "validation/loss_t100": 0.125, "validation/loss_t900": 0.375}))
    line.add(step_of(2, **{"validation/loss": 0.25, "validation/loss_t100": 0.25, "validation/ema_loss": 0.125}))
    line.close()
    assert "validation after 2 steps: loss 0.2500 (t100 0.1250, t900 0.3750)\n" in shown.getvalue()
    assert "validation after 3 steps: loss 0.2500 (t100 0.2500), of the average 0.1250\n" in shown.getvalue()


# --- wandb --------------------------------------------------------------------------------------------------------


def test_wandb_that_is_not_installed_is_told_before_anything_is_built(
    small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("mimir_train.loop.build_trainer", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(InputError, match=r"--report-to wandb: it is not installed; `pip install 'mimir-t2v\[wandb\]'`"):
        train(tiny_config(small_cache, tmp_path / "run", run__report_to=["wandb"]))
    assert not (tmp_path / "run").exists()


class FakeWandb(types.ModuleType):
    """As much of the library as we use."""

    class Error(Exception):
        pass

    class UsageError(Error):
        pass

    class Settings:
        def __init__(self, **_: object) -> None: ...

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = self
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self.fault: Exception | None = None

    def init(self, **settings: Any) -> "FakeWandb":
        if self.fault is not None:
            raise self.fault
        self.runs.append(settings)
        return self

    def log(self, figures: dict[str, Any], step: int) -> None:
        self.logged.append((step, figures))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return fake


def test_a_run_that_goes_on_is_the_same_run_at_wandb(small_cache: Path, tmp_path: Path, fake_wandb: FakeWandb) -> None:
    train(tiny_config(small_cache, tmp_path / "run", run__report_to=["wandb"], run__stop_at_step=2))
    train(resumed_config(tmp_path / "run", run__max_train_steps=3), "latest")
    first, second = fake_wandb.runs
    assert first["id"] == second["id"] != ""
    assert first["config"]["model"]["fuser"] == "mimir"
    assert [step for step, _ in fake_wandb.logged] == [0, 1, 2]
    assert {"loss", "epoch", "data_wait_share", "fuser/t5_share"} <= fake_wandb.logged[0][1].keys()
    assert fake_wandb.finished == 2


def test_what_wandb_refuses_is_one_line_with_a_way_on(small_cache: Path, tmp_path: Path, fake_wandb: FakeWandb) -> None:
    config = tiny_config(small_cache, tmp_path, run__report_to=["wandb"])
    fake_wandb.fault = FakeWandb.UsageError("No API key\nconfigured.")
    with pytest.raises(InputError, match=r"--report-to wandb: No API key configured.; or set WANDB_MODE=offline"):
        Wandb(tmp_path, config)
    fake_wandb.fault = FakeWandb.Error("timed out")
    with pytest.raises(MachineError, match="--report-to wandb: timed out; run it again"):
        Wandb(tmp_path, config)


def test_the_real_wandb_writes_offline(small_cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install 'mimir-t2v[wandb]'")
    command = [sys.executable, "-m", "mimir_train", "run", "--cache", str(small_cache), "--preset", "tiny",
               "--output-dir", str(tmp_path / "run"), "--max-train-steps", "2", "--report-to", "wandb", "--device",
               "cpu"]  # fmt: skip
    variables = {**environment(), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    identity = (tmp_path / "run/wandb-id").read_text().strip()
    assert written.name == f"run-{identity}.wandb"
    assert b"tokens_per_s" in written.read_bytes()


def test_a_validation_set_has_every_bucket_in_proportion(tmp_path: Path) -> None:
    from mimir_train.validation.loss import find_validation_set
    from tests.train.caches import IMAGE, build_cache

    cache = open_cache(str(build_cache(tmp_path / "c", {VIDEO: 24, IMAGE: 12}, shard_size=12)))
    layout = find_layout(cache, llm=True)
    found = find_validation_set(cache, layout, (2,), limit=6, batch_size=4)
    numbers = [number for group in found.groups for _, number in group]
    assert found.num_clips == 6
    assert {cache.clip(number).bucket for number in numbers} <= {VIDEO, IMAGE}
    whole = find_validation_set(cache, layout, (1, 2), limit=8, batch_size=4)
    buckets = [{cache.clip(number).bucket for _, number in group} for group in whole.groups]
    assert sorted(len(one) for one in buckets) == [1] * len(buckets)
    assert {name for one in buckets for name in one} == {VIDEO, IMAGE}
    assert sorted(position for group in whole.groups for position, _ in group) == list(range(8))
