"""What a person sees while `encode` runs: live bars on a terminal, a plain line now and then elsewhere.

All workers of a cache are one view: what is committed, whoever did it, and what each says of itself (workers/seen.py).
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from mimir_precompute.termination import when_stopped
from mimir_precompute.workers.pace import RecentRate
from mimir_precompute.workers.seen import (
    BEAT_S,
    SeenWorker,
    WorkerFile,
    WorkerReport,
    describe_self,
    forget_dead_workers,
)
from mimir_precompute.workers.together import SharedWork, Together, add_up, describe_together, workers_at
from mimir_shared.command_line import visible
from mimir_shared.errors import MimirError
from mimir_shared.features import FeatureName
from mimir_shared.redaction import hide_secrets
from mimir_shared.wording import counted, format_size

LINE_EVERY_S = 10.0
BAR_EVERY_S = 0.5


def bar_columns() -> tuple[ProgressColumn, ...]:
    """Of a bar whose task has a field `speed`."""
    columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn())
    return (*columns, TextColumn("{task.fields[speed]}"))


class _Counts:
    """What this worker has made of one feature. The lock is the owner's."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clips = 0
        self.nbytes = 0
        self.quarantined_before = 0
        """In shards that are committed."""
        self.quarantined_in_shard = 0
        self.clips_in_shard = 0
        self.shard: int | None = None
        self.shard_since_s: float | None = None
        self.rate = RecentRate(clock)

    @property
    def quarantined(self) -> int:
        return self.quarantined_before + self.quarantined_in_shard


