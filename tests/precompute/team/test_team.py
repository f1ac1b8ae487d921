"""What becomes of workers that end: by fake workers and a clock of the test's own."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from mimir_precompute.config import DecodeLimits, ModelOptions
from mimir_precompute.pipeline import FeatureOutcome
from mimir_precompute.team import team
from mimir_precompute.team.team import Ending, Team, WorkerBugError
from mimir_precompute.team.worker_task import WorkerTask
from mimir_shared.errors import CacheError, InputError, MachineError, TooManyQuarantinedError
from mimir_shared.features import FeatureName

DIED = Ending(message="was killed by SIGKILL")
DONE = Ending(outcomes=(FeatureOutcome(feature="t5", shards_made=1),))


@dataclass
class FakeWorker:
    """It has ended the moment it is looked at, unless it goes on until it is stopped."""

    name: str
    end: Ending | None
    asked_to_stop: bool = False

    def ending(self) -> Ending | None:
        return Ending(exit_code=143) if self.asked_to_stop else self.end

    def stop(self) -> None:
        self.asked_to_stop = True

    def kill(self) -> None:
        self.asked_to_stop = True


@dataclass
class Office:
    """Starts workers by a script, lets time pass and keeps what is told."""

    script: dict[int, list[Ending | None]]
    """Worker → how each one that is started for it ends; the last again and again."""
    lives_s: float = 1.0
    now_s: float = 0.0
    warned: list[str] = field(default_factory=list)
    started: list[tuple[int, float]] = field(default_factory=list)
    workers: list[FakeWorker] = field(default_factory=list)
    each_tick: Callable[[], None] = lambda: None

    def start(self, task: WorkerTask) -> FakeWorker:
        self.started.append((task.number, self.now_s))
        script = self.script[task.number]
        self.workers.append(FakeWorker(f"worker {task.number}", script.pop(0) if len(script) > 1 else script[0]))
        return self.workers[-1]

    def tick(self) -> None:
        self.now_s += self.lives_s
        self.each_tick()

    def warn(self, message: str) -> None:
        self.warned.append(message)

    def team(self, features: dict[int, tuple[FeatureName, ...]] | None = None) -> Team:
        tasks = [make_task(number, (features or {}).get(number, ("t5",))) for number in self.script]
        return Team(tasks, self.start, self, clock=lambda: self.now_s)


def make_task(number: int, features: tuple[FeatureName, ...]) -> WorkerTask:
    return WorkerTask(
        number=number, cache="cache", models=ModelOptions(), features=features, shards=(0,), data_format=None,
        on_mismatch="error", decode_workers=1, decode_limits=DecodeLimits(), max_quarantined=0.01,
        accept_quarantine=False,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_LOOK_EVERY_S", 0)
    monkeypatch.setattr(team, "_STOP_WITHIN_S", 0.1)


def test_a_team_ends_when_every_worker_has_and_says_what_they_made() -> None:
    office = Office({0: [DONE], 1: [DONE]})
    assert [made.shards_made for made in office.team().run()] == [1, 1]
    assert office.warned == []


def test_a_worker_that_dies_is_started_again_after_a_pause_that_grows() -> None:
    office = Office({0: [DIED, DIED, DIED, DONE]})
    office.team().run()
    pauses = [second - first for (_, first), (_, second) in zip(office.started, office.started[1:], strict=False)]
    assert [pause // 5 for pause in pauses] == [0, 1, 5]  # 1, 5 and 25 s, and a second or two of life
    assert office.warned[0] == (
        "worker 0 was killed by SIGKILL; it is started again in 1 s (1 of 3), and what it had not committed is made by "
        "whoever comes first"
    )


def test_a_worker_that_dies_four_times_in_a_row_ends_the_run_where_nobody_else_is_left() -> None:
    office = Office({0: [DIED]})
    with pytest.raises(MachineError, match="worker 0 ended 4 times in a row, and nobody is left to make t5; the last"):
        office.team().run()
    assert len(office.started) == 4


def test_the_others_go_on_without_a_worker_that_is_given_up() -> None:
    office = Office({0: [DIED], 1: [None]})
    office.each_tick = lambda: setattr(office.workers[1], "end", DONE if len(office.started) == 5 else None)
    assert len(office.team().run()) == 1
    assert office.warned[-1] == ("worker 0 is given up, for it was killed by SIGKILL; the others go on without it")


def test_a_feature_that_a_lost_worker_alone_makes_ends_the_run_though_others_wait_for_it() -> None:
    office = Office({0: [DIED], 1: [None]})
    with pytest.raises(MachineError, match="nobody is left to make answers"):
        office.team({0: ("answers",), 1: ("llm",)}).run()
    assert office.workers[1].asked_to_stop


def test_a_worker_that_worked_long_before_it_died_counts_anew() -> None:
    office = Office({0: [DIED, DIED, DIED, DIED, DIED, DIED, DONE]}, lives_s=601)
    office.team().run()
    assert len(office.started) == 7


@pytest.mark.parametrize(
    ("code", "kind"), [(2, InputError), (3, TooManyQuarantinedError), (4, CacheError)], ids=["2", "3", "4"]
)
def test_an_error_that_all_would_meet_ends_all_at_once(code: int, kind: type[Exception]) -> None:
    office = Office({0: [Ending(exit_code=code, message="wrong is this")], 1: [None]})
    with pytest.raises(kind, match=r"^wrong is this$"):
        office.team().run()
    assert office.workers[1].asked_to_stop
    assert len(office.started) == 2


def test_a_fault_of_the_machine_is_tried_again_and_the_same_one_twice_is_not() -> None:
    broken = Ending(exit_code=5, message="the mount is broken")
    office = Office({0: [broken]})
    with pytest.raises(MachineError, match=r"ended 2 times in a row.*it failed: the mount is broken"):
        office.team().run()
    office = Office({0: [broken, DONE]})
    office.team().run()
    office = Office({0: [broken, DIED, broken, DONE]})
    office.team().run()
    assert len(office.started) == 4


def test_a_fault_of_ours_ends_with_exit_code_1_when_it_comes_again() -> None:
    office = Office({0: [Ending(exit_code=1, message="AssertionError: no")]})
    with pytest.raises(WorkerBugError, match="it failed: AssertionError: no") as raised:
        office.team().run()
    assert raised.value.exit_code == 1


def test_nobody_is_started_once_the_team_is_stopped() -> None:
    office = Office({0: [DIED], 1: [None]})
    members = office.team()

    def stop_at_fifth_second() -> None:
        if office.now_s == 5:
            members.stop()
            raise KeyboardInterrupt

    office.each_tick = stop_at_fifth_second
    with pytest.raises(KeyboardInterrupt):
        members.run()
    assert [worker.name for worker in office.workers if not worker.asked_to_stop and worker.end is None] == []
    before = len(office.started)
    members._look_after(members._places[0])
    assert len(office.started) == before
