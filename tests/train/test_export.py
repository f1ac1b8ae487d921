"""What `export` writes, read by diffusers."""

from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from safetensors.torch import load_file

from mimir_shared.errors import CacheError, InputError
from mimir_train.export import ExportRequest, export_checkpoint
from mimir_train.fuser_folder import load_fuser
from mimir_train.objective import shifted_zero_snr_alphas
from tests.train.hand_made_checkpoint import T5_ROWS, identities, random_model, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    return write_checkpoint(run, identities(toy_world / "models"), random_model("mimir"), snr_shift_scale=3.0)


def export(checkpoint: Path, output_dir: Path, **fields: str) -> None:
    settings = {"scheduler": "dpm", "dtype": "stored", **fields}
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
