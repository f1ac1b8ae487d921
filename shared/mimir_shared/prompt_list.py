"""Prompts from files and from the command line."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimir_shared.errors import InputError
from mimir_shared.plain_documents import parse_json

Json = Any
"""What `json` reads; the library gives it no type."""

VBENCH_SAMPLES_PER_PROMPT = 5


@dataclass(frozen=True, kw_only=True)
class PromptList:
    """Prompts in their order, each once."""

    prompts: tuple[str, ...]
    samples_per_prompt: int
    """How many videos are made of each where nothing else is asked for."""
    duplicates: int = 0
    """Prompts left out because they stood there before."""


def prompts_from_texts(texts: Sequence[str]) -> PromptList:
    """Take prompts from the command line. Raises InputError for an empty one."""
    for text in texts:
        if not text.strip():
            raise InputError("--prompt: an empty text; give words, or leave the option out")
    return _unique("--prompt", list(texts), samples_per_prompt=1)


def read_prompts(path: Path) -> PromptList:
    """Read a file of prompts: .txt (one a line), .jsonl ({"prompt": …} or {"text": …} a line), or VBench's .json.

    Blank lines are skipped, and blanks around a prompt of a .txt taken away.

    Raises: InputError for a file that is absent, empty or of another form, naming the place.
    """
    readers = {".txt": _read_lines, ".jsonl": _read_json_lines, ".json": _read_vbench}
    if path.suffix.lower() not in readers:
        raise InputError(f"prompts {path}: expected a .txt, .jsonl or .json file, got {path.suffix or 'no ending'!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as fault:
        raise InputError(f"prompts {path}: no such file") from fault
    except UnicodeDecodeError as fault:
        raise InputError(f"prompts {path}: not UTF-8 text (byte {fault.start}); save it as UTF-8") from fault
    except OSError as fault:
        raise InputError(f"prompts {path}: cannot be read: {fault.strerror or fault}") from fault
    prompts = readers[path.suffix.lower()](text, str(path))
    if not prompts:
        raise InputError(f"prompts {path}: no prompt in it; expected at least one")
    is_vbench = path.suffix.lower() == ".json"
    return _unique(f"prompts {path}", prompts, samples_per_prompt=VBENCH_SAMPLES_PER_PROMPT if is_vbench else 1)


def _unique(where: str, prompts: Sequence[str], samples_per_prompt: int) -> PromptList:
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as fault:
            raise InputError(
                f"{where}: {prompt!r}: character {fault.start} is half of a surrogate pair; mend the text"
            ) from fault
    unique = tuple(dict.fromkeys(prompts))
    return PromptList(prompts=unique, samples_per_prompt=samples_per_prompt, duplicates=len(prompts) - len(unique))


def _read_lines(text: str, where: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _read_json_lines(text: str, where: str) -> list[str]:
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            prompts.append(
                _field(_parse(line, f"{where}, line {number}"), ("prompt", "text"), f"{where}, line {number}")
            )
    return prompts


def _read_vbench(text: str, where: str) -> list[str]:
    document = _parse(text, where) if text.strip() else []
    if not isinstance(document, list):
        raise InputError(
            f"prompts {where}: expected VBench's list of objects with prompt_en, got {type(document).__name__}; "
            f"other prompts belong into a .txt or .jsonl"
        )
    return [_field(entry, ("prompt_en",), f"{where}, entry {number}") for number, entry in enumerate(document)]


def _parse(text: str, where: str) -> Json:
    try:
        return parse_json(text)
    except json.JSONDecodeError as fault:
        raise InputError(f"prompts {where}: not JSON: {fault}") from fault


def _field(entry: Json, names: Sequence[str], where: str) -> str:
    expected = " or ".join(f'"{name}"' for name in names)
    if not isinstance(entry, dict):
        raise InputError(f"prompts {where}: expected an object with {expected}, got {type(entry).__name__}")
    value = next((entry[name] for name in names if name in entry), None)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"prompts {where}: expected {expected} with a text, got {value!r}")
    return value
