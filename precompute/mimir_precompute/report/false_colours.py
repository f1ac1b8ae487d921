"""Latents as pictures without a decoder: the directions in which their channels differ most, painted as colours."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NUM_COLOURS = 3
_OUTLIERS = 0.01
"""Share of values at either end that may be clipped."""
_TO_RGB = np.array([[1.0, 0.0, 1.13], [1.0, -0.21, -0.38], [1.0, 1.77, 0.0]])
"""Rows R, G, B; columns brightness and two differences of colour, each in -0.5..0.5 about its middle."""


@dataclass(frozen=True, kw_only=True)
class FalseColours:
    """One scale for all pictures of a page, so that equal latents have equal colours."""

    middle: np.ndarray
    """(C,) mean of each channel."""
    directions: np.ndarray
    """(3, C): the principal components, strongest first; zeros where there are fewer channels."""
    low: np.ndarray
    """(3,) what becomes the least of each colour."""
    high: np.ndarray

    def paint(self, latent: np.ndarray) -> np.ndarray:
        """(C, h, w) float32 → (h, w, 3) uint8: the strongest component is brightness, the next two are colour."""
        components = np.einsum("kc,chw->hwk", self.directions, latent - self.middle[:, None, None])
        scaled = np.clip((components - self.low) / np.maximum(self.high - self.low, 1e-12), 0, 1) - 0.5
        rgb = scaled @ (_TO_RGB * np.array([1.0, 0.6, 0.6])).T + 0.5
        painted: np.ndarray = (np.clip(rgb, 0, 1) * 255).round().astype(np.uint8)
        return painted


def fit_colours(latents: Sequence[np.ndarray]) -> FalseColours:
    """Find the scale that suits some latents, of (C, h, w) each, best."""
    values = np.concatenate([one.reshape(one.shape[0], -1) for one in latents], axis=1).astype(np.float64)  # (C, N)
    middle = values.mean(axis=1)
    centred = values - middle[:, None]
    _, vectors = np.linalg.eigh(centred @ centred.T / centred.shape[1])
    directions = np.zeros((_NUM_COLOURS, len(middle)))
    strongest = vectors.T[::-1][:_NUM_COLOURS]
    # a component's sign means nothing, so it is chosen: its largest entry is positive
    signs = np.sign(strongest[np.arange(len(strongest)), np.abs(strongest).argmax(axis=1)])
    directions[: len(strongest)] = strongest * signs[:, None]
    components = directions @ centred
    low, high = np.quantile(components, [_OUTLIERS, 1 - _OUTLIERS], axis=1)
    return FalseColours(middle=middle, directions=directions, low=low, high=high)
