"""The whole toy world in one folder."""

from pathlib import Path

from mimir_precompute.toy.clips import write_toy_clips
from mimir_precompute.toy.models import write_toy_models
from mimir_shared.errors import InputError


def write_toy(directory: Path, num_clips: int, seed: int) -> None:
    """Write DIR/clips and DIR/models. Raises InputError where the folder cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_toy_clips(directory, num_clips, seed)
        write_toy_models(directory, seed)
    except OSError as fault:
        raise InputError(f"{directory}: cannot be written: {fault.strerror or fault}") from fault
