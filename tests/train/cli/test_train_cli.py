"""The program `mimir-train`: help in a blink, one clear line with the right exit code, stop and go on."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

from mimir_train.batch import BatchLoader, find_layout
from mimir_train.cache_reader import open_cache
from mimir_train.checkpoint.folder import find_checkpoint, list_checkpoints
from mimir_train.cli import app as cli
from mimir_train.order.clip_order import TrainingOrder
from tests.programs import environment
from tests.train.caches import VIDEO, build_cache, make_feature, place_of

SMALL = [
    "--set", "model.transformer.num_attention_heads=2", "--set", "model.transformer.attention_head_dim=16",
    "--set", "model.transformer.num_layers=1", "--report-to", "none", "--device", "cpu",
]  # fmt: skip


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the program in this process: (exit code, stdout, stderr)."""
    sys.argv = ["mimir-train", *map(str, arguments)]
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capfd.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["order", "--help"]])
def test_help_answers_in_half_a_second_of_cpu_time_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys,time\n"
        "from mimir_train.cli.app import main\n"
        f"sys.argv=['mimir-train',*{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy=[m for m in ('torch','transformers','diffusers','av','pyarrow','numpy') if m in sys.modules]\n"
        "sys.stderr.write(f'{time.process_time()} {heavy}')\n"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        time_used, _, heavy = done.stderr.partition(" ")
        assert heavy == "[]"
        seconds.append(float(time_used))
    assert min(seconds) < 0.5


def test_training_imports_no_encoder_library(small_cache: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mimir_train.cli.app import main\n"
        f"sys.argv=['mimir-train','run','--cache',{str(small_cache)!r},'--preset','tiny','--output-dir',"
        f"{str(tmp_path / 'run')!r},'--max-train-steps','2','--validation-shards','1',*{SMALL!r}]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print([m for m in ('transformers','diffusers','vllm','av','mimir_precompute') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert done.stdout.splitlines() == [f"{tmp_path}/run/checkpoints/step-00000002: after 2 steps", "[]"], done.stderr


def test_sigterm_saves_once_and_the_run_goes_on_from_there(
    small_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "mimir_train", "run", "--cache", str(small_cache), "--preset", "tiny",
               "--output-dir", str(run), "--max-train-steps", "100000", *SMALL]  # fmt: skip
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert "SIGTERM: finishing this step, then saving" in err
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    folder = find_checkpoint(run)
    assert folder.name == f"step-{len(steps):08d}"
    assert str(folder) in out
    assert len(list((run / "checkpoints").iterdir())) == 1
    # no preset and no setting is given again: the run knows them
    code, _, err = call(capfd, "run", "--output-dir", run, "--resume-from-checkpoint", "latest",
                        "--max-train-steps", len(steps) + 2)  # fmt: skip
    assert code == 0, err
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(len(steps) + 2))


def test_ctrl_c_says_that_nothing_was_saved(
    small_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mimir_train.loop.accumulate_gradients", interrupted)
    code, out, err = call(capfd, "run", "--cache", small_cache, "--preset", "tiny", "--output-dir", tmp_path / "run",
                          *SMALL)  # fmt: skip
    assert (code, out) == (130, "")
    assert err.endswith(
        "stopped by SIGINT without saving; --resume-from-checkpoint latest goes on from the last checkpoint "
        "(SIGTERM saves one first)\n"
    )


def test_a_second_sigterm_ends_a_save_at_once(small_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code = (
        "import sys, time\n"
        "from mimir_shared import failpoints\n"
        "from mimir_train.cli.app import main\n"
        "def hold(name):\n"
        "    if name == 'checkpoint.manifest_written': print('held', flush=True); time.sleep(600)\n"
        "failpoints.arm(hold)\n"
        f"sys.argv = ['mimir-train', 'run', '--cache', {str(small_cache)!r}, '--preset', 'tiny', '--output-dir', "
        f"{str(run)!r}, '--max-train-steps', '1000', '--checkpointing-steps', '1', *{SMALL!r}]\n"
        "main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGTERM)
    while "SIGTERM: finishing this step" not in (line := process.stderr.readline()):
        assert line, "it ended by the first"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert list_checkpoints(run) == []


def test_order_says_which_clips_each_rank_sees(small_cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def keys_of(*options: object) -> list[list[list[str]]]:
        code, out, _ = call(capfd, "order", "--cache", small_cache, "--global-batch-size", 8, "--seed", 1, "--json",
                            *options)  # fmt: skip
        assert code == 0
        lines = [json.loads(line) for line in out.splitlines()]
        assert all(line.keys() == {"step", "ranks"} for line in lines)
        return [line["ranks"] for line in lines]

    epoch = keys_of()
    assert len(epoch) == 3
    assert sorted(key for (keys,) in epoch for key in keys) == [f"{VIDEO}-{i:03d}" for i in range(24)]
    later = keys_of("--start-step", 1, "--steps", 4, "--world-size", 4)
    assert [list(chain(*ranks)) for ranks in later][:2] == [keys for (keys,) in epoch[1:]]
    assert all([len(keys) for keys in ranks] == [2, 2, 2, 2] for ranks in later)
    held_out = keys_of("--validation-shards", 1)
    assert len(held_out) == 2
    assert keys_of("--snapshot", open_cache(str(small_cache)).snapshot.digest[:8]) == epoch
    code, _, err = call(capfd, "order", "--cache", small_cache, "--global-batch-size", 8, "--snapshot", "0123")
    assert code == 4
    assert "snapshot 0123 is not here" in err


def test_order_of_a_run_is_what_the_run_reads(small_cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capfd, "order", "--cache", small_cache, "--global-batch-size", 6, "--seed", 9, "--json",
                     "--steps", 5, "--world-size", 2)  # fmt: skip
    cache = open_cache(str(small_cache))
    order = TrainingOrder(cache.buckets(), seed=9, global_batch_size=6)
    for rank in (0, 1):
        loader = BatchLoader(cache, order, find_layout(cache, llm=False), rank=rank, world_size=2)
        for line, batch in zip(map(json.loads, out.splitlines()), loader.batches(0, 5), strict=True):
            assert line["ranks"][rank] == [clip.key for clip in batch.clips]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--preset", "huge"], 2, "--preset 'huge': expected one of tiny"),
        (["--preset", "tiny", "--fuser", "mimi"], 2, "expected one of baseline"),
        (["--preset", "tiny", "--set", "run.sed=1"], 2, "unknown setting run.sed: did you mean run.seed"),
        (["--preset", "tiny", "--global-batch-size", "25"], 2, "larger than every bucket"),
        (
            ["--preset", "tiny", "--global-batch-size", "8", "--micro-batch-size", "3"],
            2,
            "multiple of 3, for instance 6",
        ),
        (["--preset", "tiny", "--report-to", "wandb,mail"], 2, "expected one of tensorboard, wandb, got 'mail'"),
        (["--preset", "tiny", "--device", "abacus"], 2, "expected auto, cpu, cuda"),
        (["--preset", "tiny", "--feature", "llm=ffff"], 2, "--feature llm=ffff"),
        (["--preset", "tiny", "--init-from", "/nowhere"], 2, "--init-from /nowhere"),
        (["--preset", "tiny", "--lora-alpha", "4"], 2, "--lora-alpha without --lora-rank"),
        (["--preset", "cogvideox-5b"], 4, "latents have 4 channels"),
        (["--preset", "tiny", "--resume-from-checkpoint", "7"], 2, "--resume-from-checkpoint 7: no checkpoint there"),
    ],
)
def test_wrong_input_is_one_line_with_its_exit_code(
    small_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    found, _, err = call(capfd, "run", "--cache", small_cache, "--output-dir", tmp_path / "run", *arguments)
    assert found == code, err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "run").exists()


def test_an_unfinished_cache_exits_2_naming_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cache = build_cache(tmp_path / "c", leave_out_shards=2)
    code, _, err = call(capfd, "run", "--cache", cache, "--preset", "tiny", "--output-dir", tmp_path / "run")
    assert code == 2
    assert f"mimir-precompute encode --cache {cache} --shards all" in err


def flip_a_byte(cache: Path) -> str:
    path, position = place_of(open_cache(str(cache)), 8)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))
    return f"{path}: `t5` of clip '{VIDEO}-008' (shard 1, row 0, source {VIDEO}-008.mp4): its "


