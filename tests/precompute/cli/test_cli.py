"""The command line: help without torch, and one clear line with the right exit code for wrong input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mimir_precompute.cli import app as cli
from mimir_precompute.option_values import parse_features, parse_shards
from mimir_shared.errors import InputError
from tests.programs import environment


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the program in this process: (exit code, stdout, stderr)."""
    sys.argv = ["mimir-precompute", *map(str, arguments)]
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capfd.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("arguments", [["--help"], ["encode", "--help"]])
def test_help_answers_in_half_a_second_of_cpu_time_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys,time\n"
        "from mimir_precompute.cli.app import main\n"
        f"sys.argv=['mimir-precompute',*{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy=[m for m in ('torch','transformers','diffusers','av','pyarrow','numpy') if m in sys.modules]\n"
        "sys.stderr.write(f'{time.process_time()} {heavy}')\n"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
        )
        took, heavy = done.stderr.rsplit("\n", 1)[-1].split(" ", 1)
        assert heavy == "[]"
        assert "Usage" in done.stdout
        seconds.append(float(took))
    assert min(seconds) < 0.5, seconds


def check_error(capfd: pytest.CaptureFixture[str], code: int, *parts: str, arguments: tuple[object, ...]) -> None:
    got, _, err = call(capfd, *arguments)
    assert got == code, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in lines[0], lines[0]


