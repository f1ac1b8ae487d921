"""Faults of an accelerator as this program tells them: of the machine, and no traceback. No torch here."""

from collections.abc import Iterator
from contextlib import contextmanager

from mimir_shared.errors import MachineError


@contextmanager
def device_faults(where: str, *, for_want_of_memory: str) -> Iterator[None]:
    """Turn what torch raises where a device has no memory left, or fails, into a MachineError; others pass as they are.

    Args:
        where: what was being done, for the message.
        for_want_of_memory: what takes less memory.
    """
    try:
        yield
    except RuntimeError as fault:
        told = " ".join((str(fault).splitlines() or ["no more is known"])[0].split())[:300]
        match type(fault).__name__:  # of classes of torch, which would take a second to import
            case "OutOfMemoryError":
                raise MachineError(
                    f"{where}: the device has not memory enough ({told}); {for_want_of_memory}, or take another device"
                ) from fault
            case "AcceleratorError":
                raise MachineError(
                    f"{where}: the device failed ({told}); nothing that was committed or saved is lost: run the same "
                    f"command again, on another device if it comes back"
                ) from fault
        raise
