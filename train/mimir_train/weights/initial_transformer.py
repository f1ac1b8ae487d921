"""Where the transformer of a new run comes from: a diffusers folder, the hub, or nothing but its sizes."""

import re
from dataclasses import dataclass
from pathlib import Path

from mimir_shared.errors import InputError, MachineError
from mimir_shared.plain_documents import parse_json
from mimir_train.config import SCRATCH, ModelConfig
from mimir_train.model.config import DiTConfig
from mimir_train.weights.transformer_folder import find_transformer_folder, read_transformer_config

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, kw_only=True)
class InitialTransformer:
    """The weights that a run starts from, not yet loaded."""

    config: DiTConfig
    folder: Path | None
    """None: drawn at random."""
    vae_scaling_factor: float | None
    """Of the VAE that lies beside it, where one does."""


def find_initial_transformer(model: ModelConfig) -> InitialTransformer:
    """Find the folder of `model.init_from` and read its sizes; hub files are downloaded.

    Raises: InputError where there is no such folder or repository, or it is no CogVideoX 1.0 transformer;
        MachineError where the hub does not answer.
    """
    if model.init_from == SCRATCH:
        return InitialTransformer(config=model.transformer, folder=None, vae_scaling_factor=None)
    folder = locate_transformer(model.init_from, "--init-from")
    pipeline = folder.parent if folder.name == "transformer" else folder
    return InitialTransformer(
        config=read_transformer_config(folder), folder=folder, vae_scaling_factor=_vae_scaling_factor(pipeline)
    )


def locate_transformer(name: str, option: str) -> Path:
    """The transformer's folder of what an option named: a folder, or a hub id whose files are downloaded.

    Raises: as `find_initial_transformer`.
    """
    return find_transformer_folder(_local_folder(name, option))


def is_hub_id(name: str) -> bool:
    """Whether --init-from names a repository of the hub, no folder."""
    return not Path(name).expanduser().exists() and _HUB_ID.fullmatch(name) is not None


def _local_folder(name: str, option: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    match = _HUB_ID.fullmatch(name)
    if match is None or path.exists():
        scratch = f" or {SCRATCH!r}" if option == "--init-from" else ""
        raise InputError(f"{option} {name}: expected a diffusers folder, a hub id (owner/name){scratch}")
    return _download(f"{option} {name}", match["repo"], match["revision"])


def _download(asked: str, repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=["transformer/*.json", "transformer/*.safetensors", "vae/config.json"],
        )
    except GatedRepoError as fault:
        raise InputError(f"{asked}: the hub asks for a licence first; accept it and log in") from fault
    except RepositoryNotFoundError as fault:
        raise InputError(f"{asked}: no such folder here, and no such repository on the hub") from fault
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as fault:
        raise MachineError(
            f"{asked}: no such folder here, and the hub does not give it ({type(fault).__name__}); run it "
            f"again, or download the folder elsewhere and give its path"
        ) from fault
    return Path(folder)


def _vae_scaling_factor(pipeline: Path) -> float | None:
    try:
        factor = parse_json((pipeline / "vae" / "config.json").read_text(encoding="utf-8")).get("scaling_factor")
    except (OSError, ValueError, AttributeError):
        return None  # no VAE beside it, or none of ours to judge: then nothing is known
    return float(factor) if isinstance(factor, int | float) else None
