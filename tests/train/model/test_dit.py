"""The DiT against diffusers' CogVideoXTransformer3DModel, and the folder format against diffusers' own reading."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor

from mimir_shared.errors import CacheError, InputError
from mimir_train.model.config import DiTConfig
from mimir_train.model.dit import DiT
from mimir_train.weights.transformer_folder import (
    find_transformer_folder,
    load_transformer,
    read_transformer_config,
    save_transformer,
)

CONFIG_2B = DiTConfig(
    num_attention_heads=3,
    attention_head_dim=16,
    num_layers=2,
    in_channels=4,
    out_channels=4,
    time_embed_dim=24,
    text_embed_dim=20,
    sample_height=8,
    sample_width=12,
    sample_frames=9,
)
CONFIG_5B = replace(CONFIG_2B, use_rotary_positional_embeddings=True)
CONFIGS = [pytest.param(CONFIG_2B, id="sincos"), pytest.param(CONFIG_5B, id="rotary")]


def random_dit(config: DiTConfig) -> DiT:
    """A DiT without a zero anywhere, so that no part is hidden from a comparison."""
    torch.manual_seed(0)
    model = DiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def diffusers_twin(model: DiT, folder: Path, max_text_seq_length: int) -> CogVideoXTransformer3DModel:
    """The official model with the same weights, read by diffusers from the folder that we wrote."""
    save_transformer(replace(model.config, max_text_seq_length=max_text_seq_length), model.state_dict(), folder)
    twin, info = CogVideoXTransformer3DModel.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return twin


@torch.no_grad()
def run_twin(twin: CogVideoXTransformer3DModel, latents: Tensor, text: Tensor, timesteps: Tensor) -> Tensor:
    rotary = None
    if twin.config.use_rotary_positional_embeddings:
        pipeline = SimpleNamespace(vae_scale_factor_spatial=8, transformer=twin)
        num_frames, height, width = latents.shape[2:]
        rotary = CogVideoXPipeline._prepare_rotary_positional_embeddings(
            pipeline, height * 8, width * 8, num_frames, torch.device("cpu")
        )
    frames_first = latents.transpose(1, 2)  # (B, T, C, h, w)
    out = twin(frames_first, text, timesteps, image_rotary_emb=rotary, return_dict=False)[0]
    return out.transpose(1, 2)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("num_text_tokens", [226, 230])
@pytest.mark.parametrize("config", CONFIGS)
def test_dit_equals_the_diffusers_model(config: DiTConfig, num_text_tokens: int, tmp_path: Path) -> None:
    model = random_dit(config)
    twin = diffusers_twin(model, tmp_path, num_text_tokens)
    # the size of the config, one frame, more frames, taller than the base grid, smaller and of another shape
    for size in [(3, 8, 12), (1, 8, 12), (5, 8, 12), (3, 16, 12), (2, 4, 10)]:
        latents = torch.randn(2, config.in_channels, *size)
        text = torch.randn(2, num_text_tokens, config.text_embed_dim)
        timesteps = torch.tensor([7, 999])
        with torch.no_grad():
            got = model(latents, text, timesteps)
        error = relative_error(got, run_twin(twin, latents, text, timesteps))
        assert error <= 1e-5, f"latents {size}: relative error {error:.2e}"


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_equal_those_of_the_diffusers_model(config: DiTConfig, tmp_path: Path) -> None:
    model = random_dit(config)
    twin = diffusers_twin(model, tmp_path, 230)
    latents, text, timesteps = torch.randn(1, 4, 2, 4, 6), torch.randn(1, 230, 20), torch.tensor([500])
    model(latents, text, timesteps).square().sum().backward()
    run_twin.__wrapped__(twin, latents, text, timesteps).square().sum().backward()
    wanted = dict(twin.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in wanted.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # against the largest of all: the true gradient of some, such as a shift of every key, is zero
        assert (parameter.grad - wanted[name].grad).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize(
    ("sizes", "num_parameters"),
    [
        pytest.param({}, 1_693_783_872, id="2B"),
        pytest.param(
            {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
            5_570_283_072,
            id="5B",
        ),
    ],
)
def test_the_released_sizes_have_the_official_parameters(sizes: dict[str, int], num_parameters: int) -> None:
    with torch.device("meta"):
        model, official = DiT(DiTConfig(**sizes)), CogVideoXTransformer3DModel(**sizes)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in official.state_dict().items()}
    assert sum(shape.numel() for shape in shapes.values()) == num_parameters


@pytest.mark.parametrize("config", CONFIGS)
def test_any_number_of_text_tokens_fits_one_model(config: DiTConfig) -> None:
    model = random_dit(config)
    for num_text_tokens in (1, 30, 34, 230):
        out = model(torch.randn(1, 4, 1, 4, 4), torch.randn(1, num_text_tokens, 20), torch.tensor([3]))
        assert out.shape == (1, 4, 1, 4, 4)


def test_latents_that_do_not_fit_the_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="latents of 5 x 4 cannot be cut into patches of 2"):
        DiT(CONFIG_2B)(torch.zeros(1, 4, 1, 5, 4), torch.zeros(1, 3, 20), torch.tensor([0]))


def test_training_from_scratch_starts_at_v_zero_and_moves() -> None:
    torch.manual_seed(0)
    model = DiT(CONFIG_5B)
    latents, text, timesteps = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 5, 20), torch.tensor([1, 900])
    v_target = torch.randn(2, 4, 2, 4, 4)
    assert not model(latents, text, timesteps).any()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # the output opens first, then the gates, then what is behind them
        optimizer.zero_grad()
        (model(latents, text, timesteps) - v_target).square().mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_dit_computes_in_the_dtype_of_its_latents() -> None:
    model = random_dit(CONFIG_5B).bfloat16()
    out = model(torch.randn(1, 4, 1, 4, 4).bfloat16(), torch.randn(1, 5, 20), torch.tensor([3]))
    assert out.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        out = random_dit(CONFIG_5B)(torch.randn(1, 4, 1, 4, 4), torch.randn(1, 5, 20), torch.tensor([3]))
    assert out.isfinite().all()


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["10GB", "60KB"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_folder_that_diffusers_wrote_loads(config: DiTConfig, max_shard_size: str, tmp_path: Path) -> None:
    model = random_dit(config)
    diffusers_twin(model, tmp_path / "ours", 226).save_pretrained(
        tmp_path / "pipeline" / "transformer", max_shard_size=max_shard_size
    )
    loaded = load_transformer(tmp_path / "pipeline")
    assert loaded.config == config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_sharded_folder_that_we_wrote_loads_here_and_in_diffusers(tmp_path: Path) -> None:
    model = random_dit(CONFIG_5B)
    save_transformer(CONFIG_5B, model.state_dict(), tmp_path)
    save_transformer(CONFIG_5B, model.state_dict(), tmp_path, max_shard_bytes=60_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists(), "weights of an earlier save are left"
    twin, info = CogVideoXTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for state_dict in (load_transformer(tmp_path).state_dict(), twin.state_dict()):
        assert all(torch.equal(state_dict[name], value) for name, value in model.state_dict().items())


def test_every_key_of_the_official_config_is_written(tmp_path: Path) -> None:
    save_transformer(CONFIG_2B, DiT(CONFIG_2B).state_dict(), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    official = CogVideoXTransformer3DModel.load_config(tmp_path)
    twin = CogVideoXTransformer3DModel.from_config(official)
    assert {key for key in twin.config if not key.startswith("_")} == {
        key for key in written if not key.startswith("_")
    }


def test_weights_load_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    model = random_dit(CONFIG_2B).bfloat16()
    save_transformer(CONFIG_2B, model.state_dict(), tmp_path)
    assert {p.dtype for p in load_transformer(tmp_path).parameters()} == {torch.bfloat16}
    widened = load_transformer(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in widened.parameters()} == {torch.float32}
    assert torch.equal(widened.proj_out.weight, model.proj_out.weight.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size_t": 2}, r"patch_size_t is 2, a CogVideoX 1\.5 transformer; only 1\.0"),
        ({"dropout": 0.1, "ofs_embed_dim": 512}, r"dropout is 0\.1, expected 0\.0; ofs_embed_dim is 512"),
        ({"new_key": 1}, "new_key is not known"),
        ({"num_layers": "2"}, "num_layers is '2', expected int"),
        ({"attention_head_dim": 8}, "attention_head_dim must be a multiple of 16"),
        ({"_class_name": "UNet"}, "expected the class CogVideoXTransformer3DModel, got UNet"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(change: dict[str, object], message: str, tmp_path: Path) -> None:
    save_transformer(CONFIG_5B, DiT(CONFIG_5B).state_dict(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_transformer_config(tmp_path)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    state_dict = DiT(CONFIG_2B).state_dict()
    state_dict["proj_in.weight"] = state_dict.pop("proj_out.weight")
    state_dict["proj_out.bias"] = torch.zeros(3)
    save_transformer(CONFIG_2B, state_dict, tmp_path)
    message = (
        r"proj_out.weight is missing; proj_in.weight is not part .*; proj_out.bias has shape \(3,\), expected \(16,\)"
    )
    with pytest.raises(CacheError, match=message):
        load_transformer(tmp_path)


def test_damaged_or_absent_weights_are_refused(tmp_path: Path) -> None:
    save_transformer(CONFIG_2B, DiT(CONFIG_2B).state_dict(), tmp_path, max_shard_bytes=60_000)
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:1000])
    with pytest.raises(CacheError, match=r"00001-of.*missing or damaged"):
        load_transformer(tmp_path)
    first.unlink()
    with pytest.raises(CacheError, match=r"00001-of.*missing or damaged"):
        load_transformer(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match="weights must be safetensors"):
        load_transformer(tmp_path)
    with pytest.raises(InputError, match=r"no config\.json here or in transformer/"):
        find_transformer_folder(tmp_path / "nowhere")
