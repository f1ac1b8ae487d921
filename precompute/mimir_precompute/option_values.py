"""What is typed behind an option, turned into values; every refusal names the option and what it expects."""

from collections.abc import Sequence
from typing import Any

from mimir_shared.errors import InputError
from mimir_shared.features import FEATURES, FeatureName


def parse_features(text: str) -> tuple[FeatureName, ...]:
    """Read "latents,t5"; in the order in which features are made. Raises InputError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in FEATURES]
    if unknown or not names:
        raise InputError(f"--features {text!r}: {(unknown or ['nothing'])[0]!r} is none of {', '.join(FEATURES)}")
    return tuple(feature for feature in FEATURES if feature in names)


def parse_feature_choices(wanted: Sequence[str]) -> dict[str, str]:
    """Read "llm=1a2b3c…" options. Raises InputError."""
    choices: dict[str, str] = {}
    for text in wanted:
        name, _, fingerprint = text.partition("=")
        if name not in FEATURES or not fingerprint:
            raise InputError(f"--feature {text!r}: expected NAME=FINGERPRINT, for instance llm=1a2b3c4d5e6f")
        choices[name] = fingerprint
    return choices


def parse_choice(option: str, value: str, choices: Sequence[str]) -> Any:
    """Return a value that is one of `choices`. Raises InputError that lists them."""
    if value not in choices:
        raise InputError(f"{option} {value!r}: expected one of {', '.join(choices)}")
    return value


def parse_shards(text: str, num_shards: int) -> tuple[int, ...]:
    """Read "all", "0-63", "3,17", "2::8" (start:stop:step) or such joined by commas.

    Raises: InputError for what is none of these, and for shards that the plan does not have.
    """
    return choose_numbers("--shards ", text, num_shards, "shard", "the plan has")


def choose_numbers(option: str, text: str, count: int, noun: str, there_are: str) -> tuple[int, ...]:
    """Some of the numbers from 0 to `count` - 1: "all", "0-63", "3,17", "2::8" or such joined by commas.

    Args:
        option, noun, there_are: for messages: "--shards ", "shard", "the plan has".
    Raises: InputError for what is none of these, and for numbers that are not among them.
    """
    chosen: set[int] = set()
    for part in read_numbers(option, text):
        numbers: Sequence[int] = part if isinstance(part, range) else range(count)[part]
        if isinstance(part, slice) and part.start is not None and part.start >= count:
            numbers = [part.start]
        for outside in (n for n in (*numbers[:1], *numbers[-1:]) if not 0 <= n < count):
            raise InputError(f"{option}{text!r}: no {noun} {outside}; {there_are} {noun}s 0 to {count - 1}")
        chosen.update(numbers)
    return tuple(sorted(chosen))


def read_numbers(option: str, text: str) -> list[range | slice]:
    """What such an option says, before it is known how many there are. Raises InputError where it is not understood."""
    if text == "all":
        return [slice(None)]
    parts: list[range | slice] = []
    for part in text.split(","):
        try:
            if ":" in part:
                pieces = [int(piece) if piece else None for piece in part.split(":")]
                if len(pieces) > 3 or any(piece is not None and piece < 0 for piece in pieces) or 0 in pieces[2:]:
                    raise ValueError(part)
                parts.append(slice(*pieces))
                continue
            first, last = (int(piece) for piece in part.split("-")) if "-" in part else (int(part), int(part))
            if last < first:
                raise ValueError(part)
        except ValueError as fault:
            raise InputError(
                f"{option}{text!r}: {part!r} is not understood; expected all, 0-63, 3,17 or 2::8 (start:stop:step)"
            ) from fault
        parts.append(range(first, last + 1))
    return parts
