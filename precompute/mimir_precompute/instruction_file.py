"""Instructions from a YAML file: a list of `name` and `text`, in the order in which the LLM's tokens will stand."""

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mimir_precompute.config import Instruction
from mimir_shared.errors import InputError
from mimir_shared.plain_documents import parse_yaml

_MAX_BYTES = 1_000_000


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, str_strip_whitespace=True)
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    text: str = Field(min_length=1)


_LIST: TypeAdapter[list[_Entry]] = TypeAdapter(list[_Entry])


def read_instructions(path: str) -> tuple[Instruction, ...]:
    """Read the instructions that are put to the LLM about every caption.

    Raises: InputError naming the file and the entry: where it is no list of {name, text}, where it is empty, or where a
        name comes twice.
    """
    where = f"--instructions {path}"
    try:
        data = Path(path).read_bytes()
    except OSError as fault:
        raise InputError(f"{where}: cannot be read: {fault.strerror}; expected a YAML file") from fault
    if len(data) > _MAX_BYTES:
        raise InputError(f"{where}: has {len(data)} bytes; expected a short list of name and text")
    try:
        entries = _LIST.validate_python(parse_yaml(data))
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise InputError(f"{where}: is no YAML: {' '.join(str(fault).split())[:200]}") from fault
    except ValidationError as fault:
        raise InputError(f"{where}: {_describe(fault)}") from fault
    if not entries:
        raise InputError(f"{where}: has no instruction; expected at least one entry with `name` and `text`")
    return tuple(Instruction(name=entry.name, text=entry.text) for entry in entries)


def _describe(fault: ValidationError) -> str:
    """The first thing that is wrong, with entries counted from 1."""
    first = fault.errors()[0]
    got = repr(first["input"])
    got = got if len(got) <= 60 else f"{got[:60]}…"
    match first["loc"]:
        case (int(number), str(name)) if first["type"] == "missing":
            return f"entry {number + 1}: expected `name` and `text`, got no `{name}`"
        case (int(number), str(name)) if first["type"] == "extra_forbidden":
            return f"entry {number + 1}: expected `name` and `text` alone, got `{name}` too"
        case (int(number), "name"):
            return f"entry {number + 1}: expected a `name` of letters, digits, _ or -, got {got}"
        case (int(number), "text"):
            return f"entry {number + 1}: expected a `text` with something in it, got {got}"
        case (int(number), *_):
            return f"entry {number + 1}: expected `name` and `text`, got {got}"
    return f"the file: expected a list of entries with `name` and `text`, got {got}"
