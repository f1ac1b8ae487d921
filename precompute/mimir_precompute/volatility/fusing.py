"""The fuser's arithmetic in numpy, for pictures of its tokens: a trained fuser's folder, or one before its first step.

Stage one knows nothing of the trainer; `mimir-train export` writes `fuser/config.json` and `model.safetensors`, and
what is read of them here is compared with the trainer's own fuser in a test.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from mimir_shared.errors import InputError
from mimir_shared.safetensors_bytes import read_tensors

_SEED: Final = 0
_RMS_EPS: Final = 1e-6


@dataclass(frozen=True, kw_only=True)
class FusingWeights:
    """What makes T5's and the LLM's tokens into one sequence. D is T5's width, H the LLM's."""

    encoder: np.ndarray | None
    """(D, D) residual map of T5's tokens; None for none."""
    decoder: np.ndarray
    """(D, H) map of the LLM's tokens."""
    scale: np.ndarray | None
    """(H,) that normalised LLM tokens are multiplied by; None: they are taken as they are."""
    gain: float
    trained: bool

    def encoder_tokens(self, t5_rows: np.ndarray) -> np.ndarray:
        """(L, D) → (L, D)."""
        return t5_rows if self.encoder is None else t5_rows + t5_rows @ self.encoder.T

    def decoder_tokens(self, llm_rows: np.ndarray) -> np.ndarray:
        """(M, H) → (M, D), the gain included."""
        if self.scale is not None:
            llm_rows = normalise(llm_rows) * self.scale
        tokens: np.ndarray = self.gain * (llm_rows @ self.decoder.T)
        return tokens


def normalise(rows: np.ndarray) -> np.ndarray:
    """Rows (…, H) over their root mean square."""
    normalised: np.ndarray = rows / np.sqrt(np.mean(np.square(rows), axis=-1, keepdims=True) + _RMS_EPS)
    return normalised


def untrained_weights(t5_rms: float, text_width: int, llm_width: int) -> FusingWeights:
    """Norm and scale, then a random projection of fixed seed that keeps the size: what the branches are like as such.

    The paper's own fuser adds nothing at its first step, for its map starts at zero.
    """
    projection = np.random.default_rng(_SEED).standard_normal((text_width, llm_width)).astype(np.float32)
    return FusingWeights(
        encoder=None,
        decoder=projection * llm_width**-0.5,
        scale=np.full(llm_width, t5_rms, np.float32),
        gain=1.0,
        trained=False,
    )


def load_weights(folder: Path) -> FusingWeights:
    """Read the folder of a trained fuser.

    Raises: InputError where it is none, or where it has no decoder branch.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = read_tensors((folder / "model.safetensors").read_bytes(), str(folder / "model.safetensors"))
        gain = float(config["decoder_gain"])
    except (OSError, ValueError, KeyError) as fault:
        raise InputError(
            f"--fuser {folder}: no fuser of `mimir-train export` ({fault}); give its `fuser` folder"
        ) from fault
    arrays = {name: tensor.to_float32() for name, tensor in tensors.items()}
    decoder = arrays.get("decoder_zero_proj.weight", arrays.get("decoder_seeded_proj.weight"))
    if decoder is None:
        raise InputError(
            f"--fuser {folder}: this fuser does not read the LLM (it has {', '.join(sorted(arrays)) or 'no weights'}); "
            f"expected one with a decoder branch"
        )
    return FusingWeights(
        encoder=arrays.get("encoder_zero_proj.weight"),
        decoder=decoder,
        scale=arrays.get("decoder_scale"),
        gain=gain,
        trained=True,
    )
