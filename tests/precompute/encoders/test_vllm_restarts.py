"""The child of vLLM's may die at any prompt: nothing that came back is lost, nothing is asked twice without need.

The real parent and the real child run here; only the package `vllm` that the child imports is a small one of the same
interface, whose "model" answers with the prompt reversed, has rows of known values, and dies where it is told to.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mimir_precompute.config import LlmSettings, ModelSource, VllmSettings
from mimir_precompute.encoders import vllm_process
from mimir_precompute.encoders.answer_engine import EngineGaveUp, Request
from mimir_precompute.encoders.vllm_engine import VllmEngine
from mimir_precompute.encoders.vllm_rows import VllmRows
from mimir_precompute.model_files import ResolvedModel
from mimir_shared.errors import InputError, MachineError

END, DEADLY, DEADLY_ONCE, SLOW, DEADLY_IN_A_MESSAGE = 3, 666, 667, 668, 669
WIDTH = 64

FAKE_VLLM = """
import json, os, sys, time
from types import SimpleNamespace
import numpy as np

class SamplingParams:
    def __init__(self, **values):
        self.__dict__.update(values)

class PoolingParams(SamplingParams):
    pass

class LLM:
    def __init__(self, model, **settings):
        with open(os.path.join(model, "settings"), "w") as file:
            json.dump({name: getattr(value, "__dict__", value) for name, value in settings.items()}, file)
        if "unloadable" in model:
            raise RuntimeError("no such weights")
        self.folder, self.llm_engine = model, self
        self.waiting = []

    def add_request(self, request_id, prompt, params):
        self.waiting.append((request_id, prompt, params))

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        request_id, prompt, params = self.waiting.pop(0)
        ids = prompt["prompt_token_ids"]
        with open(os.path.join(self.folder, "asked"), "a") as asked:
            asked.write(json.dumps({"ids": ids, **params.__dict__}) + "\\n")
        if 668 in ids:
            time.sleep(60)
        once = os.path.join(self.folder, "died")
        if 666 in ids or (667 in ids and not os.path.exists(once)):
            open(once, "w").close()
            print("the last words")
            os._exit(9)
        if 669 in ids and not os.path.exists(once):
            open(once, "w").close()
            header = {"id": int(request_id), "dtype": "f32", "shape": [9, 64], "bytes": 2304}
            os.write(int(sys.argv[2]), json.dumps(header).encode() + b"\\n" + 100 * b"x")
            os._exit(9)
        if isinstance(params, PoolingParams):
            rows = np.outer(np.array(ids, np.float32), np.arange(1, 65, dtype=np.float32)) / np.float32(16)
            return [SimpleNamespace(finished=True, request_id=request_id, outputs=SimpleNamespace(data=rows))]
        answer = (ids[::-1] + params.stop_token_ids)[: params.max_tokens]
        return [SimpleNamespace(finished=True, request_id=request_id, num_cached_tokens=0,
                                outputs=[SimpleNamespace(token_ids=answer)])]
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResolvedModel:
    package = tmp_path / "packages" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_VLLM)
    (package / "inputs.py").write_text("TokensPrompt = dict\n")
    (package / "config.py").write_text("from . import SamplingParams as PoolerConfig\n")
    paths = [str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    monkeypatch.setattr(vllm_process, "vllm_version", lambda: "0")
    folder = tmp_path / "llm"
    folder.mkdir()
    return resolved(folder)


def resolved(folder: Path) -> ResolvedModel:
    return ResolvedModel(
        folder=folder, name="local", subfolder="", commit=None, digests={}, config={}, chat_template_sha256=None
    )


def start(model: ResolvedModel) -> VllmEngine:
    return VllmEngine(model, "float32", "cpu", VllmSettings(), end_ids=[END], temperature=0.7, max_model_len=64)


def requests(prompts: Sequence[Sequence[int]]) -> list[Request]:
    return [
        Request(prompt_ids=list(prompt), max_new_tokens=8, seed=None if i % 2 else i)
        for i, prompt in enumerate(prompts)
    ]


def asked(model: ResolvedModel) -> list[list[int]]:
    return [json.loads(line)["ids"] for line in (model.folder / "asked").read_text().splitlines()]


PROMPTS = [[10 + i, 40 + i] for i in range(12)]


def test_every_prompt_is_asked_once_and_answered_in_order(model: ResolvedModel) -> None:
    engine = start(model)
    answers = engine.generate(requests(PROMPTS))
    assert answers == [prompt[::-1] for prompt in PROMPTS]
    assert asked(model) == PROMPTS
    told = [json.loads(line) for line in (model.folder / "asked").read_text().splitlines()]
    assert [(t["seed"], t["temperature"]) for t in told[:2]] == [(0, 0.7), (None, 0.0)]
    assert engine.report()["starts"] == 1
    assert engine.report()["answer_tokens"] == 12 * 3
    engine.close()


def test_what_was_answered_before_a_death_is_not_asked_again(model: ResolvedModel) -> None:
    prompts = [*PROMPTS[:5], [DEADLY_ONCE], *PROMPTS[5:]]
    engine = start(model)
    assert engine.generate(requests(prompts)) == [prompt[::-1] for prompt in prompts]
    assert engine.process.starts == 2
    assert asked(model) == [*prompts[:6], *prompts[5:]]
    engine.close()


def test_a_prompt_that_kills_the_engine_is_given_up_and_no_other(model: ResolvedModel) -> None:
    prompts = [*PROMPTS[:5], [DEADLY], *PROMPTS[5:]]
    engine = start(model)
    answers = engine.generate(requests(prompts))
    assert isinstance(answers[5], EngineGaveUp)
    assert "3 times" in answers[5].detail
    assert [a for i, a in enumerate(answers) if i != 5] == [p[::-1] for p in PROMPTS]
    # twice in company, three times alone, and a new child for what is left
    assert asked(model).count([DEADLY]) == 5
    assert all(asked(model).count(prompt) == 1 for prompt in PROMPTS)
    assert engine.process.starts == 6
    engine.close()


def test_an_engine_that_dies_over_prompt_after_prompt_is_a_fault_of_the_machine(model: ResolvedModel) -> None:
    engine = start(model)
    with pytest.raises(MachineError, match=r"one after another.*exit 9.*the last words"):
        engine.generate(requests([[DEADLY, i] for i in range(5)]))
    engine.close()


def test_a_child_that_is_killed_from_outside_is_replaced(model: ResolvedModel) -> None:
    engine = start(model)
    first = engine.process.pid
    assert first is not None
    threading.Timer(0.5, os.kill, (first, signal.SIGKILL)).start()
    time.sleep(1.0)
    assert engine.generate(requests(PROMPTS)) == [prompt[::-1] for prompt in PROMPTS]
    assert engine.process.pid != first
    engine.close()


def test_a_child_that_hangs_is_ended(model: ResolvedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_process, "_SILENCE_TIMEOUT_S", 0.5)
    engine = start(model)
    answers = engine.generate(requests([PROMPTS[0], [SLOW], PROMPTS[1]]))
    assert isinstance(answers[1], EngineGaveUp)
    assert (answers[0], answers[2]) == (PROMPTS[0][::-1], PROMPTS[1][::-1])
    engine.close()


def test_an_engine_that_does_not_start_says_why(model: ResolvedModel) -> None:
    folder = model.folder.parent / "unloadable"
    folder.mkdir()
    with pytest.raises(MachineError, match=r"does not start.*no such weights"):
        start(resolved(folder))


def test_without_vllm_the_refusal_says_what_to_install(model: ResolvedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_process, "vllm_version", lambda: None)
    with pytest.raises(InputError, match=r"--llm-engine vllm.*setup_vllm_cpu\.sh"):
        start(model)
    with pytest.raises(InputError, match=r"--llm-hidden-engine vllm.*setup_vllm_cpu\.sh"):
        start_rows(model)


def test_the_child_ends_with_the_engine(model: ResolvedModel) -> None:
    engine = start(model)
    pid = engine.process.pid
    assert pid is not None
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def start_rows(model: ResolvedModel) -> VllmRows:
    settings = LlmSettings(source=ModelSource(name="local"), dtype="float32", engine="vllm")
    return VllmRows(model, settings, "cpu", longest=4096)


def rows_of(source: VllmRows, sequences: Sequence[list[int]]) -> list[np.ndarray]:
    """What came of each sequence, in order."""
    found: dict[int, np.ndarray] = {}
    for i, rows in source.hidden_rows(sequences):
        assert i not in found
        assert isinstance(rows, torch.Tensor)
        assert rows.dtype == torch.float32
        found[i] = rows.numpy()
    assert sorted(found) == list(range(len(sequences)))
    return [found[i] for i in range(len(sequences))]


def known_rows(ids: Sequence[int]) -> np.ndarray:
    """(n, WIDTH) float32, as the small package computes them."""
    rows: np.ndarray = np.outer(np.array(ids, np.float32), np.arange(1, WIDTH + 1, dtype=np.float32)) / np.float32(16)
    return rows


def assert_rows_are_known(got: Sequence[np.ndarray], sequences: Sequence[Sequence[int]]) -> None:
    for rows, ids in zip(got, sequences, strict=True):
        np.testing.assert_array_equal(rows.view(np.uint32), known_rows(ids).view(np.uint32))


def test_rows_come_back_to_the_bit_whatever_their_number(model: ResolvedModel) -> None:
    # the first two need no more than bfloat16 has, and go over the pipe as such; one is longer than a pipe
    sequences = [[1, 2], [4], [10_007, 5], [1000 + i for i in range(3000)], [7]]
    assert [not (known_rows(ids).view(np.uint32) & 0xFFFF).any() for ids in sequences[:3]] == [True, True, False]
    source = start_rows(model)
    assert_rows_are_known(rows_of(source, sequences), sequences)
    assert asked(model) == sequences
    source.close()


def test_rows_are_asked_of_every_token_after_the_final_norm_and_without_a_prefix_cache(model: ResolvedModel) -> None:
    source = start_rows(model)
    rows_of(source, [[5, 6]])
    told = json.loads((model.folder / "settings").read_text())
    assert (told["runner"], told["convert"], told["enable_prefix_caching"]) == ("pooling", "embed", False)
    assert told["pooler_config"] == {"task": "token_embed", "tok_pooling_type": "ALL", "use_activation": False}
    assert (told["enable_chunked_prefill"], told["max_num_batched_tokens"]) == (False, 4096)
    (request,) = [json.loads(line) for line in (model.folder / "asked").read_text().splitlines()]
    assert request == {"ids": [5, 6], "task": "token_embed", "use_activation": False}
    source.close()


@pytest.mark.parametrize("deadly", [DEADLY_ONCE, DEADLY_IN_A_MESSAGE])
def test_rows_that_came_before_a_death_are_not_asked_again(model: ResolvedModel, deadly: int) -> None:
    sequences = [*PROMPTS[:5], [deadly], *PROMPTS[5:]]
    source = start_rows(model)
    assert_rows_are_known(rows_of(source, sequences), sequences)
    assert source.process.starts == 2
    assert asked(model) == [*sequences[:6], *sequences[5:]]
    source.close()


def test_a_sequence_that_kills_the_engine_is_given_up_and_no_other(model: ResolvedModel) -> None:
    sequences = [*PROMPTS[:5], [DEADLY], *PROMPTS[5:]]
    source = start_rows(model)
    results = dict(source.hidden_rows(sequences))
    lost = results.pop(5)
    assert isinstance(lost, EngineGaveUp)
    assert "3 times" in lost.detail
    kept = [rows.numpy() for _, rows in sorted(results.items()) if isinstance(rows, torch.Tensor)]
    assert_rows_are_known(kept, PROMPTS)
    source.close()


def test_rows_that_nobody_waited_for_are_not_taken_for_those_of_later_sequences(model: ResolvedModel) -> None:
    source = start_rows(model)
    left_early = source.hidden_rows(PROMPTS)
    next(left_early)
    del left_early
    assert_rows_are_known(rows_of(source, PROMPTS[::-1]), PROMPTS[::-1])
    assert source.process.starts == 2
    source.close()
