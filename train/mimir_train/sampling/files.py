"""The folder that samples are written to.

<prompt>-<index>.mp4   the videos
contact_sheet.png      the first of them on one page
samples.jsonl          one object a video: prompt, index, file, settings
sampling.json          the settings that all of them were made with
latents/               of videos that are not decoded yet; gone when all are
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimir_shared.errors import InputError
from mimir_shared.fingerprint import differences
from mimir_shared.plain_documents import parse_json
from mimir_shared.storage.folder import machine_faults
from mimir_train.sampling.frozen_models import write_video

Json = Any
"""What `json` reads; the library gives it no type."""

SETTINGS_NAME = "sampling.json"
LIST_NAME = "samples.jsonl"
SHEET_NAME = "contact_sheet.png"
LATENTS_FOLDER = "latents"


@dataclass(frozen=True, kw_only=True)
class Video:
    """One video that is asked for."""

    prompt: str
    index: int
    """0 is the prompt's first; each has noise of its own."""
    name: str
    """Of its file."""


class SampleFolder:
    """Writes every file whole or not at all: under another name first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._settings: Mapping[str, Json] = {}

    @property
    def sheet_path(self) -> Path:
        return self.root / SHEET_NAME

    def video_path(self, video: Video) -> Path:
        return self.root / video.name

    def latents_path(self, video: Video) -> Path:
        return self.root / LATENTS_FOLDER / f"{video.name.removesuffix('.mp4')}.safetensors"

    def claim(self, settings: Mapping[str, Json], videos: Iterable[Video]) -> None:
        """Say what the folder's videos are made with.

        Raises: InputError where it holds videos that were made with other settings, naming each difference.
        """
        self._settings = settings
        path = self.root / SETTINGS_NAME
        if path.is_file():
            try:
                existing = parse_json(path.read_text(encoding="utf-8"))
                changed = [f"{field}: {old!r} → {new!r}" for field, old, new in differences(existing, settings)]
            except (ValueError, AttributeError, TypeError) as fault:
                raise InputError(f"{path}: not readable ({fault}); choose another --output-dir") from fault
            if changed:
                raise InputError(
                    f"--output-dir {self.root}: its videos were made with other settings ({'; '.join(changed)}); "
                    f"choose another folder, or remove this one"
                )
            return
        foreign = [video.name for video in videos if self.video_path(video).exists()]
        if foreign:
            raise InputError(
                f"--output-dir {self.root}: holds {foreign[0]!r} but no {SETTINGS_NAME}, so what made it is not known; "
                f"choose another folder"
            )
        with machine_faults(f"{self.root}: writing"):
            (self.root / LATENTS_FOLDER).mkdir(parents=True, exist_ok=True)
            self._write(path, json.dumps(settings, indent=1, sort_keys=True).encode() + b"\n")

    def write_latents(self, video: Video, latents: Tensor) -> None:
        """Keep (C, T, h, w) float32 until they are decoded."""
        path = self.latents_path(video)
        with machine_faults(f"{path}: writing"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary(path)
            save_file({"latents": latents.contiguous()}, temporary)
            temporary.replace(path)

    def read_latents(self, video: Video, shape: Sequence[int]) -> Tensor | None:
        """The latents of a video that is not decoded yet; None where there are none, or they are damaged."""
        try:
            latents = load_file(self.latents_path(video))["latents"]
        except (OSError, SafetensorError, KeyError):
            return None
        return latents if latents.shape == tuple(shape) and bool(torch.isfinite(latents).all()) else None

    def write_video(self, video: Video, pixels: np.ndarray, fps: float) -> None:
        """Write (F, H, W, 3) uint8 and let go of the latents."""
        path = self.video_path(video)
        temporary = _temporary(path)
        write_video(temporary, pixels, fps)
        with machine_faults(f"{path}: writing"):
            temporary.replace(path)
            self.latents_path(video).unlink(missing_ok=True)

    def write_list(self, videos: Iterable[Video]) -> None:
        """Add videos to samples.jsonl; those of earlier calls stay."""
        path = self.root / LIST_NAME
        lines = {entry["file"]: entry for entry in self._read_list() if (self.root / entry["file"]).is_file()}
        for video in videos:
            seed = self._settings["seed"]
            entry = {"prompt": video.prompt, "index": video.index, "seed": seed, "file": video.name}
            lines[video.name] = {**entry, "settings": self._settings}
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
        with machine_faults(f"{path}: writing"):
            self._write(path, text.encode())
            with suppress(OSError):  # another call may be using it
                (self.root / LATENTS_FOLDER).rmdir()

    def _read_list(self) -> list[dict[str, Json]]:
        path = self.root / LIST_NAME
        if not path.is_file():
            return []
        try:
            entries = [parse_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            return [{**entry, "file": str(entry["file"])} for entry in entries]
        except (ValueError, TypeError, KeyError) as fault:
            raise InputError(f"{path}: not readable ({fault!r}); remove it and run the same command again") from fault

    def _write(self, path: Path, data: bytes) -> None:
        temporary = _temporary(path)
        temporary.write_bytes(data)
        temporary.replace(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
