"""The fingerprint of an identity: what made some bytes, as plain JSON, and its sha256.

Two identities with the same fingerprint promise the same bytes at equal provenance; where they differ,
`differences` names each field, so that a refusal can say what changed.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

JsonValue = Any
"""What `json` reads and writes: None, bool, int, float, str, lists of them and dicts with str keys."""

ABSENT = "(absent)"
"""Stands in `differences` for a field that one side does not have."""


def canonical_json(value: JsonValue) -> str:
    """Write a value in the one form that is hashed: sorted keys, no spaces, ASCII only.

    A tuple is written as a list. 1, 1.0 and true are three different values, as they are in a file that
    is written and read back.

    Raises: TypeError for anything that JSON cannot hold, ValueError for NaN and infinities.
    """
    _refuse_foreign(value, "")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(identity: Mapping[str, JsonValue]) -> str:
    """Digest an identity: 64 hex digits of sha256 over its canonical JSON."""
    return hashlib.sha256(canonical_json(identity).encode("ascii")).hexdigest()


def differences(old: Mapping[str, JsonValue], new: Mapping[str, JsonValue]) -> list[tuple[str, JsonValue, JsonValue]]:
    """Name every field in which two identities differ, as (dotted field, old value, new value).

    Empty exactly when the fingerprints are equal. List elements are numbered (`instructions[0].text`); a key that
    is not a plain word is quoted (`model.files["config.json"]`); a field of one side only stands against ABSENT.
    """
    return list(_walk("", old, new))


def _walk(field: str, old: JsonValue, new: JsonValue) -> Iterator[tuple[str, JsonValue, JsonValue]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            name = _dotted(field, key)
            yield from _walk_one(name, key in old, key in new, old.get(key), new.get(key))
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        for i in range(max(len(old), len(new))):
            in_old, in_new = i < len(old), i < len(new)
            old_item, new_item = old[i] if in_old else None, new[i] if in_new else None
            yield from _walk_one(f"{field}[{i}]", in_old, in_new, old_item, new_item)
    elif canonical_json(old) != canonical_json(new):
        yield field, old, new


def _walk_one(
    field: str, in_old: bool, in_new: bool, old: JsonValue, new: JsonValue
) -> Iterator[tuple[str, JsonValue, JsonValue]]:
    if in_old and in_new:
        yield from _walk(field, old, new)
    else:
        yield field, old if in_old else ABSENT, new if in_new else ABSENT


def _dotted(field: str, key: str) -> str:
    if not key.replace("-", "_").isidentifier():
        return f"{field}[{json.dumps(key, ensure_ascii=False)}]"
    return f"{field}.{key}" if field else key


def _refuse_foreign(value: JsonValue, field: str) -> None:
    # json.dumps turns the keys 1 and True into strings and takes any int or str subclass: two identities
    # that differ could then be written alike
    if isinstance(value, dict | Mapping):
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"an identity has str keys only, got {type(key).__name__} {key!r} in {field!r}")
            _refuse_foreign(item, _dotted(field, key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _refuse_foreign(item, f"{field}[{i}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(f"an identity holds plain JSON values, got {type(value).__name__} at {field!r}")
