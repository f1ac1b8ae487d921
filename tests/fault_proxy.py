"""A service for buckets that fails as asked: a proxy on the loopback in front of another one.

It forwards each request over a connection of its own, unless the plan of faults has something else for it.
"""

import hashlib
import http.client
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal[
    "500",
    "503",
    "403",
    "404",
    "409",
    "timeout",
    "trickle",
    "cut",
    "short",
    "flip",
    "lost",
    "reset",
    "stale",
    "garbled",
    "partial",
]
Plan = Callable[[str, str, int], Fault | None]
"""(method, path with query, number of the request) → what happens to it."""

_CODES = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "403": (403, "AccessDenied"),
    "404": (404, "NoSuchUpload"),
    "409": (409, "ConditionalRequestConflict"),
}
_HOP_HEADERS = {"connection", "transfer-encoding", "content-length", "date", "server"}


class FaultProxy:
    """`endpoint` is its URL; `faults` counts what it did to requests, `requests` what came in."""

    def __init__(self, upstream_port: int, *, timeout_s: float = 1.0) -> None:
        self.upstream_port = upstream_port
        self.timeout_s = timeout_s
        """How long a fault "timeout" or "trickle" holds a request; longer than its client waits."""
        self.plan: Plan = lambda method, path, number: None
        self.hidden: set[str] = set()
        """Keys, or parts of them, that a fault "stale" leaves out of listings."""
        self.faults: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()

        class Handler(_Handler):
            proxy = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def choose(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            fault = self.plan(method, path, len(self.requests) - 1)
            if fault is not None:
                self.faults[fault] += 1
            return fault

    @contextmanager
    def serving(self) -> Iterator["FaultProxy"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.choose(self.command, self.path)
        if fault in _CODES:
            self._refuse(*_CODES[fault])
        elif fault == "reset":
            self._hang_up()
        elif fault == "timeout":
            time.sleep(self.proxy.timeout_s)
            self._hang_up()
        else:
            match fault:
                case "garbled" if body:
                    body = bytes([body[0] ^ 1]) + body[1:]
                case "partial" if body:
                    body = body[: len(body) // 2]
            announced = self.headers.get("x-amz-content-sha256", "")
            if len(announced) == 64 and announced != hashlib.sha256(body).hexdigest():
                self._refuse(400, "XAmzContentSHA256Mismatch")  # as S3 does, and moto does not
            else:
                self._pass_on(fault, *self._forward(body))

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, {}, f"<Error><Code>{code}</Code><Message>as asked</Message></Error>".encode())

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.upstream_port, timeout=30)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_HEADERS}
            if self.command == "HEAD":
                headers["Content-Length"] = answer.getheader("Content-Length") or "0"
            return answer.status, headers, answer.read()
        finally:
            upstream.close()

    def _pass_on(self, fault: Fault | None, status: int, headers: dict[str, str], body: bytes) -> None:
        match fault:
            case "lost":
                self._hang_up()
            case "cut" if body:
                self._answer(status, headers, body[: len(body) // 2], announced=len(body))
                self._hang_up()
            case "short" if status == 206:
                self._answer(status, headers, body[: len(body) // 2])
            case "flip" if body:
                self._answer(status, headers, bytes([body[0] ^ 1]) + body[1:])
            case "trickle" if body:
                self._answer(status, headers, b"", announced=len(body))
                began = time.monotonic()
                for byte in body:
                    if time.monotonic() - began > self.proxy.timeout_s:
                        break
                    try:
                        self.wfile.write(bytes([byte]))
                    except OSError:
                        break
                    time.sleep(0.05)
                self._hang_up()
            case "stale":
                self._answer(status, headers, self._without_hidden(body))
            case _:
                self._answer(status, headers, body)

    def _without_hidden(self, listing: bytes) -> bytes:
        def keep(match: re.Match[bytes]) -> bytes:
            return b"" if any(key.encode() in match[0] for key in self.proxy.hidden) else match[0]

        return re.sub(rb"<Contents>.*?</Contents>|<CommonPrefixes>.*?</CommonPrefixes>", keep, listing, flags=re.DOTALL)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, announced: int | None = None) -> None:
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body) if announced is None else announced))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except OSError:
            self.close_connection = True

    def _hang_up(self) -> None:
        self.close_connection = True
        try:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
