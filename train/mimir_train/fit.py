"""Whether cache, transformer and fuser fit one another: settled before anything is built.

What the config leaves open is filled in from the cache here, so that config.yaml says what was trained.
"""

import math
from dataclasses import dataclass, replace

from mimir_shared.errors import CacheError, InputError
from mimir_shared.wording import noun_for
from mimir_train.batch import FeatureLayout, batch_requests, find_layout, read_empty_text
from mimir_train.cache_reader import Cache
from mimir_train.config import SCRATCH, ModelConfig, TrainConfig
from mimir_train.model.config import FUSERS, DiTConfig, FuserConfig
from mimir_train.objective import TextFeatures
from mimir_train.order.held_out import held_out_shards
from mimir_train.presets import PRESETS, VAE_SCALING_FACTORS
from mimir_train.weights.initial_transformer import InitialTransformer, find_initial_transformer, is_hub_id


@dataclass(frozen=True, kw_only=True)
class FittedRun:
    """A config with nothing left open, and what it means for model and batches."""

    config: TrainConfig
    initial: InitialTransformer
    fuser: FuserConfig
    layout: FeatureLayout
    latents_std: float
    """Of the cached latents, unscaled."""
    held_out: tuple[int, ...]
    """Shards that are never trained on."""
    empty_text: TextFeatures | None
    """What dropped text becomes; None: zeros."""


def fit(config: TrainConfig, cache: Cache, initial: InitialTransformer | None = None) -> FittedRun:
    """Check a config against a cache and fill in what it leaves open.

    Args:
        initial: the transformer of a run that goes on; None: find that of the config.
    Raises: InputError where the fuser needs `llm` and the cache has none; CacheError where latents or text are not
        of the transformer's size, were made by a VAE of another scale, or lack a tensor that is read.
    """
    layout = find_layout(cache, llm=_reads_llm(config.model, cache), text_align=config.model.text_align)
    check_tensors(layout, cache)
    if config.data.answer_variant != "fixed" and layout.llm and layout.num_variants == 1:
        raise InputError(
            f"--answer-variant {config.data.answer_variant}: {cache.storage.root} holds one answer to each prompt; "
            f"encode with --answer-variants 2 or more, or train with --answer-variant fixed"
        )
    if initial is None and _has_known_sizes(config):
        check_sizes(config.model.transformer, layout, cache, config.model.init_from)  # before gigabytes are fetched
    initial = initial or find_initial_transformer(config.model)
    if config.model.fit_to_cache:
        initial = replace(initial, config=fit_transformer(initial.config, layout))
    check_sizes(initial.config, layout, cache, config.model.init_from)
    latents_std = measure_latents_std(cache, layout)
    factor = settle_scaling_factor(config, cache, initial, latents_std)
    t5_rms = config.model.t5_rms or measure_t5_rms(cache)
    held_out = held_out_shards(config.data.validation_shards, cache.num_shards)
    model = replace(config.model, transformer=initial.config, latent_scaling_factor=factor, t5_rms=t5_rms)
    data = replace(config.data, snapshot=cache.snapshot.digest, validation_shards=len(held_out))
    return FittedRun(
        config=replace(config, model=model, data=data),
        initial=initial,
        fuser=FuserConfig(
            switches=FUSERS[model.fuser],
            t5_rms=t5_rms,
            text_width=layout.text_width,
            llm_width=layout.llm_width or FuserConfig.llm_width,
            num_instructions=layout.num_instructions or FuserConfig.num_instructions,
            stabilizer_start_step=model.stabilizer_start_step,
        ),
        layout=layout,
        latents_std=latents_std,
        held_out=held_out,
        empty_text=read_empty_text(cache, layout) if config.data.empty_text == "cached" else None,
    )


def check_tensors(layout: FeatureLayout, cache: Cache) -> None:
    """Raise CacheError where a feature lacks a tensor that batches are made of."""
    for request in batch_requests(layout):
        for bucket in cache.snapshot.buckets:
            there = [spec.name for spec in cache.spec(request.feature).tensor_specs(bucket)]
            missing = [name for name in request.variants or (request.name,) if name not in there]
            if missing:
                raise CacheError(
                    f"{cache.storage.root}: `{request.feature}` has no {missing[0]}, which training reads; it has "
                    f"{', '.join(there)}: encode `{request.feature}` anew, with --on-mismatch new to keep what is there"
                )


def fit_transformer(config: DiTConfig, layout: FeatureLayout) -> DiTConfig:
    """Sizes of a transformer from scratch that follow from the cache; its base grid is that of the largest bucket."""
    _, height, width = max(layout.latent_sizes.values(), key=lambda sizes: sizes[1] * sizes[2])
    frames = max(sizes[0] for sizes in layout.latent_sizes.values())
    return replace(
        config,
        in_channels=layout.latent_channels,
        out_channels=layout.latent_channels,
        text_embed_dim=layout.text_width,
        max_text_seq_length=layout.t5_rows,
        sample_height=height,
        sample_width=width,
        sample_frames=(frames - 1) * config.temporal_compression_ratio + 1,
    )


