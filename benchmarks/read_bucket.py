"""How fast ranges of 3.5 MB come from a service that takes 20 ms to begin, by threads, by asyncio, from a near disk.

python -m benchmarks.read_bucket [--reads 128] [--repetitions 5]

The service is a plain web server in another process on this machine: it and the client share its cores, so that the
highest rates are the server's. What the figures say is how many requests at a time hide the way to a bucket, and
whether asyncio would do better than the threads that read anyway.
"""

import argparse
import asyncio
import http.server
import multiprocessing
import os
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import obstore
from obstore.store import S3Store

from mimir_shared.storage.bucket import ObjectStorage
from mimir_shared.storage.local_read_cache import LocalReadCache

RANGE_BYTES = 3_500_000
OBJECT_BYTES = 900_000_000
DELAY_S = 0.02
NAME = "latents/abc/data/000000-00000000.tar"


class _Service(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    content = bytes(RANGE_BYTES)

    def do_GET(self) -> None:
        time.sleep(DELAY_S)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert found is not None, self.headers["Range"]
        first, last = int(found[1]), int(found[2])
        self.send_response(206)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Content-Range", f"bytes {first}-{last}/{OBJECT_BYTES}")
        self.send_header("Last-Modified", "Sun, 22 Nov 2026 00:00:00 GMT")
        self.send_header("ETag", '"0"')
        self.end_headers()
        self.wfile.write(memoryview(self.content)[: last - first + 1])

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def _serve(port: Connection) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Service)
    port.send(server.server_port)
    server.serve_forever()


def _offsets(reads: int) -> list[int]:
    return [number * RANGE_BYTES % (OBJECT_BYTES - RANGE_BYTES) for number in range(reads)]


def read_by_threads(storage: ObjectStorage, reads: int, threads: int) -> None:
    def read(offset: int) -> None:
        assert storage.read_into(NAME, offset, [memoryview(bytearray(RANGE_BYTES))]) == RANGE_BYTES

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, _offsets(reads)))


def read_by_asyncio(store: S3Store, reads: int, at_a_time: int) -> None:
    async def read_all() -> None:
        slots = asyncio.Semaphore(at_a_time)

        async def read(offset: int) -> None:
            async with slots:
                answer = await obstore.get_async(store, NAME, options={"range": (offset, offset + RANGE_BYTES)})
                memoryview(bytearray(RANGE_BYTES))[:] = memoryview(await answer.bytes_async())

        await asyncio.gather(*map(read, _offsets(reads)))

    asyncio.run(read_all())


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(cases: dict[str, Callable[[], None]], gigabytes: float, repetitions: int) -> None:
    """Run all cases in turns and print a table of medians."""
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, run in cases.items():
            began, cpu = time.monotonic(), _cpu_s()
            run()
            rates[name].append((gigabytes * 1000 / (time.monotonic() - began), (_cpu_s() - cpu) / gigabytes))
    print("| how | MB/s | CPU s/GB |\n|---|---|---|")  # noqa: T201
    for name, found in rates.items():
        rate, cpu = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"| {name} | {rate:.0f} | {cpu:.2f} |")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reads", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(sender,), daemon=True)
    server.start()
    endpoint = f"http://127.0.0.1:{receiver.recv()}"
    os.environ.update(AWS_ENDPOINT_URL=endpoint, AWS_SKIP_SIGNATURE="true")
    storage = ObjectStorage("s3://bucket/cache")
    store = S3Store("bucket", prefix="cache", client_options={"allow_http": True})
    with tempfile.TemporaryDirectory() as folder:
        near = ObjectStorage("s3://bucket/cache", LocalReadCache(Path(folder), 10 * arguments.reads * RANGE_BYTES))
        read_by_threads(near, arguments.reads, 8)
        cases: dict[str, Callable[[], None]] = {
            f"{n} thread{'s' * (n > 1)}": partial(read_by_threads, storage, arguments.reads, n) for n in (1, 4, 16, 32)
        }
        cases |= {f"asyncio, {n} at a time": partial(read_by_asyncio, store, arguments.reads, n) for n in (16, 32)}
        cases["4 threads, kept on a near disk"] = partial(read_by_threads, near, arguments.reads, 4)
        measure(cases, arguments.reads * RANGE_BYTES / 1e9, arguments.repetitions)
    server.terminate()


if __name__ == "__main__":
    main()
