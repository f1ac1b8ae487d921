"""How strongly the text is followed at each denoising step (classifier-free guidance)."""

import math

from torch import Tensor

from mimir_train.sampling.choices import GuidanceName

RAMP_EXPONENT = 5.0


def guidance_scale_at(
    name: GuidanceName, guidance_scale: float, step_index: int, timestep: int, num_inference_steps: int
) -> float:
    """The scale of one denoising step.

    Args:
        name: fixed, the same at every step; ramp, from 1 up to nearly 1 + guidance_scale by the share of steps that
            are done, which is what CogVideoX's dynamic guidance means to do; official, that formula as sat and
            diffusers compute it: they put the raw timestep (999 to 0) where the steps that are left belong, so that
            the scale jumps about between 1 and 1 + guidance_scale until the last few steps.
        step_index: 0 is the first step, which starts from noise.
        timestep: 999 (noise) to 0 (data).
    Source: diffusers pipelines/cogvideo/pipeline_cogvideox.py, `use_dynamic_cfg`; sat DynamicCFG.
    """
    if name == "fixed":
        return guidance_scale
    steps_left = num_inference_steps - step_index if name == "ramp" else timestep
    progress = (num_inference_steps - steps_left) / num_inference_steps
    return 1 + guidance_scale * (1 - math.cos(math.pi * progress**RAMP_EXPONENT)) / 2


def apply_guidance(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Move from the prediction without text towards, and past, the one with it; 1 gives the latter."""
    return unconditional + scale * (conditional - unconditional)
