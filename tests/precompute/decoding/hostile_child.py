"""A decoding child that misbehaves when a clip asks it to: the clip's bytes end with MISBEHAVE:<how>.

The product's child has no such hook; tests start this program in its place.
"""

import ctypes
import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from mimir_precompute.clips.source import SourceFile
from mimir_precompute.decoding import child as decode_child

MARK = b"MISBEHAVE:"
_poisoned: list[str] = []
_true_decode = decode_child.decode_clip
_libc = ctypes.CDLL(None)


def _misbehaviour(file: SourceFile) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 64))
    _, mark, how = file.read().rpartition(MARK)
    file.seek(0)
    return how.decode() if mark else ""


def _spin(cpu_s: float) -> None:
    until = time.process_time() + cpu_s
    while time.process_time() < until:
        pass


def _allocate_in_python() -> None:
    hoard = []
    while True:
        hoard.append(bytearray(2**24))


def _allocate_in_c() -> None:
    _libc.malloc.restype = ctypes.c_void_p
    while True:
        place = _libc.malloc(ctypes.c_size_t(2**24))
        if not place:
            os.abort()  # as a library does that does not look at what malloc returns
        ctypes.memset(place, 1, 2**24)


def _work_slowly() -> None:
    for _ in range(10):
        _spin(0.07)
        time.sleep(0.25)


def _fail_to_read(file: SourceFile) -> None:
    file.fault = OSError(errno.EIO, "Input/output error")


def _raise_unlisted() -> None:
    raise LookupError("/secret/path")


def _find_a_way_out() -> None:
    """Every one of these must fail; one that works is reported as a crash of another kind."""
    ways: dict[str, Callable[[], Any]] = {
        "read": lambda: os.open("/etc/hostname", os.O_RDONLY),
        "write": lambda: os.open("/tmp/canary", os.O_CREAT | os.O_WRONLY),
        "connect": lambda: socket.socket(),
        "listen": lambda: socket.socketpair(),
        "pipe": lambda: os.pipe(),
        "shrink": lambda: os.ftruncate(4, 0),
        "print": lambda: os.write(2, b"canary"),
    }
    for name, way in ways.items():
        try:
            way()
        except OSError:
            continue
        raise RuntimeError(name)


_DEEDS: dict[str, Callable[[], Any]] = {
    "hang": lambda: time.sleep(3600),
    "hang with the lock": lambda: ctypes.PyDLL(None).pause(),
    "spin": lambda: _spin(3600),
    "work slowly": _work_slowly,
    "take a second": lambda: time.sleep(1),
    "abort": os.abort,
    "segfault": lambda: ctypes.string_at(0),
    "overflow": lambda: os.kill(os.getpid(), signal.SIGFPE),
    "leave": lambda: os._exit(0),
    "leave with an error": lambda: os._exit(3),
    "be killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "allocate in python": _allocate_in_python,
    "allocate in c": _allocate_in_c,
    "raise": _raise_unlisted,
    "find a way out": _find_a_way_out,
    "poison": lambda: _poisoned.append(""),
}

_ANSWERS: dict[str, bytes] = {
    "say nothing sensible": b"\xff\xfe{",
    "say nothing": b"{}",
    "claim another bucket": b'{"outcome": "pixels", "bucket": "4097x4096x4096"}',
    "claim a bucket and more": b'{"outcome": "pixels", "bucket": "9x64x96", "__reduce__": "os.system"}',
    "claim a picture": b'{"outcome": "still", "height": 1000000, "width": 1000000}',
    "claim a length": b'{"outcome": "info", "frames": 1e999}',
    "claim a reason": b'{"outcome": "rejected", "stage": "decode", "reason": "missing", "detail": ""}',
    "send control characters": b'{"outcome": "rejected", "stage": "decode", "reason": "too_large", "detail": "\\t"}',
    "claim a fault": b'{"outcome": "machine", "errno": 99999999999999999999}',
    "nest": b"[" * 60000,
}


def _decode(file: SourceFile, **options: Any) -> Any:
    how = _misbehaviour(file)
    if _poisoned:
        os.abort()
    if how == "fail to read":
        _fail_to_read(file)
    if how in _ANSWERS:
        socket.socket(fileno=decode_child.CONTROL).send(_ANSWERS[how])
        time.sleep(3600)
    if how in _DEEDS:
        _DEEDS[how]()
    return _true_decode(file, **options)


if __name__ == "__main__":
    decode_child.decode_clip = _decode  # type: ignore[assignment]
    decode_child.main()
