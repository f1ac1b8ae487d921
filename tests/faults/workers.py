"""Workers for the fault batteries: processes forked from this one, that encode a small cache with fake encoders.

Nothing here imports torch, so that a worker starts in milliseconds and hundreds of them can be killed in a minute.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mimir_precompute.clips.clip_list import read_clip_list
from mimir_precompute.pipeline import EncodeJob, encode_cache
from mimir_precompute.planning.plan import PlanRequest, update_plan
from mimir_precompute.provenance import RunLog
from mimir_precompute.workers.progress import Progress
from mimir_shared.errors import MimirError
from mimir_shared.features import FeatureName
from mimir_shared.plan_file import read_plan
from mimir_shared.storage.disk import Disk
from mimir_shared.storage.folder import LocalStorage
from mimir_shared.storage.protocol import Storage
from tests.fake_encoders import FakeEncoders, tree

NUM_SHARDS, SHARD_SIZE = 5, 2
TEXT: tuple[FeatureName, ...] = ("t5", "answers", "llm")
"""Features that read no video: a shard of them takes a millisecond or two."""
NOT_COMPARED = ("logs", "tmp", "leases")


def make_clips(folder: Path, count: int = NUM_SHARDS * SHARD_SIZE) -> Path:
    """A list of clips whose videos are empty files: only their captions are encoded."""
    folder.mkdir(parents=True)
    for n in range(count):
        (folder / f"{n:03d}.mp4").touch()
    rows = [f'{{"file_name": "{n:03d}.mp4", "text": "Clip {n} shows {n * 7 % 11} things ."}}' for n in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def encode(cache: Path, clips: Path, *, clip_s: float = 0.0, disk: Disk | None = None, **options: Any) -> None:
    """Plan if there is no plan, and encode, as the command does."""
    encode_into(LocalStorage(cache, disk), clips, clip_s=clip_s, **options)


def encode_into(storage: Storage, clips: Path, *, clip_s: float = 0.0, **options: Any) -> None:
    """As `encode`, wherever the cache lies."""
    storage.check_writable()
    if not storage.list("plan"):
        update_plan(storage, None, read_clip_list(str(clips)), PlanRequest(preset="tiny", shard_size=SHARD_SIZE))
    plan = read_plan(storage)
    job = EncodeJob(
        storage=storage,
        plan=plan,
        encoders=FakeEncoders(clip_s=clip_s),
        **{"shards": tuple(range(plan.num_shards)), "features": TEXT, "heartbeat_s": 0.02, "decode_workers": 1}
        | options,
    )
    encode_cache(job, Progress(quiet=True), RunLog(storage, "cpu"))


def start(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its exit code is 0, that of a MimirError, or 1. Returns the pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 0
    try:
        work()
    except MimirError as error:
        sys.stderr.write(f"{error}\n")
        code = error.exit_code
    except BaseException:  # noqa: BLE001 (a forked child must never return into pytest)
        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def end_of(pid: int) -> int:
    """Wait for a worker: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_alone(work: Callable[[], object]) -> None:
    """Run `work` in a process of its own, to its end."""
    code = end_of(start(work))
    assert code == 0, f"a worker that nobody disturbed ended with {code}"


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(pid, number)


def compared(cache: Path) -> Mapping[str, bytes]:
    """All of a cache that must not depend on what its workers lived through."""
    return tree(cache, leave_out=NOT_COMPARED)


def assert_same_cache(cache: Path, uninterrupted: Mapping[str, bytes]) -> None:
    """Every file and byte as in the uninterrupted run, whose own cache was verified: nothing lost, nothing doubled."""
    ours = compared(cache)
    assert sorted(ours) == sorted(uninterrupted)
    assert [name for name, data in uninterrupted.items() if ours[name] != data] == []
