"""Several workers on one cache, seen from the one who started them: watched, started again, ended together.

What is done stands in the commit records, so a worker may die at any moment; another takes its shard over. Where the
workers run is another module's to know (local_workers.py, ray_executor.py).
"""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from mimir_precompute.pipeline import FeatureOutcome
from mimir_precompute.team.worker_task import WorkerTask
from mimir_shared.errors import CacheError, InputError, MachineError, MimirError, TooManyQuarantinedError
from mimir_shared.features import FeatureName
from mimir_shared.redaction import hide_secrets
from mimir_shared.wording import counted

MAX_RESTARTS: Final = 3
"""So often in a row a worker is started again. One that has worked for _STEADY_S begins to count anew."""
_STEADY_S: Final = 600.0
BACKOFF_S: Final = 1.0
_BACKOFF_FACTOR: Final = 5
_LOOK_EVERY_S: Final = 0.1
_STOP_WITHIN_S: Final = 8.0


class WorkerBugError(MimirError):
    """A worker ended by a fault of ours; its traceback stands above."""

    exit_code = 1


_ERRORS: Final[dict[int, type[MimirError]]] = {
    error.exit_code: error for error in (WorkerBugError, InputError, TooManyQuarantinedError, CacheError, MachineError)
}
_FINAL: Final = frozenset((InputError.exit_code, TooManyQuarantinedError.exit_code, CacheError.exit_code))
"""What one worker fails with, every worker would."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a worker ended."""

    outcomes: tuple[FeatureOutcome, ...] | None = None
    """Of one that came to its end."""
    exit_code: int = 0
    """Of one that failed with an error; 0 for one that just died."""
    message: str = ""
    """That error, or of what it died: "was killed by SIGKILL"."""

    def describe(self) -> str:
        return f"failed: {self.message}" if self.exit_code else self.message


def ending_of(work: Callable[[], Sequence[FeatureOutcome]]) -> Ending:
    """Do a worker's work; what it raises is told here in full if it is a fault of ours, and to the team in one line."""
    try:
        return Ending(outcomes=tuple(work()))
    except MimirError as error:
        return Ending(exit_code=error.exit_code, message=hide_secrets(str(error)))
    except Exception as error:  # noqa: BLE001  # of any kind: whoever started this worker must hear of it
        sys.stderr.write(hide_secrets(traceback.format_exc()))
        return Ending(exit_code=1, message=hide_secrets(f"{type(error).__name__}: {error}"))


class RunningWorker(Protocol):
    """A worker somewhere."""

    @property
    def name(self) -> str:
        """For a person: "worker 3 (GPU 3)"."""
        ...

    def ending(self) -> Ending | None:
        """None while it works. Does not wait."""
        ...

    def stop(self) -> None:
        """Ask it to end within seconds. May be called of one that has ended."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


class TeamWatcher(Protocol):
    """Who is shown how the team fares."""

    def tick(self) -> None: ...

    def warn(self, message: str) -> None: ...


@dataclass(kw_only=True)
class _Place:
    """One worker's task, and whoever does it at the moment."""

    task: WorkerTask
    worker: RunningWorker | None = None
    started_s: float = 0.0
    start_again_s: float = 0.0
    deaths: int = 0
    """In a row."""
    last: Ending | None = None
    is_over: bool = False
    """It came to its end, or is given up."""

    @property
    def came_to_its_end(self) -> bool:
        return self.is_over and self.last is not None and self.last.outcomes is not None


class Team:
    """Starts a worker for each task and sees all of them to their end.

    Args:
        start: starts a worker; raises MachineError where it cannot.
        backoff_s: pause before a worker that died is started again; five times as long each time.
        clock: seconds.
    """

    def __init__(
        self,
        tasks: Sequence[WorkerTask],
        start: Callable[[WorkerTask], RunningWorker],
        watcher: TeamWatcher,
        *,
        backoff_s: float = BACKOFF_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._places = [_Place(task=task) for task in tasks]
        self._start = start
        self._watcher = watcher
        self._backoff_s = backoff_s
        self._clock = clock
        self._lock = threading.Lock()
        self._stopping = False

    def run(self) -> list[FeatureOutcome]:
        """What the workers that came to their end made, feature by feature and worker by worker.

        Raises: the error of a worker, once it is certain that the work cannot be finished: at once where every worker
            would fail alike (exit codes 2, 3 and 4), else when no worker is left for one of the features.
        """
        try:
            while not all(place.is_over for place in self._places):
                for place in self._places:
                    self._look_after(place)
                self._watcher.tick()
                time.sleep(_LOOK_EVERY_S)
        finally:
            self.stop()
        endings = [place.last for place in self._places if place.last is not None]
        return [outcome for ending in endings for outcome in ending.outcomes or ()]

    def stop(self) -> None:
        """End every worker within seconds; none is started any more. May be called by another thread, and twice."""
        with self._lock:
            self._stopping = True
            workers = [place.worker for place in self._places if place.worker is not None]
        for worker in workers:
            worker.stop()
        deadline_s = time.monotonic() + _STOP_WITHIN_S
        while (left := [worker for worker in workers if worker.ending() is None]) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        for worker in left:
            worker.kill()

    def _look_after(self, place: _Place) -> None:
        if place.is_over:
            return
        if place.worker is None:
            if self._clock() >= place.start_again_s:
                with self._lock:
                    if not self._stopping:
                        place.worker = self._start(place.task)
                        place.started_s = self._clock()
            return
        ending = place.worker.ending()
        if ending is not None:
            name = place.worker.name
            with self._lock:
                place.worker = None
                if self._stopping:
                    return  # it was asked to
            self._see_to_ending(place, name, ending)

    def _see_to_ending(self, place: _Place, name: str, ending: Ending) -> None:
        same_again = place.last is not None and ending.exit_code != 0 and ending == place.last
        if self._clock() - place.started_s >= _STEADY_S:
            place.deaths = 0
        place.last = ending
        if ending.outcomes is not None:
            place.is_over = True
            return
        if ending.exit_code in _FINAL:
            raise _ERRORS[ending.exit_code](ending.message)
        place.deaths += 1
        if same_again or place.deaths > MAX_RESTARTS:
            self._give_up(place, name, ending)
            return
        pause_s = self._backoff_s * _BACKOFF_FACTOR ** (place.deaths - 1)
        place.start_again_s = self._clock() + pause_s
        self._watcher.warn(
            f"{name} {ending.describe()}; it is started again in {pause_s:.0f} s ({place.deaths} of {MAX_RESTARTS}), "
            f"and what it had not committed is made by whoever comes first"
        )

    def _give_up(self, place: _Place, name: str, ending: Ending) -> None:
        place.is_over = True
        lost = self._feature_without_workers()
        if lost is None:
            self._watcher.warn(f"{name} is given up, for it {ending.describe()}; the others go on without it")
            return
        raise _ERRORS.get(ending.exit_code, MachineError)(
            f"{name} ended {counted(place.deaths, 'time')} in a row, and nobody is left to make {lost}; the last time "
            f"it {ending.describe()}; what is committed stays: see to it and run the same command again"
        )

    def _feature_without_workers(self) -> FeatureName | None:
        """A feature that none of those who are left, or have come to their end, makes."""
        of_use = [place for place in self._places if not place.is_over or place.came_to_its_end]
        for place in self._places:
            for feature in place.task.features:
                if not any(feature in other.task.features for other in of_use):
                    return feature
        return None
