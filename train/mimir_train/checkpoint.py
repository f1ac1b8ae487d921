"""Checkpoints: RUN/checkpoints/step-00000020 holds all that a run needs to go on, and what sampling needs.

    transformer/            a diffusers folder, float32
    fuser/                  config.json, model.safetensors
    optimizer.safetensors   the state of AdamW by parameter name
    state.json              scalars: step, order
    checkpoint.json         written last: sha256 of every file above, and what the model was trained on

A checkpoint is written under another name, made durable and then renamed; checkpoint.json carries a seal over itself.
Nothing in it is pickled, and no file of it is believed before its sha256 was compared.
"""

import errno
import hashlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimir_shared.errors import CacheError, InputError
from mimir_shared.plain_documents import parse_json
from mimir_shared.sealed import read_sealed_json, write_sealed_json
from mimir_shared.storage import machine_faults
from mimir_train.fuser_folder import save_fuser
from mimir_train.trained_model import TrainedModel
from mimir_train.transformer_folder import save_transformer

CHECKPOINT_VERSION: Final = 1
CHECKPOINTS: Final = "checkpoints"
TRANSFORMER: Final = "transformer"
FUSER: Final = "fuser"
OPTIMIZER: Final = "optimizer.safetensors"
STATE: Final = "state.json"
MANIFEST: Final = "checkpoint.json"

_STEP_FOLDER: Final = re.compile(r"step-(\d{8,})")
_CHUNK_BYTES: Final = 1 << 22

Json = Any
"""What `json` reads; the library gives it no type."""
Say = Callable[[str], None]


