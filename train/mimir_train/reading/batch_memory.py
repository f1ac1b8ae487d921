"""Memory for batches, used again and again: fresh pages cost more than the bytes that are put into them.

A slot is lent out as one array of bytes. It comes back by itself when the last array or tensor that shows it is gone,
so that nobody ever sees a batch change; whoever borrows gives it back by hand, and may see it change after that.
"""

import mmap
import weakref
from collections import deque

import numpy as np


class BatchMemory:
    """Slots of one size."""

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        """
        Args:
            nbytes: of a slot.
            pinned: page-locked, so that a CUDA device copies from it while the program goes on.
        """
        self._nbytes = max(nbytes, 1)
        self._pinned = pinned
        # a deque, for slots come back from whichever thread drops the last tensor, at any moment: no lock may be taken
        self._free: deque[np.ndarray] = deque()
        self.num_slots = 0
        """Allocated so far: as many as were ever in use at once."""

    def lend(self) -> np.ndarray:
        """(nbytes,) uint8, at the start of a page; free again when nothing shows it any more."""
        slot = self._take()
        # by way of a memoryview, numpy takes this array for the owner, and every view of it keeps it alive
        shown = np.frombuffer(slot.data, np.uint8)
        weakref.finalize(shown, self._free.append, slot).atexit = False
        return shown

    def borrow(self) -> np.ndarray:
        """As lend, but free again when `give_back` says so."""
        return self._take()

    def give_back(self, slot: np.ndarray) -> None:
        self._free.append(slot)

    def _take(self) -> np.ndarray:
        try:
            return self._free.popleft()
        except IndexError:
            self.num_slots += 1
            return _allocate_pinned(self._nbytes) if self._pinned else _allocate(self._nbytes)


def _allocate(nbytes: int) -> np.ndarray:
    # zeroed, and taken from the machine when it is first written to; private, for shared memory gets no huge pages
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


def _allocate_pinned(nbytes: int) -> np.ndarray:
    import torch

    array: np.ndarray = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return array
