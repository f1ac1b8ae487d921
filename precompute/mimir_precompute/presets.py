"""Named settings of stage one: the geometry of the plan and the models of the encoders."""

from dataclasses import dataclass, replace
from typing import Literal

from mimir_precompute.config import Bucket, ComputeDType, Geometry
from mimir_shared.errors import InputError

PresetName = Literal["tiny", "cogvideox-2b", "cogvideox-5b"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    geometry: Geometry
    dtype: ComputeDType
    models: str | None
    """Hub id of a diffusers CogVideoX folder: its vae, text_encoder and tokenizer; None: give --models."""
    llm: str | None
    """Hub id of the LLM."""
    t5_max_length: int
    max_caption_tokens: int
    max_answer_tokens: int
    max_instruction_tokens: int


_COGVIDEOX_2B = Preset(
    geometry=Geometry(buckets=(Bucket(frames=49, height=480, width=720),), fps=8.0),
    dtype="bfloat16",
    models="THUDM/CogVideoX-2b",
    llm="microsoft/Phi-3.5-mini-instruct",
    t5_max_length=226,
    max_caption_tokens=226,
    max_answer_tokens=128,
    max_instruction_tokens=64,
)

PRESETS: dict[PresetName, Preset] = {
    "tiny": Preset(
        geometry=Geometry(
            buckets=(Bucket(frames=9, height=64, width=96), Bucket(frames=1, height=64, width=96)), fps=8.0
        ),
        dtype="float32",
        models=None,
        llm=None,
        t5_max_length=64,
        max_caption_tokens=64,
        max_answer_tokens=24,
        max_instruction_tokens=12,
    ),
    "cogvideox-2b": _COGVIDEOX_2B,
    "cogvideox-5b": replace(_COGVIDEOX_2B, models="THUDM/CogVideoX-5b"),
}


def find_preset(name: str) -> Preset:
    """Raises InputError that lists the presets there are."""
    for known, preset in PRESETS.items():
        if known == name:
            return preset
    raise InputError(f"--preset {name!r}: expected one of {', '.join(PRESETS)}")
