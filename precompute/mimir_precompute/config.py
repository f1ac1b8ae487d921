"""Settings of stage one: frozen, checked where they are made, and without torch."""

from dataclasses import dataclass, field
from typing import Literal

from mimir_shared.errors import InputError

ComputeDType = Literal["float32", "bfloat16"]
StoredLatents = Literal["moments", "mean", "sample"]
VaeEngine = Literal["fast", "diffusers"]
LlmEngineName = Literal["transformers", "vllm"]
InstructionPooling = Literal["mean", "last", "query"]
LlmLayer = int | Literal["last", "mean"]


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The size to which clips are cut: (frames, height, width) in pixels."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.frames < 1 or (self.frames != 1 and self.frames % 8 != 1):
            raise InputError(
                f"--bucket {self}: the number of frames must be 1 or 8k+1 (9, 17, 49, …), "
                f"for the VAE encodes a first chunk of 9 and then 8 at a time; got {self.frames}"
            )
        if min(self.height, self.width) < 16 or self.height % 16 or self.width % 16:
            raise InputError(
                f"--bucket {self}: height and width must be multiples of 16 (VAE stride times patch size), "
                f"got {self.height} and {self.width}"
            )

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Read "FxHxW". Raises InputError for anything else."""
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            raise InputError(f"--bucket {text!r}: expected frames x height x width, for instance 49x480x720")
        frames, height, width = (int(part) for part in parts)
        return cls(frames=frames, height=height, width=width)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Which frames of a clip are taken, and to what size they are cut."""

    buckets: tuple[Bucket, ...]
    fps: float
    """Frames a second at which a clip is sampled, by time stamp."""

    def __post_init__(self) -> None:
        if not self.buckets:
            raise InputError("no bucket: give --bucket FxHxW at least once, or a --preset")
        if not self.fps > 0:
            raise InputError(f"--fps must be positive, got {self.fps}")


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """What decoding one clip may take. They change no byte of a clip that keeps to them, so no identity has them."""

    timeout_s: float = 60
    """Seconds of CPU time; as long by the clock for a decoder that waits instead of computing. Ten seconds of
    4K HEVC at 60 frames a second take about half of it."""
    memory_gb: float = 4
    """GB (10^9 bytes) beyond what an idle decoder has mapped. Enough for 8K frames, of which a decoder keeps up to
    twenty; a bomb can take so much once for each decode worker."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < float("inf"):
            raise InputError(f"--decode-timeout-s must be positive, got {self.timeout_s}")
        if not 0 < self.memory_gb < float("inf"):
            raise InputError(f"--decode-memory-gb must be positive, got {self.memory_gb}")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where one model lies: a folder, or a hub id with an optional revision (`id@revision`)."""

    name: str
    subfolder: str = ""


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """A request put to the LLM about every caption; one stabilizer token comes of each."""

    name: str
    text: str


DEFAULT_INSTRUCTIONS: tuple[Instruction, ...] = (
    Instruction(name="objects", text="Name every object in this scene and say how many there are of each."),
    Instruction(name="attributes", text="Give the colour, material and other visible attributes of each object."),
    Instruction(name="relations", text="Say where the objects are in the frame and in relation to one another."),
    Instruction(name="actions", text="Describe what moves, how it moves, and in which order things happen."),
)


@dataclass(frozen=True, kw_only=True)
class VaeSettings:
    source: ModelSource
    dtype: ComputeDType = "bfloat16"
    stored: tuple[StoredLatents, ...] = ("moments",)
    """Which of the posterior's tensors are kept: moments (mean and log-variance), mean, one sample."""
    tiling: bool = False
    """Encode in overlapping tiles: less memory, other bytes."""
    engine: VaeEngine = "fast"
    """fast: our encoder, equal to diffusers but for the last bits; diffusers: its own, the reference and fall-back."""
    batch_size: int = 1
    """Clips a launch; may change the last bits, so it is part of the identity."""
    seed: int = 0
    """Of the stored sample (`stored` has "sample"); keyed by clip."""


