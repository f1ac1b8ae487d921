"""A page that shows each prompt of validation over the steps: what became of one noise as the model learned."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from mimir_shared.page.pictures import Moving, moving_picture
from mimir_shared.page.render import render_page
from mimir_shared.storage.folder import machine_faults
from mimir_train.ema_profile import RAW
from mimir_train.json_lines import read_steps
from mimir_train.run_folder import METRICS_NAME

PAGE_NAME: Final = "index.html"
MOST_STEPS: Final = 12
"""That a page shows: the first, the last, and others spread between them."""
_LONGEST_SIDE: Final = 256
"""Pixels: a page carries all its pictures inside itself."""
_TEMPLATE = Path(__file__).parent / "page.html.j2"


@dataclass(frozen=True, kw_only=True)
class StepPicture:
    """One prompt after so many steps."""

    step: int
    picture: Moving
    weights: str
    """What sampled it: `RAW`, or the profile of an average."""
    loss: float | None
    """Validation loss of those weights then, where it is known."""


@dataclass(kw_only=True)
class PromptStory:
    prompt: str
    pictures: list[StepPicture] = field(default_factory=list)


class ValidationPage:
    """Takes videos one by one, in order of the steps, and keeps of each what a page needs."""

    def __init__(self, run: Path, steps: Sequence[int]) -> None:
        """
        Args:
            steps: all that validation sampled at.
        """
        self._run = run
        self._num_steps = len(steps)
        self._shown = spread_steps(steps)
        self._losses = validation_losses(run)
        self._stories: dict[tuple[int, str], PromptStory] = {}

    def add(self, step: int, index: int, prompt: str, frames: np.ndarray, fps: float, weights: str = RAW) -> None:
        """
        Args:
            index: of the prompt among those of the step.
            frames: (F, H, W, 3) uint8.
        """
        if step not in self._shown:
            return
        story = self._stories.setdefault((index, prompt), PromptStory(prompt=prompt))
        picture = moving_picture([_made_smaller(frames)], fps)
        loss = self._losses.get(step, {}).get("validation/loss" if weights == RAW else "validation/ema_loss")
        story.pictures.append(StepPicture(step=step, picture=picture, weights=weights, loss=loss))

    def write(self, path: Path) -> None:
        for story in self._stories.values():
            story.pictures.sort(key=lambda one: one.step)
        values = {
            "name": self._run.resolve().name,
            "stories": [self._stories[key] for key in sorted(self._stories)],
            "num_steps": self._num_steps,
            "num_shown": len(self._shown),
            "averages": sorted({one.weights for s in self._stories.values() for one in s.pictures} - {RAW}),
        }
        text = render_page(_TEMPLATE, values)
        temporary = path.with_name(f".{path.name}.tmp")
        with machine_faults(f"{path}: writing"):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)


def spread_steps(steps: Sequence[int], most: int = MOST_STEPS) -> set[int]:
    """At most so many, evenly spread from the first to the last."""
    ordered = sorted(set(steps))
    return {ordered[round(i)] for i in np.linspace(0, len(ordered) - 1, min(most, len(ordered)))}


def validation_losses(run: Path) -> dict[int, dict[str, float]]:
    """Steps done → the validation losses then, by name; {} for a run whose metrics are not here."""
    names = ("validation/loss", "validation/ema_loss")
    found = {
        line["step"] + 1: {name: float(line[name]) for name in names if name in line}
        for line in read_steps(run / METRICS_NAME)
    }
    return {step: losses for step, losses in found.items() if losses}


def _made_smaller(frames: np.ndarray) -> np.ndarray:
    """(F, H, W, 3) uint8, no side longer than a page wants."""
    height, width = frames.shape[1:3]
    factor = _LONGEST_SIDE / max(height, width)
    if factor >= 1:
        return frames
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in frames])