class FileDigest(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class FeatureRecord(BaseModel):
    """One feature that the model was trained on: sampling compares its own models with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    fingerprint: str
    identity: dict[str, Any]


class DataRecord(BaseModel):
    """What the model was trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    snapshot: str
    features: dict[str, FeatureRecord]
    buckets: tuple[str, ...] = Field(description="that were trained on: frames x height x width")
    fps: float
    latent_scaling_factor: float
    latents_std: float = Field(description="of the cached latents, unscaled")


class TextRecord(BaseModel):
    """How the text was read."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    t5_rows: int
    text_align: Literal["index", "char_offset"] = "index"
    empty_text: Literal["zeros", "cached"] = Field("zeros", description="what stood in place of dropped text")


class ObjectiveRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    snr_shift_scale: float


class CheckpointInfo(BaseModel):
    """checkpoint.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seal: str = ""
    version: Literal[1] = CHECKPOINT_VERSION
    step: int = Field(ge=0, description="steps that were trained; the next is the step of this number")
    preset: str
    files: dict[str, FileDigest] = Field(description="every other file, relative to the checkpoint")
    data: DataRecord
    objective: ObjectiveRecord
    fuser: dict[str, Any] = Field(description="its config as plain JSON")
    text: TextRecord


class TrainingState(BaseModel):
    """state.json: the scalars that a run goes on from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = CHECKPOINT_VERSION
    step: int
    order: dict[str, int] = Field(description="as TrainingOrder.state gives it")
    config_sha256: str = Field(description="of the settings that decide the training (`training_digest`)")


def step_folder_name(step: int) -> str:
    return f"step-{step:08d}"


def save_checkpoint(
    run: Path,
    model: TrainedModel,
    weights: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor],
    state: TrainingState,
    describe: Callable[[int, dict[str, FileDigest]], CheckpointInfo],
) -> Path:
    """Write a checkpoint whole or not at all.

    Args:
        weights: of the model, whole, by parameter name.
        describe: makes checkpoint.json of the step and the digests of the files.
    Returns: its folder; it takes the place of one of the same step.
    Raises: MachineError for faults of the disk; earlier checkpoints are untouched.
    """
    parent = run / CHECKPOINTS
    final = parent / step_folder_name(state.step)
    temporary = parent / f".{final.name}-{uuid.uuid4().hex}"
    with machine_faults(f"{final}: saving the checkpoint"):
        temporary.mkdir(parents=True)
        try:
            parts = [
                {name.removeprefix(part): tensor for name, tensor in weights.items() if name.startswith(part)}
                for part in ("dit.", "fuser.")
            ]
            save_transformer(model.dit.config, parts[0], temporary / TRANSFORMER)
            save_fuser(model.fuser.config, parts[1], temporary / FUSER)
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in optimizer_state.items()},
                      temporary / OPTIMIZER)  # fmt: skip
            (temporary / STATE).write_text(state.model_dump_json(indent=1) + "\n")
            files = {name: _digest_and_sync(temporary / name) for name in _file_names(temporary)}
            info = describe(state.step, files).model_dump(mode="json", exclude={"seal"})
            (temporary / MANIFEST).write_bytes(write_sealed_json(info))
            _digest_and_sync(temporary / MANIFEST)
            for directory in (temporary / TRANSFORMER, temporary / FUSER, temporary):
                _sync(directory)
            if final.exists():
                _remove(final)
            temporary.rename(final)
            _sync(parent)
        except SafetensorError as fault:  # how that library tells of a full disk
            raise OSError(errno.EIO, str(fault)) from fault
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def remove_old_checkpoints(run: Path, keep: int | None) -> None:
    """Leave the newest `keep` checkpoints, and nothing that a killed run left half-written."""
    for entry in (run / CHECKPOINTS).iterdir():
        if entry.name.startswith(".step-"):
            shutil.rmtree(entry, ignore_errors=True)
    if keep is not None:
        for folder in list_checkpoints(run)[:-keep]:
            _remove(folder)


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, good or not."""
    parent = run / CHECKPOINTS
    if not parent.is_dir():
        return []
    found = [(int(match[1]), path) for path in parent.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def check_checkpoint(folder: Path, parts: Collection[str] | None = None) -> str | None:
    """What is wrong with a checkpoint, in words; None where every byte is as it was written.

    Args:
        parts: files or folders of it to check (checkpoint.json always is); None: all.
    """
    try:
        info = _read_manifest(folder)
    except CacheError as fault:
        return str(fault)
    for name, digest in info.files.items():
        if parts is not None and not any(name == part or name.startswith(f"{part}/") for part in parts):
            continue
        try:
            found = _digest(folder / name)
        except OSError as fault:
            return f"{folder / name}: {fault.strerror}"
        if found != digest:
            return f"{folder / name}: its {found.bytes} bytes are not those that were written ({digest.bytes} bytes)"
    return None


def find_checkpoint(path: Path, *, say: Say | None = None, parts: Collection[str] | None = None) -> Path:
    """The newest good checkpoint of a run; of a checkpoint's own folder, that one.

    Args:
        path: RUN, or RUN/checkpoints/step-N.
        say: told of every checkpoint that is passed over for being damaged; None: one line on stderr.
        parts: as `check_checkpoint`.
    Raises: InputError where there is no checkpoint; CacheError where none is good.
    """
    say = say or (lambda line: print(line, file=sys.stderr))  # noqa: T201 (the caller gave no other way to tell)
    folders = [path] if is_checkpoint_folder(path) else list_checkpoints(path)
    if not folders:
        raise InputError(f"{path}: no checkpoint here; expected {CHECKPOINTS}/{step_folder_name(20)} or one like it")
    for folder in reversed(folders):
        problem = check_checkpoint(folder, parts)
        if problem is None:
            return folder
        say(f"checkpoint {folder.name} is damaged and passed over: {problem}")
    raise CacheError(f"{path}: no good checkpoint ({problem}); restore one from a copy, or begin anew")


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a path is one checkpoint rather than a run."""
    return _STEP_FOLDER.fullmatch(path.name) is not None or (path / MANIFEST).exists()


def read_checkpoint_info(path: Path, *, parts: Collection[str] | None = None) -> CheckpointInfo:
    """checkpoint.json of a checkpoint, after its files have been checked.

    Args:
        path: the checkpoint's folder (`find_checkpoint`).
        parts: as `check_checkpoint`.
    Raises: CacheError where a file is not as it was written.
    """
    problem = check_checkpoint(path, parts)
    if problem is not None:
        raise CacheError(f"{problem}; the checkpoint is damaged: take another of the run, or restore it from a copy")
    return _read_manifest(path)


def read_state(folder: Path) -> tuple[TrainingState, dict[str, Tensor]]:
    """Scalars and optimizer state of a checkpoint that `find_checkpoint` found good. Raises CacheError."""
    try:
        state = TrainingState.model_validate(parse_json((folder / STATE).read_text()))
        tensors = load_file(folder / OPTIMIZER)
    except (OSError, ValueError, SafetensorError) as fault:
        raise CacheError(f"{folder}: {' '.join(str(fault).splitlines()[:3])}; written by another release?") from fault
    return state, tensors


def _read_manifest(folder: Path) -> CheckpointInfo:
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise CacheError(f"{path}: {fault.strerror}; the checkpoint was not finished, or is damaged") from fault
    document: Json = read_sealed_json(data, str(path))
    try:
        return CheckpointInfo.model_validate(document)
    except ValidationError as fault:
        raise CacheError(
            f"{path}: not of version {CHECKPOINT_VERSION}: {' '.join(str(fault).splitlines()[:3])}; it was written by "
            f"another release of this program"
        ) from fault


def _file_names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> FileDigest:
    sha256, nbytes = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha256.update(chunk)
            nbytes += len(chunk)
    return FileDigest(bytes=nbytes, sha256=sha256.hexdigest())


def _digest_and_sync(path: Path) -> FileDigest:
    _sync(path)
    return _digest(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Take a checkpoint out of sight first: a half-removed one must not look like a damaged one."""
    hidden = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    with machine_faults(f"{folder}: removing an old checkpoint"):
        folder.rename(hidden)
        shutil.rmtree(hidden)
