"""Settings of stage two: frozen, checked where they are made, and without torch.

`--set a.b=c` and the sections of a YAML file follow this tree: `optimizer.learning_rate` and so on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from mimir_shared.errors import InputError
from mimir_shared.storage.open import DEFAULT_LOCAL_CACHE_GB
from mimir_train.ema_profile import EmaProfile, parse_profile
from mimir_train.model.config import FUSERS, AttentionName, DiTConfig, FuserName
from mimir_train.order.clip_order import DEFAULT_SHARDS_PER_BLOCK

VerifyReads = Literal["always", "first-epoch", "never"]
OnBadSample = Literal["error", "substitute"]
AnswerVariant = Literal["fixed", "cycle", "random"]
TextAlign = Literal["index", "char_offset"]
EmptyText = Literal["zeros", "cached"]
Schedule = Literal["constant", "cosine", "linear", "wsd"]
Precision = Literal["float32", "bfloat16"]
Reporter = Literal["tensorboard", "wandb"]
Strategy = Literal["auto", "ddp", "fsdp", "hsdp"]
ActivationCheckpointing = Literal["none", "selective", "full"]

SCRATCH = "scratch"
"""Value of `model.init_from`: no weights are loaded."""


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise InputError(f"{name} must be {expected}, got {got}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and in which order."""

    cache: str
    """The cache: a folder, or s3://bucket/prefix (gs://, az://). A run may go on from a copy elsewhere: the snapshot
    is what counts."""
    features: Mapping[str, str] = field(default_factory=dict)
    """Feature to the beginning of its fingerprint, where the cache has a feature more than once."""
    snapshot: str | None = None
    """Digest of the snapshot; None takes the newest and pins it."""
    global_batch_size: int
    """Clips of a step over all ranks, all of one bucket; with tokens_per_pack: packs of a step."""
    micro_batch_size: int | None = None
    """Clips that go through the model at once on one rank; the rest of the step is accumulated. None: all."""
    tokens_per_pack: int | None = None
    """Clips of all buckets go through the transformer several in one sequence, of at most so many text and video
    tokens, one sequence at once on a rank; a cogvideox clip of 49x480x720 has 17,780. None: clips of one bucket at a
    time, each a sequence."""
    shards_per_block: int = DEFAULT_SHARDS_PER_BLOCK
    """Shards whose clips are shuffled together: more mixes better, fewer reads more locally."""
    validation_shards: int | None = None
    """How many shards, those of the highest numbers, are never trained on; None: one in 50, at most 4."""
    verify_reads: VerifyReads = "always"
    """When the hash of what is read is compared."""
    prefetch_batches: int = 2
    """Steps that are read ahead."""
    reader_threads: int = 4
    """Threads of a rank that read the cache."""
    on_bad_sample: OnBadSample = "error"
    """What becomes of a clip that cannot be read: the run ends, or another of its bucket stands in, and is recorded."""
    max_bad_share: float = 0.01
    """With substitute: the run ends when more than 10 clips, and more than this share of those read, were bad."""
    local_cache_dir: str | None = None
    """Folder on a near disk that keeps what is read from a bucket; ranks of a machine share it. None: keep nothing."""
    local_cache_gb: float = DEFAULT_LOCAL_CACHE_GB
    """The most that may lie in it, in 10^9 bytes."""
    answer_variant: AnswerVariant = "fixed"
    """Which of several cached answers is read: always the first, each in turn over the epochs, or one at random."""
    empty_text: EmptyText = "zeros"
    """What a clip gets in place of its text when that is dropped: zeros, or the cached features of the empty prompt."""

    def __post_init__(self) -> None:
        _require(self.global_batch_size >= 1, "data.global_batch_size", "at least 1", self.global_batch_size)
        micro = self.micro_batch_size
        _require(micro is None or micro >= 1, "data.micro_batch_size", "at least 1", micro)
        budget = self.tokens_per_pack
        _require(budget is None or budget >= 1, "--tokens-per-pack", "at least 1", budget)
        if budget is not None:
            _require(micro in (None, 1), "--micro-batch-size", "1 with --tokens-per-pack: a pack at a time", micro)
        _require(self.shards_per_block >= 1, "data.shards_per_block", "at least 1", self.shards_per_block)
        held_out = self.validation_shards
        _require(held_out is None or held_out >= 0, "data.validation_shards", "0 or more", held_out)
        _require(self.local_cache_gb > 0, "--cache-dir-gb", "more than 0", self.local_cache_gb)
        policy, policies = self.answer_variant, get_args(AnswerVariant)
        _require(policy in policies, "--answer-variant", f"one of {', '.join(policies)}", repr(policy))
        _require(self.prefetch_batches >= 1, "data.prefetch_batches", "at least 1", self.prefetch_batches)
        _require(self.reader_threads >= 1, "data.reader_threads", "at least 1", self.reader_threads)
        _require(0 <= self.max_bad_share <= 1, "data.max_bad_share", "from 0 to 1", self.max_bad_share)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters that are trained in place of the transformer, whose own weights stay as they are."""

    rank: int
    """Of each adapter: its update to a matrix is a product of two that are so narrow."""
    alpha: float | None = None
    """The update is multiplied by alpha / rank; None: the rank, a factor of one."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Linear maps of the transformer that get one, by the ends of their names."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "--lora-rank", "at least 1", self.rank)
        _require(self.alpha is None or self.alpha > 0, "--lora-alpha", "positive", self.alpha)
        _require(bool(self.targets) and all(self.targets), "--lora-targets", "names of linear maps", self.targets)

    @property
    def settled_alpha(self) -> float:
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def scaling(self) -> float:
        """What the product of an adapter's two matrices is multiplied by."""
        return self.settled_alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained."""

    fuser: FuserName = "mimir"
    """One of the named token fusers: which parts of it are there."""
    text_align: TextAlign = "index"
    """How the LLM's tokens meet T5's: row by row, or by the characters that both cover; the answer comes behind."""
    stabilizer_start_step: int = 0
    """Step from which the stabilizer tokens are appended; until then the transformer sees a text as long as T5's."""
    init_from: str = SCRATCH
    """Where the transformer comes from: a diffusers folder, a hub id (or id@revision), or "scratch"."""
    transformer: DiTConfig = field(default_factory=DiTConfig)
    """Its sizes; with init_from, those that are expected there."""
    attention: AttentionName = "sdpa"
    """Who computes attention: torch's own, or a kernel that some machines have. All give the same but for rounding."""
    fit_to_cache: bool = False
    """Channels, text width and base grid of `transformer` are taken from the cache; from scratch only."""
    lora: LoraConfig | None = None
    """Adapters on the transformer of init_from; None: all of it is trained. The fuser always is."""
    latent_scaling_factor: float | None = None
    """Multiplies the cached latents; None: one over their standard deviation in the snapshot."""
    t5_rms: float | None = None
    """Where the fuser's learnable scale starts; None: the root mean square of the snapshot's T5 embeddings."""

    def __post_init__(self) -> None:
        choices = get_args(TextAlign)
        _require(self.text_align in choices, "--text-align", f"one of {', '.join(choices)}", repr(self.text_align))
        _require(self.fuser in FUSERS, "--fuser", f"one of {', '.join(FUSERS)}", repr(self.fuser))
        start = self.stabilizer_start_step
        _require(start >= 0, "--stabilizer-start-step", "0 or more", start)
        if self.lora is not None and self.init_from == SCRATCH:
            raise InputError("--lora-rank: adapters want a transformer that was trained; give it by --init-from")
        factor = self.latent_scaling_factor
        _require(factor is None or factor > 0, "model.latent_scaling_factor", "positive", factor)
        _require(self.t5_rms is None or self.t5_rms > 0, "model.t5_rms", "positive", self.t5_rms)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the model learns to predict."""

    snr_shift_scale: float
    """Divides the signal-to-noise ratio of the schedule: 3.0 for 2B, 1.0 for 5B."""
    text_dropout: float = 0.1
    """Share of clips trained without their text, T5 and LLM together: the unconditional branch of guidance."""

    def __post_init__(self) -> None:
        _require(self.snr_shift_scale > 0, "objective.snr_shift_scale", "positive", self.snr_shift_scale)
        _require(0 <= self.text_dropout <= 1, "objective.text_dropout", "from 0 to 1", self.text_dropout)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, with one learning rate for the transformer and one for the fuser."""

    learning_rate: float
    """Of the transformer, or of the adapters on it."""
    fuser_learning_rate: float
    schedule: Schedule = "constant"
    """What follows the warm-up: a constant rate; half a cosine or a line that ends with max_train_steps; or wsd, a
    constant rate that falls in a line over the last decay_steps."""
    warmup_steps: int = 0
    """Steps in which the rates rise from zero."""
    decay_steps: int | None = None
    """Of wsd; None: a fifth of max_train_steps."""
    final_rate_share: float = 0.0
    """What cosine, linear and wsd end at, as a share of the rates above."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    """Of matrices; norms, biases, scales and offsets have none."""
    clip_norm: float = 1.0
    """Gradients whose norm over all parameters is larger are scaled down to it."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "fuser_learning_rate", "epsilon", "clip_norm"):
            _require(getattr(self, name) > 0, f"optimizer.{name}", "positive", getattr(self, name))
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name}", "from 0 to below 1", getattr(self, name))
        _require(self.weight_decay >= 0, "optimizer.weight_decay", "0 or more", self.weight_decay)
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", "0 or more", self.warmup_steps)
        choices = get_args(Schedule)
        _require(self.schedule in choices, "--lr-scheduler", f"one of {', '.join(choices)}", repr(self.schedule))
        decay, share = self.decay_steps, self.final_rate_share
        _require(decay is None or decay >= 1, "optimizer.decay_steps", "at least 1", decay)
        _require(0 <= share < 1, "optimizer.final_rate_share", "from 0 to below 1", share)
        if decay is not None and self.schedule != "wsd":
            raise InputError(f"--lr-decay-steps {decay}: only --lr-scheduler wsd takes it, not {self.schedule}")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is shared and run. Nothing here changes what is trained, but for rounding."""

    strategy: Strategy = "auto"
    """Each rank holds the whole model (ddp), a part of it (fsdp), or a part, several times over (hsdp: cut within a
    machine, repeated across machines). auto: ddp where the model's states fit into half of a device's memory."""
    shard_size: int | None = None
    """With hsdp: ranks over which the model is cut; None: those of one machine."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """What a block of the transformer computes again in its backward, in place of keeping it: nothing, all but matrix
    products and attention (selective), or everything (full)."""
    compile: bool = False
    """Run the blocks through torch.compile: faster steps after some minutes; on a CPU it needs a C++ compiler."""

    def __post_init__(self) -> None:
        choices = get_args(Strategy)
        _require(self.strategy in choices, "--parallel", f"one of {', '.join(choices)}", repr(self.strategy))
        size = self.shard_size
        _require(size is None or size >= 1, "--shard-size", "at least 1", size)
        _require(size is None or self.strategy == "hsdp", "--shard-size", "left out but with --parallel hsdp", size)


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Running averages of the weights, kept beside them in float32: for sampling, export and validation."""

    profiles: tuple[str, ...] = ()
    """power:SIGMA_REL or fixed:DECAY each (`ema_profile`). Each takes as much memory as the weights that are trained,
    cut over the ranks as they are, so none is kept unless asked for."""
    validation: bool = True
    """Report the validation loss of the first average too, and sample by it in place of the weights."""

    def __post_init__(self) -> None:
        names = [profile.name for profile in self.parsed]
        _require(len(set(names)) == len(names), "--ema", "each profile once", ", ".join(names))

    @property
    def parsed(self) -> tuple[EmaProfile, ...]:
        return tuple(parse_profile(text) for text in self.profiles)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, where, and what is written."""

    output_dir: str
    seed: int = 42
    """Of the order, of every draw of a step, and of the first weights."""
    max_train_steps: int
    """Steps of the whole training; what falls of the learning rates ends here."""
    stop_at_step: int | None = None
    """Save and leave after so many steps, to go on later."""
    checkpointing_steps: int = 500
    """Steps between checkpoints; there is one at the end besides."""
    checkpoints_total_limit: int | None = None
    """Older checkpoints than the newest so many are removed; None keeps all."""
    checkpoints_keep_every: int | None = None
    """With the limit: checkpoints whose step is a multiple of it stay besides."""
    checkpoints_in_background: bool = True
    """Write checkpoints while the steps go on, from a copy of the state in the host's memory; false: the steps wait,
    and no copy is made."""
    validation_steps: int = 500
    """Steps between validation losses; of no effect without validation shards."""
    validation_clips: int = 64
    """Clips of the held-out shards that a validation loss is taken over, at most."""
    validation_samples: int = 0
    """Captions of held-out clips that are sampled at each validation, for `mimir-train decode`; 0: none."""
    fuser_figures_steps: int = 20
    """Steps between measurements of the fuser's branches."""
    report_to: tuple[Reporter, ...] = ("tensorboard",)
    """Who gets the metrics besides metrics.jsonl."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    watchdog_s: float | None = 600.0
    """Seconds that a step may take before all ranks are ended as hanging, with their stacks; six times as long for
    reading data, saving, validating and the first step. null: never."""
    precision: Precision
    """In which the model computes; weights and optimizer are float32 always."""
    peak_tflops: float | None = None
    """10^12 operations a second of one device at its best, that MFU is a share of; None: the data sheet's, if known."""

    def __post_init__(self) -> None:
        _require(self.max_train_steps >= 1, "--max-train-steps", "at least 1", self.max_train_steps)
        stop = self.stop_at_step
        _require(stop is None or stop >= 1, "--stop-at-step", "at least 1", stop)
        for name in ("checkpointing_steps", "validation_steps", "validation_clips", "fuser_figures_steps"):
            _require(getattr(self, name) >= 1, f"run.{name}", "at least 1", getattr(self, name))
        watchdog_s = self.watchdog_s
        _require(watchdog_s is None or watchdog_s > 0, "run.watchdog_s", "positive, or null", watchdog_s)
        peak = self.peak_tflops
        _require(peak is None or peak > 0, "run.peak_tflops", "positive", peak)
        _require(self.validation_samples >= 0, "run.validation_samples", "at least 0", self.validation_samples)
        for option in ("checkpoints_total_limit", "checkpoints_keep_every"):
            limit = getattr(self, option)
            _require(limit is None or limit >= 1, f"--{option.replace('_', '-')}", "at least 1", limit)
        _require(self.checkpoints_keep_every is None or self.checkpoints_total_limit is not None,
                 "--checkpoints-keep-every", "given with --checkpoints-total-limit (without it all are kept)",
                 self.checkpoints_keep_every)  # fmt: skip
        _require(len(set(self.report_to)) == len(self.report_to), "--report-to", "each once", self.report_to)

    @property
    def last_step(self) -> int:
        """How many steps will have been trained when this run ends."""
        return self.max_train_steps if self.stop_at_step is None else min(self.stop_at_step, self.max_train_steps)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a training run is told."""

    preset: str
    """Where the settings began; recorded in checkpoints."""
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    run: RunConfig

    def __post_init__(self) -> None:
        if self.model.fit_to_cache and self.model.init_from != SCRATCH:
            raise InputError(
                f"model.fit_to_cache changes the sizes of a transformer made from scratch, and --init-from "
                f"{self.model.init_from} has its own: set model.fit_to_cache=false"
            )
        decay, warmup, steps = self.optimizer.decay_steps, self.optimizer.warmup_steps, self.run.max_train_steps
        if decay is not None and warmup + decay > steps:
            raise InputError(
                f"--lr-decay-steps {decay}: with {warmup} steps of warm-up before it, it does not fit into "
                f"--max-train-steps {steps}"
            )
