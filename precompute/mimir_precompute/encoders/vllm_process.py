"""vLLM in a child process that may die: it is started again, and the requests that it had not met are replayed.

vLLM's engine cannot be mended within a process, and it holds a GPU's memory until that process ends; so it lives in
one of its own (vllm_child.py), which gets requests as lines of JSON and gives results as they are finished. Nothing
that came back is asked for again. When the engine dies twice over a batch, the rest is asked one request at a time, and
a request over which it dies three times alone is given up: its clip is quarantined, never the engine's other work.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import IO, Any, Final

from mimir_precompute.config import ComputeDType, VllmSettings
from mimir_precompute.encoders.answer_engine import EngineGaveUp
from mimir_precompute.model_files import ResolvedModel
from mimir_shared.errors import InputError, MachineError

_START_TIMEOUT_S: Final = 1800.0
_SILENCE_TIMEOUT_S: Final = 600.0
"""Without a sign of life for so long the engine hangs; it gives one at least every few seconds while it works."""

_DEATHS_TOGETHER: Final = 2
_DEATHS_ALONE: Final = 3
_GIVEN_UP_IN_A_ROW: Final = 3
"""When so many requests in a row are given up, it is the machine and not the requests."""

_LOG_TAIL_LINES: Final = 5


class EngineDiedError(Exception):
    """The child ended, or hung and was ended, before it had done what it was asked."""


def vllm_version() -> str | None:
    """Of the vLLM that is installed, for GPUs or for CPUs; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def require_vllm(option: str) -> None:
    """Raise InputError, naming the option that asked for it, where vLLM is not installed."""
    if vllm_version() is None:
        raise InputError(
            f"{option} vllm: vLLM is not installed; install it (`pip install 'mimir-t2v[vllm]'`, without a GPU "
            f"scripts/setup_vllm_cpu.sh), or give {option} transformers"
        )


@dataclass(frozen=True, kw_only=True)
class Message:
    """What the child says: fields of JSON, and the raw bytes that follow where they say how many ("bytes")."""

    fields: dict[str, Any]
    payload: bytes


