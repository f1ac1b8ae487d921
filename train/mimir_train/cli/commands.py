"""What the commands of `mimir-train` do, once their options are parsed."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mimir_shared.errors import InputError
from mimir_train.cache_reader import Cache
from mimir_train.config import SCRATCH, TrainConfig
from mimir_train.config_document import Document, nest, overlay, parse_assignment, read_document, train_config
from mimir_train.order.build import OrderSettings, build_order
from mimir_train.order.clip_order import ClipOrder
from mimir_train.order.held_out import held_out_shards
from mimir_train.presets import LORA_LEARNING_RATES, preset_document
from mimir_train.run_folder import resumed_run, resumed_settings


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What the user asked of `run`."""

    preset: str | None
    output_dir: Path
    config_file: Path | None
    assignments: tuple[str, ...]
    """Of --set."""
    flags: Mapping[str, object]
    """Dotted setting → value of its own option; None where the option was not given."""
    resume: str | None


def build_config(request: RunRequest) -> TrainConfig:
    """Preset, or the settings that the run began with; over them the file, then --set, then options.

    Raises: InputError for whatever does not fit, naming it.
    """
    began_with = resumed_settings(request.output_dir, request.resume)
    document: Document
    if began_with is not None:
        document = began_with
        if request.preset is not None and request.preset != began_with.get("preset"):
            raise InputError(
                f"--preset {request.preset}: {request.output_dir} began with {began_with.get('preset')}; leave it out"
            )
    elif request.preset is None:
        raise InputError(describe_missing_preset(request))
    else:
        document = preset_document(request.preset)
    given: Document = {} if request.config_file is None else read_document(request.config_file)
    for assignment in request.assignments:
        given = overlay(given, parse_assignment(assignment))
    for name, value in request.flags.items():
        if value is not None:
            refuse_flat_section(given, name)
            given = overlay(given, nest(name, value))
    if began_with is None:
        document = with_rate_of_adapters(document, given)
    document = overlay(overlay(document, given), nest("run.output_dir", str(request.output_dir)))
    refuse_adapters_without_rank(document)
    refuse_no_cache(document)
    return train_config(without_fitting(document))


def describe_missing_preset(request: RunRequest) -> str:
    """Who asks for a run to go on has named no preset because there should be a run: say that there is none."""
    if request.resume is None:
        return "--preset is missing: give tiny, cogvideox-2b or cogvideox-5b"
    run = resumed_run(request.output_dir, request.resume)
    return (
        f"--resume-from-checkpoint {request.resume}: {run} holds no checkpoint to go on from; give the --output-dir of "
        f"a run, or --cache and --preset to begin a new one"
    )


def refuse_flat_section(given: Document, name: str) -> None:
    """A section that --set or the file gave as one value must not vanish under an option of that section."""
    section = name.partition(".")[0]
    values = given.get(section)
    if values is not None and not isinstance(values, dict):
        raise InputError(f"setting {section}: expected a section, got {values!r}")


def refuse_no_cache(document: Document) -> None:
    data = document.get("data")
    if isinstance(data, dict) and "cache" not in data:
        raise InputError("--cache is missing: give the folder of the cache, or s3://bucket/prefix (gs://, az://)")


def refuse_adapters_without_rank(document: Document) -> None:
    model = document.get("model")
    lora = model.get("lora") if isinstance(model, dict) else None
    if isinstance(lora, dict) and lora.get("rank") is None:
        given = ", ".join(f"--lora-{name}" for name in lora if name != "rank")
        raise InputError(f"{given} without --lora-rank: adapters are trained only where their rank is given")


def with_rate_of_adapters(preset: Document, given: Document) -> Document:
    """Where adapters are asked for, the preset's learning rate is theirs; a rate that was given wins later."""
    model = given.get("model")
    rate = LORA_LEARNING_RATES.get(str(preset.get("preset")))
    if rate is None or not isinstance(model, dict) or model.get("lora") is None:
        return preset
    return overlay(preset, nest("optimizer.learning_rate", rate))


