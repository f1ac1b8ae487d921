"""The child of the vLLM engine may die at any prompt: nothing answered is lost, nothing is asked twice without need.

The real parent and the real child run here; only the package `vllm` that the child imports is a small one of the same
interface, whose "model" answers with the prompt reversed and dies where it is told to.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mimir_precompute.config import VllmSettings
from mimir_precompute.encoders import vllm_engine
from mimir_precompute.encoders.answer_engine import EngineGaveUp, Request
from mimir_precompute.encoders.vllm_engine import VllmEngine
from mimir_precompute.model_files import ResolvedModel
from mimir_shared.errors import InputError, MachineError

END, DEADLY, DEADLY_ONCE, SLOW = 3, 666, 667, 668

FAKE_VLLM = """
import json, os, time
from types import SimpleNamespace

class SamplingParams:
    def __init__(self, **values):
        self.__dict__.update(values)

class LLM:
    def __init__(self, model, **settings):
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
            asked.write(json.dumps({"ids": ids, "seed": params.seed, "temperature": params.temperature}) + "\\n")
        if 668 in ids:
            time.sleep(60)
        once = os.path.join(self.folder, "died")
        if 666 in ids or (667 in ids and not os.path.exists(once)):
            open(once, "w").close()
            print("the last words")
            os._exit(9)
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
    paths = [str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    monkeypatch.setattr(vllm_engine, "vllm_version", lambda: "0")
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
    assert engine.starts == 2
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
    assert engine.starts == 6
    engine.close()


def test_an_engine_that_dies_over_prompt_after_prompt_is_a_fault_of_the_machine(model: ResolvedModel) -> None:
    engine = start(model)
    with pytest.raises(MachineError, match=r"one after another.*exit 9.*the last words"):
        engine.generate(requests([[DEADLY, i] for i in range(5)]))
    engine.close()


def test_a_child_that_is_killed_from_outside_is_replaced(model: ResolvedModel) -> None:
    engine = start(model)
    first = engine.pid
    assert first is not None
    threading.Timer(0.5, os.kill, (first, signal.SIGKILL)).start()
    time.sleep(1.0)
    assert engine.generate(requests(PROMPTS)) == [prompt[::-1] for prompt in PROMPTS]
    assert engine.pid != first
    engine.close()


def test_a_child_that_hangs_is_ended(model: ResolvedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "_SILENCE_TIMEOUT_S", 0.5)
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
    monkeypatch.setattr(vllm_engine, "vllm_version", lambda: None)
    with pytest.raises(InputError, match=r"setup_vllm_cpu\.sh"):
        start(model)


def test_the_child_ends_with_the_engine(model: ResolvedModel) -> None:
    engine = start(model)
    pid = engine.pid
    assert pid is not None
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