class VllmProcess:
    """A child of vLLM's and the requests that it is to meet."""

    def __init__(
        self,
        model: ResolvedModel,
        dtype: ComputeDType,
        device: str,
        settings: VllmSettings,
        *,
        max_model_len: int,
        task: Mapping[str, Any],
    ) -> None:
        """Start the child and wait until it is ready.

        Args:
            max_model_len: tokens of the longest sequence.
            task: what vllm_child.py reads besides: {"task": "generate" or "hidden"} and what belongs to it.
        Raises: MachineError where it does not start.
        """
        self._environment = _environment(device)
        self._arguments: dict[str, Any] = {
            "model": str(model.folder),
            "dtype": dtype,
            "cpu": not device.startswith("cuda"),
            "max_model_len": max_model_len,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "max_num_seqs": settings.max_num_seqs,
            "prefix_caching": settings.prefix_caching,
            **task,
        }
        self.starts = 0
        self.start_s = 0.0
        self._child: _Child | None = None
        self._started()

    @property
    def pid(self) -> int | None:
        """Of the child, None while there is none."""
        return None if self._child is None else self._child.process.pid

    def results(self, requests: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Message | EngineGaveUp]]:
        """Put requests to the child; gives (number of the request, result), each once, as they are finished.

        Raises: MachineError where the engine does not start again, or dies over request after request.
        """
        pending = dict(enumerate(requests))
        deaths_together = deaths_alone = given_up = 0
        try:
            while pending:
                alone = deaths_together >= _DEATHS_TOGETHER or len(pending) == 1
                group = dict([next(iter(pending.items()))]) if alone else dict(pending)
                try:
                    for i, message in self._ask(group):
                        del pending[i]
                        yield i, message
                    deaths_alone = given_up = 0
                except EngineDiedError as death:
                    self.close()
                    if not alone:
                        deaths_together += 1
                    elif (deaths_alone := deaths_alone + 1) == _DEATHS_ALONE:
                        (i,) = group
                        del pending[i]
                        deaths_alone, given_up = 0, given_up + 1
                        if given_up == _GIVEN_UP_IN_A_ROW:
                            raise MachineError(
                                f"vLLM ended over {given_up} prompts one after another: {death}; see to the device, "
                                f"then run the same command again"
                            ) from death
                        yield i, EngineGaveUp(f"the engine ended {_DEATHS_ALONE} times over this prompt alone")
        finally:
            if pending:  # left in the middle: what the child still says would be taken for the next requests' results
                self.close()

    def close(self) -> None:
        """End the child, and give back all its memory; another request would start another."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def _ask(self, requests: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[int, Message]]:
        child = self._started()
        for i, request in requests.items():
            child.send({"id": i, **request})
        child.send({"run": True})
        left = set(requests)
        while left:
            message = child.receive(_SILENCE_TIMEOUT_S)
            if "id" in message.fields:
                i = int(message.fields["id"])
                left.discard(i)
                yield i, message

    def _started(self) -> "_Child":
        if self._child is None:
            began = time.monotonic()
            self._child = _Child(self._arguments, self._environment)
            self.starts += 1
            try:
                self._child.receive(_START_TIMEOUT_S)
            except EngineDiedError as death:
                self.close()
                raise MachineError(f"vLLM does not start: {death}") from death
            self.start_s += time.monotonic() - began
        return self._child


class _Child:
    """One process of vllm_child.py: lines of JSON in by its standard input, messages out by a pipe of their own."""

    def __init__(self, arguments: dict[str, Any], environment: dict[str, str]) -> None:
        results, given = os.pipe()
        # vLLM writes to both standard streams whatever it is told; the end of it explains a death
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mimir_precompute.encoders.vllm_child", json.dumps(arguments), str(given)],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                env=environment,
                pass_fds=(given,),
                start_new_session=True,  # its own workers end with it
            )
        finally:
            os.close(given)
        self._results = results
        self._unread = bytearray()
        self._selector = selectors.DefaultSelector()
        self._selector.register(results, selectors.EVENT_READ)

    def send(self, message: dict[str, Any]) -> None:
        """Raises: EngineDiedError."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as fault:
            raise EngineDiedError(self._last_words()) from fault

    def receive(self, timeout_s: float) -> Message:
        """The next message, whole. Raises: EngineDiedError where the child ends, or says nothing for so long."""
        while (stop := self._unread.find(b"\n")) < 0:
            self._read(timeout_s)
        fields: dict[str, Any] = json.loads(self._unread[:stop])
        start, stop = stop + 1, stop + 1 + int(fields.get("bytes", 0))
        while len(self._unread) < stop:
            self._read(timeout_s)
        payload = bytes(memoryview(self._unread)[start:stop])
        del self._unread[:stop]
        return Message(fields=fields, payload=payload)

    def _read(self, timeout_s: float) -> None:
        if not self._selector.select(timeout_s):
            raise EngineDiedError(f"no sign of life for {timeout_s:.0f} s; {self._last_words()}")
        data = os.read(self._results, 1 << 20)
        if not data:
            raise EngineDiedError(self._last_words())
        self._unread += data

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._selector.close()
        os.close(self._results)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # what it was still to be told died with it
                self.process.stdin.close()
        self._log.close()

    def _last_words(self) -> str:
        # given a moment: the pipe may close before the process has ended
        try:
            code: int | str = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = "still running"
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read()[-20_000:].decode(errors="replace").splitlines()]
        tail = " | ".join([line for line in lines if line][-_LOG_TAIL_LINES:])
        return f"its process ended (exit {code}): {tail}"


def _environment(device: str) -> dict[str, str]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",  # the model was found and digested: nothing else is to be fetched
        "VLLM_NO_USAGE_STATS": "1",
        # the child is the process that may be killed: an engine in a further one only starts later
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if not device.startswith("cuda"):
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    elif ":" in device:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        number = int(device.partition(":")[2])
        environment["CUDA_VISIBLE_DEVICES"] = visible[number] if number < len(visible) else str(number)
    return environment
