"""Models, tokenizers and checkpoints that would run a program: refused in clear words, and no canary appears."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mimir_precompute.config import Instruction, ModelSource
from mimir_precompute.encoders.causal_lm import load_causal_lm, load_tokenizer
from mimir_precompute.encoders.prompts import PromptBuilder
from mimir_precompute.model_files import resolve_model
from mimir_shared.errors import CacheError, InputError, MimirError
from mimir_shared.sealed import write_sealed_json
from mimir_train.checkpoint.folder import MANIFEST, find_checkpoint, list_checkpoints, read_checkpoint_info
from mimir_train.checkpoint.opened import open_checkpoint
from mimir_train.checkpoint.storage import PieceReader
from mimir_train.weights.fuser_folder import load_fuser
from mimir_train.weights.transformer_folder import load_transformer
from tests.faults.test_payloads import HOSTILE_TENSORS, pickled

CODE = """
import os
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

os.mkdir({canary!r})


class Config(PretrainedConfig):
    model_type = "hostile"


class Model(PreTrainedModel):
    config_class = Config


class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A path at which nothing may have appeared when the test ends."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of the input was run"


@pytest.fixture
def llm(toy_world: Path, tmp_path: Path) -> Path:
    """A copy of the toy LLM, to be spoiled."""
    return Path(shutil.copytree(toy_world / "models" / "llm", tmp_path / "llm"))


def edit(path: Path, **values: object) -> None:
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**document, **values}))


def load(folder: Path) -> None:
    """All that `answers` and `llm` load, as they do."""
    model = resolve_model(ModelSource(name=str(folder)), ("weights", "tokenizer", "chat_template"))
    load_causal_lm(model, "float32", "cpu")
    tokenizer = load_tokenizer(model)
    PromptBuilder(tokenizer, (Instruction(name="a", text="b"),), 16).caption("A clip .")


def test_the_control_the_copy_is_a_good_model(llm: Path) -> None:
    load(llm)


