"""`mimir-precompute report`: from what is typed to a page on the disk."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from mimir_precompute.config import DecodeLimits
from mimir_precompute.decoding.sandbox import DecodeSandbox
from mimir_precompute.option_values import parse_feature_choices
from mimir_precompute.report.build import build_report
from mimir_precompute.report.gallery import LatentDecoder
from mimir_precompute.report.scan import choose_features
from mimir_shared.errors import InputError, MachineError
from mimir_shared.storage.folder import machine_faults
from mimir_shared.storage.open import open_storage
from mimir_shared.storage.protocol import Storage

_TIMEOUT_S = 20.0
"""For one source clip: a page is worth less patience than a cache."""


def run_report(
    cache: str,
    *,
    out: Path | None,
    gallery: int,
    wanted: Sequence[str],
    models: str | None,
    vae: str | None,
    device: str,
) -> tuple[Path, int]:
    """Write the page: (where, bytes).

    Args:
        out: None: `<name of the cache>-report.html` in the current folder.
        wanted: "NAME=FINGERPRINT" each.
        models, vae: where the VAE lies that decodes the gallery; neither: the latents stand in false colours.
    Raises: InputError, CacheError, MachineError.
    """
    storage = open_storage(cache)
    choices = parse_feature_choices(wanted)
    name = cache_name(storage)
    path = out if out is not None else default_path(storage, name)
    decode_latents = _load_decoder(storage, choices, models, vae, device) if models or vae else None
    with DecodeSandbox(DecodeLimits(timeout_s=_TIMEOUT_S)) as decoder:
        page = build_report(
            storage, name=name, gallery=gallery, wanted=choices, decoder=decoder, decode_latents=decode_latents
        )
    # texts come from anywhere: half of a surrogate pair, which no file can hold, must not cost the page
    data = page.encode("utf-8", errors="replace")
    _write_whole(path, data)
    return path, len(data)


def cache_name(storage: Storage) -> str:
    """What a person calls the cache: its folder's name."""
    root = storage.root
    return root.resolve().name if isinstance(root, Path) else root.rstrip("/").rpartition("/")[2]


def default_path(storage: Storage, name: str) -> Path:
    """In the current folder; beside the cache where the current folder is the cache or lies in it."""
    root, here = storage.root, Path.cwd()
    inside = isinstance(root, Path) and here.is_relative_to(root.resolve())
    folder = root.resolve().parent if inside and isinstance(root, Path) else Path()
    return folder / f"{name}-report.html"


def _load_decoder(
    storage: Storage, choices: dict[str, str], models: str | None, vae: str | None, device: str
) -> LatentDecoder | None:
    latents = choose_features(storage, choices).get("latents")
    if latents is None:
        return None  # the page says that there are none
    from mimir_precompute.config import ModelOptions
    from mimir_precompute.device import choose_device
    from mimir_precompute.inspection.latent_decoder import load_decoder
    from mimir_precompute.model_options import model_source

    source = model_source(ModelOptions(models=models, vae=vae), None, "vae", True)
    return load_decoder(source, latents.read_spec().identity, choose_device(device)).decode_latents


def _write_whole(path: Path, data: bytes) -> None:
    """Write under another name first: whoever reloads the page sees the old or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    try:
        with machine_faults(f"{path}: writing"):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            os.replace(part, path)
    except MachineError as fault:
        if isinstance(fault.__cause__, FileExistsError | IsADirectoryError | NotADirectoryError | PermissionError):
            raise InputError(f"{path}: cannot be written: {fault.__cause__.strerror}; give a file: --out") from fault
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
