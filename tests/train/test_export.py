"""What `export` writes, read by diffusers."""

import hashlib
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from safetensors.torch import load_file

from mimir_shared.errors import CacheError, InputError
from mimir_train.checkpoint.adapter_base import record_adapters
from mimir_train.config import LoraConfig
from mimir_train.export import ExportRequest, export_checkpoint
from mimir_train.objective import shifted_zero_snr_alphas
from mimir_train.trained_model import TrainedModel
from mimir_train.weights.fuser_folder import load_fuser
from mimir_train.weights.lora import WEIGHTS_NAME, adapter_parameters, add_adapters, merge_adapters
from mimir_train.weights.transformer_folder import load_transformer, save_transformer
from tests.train.hand_made_checkpoint import T5_ROWS, flip_last_bit, identities, random_model, write_checkpoint
from tests.train.weights.test_lora import NEEDS_PEFT


@pytest.fixture(scope="module")
def checkpoint(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    return write_checkpoint(run, identities(toy_world / "models"), random_model("mimir"), snr_shift_scale=3.0)


def export(checkpoint: Path, output_dir: Path, **fields: object) -> None:
    settings = {"scheduler": "dpm", "dtype": "stored", "weights": None, "merge_lora": False, "base": None, **fields}
    export_checkpoint(ExportRequest(checkpoint=checkpoint, output_dir=output_dir, **settings), print)  # type: ignore[arg-type]


def test_diffusers_loads_the_transformer_with_no_key_missing_or_unexpected(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "out")
    loaded, info = CogVideoXTransformer3DModel.from_pretrained(
        tmp_path / "out", subfolder="transformer", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    for name, value in random_model("mimir").dit.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("rotary", [True, False])
def test_diffusers_takes_the_text_with_the_stabilizer_tokens_and_gives_our_output(
    toy_world: Path, tmp_path: Path, rotary: bool
) -> None:
    model = random_model("mimir", rotary=rotary)
    export(write_checkpoint(tmp_path / "run", identities(toy_world / "models"), model), tmp_path / "out")
    loaded = CogVideoXTransformer3DModel.from_pretrained(
        tmp_path / "out", subfolder="transformer", low_cpu_mem_usage=False
    )
    latents, text = torch.randn(1, 8, 3, 8, 12), torch.randn(1, T5_ROWS + 4, 64)
    timesteps = torch.tensor([500])
    tables = None
    if rotary:
        tables = get_3d_rotary_pos_embed(16, ((0, 0), (4, 6)), (4, 6), 3)
    with torch.no_grad():
        theirs = loaded(
            hidden_states=latents.transpose(1, 2),
            encoder_hidden_states=text,
            timestep=timesteps,
            image_rotary_emb=tables,
            return_dict=False,
        )[0]
        ours = model.dit(latents, text, timesteps)
    torch.testing.assert_close(theirs.transpose(1, 2), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "scheduler"), [("dpm", CogVideoXDPMScheduler), ("ddim", CogVideoXDDIMScheduler)])
def test_diffusers_loads_the_scheduler_with_the_schedule_of_training(
    checkpoint: Path, tmp_path: Path, name: str, scheduler: type
) -> None:
    export(checkpoint, tmp_path / "out", scheduler=name)
    loaded = scheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")  # type: ignore[attr-defined]
    assert loaded.config["_class_name"] == scheduler.__name__
    assert (loaded.config.prediction_type, loaded.config.timestep_spacing) == ("v_prediction", "trailing")
    assert loaded.config.snr_shift_scale == 3.0
    torch.testing.assert_close(loaded.alphas_cumprod.double(), shifted_zero_snr_alphas(3.0).double())


def test_the_fuser_is_the_one_that_was_trained(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "out")
    loaded, trained = load_fuser(tmp_path / "out" / "fuser"), random_model("mimir").fuser
    assert loaded.config == trained.config
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in trained.state_dict().items())


def test_weights_are_cast_when_asked(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "out", dtype="bfloat16")
    stored = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in load_fuser(tmp_path / "out" / "fuser").parameters()} == {torch.bfloat16}


def test_the_model_card_has_the_facts(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "tiny",
        "| training steps | 20 |",
        "decoder, norm, zero_conv, stabilizer",
        "9x32x48",
        "8 fps",
        "5" * 64,
    ):
        assert fact in card, fact
    assert str(tmp_path) not in card