def without_fitting(document: Document) -> Document:
    """A transformer that is loaded has its own sizes: the tiny preset's wish to fit them to the cache is dropped."""
    model = document.get("model")
    if isinstance(model, dict) and model.get("init_from", SCRATCH) != SCRATCH:
        return overlay(document, nest("model.fit_to_cache", False))
    return document


def parse_features(choices: list[str]) -> dict[str, str] | None:
    """feature → fingerprint of --feature name=fingerprint; None where none was given. Raises InputError."""
    parsed = {}
    for choice in choices:
        name, equals, fingerprint = choice.partition("=")
        if not equals or not name or not fingerprint:
            raise InputError(f"--feature {choice}: expected name=fingerprint, for instance llm=0f3a")
        parsed[name] = fingerprint
    return parsed or None


def parse_names(text: str | None) -> list[str] | None:
    """The list of --report-to, --ema or --lora-targets; "none" is an empty one."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    return [] if names == ["none"] else names


@dataclass(frozen=True, kw_only=True)
class OrderRequest:
    """What the user asked of `order`."""

    cache: str
    features: Mapping[str, str]
    global_batch_size: int
    seed: int
    shards_per_block: int
    validation_shards: int | None
    start_step: int
    steps: int | None
    """None: one epoch."""
    world_size: int
    tokens_per_pack: int | None = None
    patch_size: int = 2
    snapshot: str | None = None
    """Digest (or its beginning) of the one that a run pinned; None: the newest."""


@dataclass(frozen=True, kw_only=True)
class OrderLine:
    """One step as `order` says it."""

    step: int
    packs: tuple[tuple[tuple[str, ...], ...], ...]
    """Of each rank its packs, of each pack the keys; clips of one bucket are one."""
    is_packed: bool

    @property
    def ranks(self) -> list[list[str]]:
        """The keys of each rank."""
        return [[key for pack in packs for key in pack] for packs in self.packs]


def order_of(request: OrderRequest, cache: Cache) -> ClipOrder:
    """Raises InputError for what makes no order."""
    settings = OrderSettings(
        seed=request.seed,
        global_batch_size=request.global_batch_size,
        shards_per_block=request.shards_per_block,
        tokens_per_pack=request.tokens_per_pack,
        patch_size=request.patch_size,
    )
    held_out = held_out_shards(request.validation_shards, cache.num_shards)
    return build_order(cache, settings, held_out=held_out, world_size=request.world_size, micro_batch_size=None)


def order_lines(request: OrderRequest, cache: Cache, order: ClipOrder) -> Iterator[OrderLine]:
    """The steps asked for."""
    steps = order.steps_per_epoch if request.steps is None else request.steps
    for step in range(request.start_step, request.start_step + steps):
        whole = order.batch(step)
        numbers = map(cache.clip_number, whole.buckets, whole.places)
        keys = [cache.clip(number).key for number in numbers]
        packs = (order.parts(step, rank, request.world_size) for rank in range(request.world_size))
        yield OrderLine(
            step=step,
            packs=tuple(tuple(tuple(keys[pack.start : pack.stop]) for pack in of_rank) for of_rank in packs),
            is_packed=order.is_packed,
        )


def describe_order(line: OrderLine, *, as_json: bool) -> str:
    if as_json:
        packs = {"packs": line.packs} if line.is_packed else {}
        return json.dumps({"step": line.step, "ranks": line.ranks, **packs}, ensure_ascii=False)
    told = [[", ".join(pack) for pack in packs] for packs in line.packs]
    ranks = [" + ".join(f"({pack})" for pack in packs) if line.is_packed else packs[0] for packs in told]
    return f"step {line.step}: " + " | ".join(f"rank {rank}: {keys}" for rank, keys in enumerate(ranks))