def test_wrong_input_gets_one_line_and_exit_code_2(
    capfd: pytest.CaptureFixture[str], toy_clips: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    tiny = ("--cache", cache, "--preset", "tiny")
    hub = (*tiny, "--models", "some/models", "--llm", "some/llm")  # not asked before the options are checked
    cases: list[tuple[tuple[str, ...], tuple[object, ...]]] = [
        (("no such file or folder", "nowhere"), ("encode", tmp_path / "nowhere", *hub)),
        (("--preset 'huge'", "tiny, cogvideox-2b"), ("encode", toy_clips, "--cache", cache, "--preset", "huge")),
        (("no geometry", "--preset"), ("encode", toy_clips, "--cache", cache)),
        (("--features", "'sound'", "latents, t5"), ("encode", toy_clips, *tiny, "--features", "t5,sound")),
        (("--on-mismatch 'maybe'", "error, new"), ("encode", toy_clips, *tiny, "--on-mismatch", "maybe")),
        (("--device 'tpu'", "cuda:N"), ("encode", toy_clips, *tiny, "--device", "tpu")),
        (("--latents 'pixels'", "moments, mean"), ("encode", toy_clips, *hub, "--latents", "pixels")),
        (("--format 'hdf5'", "webdataset"), ("encode", toy_clips, *tiny, "--format", "hdf5")),
        (("no vae", "--vae", "--models"), ("encode", toy_clips, *tiny)),
        (("--shards '7'", "no shard 7", "0 to 0"), ("encode", toy_clips, *hub, "--shards", "7")),
        (("no plan in this cache", "mimir-precompute plan"), ("encode", "--cache", tmp_path)),
        (("no plan in this cache",), ("status", tmp_path)),
        *(
            (("no such folder", "mimir-precompute plan"), (command, tmp_path / "none"))
            for command in ("status", "verify", "gc", "quarantine", "report", "stats", "retry")
        ),
        (("not in the plan", "did you mean"), ("inspect", cache, "0001")),
        (("not finished", "no feature yet"), ("finalize", cache)),
    ]
    for parts, arguments in cases:
        check_error(capfd, 2, *parts, arguments=arguments)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--models", "./modelz"), ("--models ./modelz: no such folder", "owner/name")),
        (("--models", "modelz"), ("--models modelz: no such folder",)),
        (("--models", "/non/existent"), ("--models /non/existent: no such folder",)),
        (("--models", "some/models"), ("no llm: --models some/models is no folder here", "--llm")),
        (("--models", "some/models", "--llm", "/nonexist"), ("'/nonexist': does not exist",)),
        (("--shards", "0..3"), ("--shards '0..3'", "0-63")),
        (("--models", "some/models", "--llm", "some/llm", "--llm-layer", "top"), ("--llm-layer 'top'",)),
        (("--models", "some/models", "--llm", "some/llm", "--answer-variants", "0"), ("--answer-variants",)),
        (("--models", "some/models", "--llm", "some/llm", "--instructions", "/non/existent"), ("--instructions",)),
    ],
)
def test_encode_plans_nothing_while_an_option_is_wrong(
    capfd: pytest.CaptureFixture[str],
    toy_clips: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    arguments = ("encode", toy_clips, "--cache", tmp_path / "cache", "--preset", "tiny", *options)
    check_error(capfd, 2, *parts, arguments=arguments)
    assert not (tmp_path / "cache").exists()


def test_unknown_options_and_values_of_a_wrong_type_end_with_code_2(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments in (
        ("encode", "--cache", tmp_path, "--max-quarantined", "2"),
        ("encode", "--cache", tmp_path, "--sharts", "all"),
        ("encode", "--cache", tmp_path, "--fps", "fast"),
        ("bake",),
    ):
        code, _, err = call(capfd, *arguments)
        assert code == 2
        assert "Traceback" not in err


def test_a_model_folder_without_weights_is_named(
    capfd: pytest.CaptureFixture[str], toy_clips: Path, tmp_path: Path
) -> None:
    (tmp_path / "models" / "vae").mkdir(parents=True)
    arguments = ("encode", toy_clips, "--cache", tmp_path / "c", "--preset", "tiny", "--models", tmp_path / "models")
    check_error(capfd, 2, "models/vae", "config.json", arguments=(*arguments, "--features", "latents"))
    (tmp_path / "models" / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLCogVideoX"}')
    check_error(capfd, 2, "models/vae", "safetensors", arguments=(*arguments, "--features", "latents"))


def test_other_settings_than_the_plan_has_end_with_code_4(
    capfd: pytest.CaptureFixture[str], toy_clips: Path, tmp_path: Path
) -> None:
    assert call(capfd, "plan", toy_clips, "--cache", tmp_path, "--preset", "tiny")[0] == 0
    check_error(
        capfd,
        4,
        "9x64x96",
        "49x480x720",
        arguments=("plan", toy_clips, "--cache", tmp_path, "--preset", "cogvideox-5b"),
    )
    check_error(capfd, 4, "tiny", arguments=("encode", "--cache", tmp_path, "--preset", "cogvideox-5b"))


def test_plan_reports_in_words_and_as_json(capfd: pytest.CaptureFixture[str], toy_clips: Path, tmp_path: Path) -> None:
    arguments = ("plan", toy_clips, "--cache", tmp_path, "--preset", "tiny", "--shard_size", "5")
    code, out, _ = call(capfd, *arguments, "--dry-run", "--json")
    assert code == 0
    document = json.loads(out)
    estimate = document.pop("estimate")
    assert (estimate["clips"], estimate["new_clips"], estimate["bucket"]) == (12, 12, "9x64x96")
    assert document == {
        "clips": 12, "new": 12, "changed": 0, "removed": 0, "unchanged": 0, "missing_files": 0,
        "new_shards": 3, "shards": 3, "written": False,
    }  # fmt: skip
    assert "TFLOP/clip" in call(capfd, *arguments, "--dry-run")[1]
    planned = call(capfd, *arguments)[1]
    assert "12 new" in planned
    assert "estimate: 8" in planned
    assert "nothing to plan" in call(capfd, *arguments)[1]
    status = json.loads(call(capfd, "status", tmp_path, "--json")[1])
    nobody = {"workers": [], "clips_per_s": None, "eta_s": None}
    nothing = {"superseded": 0, "complete": False, "snapshots": [], "features": {}}
    assert status == {"clips": 12, "shards": 3, **nothing, **nobody}


def test_a_damaged_plan_ends_with_code_4(capfd: pytest.CaptureFixture[str], toy_clips: Path, tmp_path: Path) -> None:
    call(capfd, "plan", toy_clips, "--cache", tmp_path, "--preset", "tiny")
    plan = tmp_path / "plan" / "0000.parquet"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(bytes(data))
    check_error(capfd, 4, "0000.parquet", "damaged", arguments=("status", tmp_path))


def test_a_cache_that_cannot_be_written_is_told_before_any_model_loads(
    capfd: pytest.CaptureFixture[str], toy_clips: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    models = ("--models", "some/models", "--llm", "some/llm")
    arguments = ("encode", toy_clips, "--cache", tmp_path / "file", "--preset", "tiny", *models)
    check_error(capfd, 2, "cannot be written", arguments=arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", list(range(10))),
        ("0-3", [0, 1, 2, 3]),
        ("7", [7]),
        ("3,5,3", [3, 5]),
        ("2::4", [2, 6]),
        (":3", [0, 1, 2]),
        ("0-1,8:", [0, 1, 8, 9]),
    ],
)
def test_shards_are_chosen_by_number_range_and_slice(text: str, expected: list[int]) -> None:
    assert list(parse_shards(text, 10)) == expected


@pytest.mark.parametrize("text", ["10", "0-10", "5-3", "x", "", "-1", "1:2:3:4", "10::2", "::0", "1,,2"])
def test_shards_that_are_not_there_or_not_understood_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--shards"):
        parse_shards(text, 10)


def test_features_come_in_the_order_in_which_they_are_made() -> None:
    assert parse_features("llm, t5,answers") == ("t5", "answers", "llm")
    for text in ("", ",", "t5,video"):
        with pytest.raises(InputError, match="--features"):
            parse_features(text)


def test_a_relative_cache_can_be_moved(capfd: pytest.CaptureFixture[str], toy_clips: Path, tmp_path: Path) -> None:
    call(capfd, "plan", toy_clips, "--cache", tmp_path / "a", "--preset", "tiny")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert call(capfd, "status", tmp_path / "b")[0] == 0


def test_status_says_it_again_until_it_is_interrupted(
    capfd: pytest.CaptureFixture[str], toy_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(capfd, "plan", toy_clips, "--cache", tmp_path, "--preset", "tiny")[0] == 0
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("mimir_precompute.cli.cache.time.sleep", pause)
    code, out, _ = call(capfd, "status", tmp_path, "--json", "--watch", 5)
    assert (code, pauses) == (0, [5.0] * 3)
    assert [json.loads(line)["clips"] for line in out.splitlines()] == [12] * 3


def test_status_is_not_said_again_without_a_pause(
    capfd: pytest.CaptureFixture[str], toy_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mimir_precompute.cli.cache.time.sleep", lambda _: pytest.fail("it went on"))
    assert call(capfd, "plan", toy_clips, "--cache", tmp_path, "--preset", "tiny")[0] == 0
    code, _, err = call(capfd, "status", tmp_path, "--watch", 0)
    assert (code, "--watch" in err, "0.1" in err) == (2, True, True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--workers", "0"), "--workers '0': expected a number, or auto: one for each GPU"),
        (("--workers", "some"), "--workers 'some': expected a number, or auto"),
        (("--workers", "2", "--place", "latents=2"), "no worker 2; there are workers 0 to 1"),
        (("--workers", "2", "--llm-tensor-parallel", "2"), "each of several --workers has one GPU"),
    ],
)
def test_a_team_that_cannot_be_is_refused_before_anything_is_written(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    arguments = ("encode", "clips", "--cache", tmp_path / "cache", "--preset", "tiny", "--device", "cpu", *options)
    check_error(capfd, 2, says, arguments=arguments)
    assert not (tmp_path / "cache").exists()
