"""What a person sees while a team of workers encodes: one view of all, by whoever started them.

The workers are quiet; their warnings come through, each with the worker's name before it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as RichProgress

from mimir_precompute.workers.progress import BAR_EVERY_S, LINE_EVERY_S, bar_columns
from mimir_precompute.workers.seen import BEAT_S, forget_dead_workers
from mimir_precompute.workers.together import SharedWork, Together, add_up, describe_together, workers_at
from mimir_shared.command_line import visible
from mimir_shared.errors import MimirError
from mimir_shared.features import FeatureName
from mimir_shared.redaction import hide_secrets
from mimir_shared.wording import counted


class TeamView:
    """A bar for each feature on a terminal, lines now and then elsewhere; on stderr.

    Args:
        works: what is to be made, at the beginning; features of which nothing is missing are left out.
        clock: seconds.
    """

    def __init__(
        self,
        works: Sequence[SharedWork],
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._works: Mapping[FeatureName, SharedWork] = {work.folder.feature: work for work in works}
        self._totals = {feature: sum(work.clips_of_shard.values()) for feature, work in self._works.items()}
        self._console = console or Console(stderr=True, highlight=False, markup=False)
        self._clock = clock
        self._together: dict[FeatureName, Together] = {}
        self._told_finished: set[FeatureName] = set()
        self._bars = RichProgress(*bar_columns(), console=self._console, disable=not self._console.is_terminal)
        self._last_beat_s = self._last_line_s = self._last_bar_s = clock()

    @contextmanager
    def showing(self, workers: str) -> Iterator[None]:
        """The work, from its beginning to its end.

        Args:
            workers: "8 workers, one on each GPU".
        """
        for feature, work in self._works.items():
            forget_dead_workers(work.storage)
            self.say(
                f"{feature}: {counted(self._totals[feature], 'clip')} in "
                f"{counted(len(work.clips_of_shard), 'shard')} to encode"
            )
        self.say(f"{workers}; `mimir-precompute status` names them")
        tasks = {
            feature: self._bars.add_task(feature, total=self._totals[feature], speed="") for feature in self._works
        }
        self._tasks = tasks
        with self._bars:
            yield
            self.tick(force=True)

    def say(self, message: str) -> None:
        """Print a line above the bars. Safe between threads."""
        self._console.print(visible(hide_secrets(message)), soft_wrap=True)

    def warn(self, message: str) -> None:
        self.say(f"warning: {message}")

    def tick(self, *, force: bool = False) -> None:
        """Show what is due."""
        now_s = self._clock()
        if force or now_s - self._last_beat_s >= BEAT_S:
            self._last_beat_s = now_s
            # a disk that fails is for the workers to tell of
            with contextlib.suppress(OSError, MimirError):
                self._look()
        if self._console.is_terminal:
            if force or now_s - self._last_bar_s >= BAR_EVERY_S:
                self._last_bar_s = now_s
                for feature, together in self._together.items():
                    self._bars.update(self._tasks[feature], completed=together.clips, speed=describe_together(together))
        elif not force and now_s - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = now_s
            for feature, together in self._together.items():
                if together.workers and feature not in self._told_finished:
                    self.say(f"{feature}: {together.clips}/{together.total} clips · {describe_together(together)}")

    def _look(self) -> None:
        for feature, work in self._works.items():
            if feature in self._told_finished:
                continue
            committed = work.committed()
            reports = [worker.report for worker in workers_at(work)]
            self._together[feature] = add_up(reports, self._totals[feature], work, committed)
            if len(committed) == len(work.clips_of_shard):
                self._told_finished.add(feature)
                self.say(f"{feature}: all {counted(self._totals[feature], 'clip')} are done")
