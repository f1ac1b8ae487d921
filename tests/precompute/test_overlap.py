"""Threads that hand things on: order, bounds, and how the first failure ends them all."""

import threading
import time
from collections.abc import Callable

import pytest

from mimir_precompute.overlap import Channel, Crew, Stopped

SOON_S = 20.0
"""Longer than any of this takes on a busy machine: a test that hangs fails."""


def in_time(work: Callable[[], None]) -> None:
    """Run a test's body in a thread; fail if it does not end."""
    fault: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as raised:  # handed on  # noqa: BLE001
            fault.append(raised)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SOON_S)
    assert not thread.is_alive(), "hangs"
    if fault:
        raise fault[0]


def test_items_arrive_in_order_and_iteration_ends_after_the_last() -> None:
    got: list[int] = []

    def work() -> None:
        with Crew() as crew:
            numbers: Channel[int] = crew.channel(2)
            crew.start("take", lambda: got.extend(numbers))
            for number in range(100):
                numbers.put(number)
            numbers.close()

    in_time(work)
    assert got == list(range(100))


def test_whoever_is_ahead_waits() -> None:
    put: list[int] = []
    may_take = threading.Event()

    def work() -> None:
        with Crew() as crew:
            numbers: Channel[int] = crew.channel(3)

            def give() -> None:
                for number in range(10):
                    numbers.put(number)
                    put.append(number)
                numbers.close()

            crew.start("give", give)
            assert may_take.wait(SOON_S)
            assert list(numbers) == list(range(10))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    deadline = time.monotonic() + SOON_S
    while len(put) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert put == [0, 1, 2]
    may_take.set()
    thread.join(SOON_S)
    assert put == list(range(10))


def test_the_first_failure_of_a_thread_ends_the_block_with_its_own_traceback() -> None:
    seen: list[str] = []

    def fail() -> None:
        raise ValueError("the disk burns") from OSError(5, "EIO")

    def wait_for_ever(numbers: Channel[int]) -> None:
        try:
            numbers.get()
        except Stopped:
            seen.append("stopped")
            raise

    def work() -> None:
        with Crew() as crew:
            numbers: Channel[int] = crew.channel(1)
            crew.start("wait", lambda: wait_for_ever(numbers))
            crew.start("fail", fail)
            crew.channel(1).get()

    with pytest.raises(ValueError, match="the disk burns") as caught:
        in_time(work)
    assert seen == ["stopped"]
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__context__ is None, "not our own Stopped"
    assert "fail" in [entry.name for entry in caught.traceback]


def test_a_failure_of_the_block_itself_stops_the_threads_and_is_raised() -> None:
    ended = threading.Event()

    def wait_for_ever(numbers: Channel[int]) -> None:
        try:
            numbers.get()
        finally:
            ended.set()

    def work() -> None:
        with Crew() as crew:
            numbers: Channel[int] = crew.channel(1)
            crew.start("wait", lambda: wait_for_ever(numbers))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_time(work)
    assert ended.is_set()


def test_a_failure_after_the_block_has_nothing_left_to_do_is_raised_too() -> None:
    def fail(numbers: Channel[int]) -> None:
        assert list(numbers) == [1]
        raise ValueError("at the very end")

    def work() -> None:
        with Crew() as crew:
            numbers: Channel[int] = crew.channel(1)
            crew.start("fail", lambda: fail(numbers))
            numbers.put(1)
            numbers.close()

    with pytest.raises(ValueError, match="at the very end"):
        in_time(work)


def test_a_thread_that_waits_elsewhere_is_woken_by_its_own_means() -> None:
    elsewhere = threading.Event()

    def work() -> None:
        with Crew() as crew:
            crew.start("elsewhere", lambda: assert_true(elsewhere.wait(SOON_S)), wake=elsewhere.set)
            raise ValueError("now")

    with pytest.raises(ValueError, match="now"):
        in_time(work)
    assert elsewhere.is_set()


def assert_true(value: bool) -> None:
    assert value
