"""Configs as plain documents: from YAML and the command line to checked dataclasses, and back.

A document is what YAML holds: nested mappings of plain values. Documents are laid over one another; the result is
turned into a config once, at the end, so that every check sees the final values.
"""

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from mimir_shared.errors import CacheError, InputError
from mimir_shared.fingerprint import differences, fingerprint
from mimir_shared.plain_documents import parse_yaml
from mimir_shared.redaction import hide_address_secrets, holds_address_secret
from mimir_train.config import TrainConfig
from mimir_train.learning_rate import ENDS_WITH_THE_RUN

Document = dict[str, Any]
"""What YAML reads: its values have any plain type."""

T = TypeVar("T")

FREE_ON_RESUME: Final = frozenset(
    {
        "data.cache",
        "data.micro_batch_size",
        "data.prefetch_batches",
        "data.reader_threads",
        "data.on_bad_sample",
        "data.max_bad_share",
        "data.verify_reads",
        "ema.validation",
        "model.attention",
        "parallel.activation_checkpointing",
        "parallel.compile",
        "parallel.strategy",
        "parallel.shard_size",
        "run.output_dir",
        "run.max_train_steps",
        "run.stop_at_step",
        "run.checkpointing_steps",
        "run.checkpoints_total_limit",
        "run.checkpoints_keep_every",
        "run.checkpoints_in_background",
        "run.validation_steps",
        "run.validation_clips",
        "run.validation_samples",
        "run.peak_tflops",
        "run.fuser_figures_steps",
        "run.report_to",
        "run.device",
        "run.watchdog_s",
    }
)
"""What may be another when a run goes on: nothing here changes a weight, but for rounding, and for clips that could not
be read: a run that ended by one may go on without it."""


def read_document(path: Path) -> Document:
    """Read a YAML file of settings. Raises InputError where it is none."""
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise InputError(f"--config {path}: cannot be read: {fault.strerror}") from fault
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise InputError(f"--config {path}: not YAML: {' '.join(str(fault).split())}") from fault
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise InputError(f"--config {path}: expected sections like `data:` and `run:`, got {type(document).__name__}")
    return document


def parse_assignment(text: str) -> Document:
    """Read "a.b=c" of --set as a document; c is YAML. Raises InputError."""
    name, equals, value = text.partition("=")
    if not equals or not all(name.split(".")):
        raise InputError(f"--set {text}: expected section.name=value, for instance optimizer.learning_rate=1e-5")
    try:
        return nest(name, parse_yaml(value))
    except yaml.YAMLError as fault:
        raise InputError(f"--set {text}: the value is not YAML: {' '.join(str(fault).split())}") from fault


def nest(name: str, value: object) -> Document:
    """{"a": {"b": value}} of "a.b"."""
    document: Any = value
    for part in reversed(name.split(".")):
        document = {part: document}
    assert isinstance(document, dict)
    return document


