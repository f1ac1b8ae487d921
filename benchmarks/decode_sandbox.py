"""What decoding in a child process costs, in CPU time, against decoding in the process itself.

python benchmarks/decode_sandbox.py CLIP [--clips 20]
"""

import argparse
import resource
import sys
import time
from pathlib import Path

from mimir_precompute.config import Bucket, Geometry
from mimir_precompute.decoding.clip_pixels import ClipDecoder, ClipPixels, DecodeInProcess
from mimir_precompute.decoding.sandbox import DecodeSandbox

GEOMETRY = Geometry(buckets=(Bucket(frames=49, height=480, width=720),), fps=8)


def read_through(clip: ClipPixels) -> None:
    """Touch every page of the pixels, as whoever encodes them does."""
    clip.pixels.reshape(-1)[::4096].max()


def cpu_s(decoder: ClipDecoder, path: Path, clips: int) -> float:
    """CPU seconds of this process for each clip, after a first one that is not counted."""
    read_through(decoder.decode(path, geometry=GEOMETRY))
    started = time.process_time()
    for _ in range(clips):
        read_through(decoder.decode(path, geometry=GEOMETRY))
    return (time.process_time() - started) / clips


def children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--clips", type=int, default=20)
    arguments = parser.parse_args()
    in_process_s = cpu_s(DecodeInProcess(), arguments.clip, arguments.clips)
    with DecodeSandbox() as sandbox:
        sandbox.probe(arguments.clip)
    start_s = children_cpu_s()  # of one child that has done next to nothing
    with DecodeSandbox() as sandbox:
        worker_s = cpu_s(sandbox, arguments.clip, arguments.clips)
    child_s = (children_cpu_s() - 2 * start_s) / (arguments.clips + 1)
    sys.stdout.write(
        f"in the process {in_process_s * 1e3:.0f} ms of CPU a clip\n"
        f"in a child     {child_s * 1e3:.0f} ms there and {worker_s * 1e3:.0f} ms here\n"
        f"start          {start_s * 1e3:.0f} ms a child\n"
    )


if __name__ == "__main__":
    main()
