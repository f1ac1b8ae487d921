"""A cache read by webdataset, tar, zarr, pyarrow and duckdb. This module imports nothing of ours, on purpose."""

import json
import tarfile
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
import zarr
from safetensors.torch import load

from tests.programs import run


@pytest.fixture
def cache(toy_cache: Path) -> Path:
    return toy_cache


def _only(folder: Path) -> Path:
    (entry,) = folder.iterdir()
    return entry


def test_webdataset_and_safetensors_read_every_sample(cache: Path) -> None:
    shards = sorted(map(str, (_only(cache / "t5") / "data").glob("*.tar")))
    keys = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        document, tensors = json.loads(sample["json"]), load(sample["safetensors"])
        keys.append(document["key"])
        assert tensors["t5_embeds"].dtype == torch.bfloat16
        assert tuple(tensors["t5_embeds"].shape) == (64, 64)
    assert len(keys) == len(set(keys)) == 8


def test_tar_lists_the_members_of_a_shard_in_row_order(cache: Path) -> None:
    shard = sorted((_only(cache / "llm") / "data").glob("000001-*.tar"))[0]
    with tarfile.open(shard) as tar:
        expected = [f"00000100{row:03d}.{ending}" for row in range(3) for ending in ("json", "safetensors")]
        assert tar.getnames() == expected


def test_pyarrow_reads_plan_and_commit_records(cache: Path) -> None:
    plan = pq.read_table(cache / "plan" / "0000.parquet")
    assert plan.num_rows == 8
    settings = json.loads(pq.read_metadata(cache / "plan" / "0000.parquet").metadata[b"mimir"])
    assert settings["buckets"] == ["9x64x96", "1x64x96"]
    record = pq.read_table(_only(cache / "latents") / "manifests" / "000000.0.parquet")
    assert record["status"].to_pylist() == ["ok"] * 3
    footer = json.loads(
        pq.read_metadata(_only(cache / "latents") / "manifests" / "000000.0.parquet").metadata[b"mimir"]
    )
    data = _only(cache / "latents") / footer["files"][0]["path"]
    assert data.stat().st_size == footer["files"][0]["bytes"]


def test_offsets_in_a_commit_record_lead_to_the_tensors_without_parsing_the_tar(cache: Path) -> None:
    folder = _only(cache / "latents")
    rows = pq.read_table(folder / "manifests" / "000000.0.parquet").to_pylist()
    shard = next((folder / "data").glob("000000-*.tar"))
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    raw = shard.read_bytes()
    for row, sample in zip(rows, samples, strict=True):
        (place,) = row["tensors"]
        data = raw[place["offset"] : place["offset"] + place["nbytes"]]
        tensor = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(place["shape"])
        assert torch.equal(tensor, load(sample["safetensors"])[place["name"]])


def test_duckdb_counts_quarantine_and_joins_features_by_key(cache: Path) -> None:
    latents, t5 = (f"{cache}/{feature}/*/manifests/*.parquet" for feature in ("latents", "t5"))
    counted = duckdb.sql(f"SELECT status, count(*) FROM '{latents}' GROUP BY status").fetchall()
    assert counted == [("ok", 8)]
    joined = duckdb.sql(
        f"SELECT p.key, p.caption, l.bucket, t.tensors[1].shape FROM '{cache}/plan/*.parquet' p "
        f"JOIN '{latents}' l USING (key) JOIN '{t5}' t USING (key) WHERE l.status = 'ok' AND t.status = 'ok'"
    ).fetchall()
    assert len(joined) == 8
    assert {row[2] for row in joined} == {"9x64x96"}


def test_two_features_are_joined_by_key_with_webdataset_alone(cache: Path) -> None:
    def samples(feature: str) -> dict[str, dict[str, torch.Tensor]]:
        shards = sorted(map(str, (_only(cache / feature) / "data").glob("*.tar")))
        read = webdataset.WebDataset(shards, shardshuffle=False)
        return {json.loads(sample["json"])["key"]: load(sample["safetensors"]) for sample in read}

    latents, llm = samples("latents"), samples("llm")
    assert set(latents) == set(llm)
    for key, tensors in latents.items():
        assert tensors["vae_moments"].shape == (16, 3, 16, 24)
        assert llm[key]["instruction_hidden_0"].shape == (4, 64)


@pytest.fixture(scope="module")
def zarr_cache(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache once more, in the other format."""
    out = tmp_path_factory.mktemp("zarr") / "cache"
    done = run("mimir-precompute", "convert", toy_cache, "--format", "zarr", "--out", out)
    assert done.code == 0, done.err
    assert "12 shards written as zarr" in done.out
    return out


def test_zarr_reads_every_tensor_that_webdataset_reads(cache: Path, zarr_cache: Path) -> None:
    groups = [zarr.open_group(path, mode="r") for path in sorted((_only(zarr_cache / "llm") / "data").glob("*.zarr"))]
    shards = sorted(map(str, (_only(cache / "llm") / "data").glob("*.tar")))
    samples = {
        json.loads(sample["json"])["key"]: (json.loads(sample["json"]), load(sample["safetensors"]))
        for sample in webdataset.WebDataset(shards, shardshuffle=False)
    }
    assert [key for group in groups for key in group.attrs["keys"]] == list(samples)
    for group in groups:
        names = [name for name in group.array_keys() if "dtype" in group[name].attrs and name != "documents"]
        for number, key in enumerate(group.attrs["keys"]):
            document, tensors = samples[key]
            assert set(names) == set(tensors)
            for name in names:
                array = group[name][number]
                if f"{name}_lengths" in group:
                    array = array[: group[f"{name}_lengths"][number]]
                tensor = torch.from_numpy(array)
                if group[name].attrs["dtype"] == "bf16":
                    tensor = tensor.view(torch.bfloat16)
                assert torch.equal(tensor, tensors[name])
            text = group["documents"][number, : group["documents_lengths"][number]].tobytes()
            assert json.loads(text) == document


def test_zarr_keeps_each_bucket_in_a_group_of_its_own(zarr_cache: Path) -> None:
    record = pq.read_table(_only(zarr_cache / "latents") / "manifests" / "000000.0.parquet").to_pylist()
    group = zarr.open_group(next((_only(zarr_cache / "latents") / "data").glob("000000-*")), mode="r")
    assert list(group.group_keys()) == ["9x64x96"]
    assert group["9x64x96/vae_moments"].shape == (3, 16, 3, 16, 24)
    assert group["9x64x96/rows"][:].tolist() == [row["row"] for row in record]
    assert group["9x64x96"].attrs["keys"] == [row["key"] for row in record]
