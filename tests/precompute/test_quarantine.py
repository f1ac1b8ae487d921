"""The ledger says what was lost and why; a shard that loses too much at once stops the run instead."""

import errno
import json
import os
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest

from mimir_precompute.encoders.base import EncoderInput
from mimir_precompute.inspection.status import read_status
from mimir_precompute.quarantine import read_ledger, refuse_mass_loss
from mimir_precompute.shard_writer import check_tensors
from mimir_shared.errors import MachineError
from mimir_shared.feature_folder import FeatureSpec, find_features
from mimir_shared.features import FeatureTensor, TensorSpec, float32_to_bf16_bits
from mimir_shared.manifest import SampleRecord
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import FakeEncoders, encode_fake, latents_specs
from tests.precompute.cli.test_cli import call
from tests.precompute.test_pipeline import captions_of, encode, write_captions


@pytest.fixture
def own_clips(toy_clips: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_clips, tmp_path / "clips"))


def _record_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*/manifests/*.parquet"))


def test_the_ledger_is_one_parquet_that_duckdb_reads(
    own_clips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "lost.parquet"
    names = sorted(captions_of(own_clips))
    (own_clips / names[0]).write_bytes(b"this is no video")
    (own_clips / names[1]).unlink()
    encode(own_clips, cache, FakeEncoders(poison={names[2]: "nan"}), max_quarantined=1)
    code, text, _ = call(capfd, "quarantine", cache, "--out", out)
    assert code == 0
    assert f"{names[1]}: latents fetch: missing: no such file (tried 1 time)" in text
    rows = duckdb.sql(f"SELECT feature, key, stage, reason, attempt, source FROM '{out}' ORDER BY key, feature")
    assert rows.fetchall() == [
        ("latents", names[0], "decode", "unsupported_format", 1, names[0]),
        ("latents", names[1], "fetch", "missing", 1, names[1]),
        ("latents", names[2], "encode", "nonfinite", 1, names[2]),
        ("llm", names[2], "encode", "nonfinite", 1, names[2]),
        ("t5", names[2], "encode", "nonfinite", 1, names[2]),
    ]
    code, text, _ = call(capfd, "quarantine", cache, "--json")
    assert [line["key"] for line in json.loads(text) if line["reason"] == "missing"] == [names[1]]
    (latents,) = read_status(LocalStorage(cache)).features["latents"]
    assert latents.reasons == {"decode: unsupported_format": 1, "fetch: missing": 1, "encode: nonfinite": 1}
    assert "quarantined in latents: 1 at fetch: missing" in call(capfd, "status", cache)[1]


def test_a_cache_without_losses_has_an_empty_ledger(
    toy_clips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    encode(toy_clips, tmp_path / "cache", features=("t5",))
    assert call(capfd, "quarantine", tmp_path / "cache", "--out", tmp_path / "none.parquet")[0] == 0
    assert duckdb.sql(f"SELECT count(*) FROM '{tmp_path}/none.parquet'").fetchall() == [(0,)]


def test_a_clip_that_a_later_plan_removed_leaves_the_ledger(own_clips: Path, tmp_path: Path) -> None:
    captions = captions_of(own_clips)
    lost = sorted(captions)[0]
    (own_clips / lost).unlink()
    encode(own_clips, tmp_path / "cache", features=("latents",), max_quarantined=1)
    assert [line.key for line in read_ledger(LocalStorage(tmp_path / "cache"))] == [lost]
    del captions[lost]
    write_captions(own_clips, captions)
    encode(own_clips, tmp_path / "cache", features=("latents",))
    assert read_ledger(LocalStorage(tmp_path / "cache")) == []


def test_a_mount_that_vanished_stops_the_run_and_commits_nothing(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    names = sorted(captions_of(own_clips))
    for name in names[1:8]:
        (own_clips / name).unlink()
    (own_clips / names[0]).write_bytes(b"this is no video")
    with pytest.raises(
        MachineError, match=r"8 of 12 clips .* 7 of them for fetch: missing .*--accept-quarantine"
    ) as stop:
        encode(own_clips, cache, shard_size=12, features=("latents",), max_quarantined=1)
    assert stop.value.exit_code == 5
    assert any(name in str(stop.value) for name in names[1:8])
    assert _record_files(cache) == []
    encode(None, cache, features=("latents",), max_quarantined=1, accept_quarantine=True)
    assert len(read_ledger(LocalStorage(cache))) == 8


def _sample(row: int, stage: str | None) -> SampleRecord:
    if stage is None:
        return SampleRecord(row=row, key=f"k{row}", status="ok", caption_xxh3=0)
    return SampleRecord(row=row, key=f"k{row}", status="quarantined", stage=stage, reason="missing", caption_xxh3=0)


@pytest.mark.parametrize(
    ("lost", "clips", "stops"), [(7, 7, False), (8, 8, True), (8, 16, True), (8, 17, False), (128, 256, True)]
)
def test_half_of_a_shard_and_eight_clips_are_too_many(lost: int, clips: int, stops: bool) -> None:
    samples = [_sample(row, "fetch" if row < lost else None) for row in range(clips)]
    if stops:
        with pytest.raises(MachineError, match=f"{lost} of {clips} clips"):
            refuse_mass_loss("shard 0", samples)
    else:
        refuse_mass_loss("shard 0", samples)


@pytest.mark.parametrize("stage", ["plan", "answers"])
def test_rows_with_nothing_to_try_are_no_loss_and_no_clips(stage: str) -> None:
    refuse_mass_loss("shard 0", [_sample(row, stage) for row in range(20)])
    with pytest.raises(MachineError, match="8 of 10 clips"):
        refuse_mass_loss(
            "shard 0", [_sample(row, stage if row < 20 else "fetch" if row < 28 else None) for row in range(30)]
        )


def test_what_was_lost_before_is_no_news() -> None:
    samples = [_sample(row, "fetch" if row < 12 else None) for row in range(16)]
    refuse_mass_loss("shard 0", samples, lost_before=range(5))
    with pytest.raises(MachineError, match="8 of 16 clips"):
        refuse_mass_loss("shard 0", samples, lost_before=range(4))


@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE])
def test_a_fault_of_the_disk_stops_the_run_and_blames_no_clip(
    toy_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    broken = str(toy_clips / sorted(captions_of(toy_clips))[3])
    true_open = os.open

    def failing_open(path: str | Path, flags: int, *rest: int, **options: int) -> int:
        if str(path) == broken:
            raise OSError(fault, os.strerror(fault))
        return true_open(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", failing_open)
    with pytest.raises(MachineError, match="not to blame") as stop:
        encode(toy_clips, tmp_path / "cache", features=("latents",))
    assert stop.value.exit_code == 5
    monkeypatch.undo()
    assert read_ledger(LocalStorage(tmp_path / "cache")) == []
    encode(None, tmp_path / "cache", features=("latents",))
    assert read_ledger(LocalStorage(tmp_path / "cache")) == []


def _moments(mean: np.ndarray) -> dict[str, FeatureTensor]:
    values = np.concatenate([mean, np.full_like(mean, -30.0)])
    return {"vae_moments": FeatureTensor(float32_to_bf16_bits(values), "bf16")}


@pytest.mark.parametrize("value", [0.0, -1.25])
def test_latents_of_one_value_are_quarantined_with_the_tensor_named(
    toy_clips: Path, tmp_path: Path, value: float
) -> None:
    key = sorted(captions_of(toy_clips))[4]

    encoders = FakeEncoders(poison={key: f"constant {value}"})
    outcome = encode(toy_clips, tmp_path, encoders, features=("latents",), max_quarantined=1)
    assert outcome.quarantined == {key: "encode: constant"}
    (line,) = read_ledger(LocalStorage(tmp_path))
    assert line.detail == f"the means of 'vae_moments' have the one value {value:g} throughout"


def test_one_other_value_or_a_constant_variance_is_no_fault() -> None:
    (spec,) = (
        TensorSpec(**{**s, "dims": tuple(s["dims"]), "sizes": tuple(s["sizes"])}) for s in latents_specs("9x64x96")
    )
    mean = np.zeros((4, 3, 16, 24), np.float32)
    mean[2, 1, 3, 4] = 1
    check_tensors(_moments(mean), [spec])


@pytest.mark.parametrize("shade", [0, 255, 128])
def test_a_clip_of_one_colour_is_not_constant_after_the_fake_encoder(shade: int) -> None:
    pixels = np.full((9, 64, 96, 3), shade, np.uint8)
    encoded = encode_fake("latents", EncoderInput(key="k", caption="", clip_pixels=pixels))
    identity = {"tensors": {"9x64x96": latents_specs("9x64x96")}}
    spec = FeatureSpec(feature="latents", fingerprint="0" * 64, format="webdataset", identity=identity)
    check_tensors(encoded.tensors, spec.tensor_specs("9x64x96"))


def test_the_hidden_states_name_the_answers_that_they_were_made_from(toy_clips: Path, tmp_path: Path) -> None:
    encode(toy_clips, tmp_path, features=("answers", "llm"))
    answers, llm = find_features(LocalStorage(tmp_path))
    for shard in range(3):
        pairs = zip(answers.read_record(shard, 0).samples, llm.read_record(shard, 0).samples, strict=True)
        assert all(a.stored is not None and a.stored.json_xxh3 == b.source_xxh3 for a, b in pairs)
