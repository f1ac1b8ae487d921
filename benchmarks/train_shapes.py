"""Forward, backward, clipping and AdamW of the real sizes on one device, with random weights, against diffusers' model.

Weights are float32 and autocast computes in bfloat16, for both, as the loop has it. A step's operations are those of
`mimir_shared.transformer_flops`: none that is computed again counts. Where AdamW's state would take more than half of
the device's memory, no optimizer steps, and the line says so.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch
from benchmarks.vae_measure import Machine
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn

from mimir_shared.transformer_flops import LatentSize, training_flops
from mimir_train.attention_choice import DTYPES
from mimir_train.block_execution import set_block_execution
from mimir_train.config import ActivationCheckpointing
from mimir_train.metrics.model_flops import device_peak_tflops, transformer_sizes
from mimir_train.model.attention import why_not
from mimir_train.model.config import FUSERS, AttentionName, DiTConfig, FuserConfig
from mimir_train.model.dit import DiT
from mimir_train.model.fuser import LlmFeatures, TokenFuser
from mimir_train.objective import TextFeatures
from mimir_train.presets import preset_document
from mimir_train.trained_model import TrainedModel

FULL_SIZE: Final[LatentSize] = (13, 60, 90)
"""49 frames of 480x720."""
T5_ROWS, INSTRUCTIONS = 226, 4
WARM_STEPS: Final = 2
_STATE_BYTES: Final = 16
"""Of a parameter: itself, its gradient, and AdamW's two moments."""

Predict = Callable[[], Tensor]
Models = {"2b": "cogvideox-2b", "5b": "cogvideox-5b", "tiny": "tiny"}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One line of the table."""

    model: str
    """A key of Models; tiny tries the benchmark itself."""
    ours: bool
    """Else diffusers' model."""
    attention: AttentionName = "sdpa"
    checkpointing: ActivationCheckpointing = "none"
    compiled: bool = False
    batch: int = 1


def measure_variant(variant: Variant, machine: Machine, steps: int) -> dict[str, Any]:
    """Median seconds of a step, the most memory, and shares of what the device can do.

    Returns: `fault` in place of figures where it does not run here.
    """
    config, latent_size = transformer_config(variant.model), FULL_SIZE if variant.model != "tiny" else (3, 16, 24)
    line: dict[str, Any] = asdict(variant)
    if machine.is_cuda:
        torch.cuda.empty_cache()  # of the line before
    if variant.ours:
        fault = why_not(variant.attention, machine.device, DTYPES["bfloat16"], config.attention_head_dim)
        if fault is not None:
            return line | {"fault": fault}
    try:
        step, line["optimizer"] = build_step(variant, config, latent_size, machine.device)
        seconds = time_step(step, machine, steps)
    except torch.OutOfMemoryError:
        return line | {"fault": "out of memory"}
    step_s = statistics.median(seconds)
    flops = variant.batch * training_flops(transformer_sizes(config), latent_size, T5_ROWS + INSTRUCTIONS)
    peak_tflops = device_peak_tflops(machine.device, "bfloat16", None)
    return line | {
        "step_s": step_s,
        "seconds": seconds,
        "tflops": flops / step_s / 1e12,
        "of_matmul_rate": flops / step_s / machine.rates("bfloat16").flops_per_s,
        "mfu": None if peak_tflops is None else flops / step_s / 1e12 / peak_tflops,
        "memory_gb": torch.cuda.max_memory_allocated(machine.device) / 1e9 if machine.is_cuda else None,
    }


def time_step(step: Callable[[], None], machine: Machine, steps: int) -> list[float]:
    for _ in range(WARM_STEPS):
        step()
    if machine.is_cuda:
        torch.cuda.reset_peak_memory_stats(machine.device)
    return [machine.seconds(step) for _ in range(steps)]


def transformer_config(model: str) -> DiTConfig:
    document = preset_document(Models[model])["model"]["transformer"]
    config = DiTConfig(**document)
    return replace(config, max_text_seq_length=T5_ROWS + INSTRUCTIONS)  # diffusers' buffer has a row for each


