"""Buckets on this machine: moto's server, and what a client needs to find it."""

import logging
import random
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

from mimir_shared.storage.bucket import ObjectStorage
from mimir_shared.storage.bucket_client import parse_location
from mimir_shared.storage.bucket_requests import RequestLimits
from tests.fault_proxy import Fault, FaultProxy, Plan

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
    """Port of a server. It takes one write at a time: moto looks and then stores, which services do in one step."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server  # large, and not for those who only fork

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = DomainDispatcherApplication(create_backend_app)
    writing = threading.Lock()

    def one_writer(environ: Any, start_response: Any) -> Any:  # as WSGI has them
        with nullcontext() if environ["REQUEST_METHOD"] in ("GET", "HEAD") else writing:
            return application(environ, start_response)

    server = make_server("127.0.0.1", 0, one_writer, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()


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


def objects_of(storage: ObjectStorage, directory: str = "") -> dict[str, bytes]:
    """Name → bytes of all objects below a folder."""
    return {file.name: storage.read(file.name) for file in storage.files(directory)}


def backdate(storage: ObjectStorage, name: str, age_s: float) -> None:
    """Have the service, which runs in this process, say that an object was written so long ago."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    _, bucket, prefix = parse_location(storage.root)
    key = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket].keys[f"{prefix}/{name}"]
    key.last_modified -= timedelta(seconds=age_s)


def faulty(share: float, *faults: Fault, method: str = "", seed: int = 0) -> Plan:
    """A plan of faults: a fixed share of the requests, of one method if it is named."""

    def plan(requested: str, path: str, number: int) -> Fault | None:
        draw = random.Random(f"{seed} {number}")
        return draw.choice(faults) if requested.startswith(method) and draw.random() < share else None

    return plan


@contextmanager
def copy_behind(proxy: FaultProxy, cache: Path, set_variable: Callable[[str, str], None]) -> Iterator[str]:
    """The URL of a copy of a cache in a bucket of its own, reached through a proxy that fails at nothing yet."""
    for name, value in environment(f"http://127.0.0.1:{proxy.upstream_port}").items():
        set_variable(name, value)
    url = f"s3://{new_bucket(proxy.upstream_port)}/caches/one"
    upload(cache, ObjectStorage(url))
    set_variable("AWS_ENDPOINT_URL", proxy.endpoint)
    proxy.faults.clear()
    proxy.requests.clear()
    yield url
    proxy.plan = lambda method, path, number: None
    proxy.hidden = set()
