"""Model files are found, checked for completeness and digested; every refusal says what is missing where."""

import hashlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from mimir_precompute.config import ModelSource
from mimir_precompute.model_files import (
    ModelPart,
    ResolvedModel,
    describe_model,
    loading_from,
    refuse_incomplete,
    resolve_model,
)
from mimir_shared.errors import InputError, MachineError

LLM_PARTS: tuple[ModelPart, ...] = ("weights", "tokenizer", "chat_template")


def write_llm(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"hidden_size": 64}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return folder


def resolve(folder: Path, parts: tuple[ModelPart, ...] = LLM_PARTS) -> ResolvedModel:
    return resolve_model(ModelSource(name=str(folder)), parts)


def test_a_folder_is_digested_file_by_file(tmp_path: Path) -> None:
    folder = write_llm(tmp_path / "llm")
    model = resolve(folder)
    assert (model.name, model.subfolder, model.commit, model.folder) == ("local", "", None, folder)
    assert model.config == {"hidden_size": 64}
    assert set(model.digests) == {file.name for file in folder.iterdir()}
    for name, digest in model.digests.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert model.chat_template_sha256 == hashlib.sha256(b"{{ messages }}").hexdigest()


def test_files_that_change_no_feature_are_left_out(tmp_path: Path) -> None:
    folder = write_llm(tmp_path)
    before = resolve(folder).digests
    for name in ("README.md", "pytorch_model.bin", "training_args.json", "consolidated.safetensors"):
        (folder / name).write_text("anything")
    assert resolve(folder).digests == before


def test_digests_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    assert resolve(write_llm(tmp_path / "a")).digests == resolve(write_llm(tmp_path / "b" / "c")).digests


def test_a_subfolder_is_found_within_a_folder(tmp_path: Path) -> None:
    write_llm(tmp_path / "models" / "llm")
    model = resolve_model(ModelSource(name=str(tmp_path / "models"), subfolder="llm"), LLM_PARTS)
    assert model.folder == (tmp_path / "models" / "llm").resolve()
    assert model.subfolder == ""


def test_only_the_parts_asked_for_are_demanded_and_digested(tmp_path: Path) -> None:
    folder = write_llm(tmp_path)
    assert set(resolve(folder, ("tokenizer",)).digests) == {"tokenizer.json", "tokenizer_config.json"}
    assert set(resolve(folder, ("weights",)).digests) == {"config.json", "generation_config.json", "model.safetensors"}


def test_shards_are_digested_with_their_index(tmp_path: Path) -> None:
    folder = write_llm(tmp_path)
    (folder / "model.safetensors").unlink()
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(b"%d" % number)
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    digests = resolve(folder, ("weights",)).digests
    assert {*weight_map.values(), "model.safetensors.index.json"} < set(digests)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"1 of 2 weight files missing, first model-00002-of-00002.safetensors"):
        resolve(folder, ("weights",))


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_is_found_wherever_it_is_kept(tmp_path: Path, place: str) -> None:
    folder = write_llm(tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / place).write_text("{{ other }}" if place.endswith("jinja") else '{"chat_template": "{{ other }}"}')
    assert resolve(folder).chat_template_sha256 == hashlib.sha256(b"{{ other }}").hexdigest()


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("config.json", "no config.json there"),
        ("model.safetensors", r"no weights there \(expected model.safetensors or"),
        ("tokenizer.json", "no tokenizer there"),
        ("tokenizer_config.json", "no chat template"),
    ],
)
def test_a_missing_file_is_named_with_its_folder(tmp_path: Path, gone: str, message: str) -> None:
    folder = write_llm(tmp_path / "llm")
    (folder / gone).unlink()
    with pytest.raises(InputError, match=message) as refusal:
        resolve(folder)
    assert f"model folder {folder}" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused(tmp_path: Path, file: str) -> None:
    folder = write_llm(tmp_path)
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(InputError, match=f"weights only as {file}, which can run code"):
        resolve(folder)


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    folder = write_llm(tmp_path)
    (folder / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(InputError, match=r"config.json is not JSON"):
        resolve(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config.json holds no JSON object"):
        resolve(folder)


def test_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        resolve(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; give the folder"):
        resolve(tmp_path / "file")
    with pytest.raises(InputError, match="has no subfolder 'llm'"):
        resolve_model(ModelSource(name=str(tmp_path), subfolder="llm"), LLM_PARTS)


def test_a_hub_model_is_named_by_id_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    write_llm(tmp_path / commit / "llm")
    calls: list[dict[str, Any]] = []

    def download(repo_id: str, **arguments: Any) -> str:
        calls.append({"repo_id": repo_id, **arguments})
        return str(tmp_path / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = resolve_model(ModelSource(name="someone/some-model@v1.0", subfolder="llm"), LLM_PARTS)
    assert (model.name, model.subfolder, model.commit) == ("someone/some-model", "llm", commit)
    assert (calls[0]["repo_id"], calls[0]["revision"]) == ("someone/some-model", "v1.0")
    patterns = calls[0]["allow_patterns"]
    assert all(pattern.startswith("llm/") for pattern in patterns)
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in patterns)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("not cached"), "not cached"),
        (ConnectionError("no route to host"), "no route to host.*Check the network, or give a folder"),
        (errors.HFValidationError("bad id"), "bad id"),
    ],
)
def test_what_the_hub_says_becomes_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(repo_id: str, **arguments: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=message) as refusal:
        resolve_model(ModelSource(name="someone/some-model"), LLM_PARTS)
    assert str(refusal.value).startswith("model 'someone/some-model': neither a folder here nor to be had from the hub")
    assert "\n" not in str(refusal.value)


def test_a_hub_model_offline_is_refused_with_the_switch_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the hub's own code this time, with its network switched off
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        resolve_model(ModelSource(name="someone/some-model"), LLM_PARTS)


def test_a_library_that_cannot_load_gives_one_line(tmp_path: Path) -> None:
    model = resolve(write_llm(tmp_path))
    with pytest.raises(InputError, match=r"cannot be loaded \(ValueError: unknown model type x\)"), loading_from(model):
        raise ValueError("unknown\n model type x")
    with pytest.raises(MachineError, match="not enough memory"), loading_from(model):
        raise MemoryError("64 GiB")
    with pytest.raises(MachineError, match="the device failed as it was loaded"), loading_from(model):
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")


def test_weights_that_would_be_random_are_refused(tmp_path: Path) -> None:
    model = resolve(write_llm(tmp_path))
    refuse_incomplete(model, [], [])
    with pytest.raises(InputError, match=r"4 of its weights are missing \(a, b, c, …\)"):
        refuse_incomplete(model, ["d", "a", "b", "c"], [])
    with pytest.raises(InputError, match=r"1 of its weights have another shape than config.json says \(a\)"):
        refuse_incomplete(model, [], ["a"])


def test_a_model_is_described_so_that_it_can_be_found_again() -> None:
    local = {"name": "local", "commit": None, "sha256": {"config.json": "c" * 64, "model.safetensors": "a1b2" * 16}}
    assert describe_model(local) == "the folder in which the sha256 of model.safetensors begins with a1b2a1b2a1b2"
    assert describe_model({**local, "name": "some/vae", "commit": "f" * 40}) == f"some/vae@{'f' * 40}"