def build_step(
    variant: Variant, config: DiTConfig, latent_size: LatentSize, device: torch.device
) -> tuple[Callable[[], None], str]:
    """A step to be called again and again, and which optimizer is in it."""
    torch.manual_seed(0)
    shape = (variant.batch, config.in_channels, *latent_size)
    noisy_latents, target = (torch.randn(shape, device=device) for _ in range(2))
    timesteps = torch.randint(0, 1000, (variant.batch,), device=device)
    make = ours if variant.ours else theirs
    model, predict = make(variant, config, noisy_latents, timesteps)
    parameters = list(model.parameters())
    optimizer = optimizer_that_fits(parameters, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            v_prediction = predict()
        loss: Any = (v_prediction.float() - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return step, "none" if optimizer is None else "adamw"


def optimizer_that_fits(parameters: Sequence[nn.Parameter], device: torch.device) -> torch.optim.AdamW | None:
    if device.type == "cuda":
        state_bytes = _STATE_BYTES * sum(parameter.numel() for parameter in parameters)
        if state_bytes > 0.5 * torch.cuda.get_device_properties(device).total_memory:
            return None
    return torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)


def ours(variant: Variant, config: DiTConfig, noisy_latents: Tensor, timesteps: Tensor) -> tuple[nn.Module, Predict]:
    """Transformer and fuser, set up as a run sets them up."""
    device = noisy_latents.device
    fuser = FuserConfig(switches=FUSERS["mimir"], t5_rms=0.1, text_width=config.text_embed_dim)
    with device:
        model = TrainedModel(DiT(config), TokenFuser(fuser))
    model.dit.use_attention(variant.attention)
    set_block_execution(model.dit, checkpointing=variant.checkpointing, compiled=variant.compiled)
    text = random_text(variant.batch, config.text_embed_dim, device)

    def predict() -> Tensor:
        v_prediction = model(noisy_latents, text, timesteps, append_stabilizer=True)
        assert isinstance(v_prediction, Tensor), "not packed"
        return v_prediction

    return model, predict


def theirs(variant: Variant, config: DiTConfig, noisy_latents: Tensor, timesteps: Tensor) -> tuple[nn.Module, Predict]:
    """diffusers' transformer, given as many tokens."""
    device = noisy_latents.device
    with device:
        model: Any = CogVideoXTransformer3DModel(**asdict(config)).train()  # diffusers has no types
    if variant.checkpointing != "none":
        model.enable_gradient_checkpointing()  # of whole blocks: it knows no other
    if variant.compiled:
        for block in model.transformer_blocks:
            block.compile()
    tokens = torch.randn(variant.batch, T5_ROWS + INSTRUCTIONS, config.text_embed_dim, device=device)
    frames_first = noisy_latents.transpose(1, 2).contiguous()  # (B, T, C, h, w)
    named: dict[str, Any] = {"return_dict": False}
    if config.use_rotary_positional_embeddings:
        named["image_rotary_emb"] = rotary(config, tuple(noisy_latents.shape[2:]), device)

    def predict() -> Tensor:
        v_prediction: Tensor = model(frames_first, tokens, timesteps, **named)[0]
        return v_prediction.transpose(1, 2)

    return model, predict


def random_text(batch: int, text_width: int, device: torch.device) -> TextFeatures:
    """Of full length: (B, 226, D) of T5; 100 rows of the caption, 126 of the answer and 4 of the LLM."""
    width = FuserConfig.llm_width

    def rows(count: int, of_width: int) -> Tensor:
        return torch.randn(batch, count, of_width, device=device)

    def mask(count: int) -> Tensor:
        return torch.ones(batch, count, dtype=torch.bool, device=device)

    llm = LlmFeatures(rows(100, width), mask(100), rows(126, width), mask(126), rows(INSTRUCTIONS, width))
    return TextFeatures(rows(T5_ROWS, text_width), llm)


def rotary(config: DiTConfig, latent_size: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """As diffusers' pipeline makes it, of the video tokens, for latents of (T, h, w)."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = latent_size[0], latent_size[1] // config.patch_size, latent_size[2] // config.patch_size
    cos, sin = get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim, crops_coords=((0, 0), (height, width)), grid_size=(height, width),
        temporal_size=frames, device=device,
    )  # fmt: skip
    return cos, sin