@dataclass(frozen=True, kw_only=True)
class T5Settings:
    text_encoder: ModelSource
    tokenizer: ModelSource
    dtype: ComputeDType = "bfloat16"
    max_length: int = 226
    """Tokens of a caption, end token included; longer ones are cut, shorter ones padded."""
    rows: Literal["all", "ragged"] = "all"
    """all: pad rows are kept, for the pretrained DiT reads them; ragged: they are dropped, which is lossy."""
    batch_size: int = 16


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """How the vLLM engine runs."""

    tensor_parallel_size: int = 1
    """GPUs that share the model."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that weights and key-value cache may take; on a CPU unread."""
    max_num_seqs: int = 256
    """Sequences that generate at once."""
    prefix_caching: bool = True
    """Keep the keys and values of the caption that the prompts of a clip begin with alike."""

    def __post_init__(self) -> None:
        if self.tensor_parallel_size < 1 or self.max_num_seqs < 1:
            raise InputError(
                f"--llm-tensor-parallel {self.tensor_parallel_size}, {self.max_num_seqs} sequences: expected at least 1"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InputError(f"--llm-memory-share {self.gpu_memory_utilization}: expected a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class AnswersSettings:
    source: ModelSource
    dtype: ComputeDType = "bfloat16"
    engine: LlmEngineName = "transformers"
    vllm: VllmSettings = field(default_factory=VllmSettings)
    """Read by the engine vllm alone."""
    instructions: tuple[Instruction, ...] = DEFAULT_INSTRUCTIONS
    max_caption_tokens: int = 226
    """LLM tokens of a caption; the rest is cut, in prompts and features alike."""
    max_answer_tokens: int = 128
    """New tokens of the answer to the caption itself."""
    max_instruction_tokens: int = 64
    """New tokens of the answer to each instruction."""
    variants: int = 1
    """Answers kept for each prompt: variant 0 is greedy, the others are sampled with recorded seeds."""
    temperature: float = 1.0
    """Of the sampled variants."""
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.variants < 1:
            raise InputError(f"--answer-variants must be at least 1, got {self.variants}")
        if not self.temperature > 0:
            raise InputError(f"the sampling temperature must be positive, got {self.temperature}")
        names = [instruction.name for instruction in self.instructions]
        if len(set(names)) != len(names):
            raise InputError(f"two instructions have the same name; got {', '.join(names)}")


@dataclass(frozen=True, kw_only=True)
class LlmSettings:
    """The hidden states of the LLM that wrote the answers: same model, same caption tokens."""

    source: ModelSource
    dtype: ComputeDType = "bfloat16"
    max_caption_tokens: int = 226
    layer: LlmLayer = "last"
    """last: after the final norm; n: transformers' hidden_states[n], 0 the embeddings, negative from the end; mean: the
    mean over every block's output, each row first normalised to mean 0 and variance 1 (arXiv 2506.08210)."""
    instruction_pooling: InstructionPooling = "mean"
    """What becomes an instruction's token: the mean over its answer's rows, the answer's last row, or the row of the
    prompt's last token, from which the answer begins. Of an empty answer always the last."""
    engine: LlmEngineName = "transformers"
    """vllm: its per-token pooling, which has the last layer alone and forms its own batches."""
    vllm: VllmSettings = field(default_factory=VllmSettings)
    """Read by the engine vllm alone; it caches no prefix here, for rows are wanted of every token."""
    batch_size: int = 8
    """Sequences a launch, of the engine transformers."""

    def __post_init__(self) -> None:
        if self.engine == "vllm" and self.layer != "last":
            raise InputError(
                f"--llm-hidden-engine vllm: gives --llm-layer last alone, got {self.layer}; give --llm-hidden-engine "
                f"transformers for other layers"
            )


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The options about models that `encode` and all that encodes again take, as typed."""

    models: str | None = None
    vae: str | None = None
    t5: str | None = None
    llm: str | None = None
    dtype: str | None = None
    stored_latents: str = "moments"
    vae_tiling: bool = False
    vae_engine: str = "fast"
    t5_rows: str = "all"
    answer_variants: int = 1
    llm_engine: str = "auto"
    llm_hidden_engine: str = "transformers"
    llm_tensor_parallel: int = 1
    llm_memory_share: float = 0.9
    instructions: str | None = None
    """A YAML file; None: the four of the project."""
    llm_layer: str = "last"
    instruction_pooling: str = "mean"
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class TeamOptions:
    """Who works, as typed behind `encode`."""

    workers: str | None = None
    """A number, or auto: one for each GPU. None: 1 on this machine, auto on a Ray cluster."""
    executor: str = "local"
    """local, or ray."""
    ray_address: str = "auto"
    place: tuple[str, ...] = ()
    """FEATURE=WORKERS each."""
    only_own_shards: bool = False
    """Of a Slurm task: leave the others' shards alone."""


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Every encoder's settings; each feature reads its own."""

    latents: VaeSettings
    t5: T5Settings
    answers: AnswersSettings
    llm: LlmSettings
    device: str = "cpu"
    features: tuple[str, ...] = field(default=("latents", "t5", "answers", "llm"))

    def __post_init__(self) -> None:
        if self.llm.source != self.answers.source or self.llm.max_caption_tokens != self.answers.max_caption_tokens:
            raise InputError(
                "answers and llm must have the same model and caption limit, got "
                f"{self.answers.source.name!r} with {self.answers.max_caption_tokens} tokens and "
                f"{self.llm.source.name!r} with {self.llm.max_caption_tokens}"
            )
