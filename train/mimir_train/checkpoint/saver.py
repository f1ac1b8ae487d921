"""Saving checkpoints while the steps go on: the state is copied first, and written by a thread of its own."""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from mimir_shared.errors import MimirError
from mimir_shared.failpoints import failpoint
from mimir_shared.sealed import write_sealed_json
from mimir_shared.storage.disk import Disk
from mimir_shared.storage.folder import machine_faults
from mimir_train.checkpoint.folder import (
    CHECKPOINTS,
    CheckpointInfo,
    FileDigest,
    list_checkpoints,
    step_folder_name,
    step_of,
)
from mimir_train.checkpoint.parts import CheckpointPart, live_tensors
from mimir_train.checkpoint.storage import PieceWriter, faults_of_ranks
from mimir_train.parallel.processes import EXCHANGE_TIMEOUT, Parallel, peer_faults

Describe = Callable[[int, Mapping[str, FileDigest]], CheckpointInfo]
"""Makes checkpoint.json of the step and the digests of the files."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which checkpoints stay."""

    newest: int | None = None
    """So many; None: all."""
    every: int | None = None
    """Besides, those whose step is a multiple of it."""


class CheckpointSaver:
    """Writes the checkpoints of a run, one at a time. All ranks make the same calls at the same steps.

    It is a context: when it ends, what is being written is waited for.

    Args:
        run: its folder, which all ranks share.
        parts: name → what is saved.
        background: let the run go on while files are written, at the price of a copy of the state in memory.
        disk: through which everything is written.
    """

    def __init__(
        self,
        run: Path,
        parts: Mapping[str, CheckpointPart],
        describe: Describe,
        parallel: Parallel,
        *,
        kept: Kept,
        background: bool,
        disk: Disk | None = None,
    ) -> None:
        self._run = run
        self._parts = parts
        self._describe = describe
        self._parallel = parallel
        self._kept = kept
        self._disk = disk or Disk()
        # of its own: two threads that speak through one group would take each other's words
        # and as patient: by itself, it would give up after half an hour on a rank that still writes
        self._group = dist.new_group(backend="gloo", timeout=EXCHANGE_TIMEOUT) if dist.is_initialized() else None
        self._stager = _stager(parallel) if background else None
        self._pending: tuple[PieceWriter, Future[object]] | None = None
        self._written: Path | None = None
        if parallel.is_first:
            clear_unfinished(run)

    @property
    def has_failed(self) -> bool:
        """Whether the save under way has come to a fault on this rank; `wait` raises it."""
        if self._pending is None:
            return False
        future = self._pending[1]
        return future.done() and future.exception() is not None

    def start(self, step: int) -> None:
        """Save the state after `step` steps as it is now; returns when it may change again.

        Raises: MachineError where this save, or the one before, failed; earlier checkpoints are untouched.
        """
        self.wait()
        tensors = dict(live_tensors(self._parts))
        writer = PieceWriter(
            self._run / CHECKPOINTS / step_folder_name(step),
            rank=self._parallel.rank,
            nbytes=sum(tensor.nbytes for tensor in tensors.values()),
            seal=lambda files: _sealed(self._describe(step, files)),
            published=lambda: remove_old_checkpoints(self._run, self._kept, written=step, disk=self._disk),
            disk=self._disk,
        )
        with self._faults(writer):
            if self._stager is None:
                save(tensors, storage_writer=writer, process_group=self._group)
                self._written = writer.final
            else:
                future = async_save(
                    tensors, storage_writer=writer, process_group=self._group, async_stager=self._stager
                )
                # another kind of answer comes only of a stager that works in the background
                self._pending = writer, cast("Future[object]", future)

    def wait(self) -> Path | None:
        """Return when nothing is being written: the checkpoint written last, None before the first.

        Raises: MachineError where it failed; earlier checkpoints are untouched.
        """
        if self._pending is not None:
            writer, future = self._pending
            with self._faults(writer):
                future.result()
            self._pending = None
            self._written = writer.final
        return self._written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except MimirError as fault:
            if error is None:
                raise
            sys.stderr.write(f"besides: {fault}\n")
        finally:
            if self._stager is not None:
                self._stager.close()

    @contextmanager
    def _faults(self, writer: PieceWriter) -> Iterator[None]:
        """Leave nothing half-written where a save failed; what other ranks had to wait for has ended by then."""
        try:
            with peer_faults(), faults_of_ranks():
                yield
        except Exception:
            self._pending = None
            if self._parallel.is_first:
                shutil.rmtree(writer.unfinished, ignore_errors=True)
            raise


def remove_old_checkpoints(run: Path, kept: Kept, *, written: int, disk: Disk) -> None:
    """Remove the checkpoints that are not to be kept.

    Args:
        written: the step of the one that was just written. It stays, whatever the others are: it is known to be good.
    Raises: MachineError.
    """
    if kept.newest is None:
        return
    for folder in list_checkpoints(run)[: -kept.newest]:
        step = step_of(folder)
        if step != written and (kept.every is None or step % kept.every):
            # out of sight first: a half-removed one must not look like a damaged one
            hidden = folder.with_name(f".{folder.name}.removed")
            with machine_faults(f"{folder}: removing an old checkpoint"):
                if hidden.exists():
                    disk.remove_tree(hidden)
                disk.rename(folder, hidden)
                failpoint("checkpoint.removed_from_sight")
                disk.remove_tree(hidden)
                failpoint("checkpoint.removed")


def clear_unfinished(run: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    if (run / CHECKPOINTS).is_dir():
        for entry in (run / CHECKPOINTS).iterdir():
            if entry.name.startswith(".step-"):
                shutil.rmtree(entry, ignore_errors=True)


def _stager(parallel: Parallel) -> DefaultStager:
    """Copies the state to memory that is kept from save to save; pinned where it comes from a GPU."""
    on_cuda = parallel.device.type == "cuda"
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=on_cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_cuda
        )
    )


def _sealed(info: CheckpointInfo) -> bytes:
    # plain JSON values, of whatever type
    document: dict[str, Any] = info.model_dump(mode="json", exclude={"seal"})
    return write_sealed_json(document)