def remove_a_shard(cache: Path) -> str:
    (path,) = cache.glob("latents/*/data/000002-*.tar")
    path.unlink()
    return f"{path}: `latents` of clip "


def exchange_a_record(cache: Path) -> str:
    other = build_cache(cache.parent / "other", replace={(f"{VIDEO}-000", "t5"): make_feature("t5", "other", VIDEO)})
    (record,) = cache.glob("t5/*/manifests/000000.0.parquet")
    (changed,) = other.glob("t5/*/manifests/000000.0.parquet")
    shutil.copy(changed, record)
    return f"{record}: its seal is "


def exchange_the_plan(cache: Path) -> str:
    other = build_cache(cache.parent / "other", {VIDEO: 3})
    shutil.copy(other / "plan/0000.parquet", cache / "plan/0000.parquet")
    return f"{cache}/plan/0000.parquet: is the plan "


@pytest.mark.parametrize("damage", [flip_a_byte, remove_a_shard, exchange_a_record, exchange_the_plan])
def test_a_damaged_cache_exits_4_naming_file_and_clip(
    small_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[Path], str]
) -> None:
    cache = Path(shutil.copytree(small_cache, tmp_path / "copy"))
    told = damage(cache)
    arguments = ["--preset", "tiny", "--output-dir", tmp_path / "run", "--max-train-steps", 6]
    code, _, err = call(capfd, "run", "--cache", cache, *arguments, *SMALL)
    assert code == 4, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {told}")
    assert "mimir-precompute" in line  # what to do now
    assert not (tmp_path / "run/checkpoints").exists()


def test_stand_ins_are_asked_for_by_an_option(
    small_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = Path(shutil.copytree(small_cache, tmp_path / "copy"))
    flip_a_byte(cache)
    arguments = ["--cache", cache, "--preset", "tiny", "--output-dir", tmp_path / "run", "--max-train-steps", 6]
    code, _, err = call(capfd, "run", *arguments, *SMALL, "--on-bad-sample", "substitute")
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {f"{VIDEO}-008"}
    assert sorted({line["step"] // 3 for line in lines}) == [0, 1]  # in every epoch
    path = tmp_path / "run/bad_samples.jsonl"
    assert f"note: step {lines[0]['step']}: '{VIDEO}-008'" in err  # when it happens first
    assert err.count("others stand in") == 1
    assert f"note: 2 of 48 clips could not be read, and others stood in for them; {path} lists them" in err
    code, _, err = call(capfd, "run", *arguments, "--on-bad-sample", "skip")
    assert code == 2
    assert "expected one of error, substitute" in err


def test_order_refuses_what_run_refuses(small_cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capfd, "order", "--cache", small_cache, "--global-batch-size", 8, "--world-size", 3)
    assert code == 2
    assert "must be a multiple of 3, for instance 6, 9, 12; or run it on 1, 2, 4, 8 rank(s)" in err