def check_sizes(transformer: DiTConfig, layout: FeatureLayout, cache: Cache, source: str) -> None:
    """Raise CacheError where the transformer cannot take what the cache holds."""
    root = cache.storage.root
    if (transformer.in_channels, transformer.out_channels) != (layout.latent_channels,) * 2:
        raise CacheError(
            f"{root}: its latents have {layout.latent_channels} channels, but the transformer ({source}) takes "
            f"{transformer.in_channels} and gives {transformer.out_channels}; they belong to different VAEs: train the "
            f"transformer of the VAE that the cache was made with, or encode `latents` with its VAE"
        )
    if transformer.text_embed_dim != layout.text_width:
        raise CacheError(
            f"{root}: its t5_embeds are {layout.text_width} wide, but the transformer ({source}) takes "
            f"{transformer.text_embed_dim}; encode `t5` with the text encoder of this transformer"
        )
    for bucket, (_, height, width) in layout.latent_sizes.items():
        if height % transformer.patch_size or width % transformer.patch_size:
            raise CacheError(
                f"{root}: latents of bucket {bucket} are {height} x {width}, which cannot be cut into patches of "
                f"{transformer.patch_size}, the transformer's ({source})"
            )


def measure_latents_std(cache: Cache, layout: FeatureLayout) -> float:
    """Standard deviation over all values of the cached latents' means, from the snapshot's statistics."""
    statistics = cache.snapshot.features["latents"].statistics[layout.latents]
    count = layout.latent_channels  # of moments, the second half are log-variances
    means, variances = statistics.mean[:count], statistics.variance[:count]
    mean = sum(means) / count
    square = sum(variance + m * m for variance, m in zip(variances, means, strict=True)) / count
    return math.sqrt(max(square - mean * mean, 0.0))


def measure_t5_rms(cache: Cache) -> float:
    """Root mean square of the T5 embeddings over their real rows, from the snapshot's statistics."""
    statistics = cache.snapshot.features["t5"].statistics["t5_embeds"]
    return round(math.sqrt(statistics.mean[0] ** 2 + statistics.variance[0]), 8)


def settle_scaling_factor(config: TrainConfig, cache: Cache, initial: InitialTransformer, latents_std: float) -> float:
    """The factor that brings cached latents to unit variance.

    Raises: CacheError where the VAE that made the cache, or the one beside the initial transformer, has another.
    """
    wanted = config.model.latent_scaling_factor
    name = str(cache.spec("latents").identity.get("model", {}).get("name", ""))
    known = {f"the VAE of {name}, which made its latents,": VAE_SCALING_FACTORS.get(name)}
    known[f"the VAE beside {config.model.init_from}"] = initial.vae_scaling_factor
    for who, factor in known.items():
        if factor is not None and wanted is not None and abs(factor - wanted) > 1e-6 * factor:
            raise CacheError(
                f"{cache.storage.root}: latents would be scaled by {wanted:g}, but {who} has the scaling factor "
                f"{factor:g}; take the preset of that VAE, or --set model.latent_scaling_factor={factor:g}"
            )
    settled = wanted or next((factor for factor in known.values() if factor is not None), None)
    if settled is not None:
        return settled
    if not latents_std > 0:
        raise CacheError(f"{cache.storage.root}: all cached latents are equal; there is nothing to learn from them")
    return round(1.0 / latents_std, 8)


def _reads_llm(model: ModelConfig, cache: Cache) -> bool:
    if not FUSERS[model.fuser].needs_llm:
        return False
    if "llm" not in cache.snapshot.features:
        root = cache.storage.root
        raise InputError(
            f"--fuser {model.fuser} reads the feature `llm`, which {root} does not have (it has "
            f"{', '.join(cache.snapshot.features)}); make it: `mimir-precompute encode --cache {root} --features "
            f"answers,llm` with its LLM, or train --fuser baseline"
        )
    return True


def _has_known_sizes(config: TrainConfig) -> bool:
    """Whether the config tells the transformer's sizes though its weights are still on the hub."""
    preset = PRESETS.get(config.preset, {})
    return is_hub_id(config.model.init_from) and config.model.init_from == preset.get("model", {}).get("init_from")


def describe_fit(fitted: FittedRun, cache: Cache, *, goes_on: bool = False) -> list[str]:
    """What a person should know before the run: one line each."""
    model = fitted.config.model
    source = "from scratch" if model.init_from == SCRATCH else f"from {model.init_from}"
    source = f"that began {source}" if goes_on else source
    shards = noun_for(len(fitted.held_out), "shard")
    held_out = f"{shards} {', '.join(map(str, fitted.held_out))} held out for validation"
    more = []
    if model.lora is not None:
        more.append(
            f"adapters of rank {model.lora.rank} on {', '.join(model.lora.targets)} are trained, not the transformer"
        )
    if fitted.config.ema.profiles:
        more.append(f"averages of the weights: {', '.join(profile.name for profile in fitted.config.ema.parsed)}")
    rows = fitted.layout.t5_rows
    if model.init_from != SCRATCH and rows != model.transformer.max_text_seq_length:
        more.append(
            f"note: the transformer ({model.init_from}) was trained on {model.transformer.max_text_seq_length} rows of "
            f"text, pad rows among them, and the cache has {rows}: encode `t5` with as many, or let it adapt"
        )
    return [
        f"snapshot {cache.snapshot.digest[:12]}: {len(cache)} clips in {cache.num_shards} "
        f"{noun_for(cache.num_shards, 'shard')}, {held_out if fitted.held_out else 'no shard held out for validation'}",
        f"transformer {source}: {model.transformer.num_layers} layers, {model.transformer.width} wide; "
        f"fuser {model.fuser}; latents scaled by {model.latent_scaling_factor:g}",
        *more,
    ]
