"""How workers are killed: at random moments, or at a named point of the commit protocol."""

import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mimir_shared import failpoints
from tests.faults.workers import end_of, kill, start

KNOWN = failpoints.DECLARED | failpoints.PUBLISHING


class Counter:
    """A number that outlives the process that counted."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def add(self) -> int:
        self._memory[:] = struct.pack("q", self.value + 1)
        return self.value

    @property
    def value(self) -> int:
        return int(struct.unpack("q", self._memory[:])[0])


def die_at(point: str, countdown: int, passed: Counter) -> None:
    """Have this process kill itself when it comes to a failpoint for the `countdown`-th time."""
    hits = 0

    def action(name: str) -> None:
        nonlocal hits
        assert name in KNOWN, name
        if name == point:
            passed.add()
            hits += 1
            if hits == countdown:
                os.kill(os.getpid(), signal.SIGKILL)

    failpoints.arm(action)


@dataclass
class RandomKills:
    """Keeps several workers at one cache and kills one after the other, then lets the last ones finish."""

    work: Callable[[], object]
    workers: int = 3
    kills: int = 20
    pause_s: tuple[float, float] = (0.0, 0.08)
    seed: int = 0
    done: int = field(default=0, init=False)
    """Kills that met a running worker."""

    def run(self) -> None:
        choose = random.Random(self.seed)
        pids = [start(self.work) for _ in range(self.workers)]
        while self.done < self.kills:
            time.sleep(choose.uniform(*self.pause_s))
            victim = choose.choice(pids)
            kill(victim)
            code = end_of(victim)
            assert code in (0, -signal.SIGKILL), f"a worker ended with {code} before it was killed"
            self.done += code != 0
            pids[pids.index(victim)] = start(self.work)
        for pid in pids:
            assert end_of(pid) == 0
