"""Canaries: secrets planted wherever a user keeps or mistypes them are in nothing that the programs write or say."""

import json
import shutil
from pathlib import Path

import pytest

from mimir_precompute.cli import commands, commands_remake
from mimir_shared.storage.folder import LocalStorage
from tests.conftest import REPOSITORY
from tests.fake_encoders import FakeEncoders
from tests.faults.workers import make_clips
from tests.precompute.cli.test_cli import call
from tests.programs import run

ENVIRONMENT = {
    "HF_TOKEN": "hf_canary1canary1canary1",
    "AWS_ACCESS_KEY_ID": "AKIACANARY2CANARY2",
    "AWS_SECRET_ACCESS_KEY": "canary3/canary3+canary3",
    "AWS_SESSION_TOKEN": "canary4canary4canary4",
    "WANDB_API_KEY": "canary5canary5canary5",
    "HTTPS_PROXY": "http://me:canary6canary6@127.0.0.1:9",
}
NETRC, LISTED, SIGNED, EXTRA, LOCATION, CONFIG = (
    f"canary{n}canary{n}canary{n}" for n in ("N", "L", "S", "E", "P", "C")
)
CANARIES = [
    *(value for name, value in ENVIRONMENT.items() if name != "HTTPS_PROXY"),
    *("canary6canary6", NETRC, LISTED, SIGNED, EXTRA, LOCATION, CONFIG),
]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with secrets in the environment and in the home folder."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text(f"machine huggingface.co login me password {NETRC}\n")
    for name, value in {**ENVIRONMENT, "HOME": str(home), "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(commands, "open_encoders", lambda plan, options, features, device: FakeEncoders())
    monkeypatch.setattr(commands_remake, "open_encoders", lambda plan, options, features: FakeEncoders())
    work = tmp_path / "work"
    work.mkdir()
    return work


def assert_clean(*said: str, written: Path) -> None:
    """No canary in what was said, nor in the names and bytes of what was written."""
    for text in said:
        assert [canary for canary in CANARIES if canary in text] == [], text
    for path in sorted(written.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        found = [c for c in CANARIES if c.encode() in data or c in str(path.relative_to(written))]
        assert found == [], path


def test_a_cache_that_is_planned_encoded_and_looked_at_holds_no_secret(
    planted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    clips = make_clips(planted.parent / "clips", 4)
    rows = [json.loads(line) for line in (clips / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["url"] = f"https://me:{EXTRA}@host/{row['file_name']}?frames=3&X-Amz-Signature={SIGNED}"
        row["nested"] = {"mirrors": [f"s3://key:{EXTRA}@bucket/x"]}
    (clips / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    cache = planted / "cache"
    said = []
    text = ["--features", "t5,answers,llm", "--device", "cpu"]
    for arguments in (
        ["plan", clips, "--cache", cache, "--preset", "tiny", "--json"],
        ["encode", "--cache", cache, *text],
        ["encode", clips, "--cache", cache, "--models", "some/models", "--llm", "some/llm", *text],
        ["status", cache, "--json"],
        ["verify", cache],
        ["quarantine", cache, "--out", planted / "lost.parquet"],
        ["stats", cache],
        ["inspect", cache, "000.mp4", "--json"],
        ["retry", cache, "--device", "cpu"],
        ["verify", cache, "--repair", "--device", "cpu"],
        ["finalize", cache],
        ["diff", cache, cache],
        ["gc", cache],
    ):
        code, out, err = call(capfd, *arguments)
        assert code == 0, (arguments, out, err)
        said += [out, err]
    assert_clean(*said, written=planted)
    plan = json.dumps(_plan_columns(cache), ensure_ascii=False)
    assert "https://…@host/000.mp4?frames=3&X-Amz-Signature=…" in plan, "the rest of the user's column is kept"


def _plan_columns(cache: Path) -> dict[str, list[object]]:
    from mimir_shared.plan_file import read_plan

    columns: dict[str, list[object]] = read_plan(LocalStorage(cache)).files[0].table.to_pydict()
    return columns


@pytest.mark.parametrize(
    "row",
    [
        {"file_name": f"https://me:{LISTED}@host/a.mp4"},
        {"file_name": f"https://host/a.mp4?X-Amz-Credential=a&X-Amz-Signature={SIGNED}"},
        {"file_name": f"s3://bucket/a.mp4?sig={SIGNED}"},
        {"file_name": "000.mp4", "key": f"https://me:{LISTED}@host/a.mp4"},
        {"file_name": "000.mp4", "key": "k", "start_s": f"https://me:{LISTED}@host"},
    ],
)
def test_a_list_that_names_clips_by_signed_addresses_is_refused_without_quoting_them(
    planted: Path, capfd: pytest.CaptureFixture[str], row: dict[str, object]
) -> None:
    clips = make_clips(planted.parent / "clips", 2)
    path = clips / "list.jsonl"
    path.write_text(json.dumps({"text": "A clip .", **row}) + "\n")
    code, out, err = call(capfd, "plan", path, "--cache", planted / "cache", "--preset", "tiny")
    assert code == 2
    assert "list.jsonl: 1 problem: " in err
    assert_clean(out, err, written=planted)


@pytest.mark.parametrize("address", [f"s3://key:{LOCATION}@bucket/cache", f"https://h/c?token={LOCATION}"])
@pytest.mark.parametrize("command", ["status", "verify", "encode", "plan", "retry"])
def test_a_password_in_the_address_of_a_cache_is_refused_without_quoting_it(
    planted: Path, capfd: pytest.CaptureFixture[str], command: str, address: str
) -> None:
    clips = make_clips(planted.parent / "clips", 2)
    arguments = {
        "encode": ["encode", "--cache", address, "--device", "cpu"],
        "plan": ["plan", clips, "--cache", address, "--preset", "tiny"],
        "retry": ["retry", address, "--device", "cpu"],
    }.get(command, [command, address])
    code, out, err = call(capfd, *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert_clean(out, err, written=planted)


def test_models_named_by_an_address_with_a_password_are_refused_without_quoting_it(
    planted: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    clips = make_clips(planted.parent / "clips", 2)
    cache = planted / "cache"
    call(capfd, "plan", clips, "--cache", cache, "--preset", "tiny")
    for option in ("--models", "--vae", "--t5", "--llm"):
        model = f"https://me:{CONFIG}@huggingface.co/some/model"
        other = [] if option == "--models" else ["--models", planted.parent / "no models here"]
        code, out, err = call(capfd, "encode", "--cache", cache, option, model, *other, "--device", "cpu")
        assert code == 2, (out, err)
        assert_clean(out, err, written=planted)


def test_a_fault_of_ours_shows_its_traceback_without_secrets(
    planted: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from mimir_shared.command_line import run_app

    def app() -> None:
        raise RuntimeError(f"403 for {ENVIRONMENT['HF_TOKEN']} at https://me:{LOCATION}@host")

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(RuntimeError) as caught:
        run_app(app)
    sys.excepthook(caught.type, caught.value, caught.tb)
    _, err = capfd.readouterr()
    assert "RuntimeError: 403 for … at https://…@host" in err
    assert "Traceback" in err
    assert_clean(err, written=planted)


def test_training_writes_no_secret_and_refuses_settings_that_hold_one(planted: Path) -> None:
    cache = Path(shutil.copytree(REPOSITORY / "manifests" / "tiny", planted.parent / "tiny"))
    out = planted / "run"
    common = ["run", "--preset", "tiny", "--output-dir", out, "--max-train-steps", 1, "--global-batch-size", 1]
    good = run("mimir-train", *common, "--cache", cache)
    assert good.code == 0, good.err
    config = planted.parent / "settings.yaml"
    config.write_text(f"data:\n  cache: s3://key:{CONFIG}@bucket/cache\n")
    said = [good.out, good.err]
    for arguments in (
        [*common, "--cache", cache, "--set", f"run.output_dir=https://me:{CONFIG}@host/run"],
        [*common, "--config", config],
    ):
        bad = run("mimir-train", *arguments)
        assert bad.code == 2, (bad.out, bad.err)
        said += [bad.out, bad.err]
    assert any(out.rglob("*.safetensors"))
    assert_clean(*said, written=planted)
