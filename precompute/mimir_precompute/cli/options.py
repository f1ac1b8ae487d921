"""Options that several commands of mimir-precompute share, with their help texts. Nothing heavy up here."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mimir_precompute.planning.plan import PlanRequest

WHAT = "What is encoded"
MODELS = "Models"
WHERE = "How it is run"
ESTIMATE = "What it will cost"
TEAM = "Who works"

Clips = Annotated[
    str,
    typer.Argument(
        help="A JSONL, CSV or Parquet file; a folder with metadata.jsonl/.csv/.parquet or a .txt beside each video; "
        "WebDataset tars (a file, a folder, or a quoted glob). In a bucket: s3://bucket/prefix/metadata.jsonl (gs://, az://).",
        show_default=False,
    ),
]
Cache = Annotated[
    str, typer.Option(help="Folder of the cache, or s3://bucket/prefix (gs://, az://).", show_default=False)
]
CacheArgument = Annotated[
    str,
    typer.Argument(metavar="CACHE", help="Folder of the cache, or s3://bucket/prefix (gs://, az://).",
                   show_default=False),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
PresetOption = Annotated[
    str | None,
    typer.Option("--preset", help="tiny, cogvideox-2b or cogvideox-5b: geometry, models and text lengths.",
                 rich_help_panel=WHAT, show_default=False),
]  # fmt: skip
BucketOption = Annotated[
    list[str] | None,
    typer.Option("--bucket", help="Frames x height x width, e.g. 49x480x720; repeatable. A clip goes to the largest "
                 "that it fills.", rich_help_panel=WHAT, show_default=False),
]  # fmt: skip
FpsOption = Annotated[
    float | None,
    typer.Option(help="Frames a second at which clips are sampled, by time stamp.", rich_help_panel=WHAT,
                 show_default=False),
]  # fmt: skip
ShardsOption = Annotated[
    str,
    typer.Option(help="all, 0-63, 3,17, 2::8 (start:stop:step), or auto: a task of a Slurm array or of srun begins "
                 "with every n-th and then helps the others.", rich_help_panel=WHAT),
]  # fmt: skip
ShardSizeOption = Annotated[
    int | None, typer.Option(help="Clips in a shard; default: 256", rich_help_panel=WHAT, show_default=False)
]
SeedOption = Annotated[
    int | None,
    typer.Option(help="Of the shuffle of clips into shards; default: 0", rich_help_panel=WHAT, show_default=False),
]
LimitOption = Annotated[
    int | None, typer.Option(help="Take the first so many clips.", rich_help_panel=WHAT, show_default=False)
]
VideoKeyOption = Annotated[str, typer.Option(help="Column of the video's path.", rich_help_panel=WHAT)]
CaptionKeyOption = Annotated[str, typer.Option(help="Column of the caption.", rich_help_panel=WHAT)]
RemovalsOption = Annotated[
    bool, typer.Option("--accept-removals", help="Allow more than half of the planned clips to be gone from the list.",
                       rich_help_panel=WHAT)
]  # fmt: skip
ModelsOption = Annotated[
    str | None,
    typer.Option("--models", help="Folder or hub id with vae, text_encoder, tokenizer (and llm).",
                 rich_help_panel=MODELS, show_default=False),
]  # fmt: skip
VaeOption = Annotated[
    str | None,
    typer.Option("--vae", help="VAE alone: folder, hub id or id@revision.", rich_help_panel=MODELS,
                 show_default=False),
]  # fmt: skip
T5Option = Annotated[
    str | None,
    typer.Option("--t5", help="Folder or hub id with text_encoder and tokenizer.", rich_help_panel=MODELS,
                 show_default=False),
]  # fmt: skip
LlmOption = Annotated[
    str | None,
    typer.Option("--llm", help="The LLM: folder, hub id or id@revision.", rich_help_panel=MODELS, show_default=False),
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="float32 or bfloat16; default: the preset's.", rich_help_panel=MODELS,
                 show_default=False),
]  # fmt: skip
LatentsOption = Annotated[
    str,
    typer.Option("--latents", help="What is kept of the posterior: moments, mean, sample.", rich_help_panel=MODELS),
]
VaeTilingOption = Annotated[
    bool, typer.Option("--vae-tiling", help="Encode in tiles: less memory, other bytes.", rich_help_panel=MODELS)
]
VaeEngineOption = Annotated[
    str, typer.Option("--vae-engine", help="fast, or diffusers: the reference, slower.", rich_help_panel=MODELS)
]
T5RowsOption = Annotated[
    str, typer.Option("--t5-rows", help="all, or ragged (drops pad rows: lossy).", rich_help_panel=MODELS)
]
AnswerVariantsOption = Annotated[
    int,
    typer.Option("--answer-variants", help="Answers kept a prompt; the first is greedy, the others sampled.",
                 rich_help_panel=MODELS),
]  # fmt: skip
LlmEngineOption = Annotated[
    str,
    typer.Option("--llm-engine", help="Who writes the answers: vllm, transformers, or auto: vllm on a GPU where it is "
                 "installed.", rich_help_panel=MODELS),
]  # fmt: skip
LlmHiddenEngineOption = Annotated[
    str,
    typer.Option("--llm-hidden-engine", help="Who computes the feature llm: transformers, or vllm, for the last layer.",
                 rich_help_panel=MODELS),
]  # fmt: skip
LlmTensorParallelOption = Annotated[
    int,
    typer.Option("--llm-tensor-parallel", help="GPUs that share the LLM (vllm).", min=1, rich_help_panel=MODELS),
]
LlmMemoryShareOption = Annotated[
    float,
    typer.Option("--llm-memory-share", help="Share of a GPU's memory that vllm may take.", min=0.01, max=1,
                 rich_help_panel=MODELS),
]  # fmt: skip
InstructionsOption = Annotated[
    str | None,
    typer.Option("--instructions", help="YAML list of name and text put to the LLM about every caption; default: four "
                 "of our own.", rich_help_panel=MODELS, show_default=False),
]  # fmt: skip
LlmLayerOption = Annotated[
    str,
    typer.Option("--llm-layer", help="last (after the final norm), the number of a layer, or mean over all of them.",
                 rich_help_panel=MODELS),
]  # fmt: skip
InstructionPoolingOption = Annotated[
    str,
    typer.Option("--instruction-pooling", help="An instruction's token: mean or last of its answer, or query: the row "
                 "it is answered from.", rich_help_panel=MODELS),
]  # fmt: skip
GpuOption = Annotated[
    str,
    typer.Option("--gpu", help="The GPU that hours are estimated for: h100, h200, a100, l40s, …",
                 rich_help_panel=ESTIMATE),
]  # fmt: skip
UtilisationOption = Annotated[
    float,
    typer.Option("--utilisation", help="Share of what the GPU's data sheet promises that is reached.", min=0.01, max=1,
                 rich_help_panel=ESTIMATE),
]  # fmt: skip
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=WHERE)]
DecodeWorkersOption = Annotated[
    int,
    typer.Option("--decode-workers", help="Processes that decode clips ahead.", min=1, rich_help_panel=WHERE),
]
SharedDecodeWorkersOption = Annotated[
    int | None,
    typer.Option("--decode-workers", help="Processes that decode clips ahead, of all workers here together; default: 2 "
                 "for each, as far as there are cores.", min=1, rich_help_panel=WHERE, show_default=False),
]  # fmt: skip
WorkersOption = Annotated[
    str | None,
    typer.Option("--workers", help="Processes that share the work: a number, or auto: one for each GPU, and 1 without "
                 "any. One that dies is started again. Default: 1 here, auto on a Ray cluster.", rich_help_panel=TEAM,
                 show_default=False),
]  # fmt: skip
ExecutorOption = Annotated[
    str,
    typer.Option("--executor", help="local: on this machine; ray: actors of a Ray cluster, one for each GPU.",
                 rich_help_panel=TEAM),
]  # fmt: skip
RayAddressOption = Annotated[
    str,
    typer.Option("--ray-address", help="auto: the cluster that runs here or that RAY_ADDRESS names; host:port; or "
                 "local: one that is started here and ends with the call.", rich_help_panel=TEAM),
]  # fmt: skip
OnlyOwnShardsOption = Annotated[
    bool,
    typer.Option("--only-own-shards", help="With --shards auto: end when the task's own shards are done, and leave "
                 "those of others alone.", rich_help_panel=TEAM),
]  # fmt: skip
PlaceOption = Annotated[
    list[str] | None,
    typer.Option("--place", help="Which workers make a feature: latents=all, t5=0, llm=1-3; repeatable. answers go "
                 "where llm goes.", rich_help_panel=TEAM, show_default=False),
]  # fmt: skip
DecodeTimeoutOption = Annotated[
    float,
    typer.Option("--decode-timeout-s", help="CPU seconds that decoding one clip may take; a clip that takes more three "
                 "times is quarantined.", rich_help_panel=WHERE),
]  # fmt: skip
DecodeMemoryOption = Annotated[
    float,
    typer.Option("--decode-memory-gb", help="GB that decoding one clip may take; one that needs more is quarantined.",
                 rich_help_panel=WHERE),
]  # fmt: skip
MaxQuarantinedOption = Annotated[
    float,
    typer.Option("--max-quarantined", help="Share of unusable clips above which the exit code is 3.", min=0, max=1,
                 rich_help_panel=WHERE),
]  # fmt: skip
AcceptQuarantineOption = Annotated[
    bool,
    typer.Option("--accept-quarantine", help="Commit a shard even if half of its clips, and 8 or more, cannot be used; "
                 "without it that stops the run (exit code 5), for it looks like a broken mount.",
                 rich_help_panel=WHERE),
]  # fmt: skip


def plan_request(
    preset: str | None,
    bucket: list[str] | None,
    fps: float | None,
    shard_size: int | None,
    seed: int | None,
    accept_removals: bool,
) -> "PlanRequest":
    """What `plan` is asked for, with the preset's and the buckets' names checked. Raises InputError."""
    from mimir_precompute.config import Bucket
    from mimir_precompute.planning.plan import PlanRequest
    from mimir_precompute.presets import find_preset

    if preset is not None:
        find_preset(preset)
    return PlanRequest(
        preset=preset,
        buckets=tuple(Bucket.parse(text) for text in bucket or ()),
        fps=fps,
        shard_size=shard_size,
        seed=seed,
        accept_removals=accept_removals,
    )
