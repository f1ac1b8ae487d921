"""What a person sees while `encode` runs: a live bar on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_LINE_EVERY_S = 10.0


class Progress:
    """Counts clips of the feature that is being made; writes to stderr, so that stdout stays clean."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bar: RichProgress | None = None
        self._feature = ""
        self._clips = 0
        self._total = 0
        self._quarantined_before = 0
        self._quarantined = 0
        self._nbytes = 0
        self._started = 0.0
        self._last_line = 0.0

    @contextmanager
    def feature(self, feature: str, *, shards: int, clips: int, verb: str = "encode") -> Iterator[None]:
        """One feature's work, from loading its model to its last shard; `verb` says what is done."""
        self._feature, self._total, self._clips = feature, clips, 0
        self._nbytes = self._quarantined = self._quarantined_before = 0
        self._started = self._last_line = time.monotonic()
        bar = RichProgress(
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        if not self._console.is_terminal:
            self._console.print(f"{feature}: {clips} clips in {shards} shards to {verb}")
        with bar:
            self._bar = bar
            self._task = bar.add_task(feature, total=clips, speed="")
            try:
                yield
            finally:
                self._bar = None
        elapsed = time.monotonic() - self._started
        self._console.print(
            f"{feature}: {self._clips} clips in {elapsed:.1f} s, {self._nbytes / 1e6:.1f} MB, "
            f"{self._quarantined} quarantined"
        )

    def advance(self, clips: int, *, quarantined: int) -> None:
        """Count clips that were written.

        Args:
            quarantined: of the shard so far.
        """
        self._clips += clips
        self._quarantined = self._quarantined_before + quarantined
        elapsed = max(time.monotonic() - self._started, 1e-6)
        speed = f"{self._clips / elapsed:.1f} clips/s · {self._nbytes / 1e9:.2f} GB · {self._quarantined} quarantined"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._clips, speed=speed)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            left_s = (self._total - self._clips) * elapsed / self._clips
            self._console.print(f"{self._feature}: {self._clips}/{self._total} clips · {speed} · {left_s:.0f} s left")

    def shard_done(self, shard: int, *, nbytes: int, quarantined: int) -> None:
        self._nbytes += nbytes
        self._quarantined_before += quarantined

    def say(self, message: str) -> None:
        self._console.print(message, soft_wrap=True)

    def warn(self, message: str) -> None:
        self._console.print(f"warning: {message}", soft_wrap=True)