def test_a_folder_that_is_not_empty_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        export(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_damaged_weights_are_never_exported(toy_world: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "run", identities(toy_world / "models"), random_model("baseline"))
    weights = folder / "model/00000.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CacheError, match="no good checkpoint"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_average_is_exported_where_there_is_one_unless_raw_is_asked_for(toy_world: Path, tmp_path: Path) -> None:
    model, average = random_model("mimir"), random_model("mimir")
    torch.nn.init.ones_(average.dit.proj_out.bias)
    torch.nn.init.ones_(average.fuser.decoder_scale)
    run = write_checkpoint(tmp_path / "run", identities(toy_world / "models"), model, average=average)
    for weights, name, expected in ((None, "power:0.1", average), ("ema", "power:0.1", average), ("raw", "raw", model)):
        output_dir = tmp_path / str(weights)
        export(run, output_dir, weights=weights)
        fuser, dit = load_fuser(output_dir / "fuser"), load_transformer(output_dir / "transformer")
        assert torch.equal(fuser.decoder_scale, expected.fuser.decoder_scale)
        assert torch.equal(dit.proj_out.bias, expected.dit.proj_out.bias)
        assert f"| weights | {name} |" in (output_dir / "README.md").read_text()


# --- adapters -----------------------------------------------------------------------------------------------------

LORA = LoraConfig(rank=2, alpha=3.0)


def adapted_checkpoint(toy_world: Path, folder: Path) -> tuple[Path, TrainedModel]:
    """A checkpoint of trained adapters, and the model with them merged into it."""
    model = random_model("mimir")
    save_transformer(model.dit.config, model.dit.state_dict(), folder / "base/transformer")
    add_adapters(model.dit, LORA)
    for name, parameter in adapter_parameters(model.dit).items():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    record = record_adapters(LORA, str(folder / "base"), folder / "base/transformer")
    run = write_checkpoint(folder / "run", identities(toy_world / "models"), model, adapters=record)
    merge_adapters(model.dit)
    return run, model


def diffusers_output(transformer: CogVideoXTransformer3DModel) -> torch.Tensor:
    torch.manual_seed(3)
    latents, text = torch.randn(1, 3, 8, 8, 12), torch.randn(1, T5_ROWS + 4, 64)
    tables = get_3d_rotary_pos_embed(16, ((0, 0), (4, 6)), (4, 6), 3)
    with torch.no_grad():
        out: torch.Tensor = transformer(latents, text, torch.tensor([500]), image_rotary_emb=tables, return_dict=False)[
            0
        ]
    return out


def test_merged_adapters_are_exported_as_a_whole_transformer(toy_world: Path, tmp_path: Path) -> None:
    run, model = adapted_checkpoint(toy_world, tmp_path)
    export(run, tmp_path / "out", merge_lora=True)
    for name, value in load_transformer(tmp_path / "out/transformer").state_dict().items():
        torch.testing.assert_close(value, model.dit.state_dict()[name], rtol=1e-6, atol=1e-6)
    assert not (tmp_path / "out" / WEIGHTS_NAME).exists()
    assert "rank 2, alpha 3, on to_q, to_k, to_v, to_out.0, merged into" in (tmp_path / "out/README.md").read_text()


@NEEDS_PEFT
def test_exported_adapters_on_their_base_are_the_merged_transformer_in_diffusers(
    toy_world: Path, tmp_path: Path
) -> None:
    run, _ = adapted_checkpoint(toy_world, tmp_path)
    export(run, tmp_path / "adapters")
    export(run, tmp_path / "merged", merge_lora=True)
    merged, adapted = (
        CogVideoXTransformer3DModel.from_pretrained(folder, low_cpu_mem_usage=False)
        for folder in (tmp_path / "merged/transformer", tmp_path / "base/transformer")
    )
    before = diffusers_output(adapted)
    adapted.load_lora_adapter(tmp_path / "adapters", weight_name=WEIGHTS_NAME)
    torch.testing.assert_close(diffusers_output(adapted), diffusers_output(merged), rtol=1e-5, atol=1e-5)
    assert (before - diffusers_output(merged)).abs().max() > 1e-2


def test_adapters_are_exported_without_their_base(toy_world: Path, tmp_path: Path) -> None:
    run, _ = adapted_checkpoint(toy_world, tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    export(run, tmp_path / "out", dtype="bfloat16")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "fuser", WEIGHTS_NAME, "scheduler",
    ]  # fmt: skip
    tensors = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert len(tensors) == 2 * 4 * 2
    assert all(name.startswith("transformer.transformer_blocks.") for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    card = (tmp_path / "out/README.md").read_text()
    assert "load_lora_adapter" in card
    assert digest_of(tmp_path / "elsewhere/transformer") in card
    with pytest.raises(InputError, match=r"--base .*base: expected a diffusers folder, a hub id \(owner/name\)$"):
        export(run, tmp_path / "merged", merge_lora=True)
    export(run, tmp_path / "merged", merge_lora=True, base=str(tmp_path / "elsewhere"))


def digest_of(transformer: Path) -> str:
    return hashlib.sha256((transformer / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


def test_another_base_is_refused_by_its_digest(toy_world: Path, tmp_path: Path) -> None:
    run, _ = adapted_checkpoint(toy_world, tmp_path)
    flip_last_bit(tmp_path / "base/transformer/diffusion_pytorch_model.safetensors")
    problem = r"not the transformer that the adapters were trained on .*safetensors has other bytes; give .* by --base"
    with pytest.raises(CacheError, match=problem) as caught:
        export(run, tmp_path / "out", merge_lora=True)
    assert caught.value.exit_code == 4


def test_options_of_adapters_are_refused_where_there_are_none(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--merge-lora: .* has no adapters"):
        export(checkpoint, tmp_path / "out", merge_lora=True)
    with pytest.raises(InputError, match="--base x: all of the transformer was trained"):
        export(checkpoint, tmp_path / "out", base="x")
