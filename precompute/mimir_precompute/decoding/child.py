"""The program that decodes one clip after the other for a worker: `python -m mimir_precompute.decoding.child`.

It meets hostile bytes, so it has little to lose: limits on memory and CPU seconds, no core dump, no byte written to
a file, and every descriptor that it may have is in use while it decodes, so that it can open neither file nor socket.
It ends with its worker, whatever ends that. Standard input is a socket of packets, in which requests and replies are
JSON; each request brings two descriptors: the clip's file, and the memory that its pixels are to be written to.
Imports no torch.
"""

import contextlib
import ctypes
import gc
import importlib
import io
import json
import math
import mmap
import os
import pkgutil
import resource
import signal
import socket
import sys
import traceback
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import av
import numpy as np
import PIL.MpoImagePlugin
import PIL.TiffImagePlugin
from PIL import Image

from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.clips.source import SourceFile
from mimir_precompute.config import Bucket, Geometry
from mimir_precompute.decoding.clip_pixels import decode_clip, decode_first_frame, probe_file
from mimir_precompute.decoding.frames import FrameCutter, Orientation, Pixels
from mimir_precompute.decoding.image_file import decode_image

CONTROL = 0
"""Descriptor of the socket to the worker."""
MAX_PACKET_BYTES = 2**16
MAX_DETAIL = 500
"""Characters of a rejection's detail."""

_DESCRIPTORS_WHILE_DECODING = 6  # 0, 1, 2, the clip, the pixels, and the duplicate that Python's mmap keeps
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38

# imported for their effect: Pillow looks for these while it decodes, when no file can be opened any more
_PRELOADED = (PIL.MpoImagePlugin, PIL.TiffImagePlugin)


def main() -> None:
    """Serve one worker until it closes its end. Arguments: the worker's pid, bytes of memory beyond the start."""
    worker, memory_bytes = (int(argument) for argument in sys.argv[1:])
    die_with(worker)
    control = socket.socket(fileno=CONTROL)
    warm_up()
    limit_resources(memory_bytes)
    control.send(b'{"outcome": "ready"}')
    while True:
        packet, descriptors, _, _ = socket.recv_fds(control, MAX_PACKET_BYTES, 2)
        if not packet:
            return
        control.send(json.dumps(answer(json.loads(packet), *descriptors)).encode())


def die_with(worker: int) -> None:
    """Be killed when the thread of the worker that started this process ends, be it by SIGKILL."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != worker:
        os._exit(1)  # it ended before we asked to be told


def warm_up() -> None:
    """Make the libraries open now what they open at first use: later there is no descriptor to open it with."""
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if module.name not in ("av.__main__", "av.datasets"):
            importlib.import_module(module.name)
    frame = np.zeros((16, 16, 3), np.uint8)
    for image_format in ("PNG", "JPEG", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, image_format, exif=Image.Exif())
        decode_image(buffer.getvalue())
    cutter = FrameCutter(
        bucket=Bucket(frames=1, height=16, width=16), orientation=Orientation(), sample_aspect=Fraction(1)
    )
    cutter.cut(av.VideoFrame.from_ndarray(frame, format="rgb24"))


def limit_resources(memory_bytes: int) -> None:
    """Give up, for good, what decoding does not need.

    Memory is limited as address space above what is mapped now. The kernel checks that at each allocation, so there
    is no moment between two looks in which a bomb could fill the machine, and a decoder that is refused memory
    mostly says so instead of dying.
    """
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where the host runs out of memory, this process goes first
    with open("/proc/self/statm") as file:
        mapped_bytes = int(file.read().split()[0]) * mmap.PAGESIZE
    os.chdir("/")
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_AS, mapped_bytes + memory_bytes)
    _limit(resource.RLIMIT_NOFILE, _DESCRIPTORS_WHILE_DECODING)
    _limit(resource.RLIMIT_NPROC, 0)


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def answer(request: dict[str, Any], source: int, shared: int) -> dict[str, Any]:
    """Do what a request asks; both descriptors are closed afterwards.

    Returns: {"outcome": "pixels" | "still" | "info" | "rejected" | "failed" | "machine", …}.
    """
    used_s = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used_s + request["cpu_s"]), hard))
    memory = mmap.mmap(shared, 0)
    try:
        with os.fdopen(source, "rb") as file:
            return _answer(request, SourceFile(file), memory)
    finally:
        gc.collect()  # of arrays in a cycle that would keep the memory mapped
        with contextlib.suppress(BufferError):
            memory.close()
        os.close(shared)


def _answer(request: dict[str, Any], file: SourceFile, memory: mmap.mmap) -> dict[str, Any]:
    try:
        reply = _decode(request, file, memory)
    except ClipRejected as rejection:
        if rejection.reason == "out_of_memory":
            reply = {"outcome": "failed", "reason": "out_of_memory", "what": ""}
        else:
            reply = {"outcome": "rejected", "stage": rejection.stage, "reason": rejection.reason}
            reply["detail"] = "".join(c if c.isprintable() else "?" for c in rejection.detail)[:MAX_DETAIL]
    except MemoryError:
        reply = {"outcome": "failed", "reason": "out_of_memory", "what": ""}
    except Exception as error:  # noqa: BLE001  # whatever a library raises on hostile bytes, the worker must hear of it
        where = traceback.extract_tb(error.__traceback__)[-1].name
        reply = {"outcome": "failed", "reason": "crashed_decoder", "what": f"{type(error).__name__} in {where}"}
    if file.fault is not None:
        return {"outcome": "machine", "errno": file.fault.errno}
    return reply


def _decode(request: dict[str, Any], file: SourceFile, memory: mmap.mmap) -> dict[str, Any]:
    def allocate(bucket: Bucket) -> Pixels:
        shape = (bucket.frames, bucket.height, bucket.width, 3)
        return np.frombuffer(memory, np.uint8, math.prod(shape)).reshape(shape)

    match request["want"]:
        case "pixels":
            geometry = Geometry(buckets=tuple(map(Bucket.parse, request["buckets"])), fps=request["fps"])
            _, bucket = decode_clip(
                file, geometry=geometry, start_s=request["start_s"], end_s=request["end_s"], allocate=allocate
            )
            return {"outcome": "pixels", "bucket": str(bucket)}
        case "still":
            still = decode_first_frame(file, longest_side=request["longest_side"], start_s=request["start_s"])
            allocate(Bucket(frames=1, height=still.shape[0], width=still.shape[1]))[0] = still
            return {"outcome": "still", "height": still.shape[0], "width": still.shape[1]}
        case "info":
            return {"outcome": "info", **asdict(probe_file(file))}
        case other:
            raise AssertionError(f"asked for {other!r}")


if __name__ == "__main__":
    main()
