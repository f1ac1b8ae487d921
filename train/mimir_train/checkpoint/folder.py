"""Checkpoints: RUN/checkpoints/step-00000020 holds all that a run needs to go on, and what sampling needs.

    model/00000.safetensors       the weights: what rank 0 wrote of them, float32; a file for each rank
    optimizer/00000.safetensors   the state of AdamW by parameter name
    ema/00000.safetensors         a running average of those that are trained, where one is kept
    random/00000.safetensors      the state of each rank's generators
    checkpoint.json               written last: sha256 of every file above, step and order, and what was trained on what

It is written under another name, made durable and then renamed; checkpoint.json carries a seal over itself.
Nothing in it is pickled, and no file of it is believed before its sha256 was compared.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mimir_shared.errors import CacheError, InputError
from mimir_shared.sealed import read_sealed_json

CHECKPOINT_VERSION: Final = 2
CHECKPOINTS: Final = "checkpoints"
MODEL: Final = "model"
OPTIMIZER: Final = "optimizer"
RANDOM: Final = "random"
EMA: Final = "ema"
"""The first average of the weights; those behind it are ema-2, ema-3 and so on."""
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


class BaseRecord(BaseModel):
    """The transformer that adapters stand on: it is not in the checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(description="as --init-from named it")
    files: dict[str, FileDigest] = Field(description="of its folder: config and weights")


class LoraRecord(BaseModel):
    """The adapters that were trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: BaseRecord


class TrainingRecord(BaseModel):
    """The scalars that a run goes on from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    order: dict[str, int] = Field(description="as TrainingOrder.state gives it")
    config_sha256: str = Field(description="of the settings that decide the training (`training_digest`)")


class CheckpointInfo(BaseModel):
    """checkpoint.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seal: str = ""
    version: Literal[2] = CHECKPOINT_VERSION
    step: int = Field(ge=0, description="steps that were trained; the next is the step of this number")
    preset: str
    files: dict[str, FileDigest] = Field(description="every other file, relative to the checkpoint")
    training: TrainingRecord
    data: DataRecord
    objective: ObjectiveRecord
    transformer: dict[str, Any] = Field(description="its config as plain JSON")
    fuser: dict[str, Any] = Field(description="its config as plain JSON")
    text: TextRecord
    ema: tuple[str, ...] = Field((), description="profiles of the averages that were kept: in ema, ema-2, …")
    lora: LoraRecord | None = Field(None, description="what was trained of the transformer, where not all of it")

    def files_of(self, part: str) -> list[str]:
        """The files of "model", "optimizer" and so on."""
        return [name for name in self.files if name.startswith(f"{part}/")]


def ema_part(index: int) -> str:
    """The part that holds the average of this place among the run's profiles."""
    return EMA if index == 0 else f"{EMA}-{index + 1}"


def step_folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    assert match is not None, f"{folder} is no checkpoint"
    return int(match[1])


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, good or not."""
    parent = run / CHECKPOINTS
    if not parent.is_dir():
        return []
    return sorted((path for path in parent.iterdir() if _STEP_FOLDER.fullmatch(path.name)), key=step_of)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which of several processes reads a checkpoint: each hashes some of its files, and all hear what each found.

    A process alone hashes them all.
    """

    number: int = 0
    count: int = 1
    tell: Callable[[Sequence[float]], list[list[float]]] = lambda values: [list(values)]
    """Hands out own values, and gives those of all, by number; every process calls it equally often."""


ALONE: Final = Share()


def check_checkpoint(folder: Path, parts: Collection[str] | None = None, *, share: Share = ALONE) -> str | None:
    """What is wrong with a checkpoint, in words; None where every byte is as it was written.

    Args:
        parts: files or folders of it to check (checkpoint.json always is); None: all.
        share: of several processes that call this at the same time, for the same checkpoint.
    """
    wanted: list[tuple[str, FileDigest]] = []
    problems: dict[int, str] = {}
    try:
        info = _read_manifest(folder)
    except CacheError as fault:
        problems[0] = str(fault)
    else:
        wanted = [
            (name, digest)
            for name, digest in info.files.items()
            if parts is None or any(name == part or name.startswith(f"{part}/") for part in parts)
        ]
    for place in range(share.number, len(wanted), share.count):
        problem = _check_file(folder, *wanted[place])
        if problem is not None:
            problems[place + 1] = problem
            break
    told = [int(place) for (place,) in share.tell([min(problems, default=-1)])]
    worst = min((place for place in told if place >= 0), default=None)
    if worst is None:
        return None
    name = wanted[worst - 1][0] if 0 < worst <= len(wanted) else MANIFEST
    return problems.get(worst) or f"{folder / name}: rank {told.index(worst)} found that it is not as it was written"


def _check_file(folder: Path, name: str, digest: FileDigest) -> str | None:
    try:
        found = digest_file(folder / name)
    except OSError as fault:
        return f"{folder / name}: {fault.strerror}"
    if found != digest:
        written = f"{digest.bytes} bytes" if found.bytes != digest.bytes else "their sha256 is another"
        return f"{folder / name}: its {found.bytes} bytes are not those that were written ({written})"
    return None


def find_checkpoint(
    path: Path, *, say: Say | None = None, parts: Collection[str] | None = None, share: Share = ALONE
) -> Path:
    """The newest good checkpoint of a run; of a checkpoint's own folder, that one.

    Args:
        path: RUN, or RUN/checkpoints/step-N.
        say: told of every checkpoint that is passed over for being damaged; None: one line on stderr.
        parts, share: as `check_checkpoint`.
    Raises: InputError where there is no checkpoint; CacheError where none is good.
    """
    say = say or (lambda line: print(line, file=sys.stderr))  # noqa: T201 (the caller gave no other way to tell)
    folders = [path] if is_checkpoint_folder(path) else list_checkpoints(path)
    if not folders:
        raise InputError(f"{path}: no checkpoint here; expected {CHECKPOINTS}/{step_folder_name(20)} or one like it")
    for folder in reversed(folders):
        problem = check_checkpoint(folder, parts, share=share)
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


def _read_manifest(folder: Path) -> CheckpointInfo:
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise CacheError(f"{path}: {fault.strerror}; the checkpoint was not finished, or is damaged") from fault
    document: Json = read_sealed_json(data, str(path))
    if document.get("version") != CHECKPOINT_VERSION:
        raise CacheError(
            f"{path}: a checkpoint of version {document.get('version')!r}, and this program reads version "
            f"{CHECKPOINT_VERSION}; go on with the release that wrote it, or begin anew"
        )
    try:
        return CheckpointInfo.model_validate(document)
    except ValidationError as fault:
        raise CacheError(
            f"{path}: not as this program writes it: {' '.join(str(fault).splitlines()[:3])}; it is of another release"
        ) from fault


def digest_file(path: Path) -> FileDigest:
    sha256, nbytes = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha256.update(chunk)
            nbytes += len(chunk)
    return FileDigest(bytes=nbytes, sha256=sha256.hexdigest())
