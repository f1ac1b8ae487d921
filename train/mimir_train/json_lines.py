"""Files of a run with a JSON object a line, each with its "step": written while the run goes, read at any time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimir_shared.errors import CacheError
from mimir_shared.plain_documents import parse_json
from mimir_shared.storage.folder import machine_faults

Line = dict[str, Any]
"""What `json` reads; the library gives it no type."""


class JsonLines:
    """Appends lines. Those of steps that are trained again are dropped first."""

    def __init__(self, path: Path, first_step: int) -> None:
        with machine_faults(f"{path}: writing"):
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_lines(path) if line["step"] < first_step]
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            temporary.replace(path)
            self._path = path
            self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def add(self, line: Mapping[str, object]) -> None:
        with machine_faults(f"{self._path}: writing"):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[Line]:
    """The objects of a file, [] where there is none; a last line that was cut short is left out.

    Raises: CacheError naming a line before the last that is no object with a step.
    """
    if not path.exists():
        return []
    with machine_faults(f"{path}: reading"):
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines: list[Line] = []
    for number, text in enumerate(texts, start=1):
        line = _parse(text)
        if line is not None:
            lines.append(line)
        elif number < len(texts):
            raise CacheError(
                f'{path}: line {number} is no JSON object with a "step", as each of them should be; remove it, or '
                f"begin anew elsewhere"
            )
    return lines


def read_steps(path: Path) -> list[Line]:
    """One object a step, in order of the steps: where a run went on from an earlier step, what it did there counts,
    and what had come behind that step before does not. Raises CacheError as `read_lines`.
    """
    lines: list[Line] = []
    for line in read_lines(path):
        while lines and lines[-1]["step"] >= line["step"]:
            lines.pop()
        lines.append(line)
    return lines


def _parse(text: str) -> Line | None:
    try:
        line = parse_json(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None