class Progress:
    """Counts the clips of the feature that is being made; writes to stderr, so that stdout stays clean.

    Args:
        watch: look at what the other workers do; one of thousands does not, and shows itself alone.
        clock: seconds, for rates and for how often to write.
        warnings: where warnings go, if not among the rest.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        watch: bool = True,
        clock: Callable[[], float] = time.monotonic,
        console: Console | None = None,
        warnings: Console | None = None,
    ) -> None:
        self._console = console or Console(stderr=True, quiet=quiet, highlight=False, markup=False)
        self._warnings = warnings or self._console
        self._watch = watch
        self._clock = clock
        self._lock = threading.Lock()
        self._counts = _Counts(clock)
        self._feature = ""
        self._total = 0
        self._shared: SharedWork | None = None
        self._file: WorkerFile | None = None
        self._others: list[SeenWorker] = []
        self._committed: set[int] = set()
        """Shards of the shared work, committed by anyone since this call began."""
        self._expected: dict[str, int] = {}
        self._finished: set[str] = set()
        self._bar: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last_beat_s = 0.0
        self._last_line_s = 0.0

    def expect(self, clips: Mapping[FeatureName, int]) -> None:
        """Tell how many clips each feature of this call lacks, so that there can be a total."""
        self._expected = dict(clips.items())

    @contextmanager
    def feature(
        self,
        feature: str,
        *,
        shards: int,
        clips: int,
        shared: SharedWork | None = None,
        verb: str = "encode",
    ) -> Iterator[None]:
        """One feature's work, from loading its model to its last shard.

        Args:
            clips: to be made, by this worker or, if it is `shared`, by all together.
            verb: what is done to them.
        """
        started_s = self._clock()
        self._begin(feature, clips, shared)
        if not self._console.is_terminal:
            self._console.print(f"{feature}: {counted(clips, 'clip')} in {counted(shards, 'shard')} to {verb}")
        over = threading.Event()
        ticker = threading.Thread(target=self._tick_until, args=(over,), name="progress", daemon=True)
        with self._bars(), self._own_file():
            self.tick(force=True)
            ticker.start()
            try:
                yield
                self._finished.add(feature)
            finally:
                over.set()
                ticker.join()
                self.tick(force=True, line=False)
        elapsed_s = self._clock() - started_s
        counts = self._counts
        self._console.print(
            f"{feature}: {counts.clips} clips in {elapsed_s:.1f} s, {format_size(counts.nbytes)}, "
            f"{counts.quarantined} quarantined"
        )

    def shard_begun(self, shard: int) -> None:
        """The first clip of a shard is about to be written."""
        with self._lock:
            self._counts.shard, self._counts.shard_since_s = shard, time.time()
            self._counts.clips_in_shard = 0
            self._counts.rate.add(self._counts.clips)

    def advance(self, clips: int, *, quarantined: int) -> None:
        """Count clips that were written.

        Args:
            quarantined: of the shard so far.
        """
        with self._lock:
            self._counts.clips += clips
            self._counts.clips_in_shard += clips
            self._counts.quarantined_in_shard = quarantined
            self._counts.rate.add(self._counts.clips)

    def shard_done(self, shard: int, *, nbytes: int, quarantined: int) -> None:
        """A shard is committed."""
        with self._lock:
            self._committed.add(shard)
            self._counts.nbytes += nbytes
            self._counts.quarantined_before += quarantined
            self._counts.quarantined_in_shard = self._counts.clips_in_shard = 0
            self._counts.shard = self._counts.shard_since_s = None

    def say(self, message: str) -> None:
        self._console.print(visible(hide_secrets(message)), soft_wrap=True)

    def warn(self, message: str) -> None:
        self._warnings.print(visible(hide_secrets(f"warning: {message}")), soft_wrap=True)

    def tick(self, *, force: bool = False, line: bool = True) -> None:
        """Write what is due: our own file, a look at what the others wrote, the bars or a line."""
        now_s = self._clock()
        if force or now_s - self._last_beat_s >= BEAT_S:
            self._last_beat_s = now_s
            self._exchange()
        together = self.together()
        if self._bar is not None and self._console.is_terminal:
            self._bar.update(self._tasks["feature"], completed=together.clips, speed=describe_together(together))
            if "all" in self._tasks:
                self._bar.update(self._tasks["all"], completed=self._clips_of_all(together))
        elif line and together.clips and now_s - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = now_s
            whole = f" · all features {self._clips_of_all(together)}/{sum(self._expected.values())}"
            self._console.print(
                f"{self._feature}: {together.clips}/{self._total} clips · {describe_together(together)}"
                f"{whole if len(self._expected) > 1 else ''}",
                soft_wrap=True,
            )

    def together(self) -> Together:
        """This worker and the others, as far as they were heard of at the last beat."""
        with self._lock:
            reports = [self._own_report(), *(worker.report for worker in self._others)]
            return add_up(reports, self._total, self._shared, self._committed)

    def _begin(self, feature: str, clips: int, shared: SharedWork | None) -> None:
        self._feature, self._total, self._shared = feature, clips, shared
        self._last_line_s = self._clock()
        with self._lock:
            self._counts = _Counts(self._clock)
            self._others, self._committed = [], set()
        if shared is not None and self._watch:
            forget_dead_workers(shared.storage)

    def _exchange(self) -> None:
        """Tell the other workers how far we are, and look how far they are."""
        if self._shared is None or self._file is None:
            return
        with self._lock:
            own = self._own_report()
        self._file.write(own)
        if not self._watch:
            return
        # a disk that fails is for the stage to report that writes to it
        with contextlib.suppress(OSError, MimirError):
            committed = self._shared.committed()
            others = [worker for worker in workers_at(self._shared) if worker.name != self._file.name]
            with self._lock:
                self._committed |= committed
                self._others = others

    def _own_report(self) -> WorkerReport:
        counts = self._counts
        return describe_self(
            self._feature,
            "" if self._shared is None else self._shared.folder.fingerprint,
            shard=counts.shard,
            since_s=counts.shard_since_s,
            clips_in_shard=counts.clips_in_shard,
            clips=counts.clips,
            nbytes=counts.nbytes,
            quarantined=counts.quarantined,
            clips_per_s=counts.rate.per_s(),
        )

    def _clips_of_all(self, together: Together) -> int:
        before = sum(clips for feature, clips in self._expected.items() if feature in self._finished)
        return before + (0 if self._feature in self._finished else together.clips)

    @contextmanager
    def _bars(self) -> Iterator[None]:
        with RichProgress(*bar_columns(), console=self._console, disable=not self._console.is_terminal) as bar:
            self._bar = bar
            self._tasks = {"feature": bar.add_task(self._feature, total=self._total, speed="")}
            if len(self._expected) > 1:
                self._tasks["all"] = bar.add_task("all", total=sum(self._expected.values()), speed="")
            try:
                yield
            finally:
                self._bar = None

    @contextmanager
    def _own_file(self) -> Iterator[None]:
        if self._shared is None:
            yield
            return
        self._file = WorkerFile(self._shared.storage)
        try:
            with when_stopped(self._file.remove):
                yield
        finally:
            self._file.remove()
            self._file = None

    def _tick_until(self, over: threading.Event) -> None:
        while not over.wait(BAR_EVERY_S if self._console.is_terminal else 1.0):
            self.tick()