def overlay(below: Document, above: Document) -> Document:
    """Values of `above` win; sections are merged."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = overlay(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def train_config(document: Document) -> TrainConfig:
    """Check a document and make it a config. Raises InputError naming the setting."""
    return from_document(TrainConfig, document, "")


def from_record(cls: type[T], document: object, where: str) -> T:
    """As `from_document`, of what a file of ours says. Raises CacheError where it is none."""
    try:
        return from_document(cls, document, where)
    except InputError as fault:
        raise CacheError(f"{where}: not a {cls.__name__}: {fault}") from fault


def from_document(cls: type[T], document: object, where: str) -> T:
    """Make a dataclass of a mapping, its fields of theirs. Raises InputError.

    Args:
        where: dotted name of the mapping, for messages; "" at the top.
    """
    assert is_dataclass(cls), f"{cls}"
    if not isinstance(document, Mapping):
        raise InputError(f"setting {where or 'file'}: expected a section, got {document!r}")
    names = {f.name for f in fields(cls)}
    prefix = f"{where}." if where else ""
    for key in document:
        if key not in names:
            close = difflib.get_close_matches(str(key), sorted(names), n=3)
            hint = f"did you mean {' or '.join(prefix + name for name in close)}?" if close else "there are"
            listed = "" if close else f" {', '.join(prefix + name for name in sorted(names))}"
            raise InputError(f"unknown setting {prefix}{key}: {hint}{listed}")
    required = [
        f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING and f.name not in document
    ]
    if required:
        raise InputError(f"setting {prefix}{required[0]} is missing; give a --preset, or the setting itself")
    types_of = get_type_hints(cls)
    values = {key: _convert(types_of[key], value, prefix + key) for key, value in document.items()}
    try:
        made: T = cls(**values)
    except ValueError as fault:  # of the model's own configs, which know nothing of settings
        raise InputError(f"setting {where}: {fault}") from fault
    return made


def to_document(config: object) -> Document:
    """The plain values of a dataclass, for YAML and JSON."""
    assert is_dataclass(config), f"{config}"
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def write_document(config: TrainConfig) -> str:
    """The config as YAML, in the order of its fields."""
    return yaml.safe_dump(to_document(config), sort_keys=False, allow_unicode=True, width=120)


def refuse_other_training(old: TrainConfig, new: TrainConfig, where: str) -> None:
    """Raise InputError where going on with `new` would be another training than `old` began."""
    changed = differences(deciding_settings(old), deciding_settings(new))
    if changed:
        shown = "; ".join(f"{name}: {before} → {after}" for name, before, after in changed[:8])
        more = f"; and {len(changed) - 8} more" if len(changed) > 8 else ""
        raise InputError(
            f"{where}: the run began with other settings, and going on with these would be another training: {shown}"
            f"{more}. Leave these settings out, or begin anew in another --output-dir"
        )


def deciding_settings(config: TrainConfig) -> Document:
    """The settings that change what is trained: all but FREE_ON_RESUME."""
    free = FREE_ON_RESUME - ({"run.max_train_steps"} if config.optimizer.schedule in ENDS_WITH_THE_RUN else set())
    free |= {"model.init_from"} if config.model.lora is not None else set()  # what adapters stand on has digests
    deciding: Document = {}
    for section, values in to_document(config).items():
        if isinstance(values, dict):
            values = {name: value for name, value in values.items() if f"{section}.{name}" not in free}
        if values != {}:
            deciding[section] = values
    return deciding


def training_digest(config: TrainConfig) -> str:
    """sha256 of the settings that change what is trained."""
    return fingerprint(deciding_settings(config))


def _plain(value: object) -> object:
    if is_dataclass(value):
        return to_document(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _convert(wanted: Any, value: object, where: str) -> object:  # Any: a type hint may be of any kind
    """Check a plain value against a type hint; lists become tuples, whole numbers floats where one is wanted."""
    if isinstance(value, str) and holds_address_secret(value):
        raise InputError(
            f"setting {where}: {hide_address_secrets(value)!r} has a password or signature in it, and settings are "
            f"written beside every output: give it by the environment"
        )
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _convert(inner, value, where)
    if is_dataclass(wanted) and isinstance(wanted, type):
        return from_document(wanted, value, where)
    if origin is Literal:
        if value in arguments and type(value) in {type(argument) for argument in arguments}:
            return value
        raise InputError(f"setting {where}: expected one of {', '.join(map(str, arguments))}, got {value!r}")
    if origin is tuple:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        raise InputError(f"setting {where}: expected a list, as [{value}], got {value!r}")
    if origin is Mapping:
        if isinstance(value, Mapping):
            return {str(key): _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
        raise InputError(f"setting {where}: expected name: value pairs, got {value!r}")
    if wanted is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 takes 1e-5 for text, for it has no dot
        except ValueError:
            pass
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is wanted:
        return value
    raise InputError(f"setting {where}: expected {getattr(wanted, '__name__', wanted)}, got {value!r}")
