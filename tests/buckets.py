"""Buckets on this machine: moto's server, and what a client needs to find it."""

import logging
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moto.server import ThreadedMotoServer

from mimir_shared.bucket_requests import RequestLimits
from mimir_shared.object_storage import ObjectStorage

SECRET = "canary5ecretNeverToBeSeen"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIACANARYKEYID",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": f"{SECRET}Token",
    "AWS_REGION": "us-east-1",
}
QUICK = RequestLimits(connect_s=1.0, request_s=0.6, action_s=10.0, first_pause_s=0.01, longest_pause_s=0.1)
"""For tests: what a minute's trouble is to a real service passes in a second."""


@contextmanager
def moto_server() -> Iterator[int]:
    """Port of a server of its own."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


def new_bucket(port: int) -> str:
    """Name of a bucket that is empty."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/{name}", method="PUT")).close()
    return name


def environment(endpoint: str) -> Mapping[str, str]:
    """Variables with which a client reaches a service on this machine."""
    return {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}


def upload(folder: Path, storage: ObjectStorage) -> int:
    """Copy a cache from a folder to a bucket, as a user would. Returns the number of files."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        assert storage.create(path.relative_to(folder).as_posix(), path.read_bytes())
    return len(files)
