"""Turn the latents that validation wrote into videos.

RUN/validation/step-00000020/latents.safetensors   tensors "0", "1", …: (C, T, h, w) float32, scaled
RUN/validation/step-00000020/prompts.json          what they are: see `ValidationLatents`
RUN/validation/step-00000020/0.mp4, 1.mp4, …       written here, and contact_sheet.png beside them
RUN/validation/index.html                          written here: each prompt over the steps
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mimir_shared.errors import InputError
from mimir_shared.storage.folder import machine_faults
from mimir_shared.wording import noun_for
from mimir_train.sampling.contact_sheet import MAX_ROWS, SheetRow, write_contact_sheet
from mimir_train.sampling.frozen_models import FrozenModels, ModelLocations, Progress, choose_device, write_video
from mimir_train.sampling.video_check import read_video
from mimir_train.validation.latents import (
    LATENTS_NAME,
    PROMPTS_NAME,
    VALIDATION_FOLDER,
    ValidationLatents,
    read_validation_latents,
)
from mimir_train.validation.page import PAGE_NAME, ValidationPage


@dataclass(frozen=True, kw_only=True)
class DecodedVideos:
    """What `decode_validation` made, and where it lies."""

    folders: tuple[Path, ...]
    """Of the validation steps, by step; never none."""
    made: int
    kept: int
    page: Path | None
    """That shows the prompts over the steps; None where one step alone was asked for."""


def decode_validation(run: Path, locations: ModelLocations, device: str, progress: Progress) -> DecodedVideos:
    """Decode every validation step of a run; videos that are newer than their latents, and play, are kept.

    Raises: InputError where there are no latents, CacheError where they are damaged or another VAE made them.
    """
    device = choose_device(device)
    folders = _find_folders(run)
    found = [(folder, read_validation_latents(folder)) for folder in folders]
    total = sum(len(latents.prompts) for _, latents in found)
    progress.start(f"{noun_for(total, 'video')} decoded", total)
    page = None if folders == [run] else ValidationPage(run, [latents.step for _, latents in found])
    made = 0
    # a run has one cache, so one VAE; a folder of another is refused when it is reached
    for identity in {latents.latents_fingerprint: latents.latents_identity for _, latents in found}.values():
        frozen = FrozenModels({"latents": identity}, ("latents",), locations, device)
        same = [(folder, latents) for folder, latents in found if latents.latents_identity == identity]
        made += _decode_with(frozen, same, page, progress)
    page_path = None if page is None else run / VALIDATION_FOLDER / PAGE_NAME
    if page is not None and page_path is not None:
        page.write(page_path)
    return DecodedVideos(folders=tuple(folders), made=made, kept=total - made, page=page_path)


def _find_folders(run: Path) -> list[Path]:
    """Of the run, or the one that was given itself."""
    if (run / LATENTS_NAME).is_file() or (run / PROMPTS_NAME).is_file():
        return [run]
    folders = sorted(path.parent for path in run.glob(f"{VALIDATION_FOLDER}/step-*/{PROMPTS_NAME}"))
    if not folders:
        raise InputError(
            f"{run}: no {VALIDATION_FOLDER}/step-*/{PROMPTS_NAME} there; give a run's folder whose validation wrote "
            f"latents, or one of its steps"
        )
    return folders


def _decode_with(
    frozen: FrozenModels,
    found: Sequence[tuple[Path, ValidationLatents]],
    page: ValidationPage | None,
    progress: Progress,
) -> int:
    made = 0
    for folder, latents in found:
        rows: list[SheetRow] = []
        with frozen.decoder(latents.latent_scaling_factor) as decode:
            for index, prompt in enumerate(latents.prompts):
                path = folder / f"{index}.mp4"
                fresh = path.is_file() and path.stat().st_mtime >= (folder / LATENTS_NAME).stat().st_mtime
                frames = read_video(path) if fresh else None
                if frames is None:
                    frames = decode(latents.tensors[index])
                    temporary = folder / f".{path.name}.tmp"
                    write_video(temporary, frames, latents.fps)
                    with machine_faults(f"{path}: writing"):
                        temporary.replace(path)
                    made += 1
                if page is not None:
                    page.add(latents.step, index, prompt, frames, latents.fps, latents.weights)
                if len(rows) < MAX_ROWS:
                    note = f"step {latents.step}, {index}.mp4"
                    rows.append(SheetRow(caption=prompt, note=note, frames=frames, fps=latents.fps))
                progress.advance()
        write_contact_sheet(folder / "contact_sheet.png", rows)
    return made