def test_the_control_a_checkpoint_of_torch_runs_code(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(pickled(tmp_path / "ran"))
    with pytest.raises(Exception):  # noqa: B017, PT011  # whatever comes of it
        torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


class TestModels:
    def test_code_beside_a_model_of_unknown_kind_is_not_run(self, llm: Path, canary: Path) -> None:
        (llm / "modeling.py").write_text(CODE.format(canary=str(canary)))
        auto_map = {
            "AutoConfig": "modeling.Config",
            "AutoModelForCausalLM": "modeling.Model",
            "AutoTokenizer": ["modeling.Tokenizer", "modeling.Tokenizer"],
        }
        edit(llm / "config.json", auto_map=auto_map, model_type="hostile", architectures=["Model"])
        edit(llm / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")
        with pytest.raises(InputError, match="cannot be loaded"):
            load(llm)

    def test_code_beside_a_model_of_known_kind_is_not_run(self, llm: Path, canary: Path) -> None:
        (llm / "modeling.py").write_text(CODE.format(canary=str(canary)))
        auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
        edit(llm / "config.json", auto_map=auto_map)
        edit(llm / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling.Tokenizer", None]})
        load(llm)  # as the library's own class

    def test_weights_in_a_pickle_are_no_weights(self, llm: Path, canary: Path) -> None:
        for path in llm.glob("*.safetensors"):
            path.unlink()
        (llm / "pytorch_model.bin").write_bytes(pickled(canary))
        with pytest.raises(InputError, match="safetensors"):
            load(llm)

    def test_a_pickle_beside_good_weights_is_left_alone(self, llm: Path, canary: Path) -> None:
        for name in ("pytorch_model.bin", "model.pt", "tokenizer.pkl", "generation_config.pkl", "sitecustomize.py"):
            (llm / name).write_bytes(pickled(canary))
        load(llm)

    def test_a_pickle_named_safetensors_is_damage(self, llm: Path, canary: Path) -> None:
        next(iter(llm.glob("*.safetensors"))).write_bytes(pickled(canary))
        with pytest.raises(InputError, match="cannot be loaded"):
            load(llm)

    @pytest.mark.parametrize(
        "template",
        [
            "{{ cycler.__init__.__globals__.os.mkdir('{canary}') }}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{% for m in messages %}{{ m.__class__.__init__.__globals__ }}{% endfor %}",
            "{% import 'os' as os %}{{ os.mkdir('{canary}') }}",
            "{{ lipsum.__globals__['os'].mkdir('{canary}') }}",
        ],
        ids=range(5),
    )
    def test_a_chat_template_reaches_nothing(self, template: str, llm: Path, canary: Path) -> None:
        template = template.replace("{canary}", str(canary))
        (llm / "chat_template.jinja").write_text(template)
        edit(llm / "tokenizer_config.json", chat_template=template)
        with pytest.raises(MimirError):
            load(llm)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
    def test_a_json_bomb_in_a_model_is_one_line(self, name: str, llm: Path) -> None:
        (llm / name).write_text('{"a":' * 100_000)
        with pytest.raises(InputError):
            load(llm)

    def test_an_index_of_weights_cannot_lead_out_of_the_folder(self, llm: Path, tmp_path: Path, canary: Path) -> None:
        (tmp_path / "outside.safetensors").write_bytes(pickled(canary))
        for path in llm.glob("*.safetensors"):
            path.unlink()
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
        (llm / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(InputError):
            load(llm)


class TestCheckpoints:
    @pytest.mark.parametrize("name", HOSTILE_TENSORS)
    def test_hostile_weights_of_transformer_and_fuser_are_damage(
        self, name: str, toy_world: Path, tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(toy_world / "models" / "transformer", tmp_path / "transformer"))
        (folder / "diffusion_pytorch_model.safetensors").write_bytes(HOSTILE_TENSORS[name])
        with pytest.raises(CacheError):
            load_transformer(folder)
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(HOSTILE_TENSORS[name])
        with pytest.raises(CacheError):
            load_fuser(tmp_path)

    def test_a_transformer_in_a_pickle_is_refused(self, toy_world: Path, tmp_path: Path, canary: Path) -> None:
        folder = Path(shutil.copytree(toy_world / "models" / "transformer", tmp_path / "transformer"))
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        (folder / "diffusion_pytorch_model.bin").write_bytes(pickled(canary))
        with pytest.raises(InputError, match="weights must be safetensors"):
            load_transformer(folder)

    @pytest.mark.parametrize("name", ["model.pt", "step-00000001", "checkpoint.json"])
    def test_a_pickle_is_no_checkpoint(self, name: str, tmp_path: Path, canary: Path) -> None:
        (tmp_path / name).write_bytes(pickled(canary))
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(MimirError):
                open_checkpoint(path, lambda line: None)

    def test_a_folder_of_torchs_distributed_checkpoints_is_none(self, tmp_path: Path, canary: Path) -> None:
        folder = tmp_path / "checkpoints" / "step-00000001"
        folder.mkdir(parents=True)
        for name in (".metadata", "__0_0.distcp", "optimizer.pt", "scheduler.bin", "random_states_0.pkl"):
            (folder / name).write_bytes(pickled(canary))
        assert list_checkpoints(tmp_path) == [folder]
        with pytest.raises(CacheError, match="no good checkpoint"):
            find_checkpoint(tmp_path, say=lambda line: None)

    def test_pickles_whose_digests_are_right_are_still_no_tensors(self, tmp_path: Path, canary: Path) -> None:
        folder = tmp_path / "step-00000001"
        folder.mkdir()
        (folder / "00000.safetensors").write_bytes(pickled(canary))
        with pytest.raises(CacheError, match=r"step-00000001/00000.safetensors: not a file of a checkpoint"):
            PieceReader(folder, ["00000.safetensors"])
        (folder / MANIFEST).write_bytes(write_sealed_json({"version": 2, "step": "__import__('os')"}))
        with pytest.raises(CacheError, match="not as this program writes it"):
            read_checkpoint_info(folder, parts=())
