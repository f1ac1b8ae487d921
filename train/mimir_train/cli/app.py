"""mimir-train: parses the command line and calls one function. Nothing heavy is imported up here."""

from pathlib import Path
from typing import Annotated

import typer

from mimir_shared.command_line import echo, make_app, run_app
from mimir_train.cli.plot import add_command
from mimir_train.cli.sample import add_commands

app = make_app(
    "Train a text-to-video model and its token fuser straight from a cache that `mimir-precompute` made.\n\n"
    "First step: `mimir-train run --cache CACHE --preset tiny --output-dir RUN`. On several GPUs: "
    "`torchrun --nproc-per-node 8 -m mimir_train run …`."
)

_DATA = "Data"
_MODEL = "Model"
_OPTIMIZER = "Optimizer"
_PARALLEL = "Processes, memory and speed"
_RUN = "Run"
_SETTINGS = "Settings"

_CACHE_HELP = "Folder of the cache, or s3://bucket/prefix (gs://, az://)."
Cache = Annotated[str, typer.Option(help=_CACHE_HELP, show_default=False, rich_help_panel=_DATA)]
FeatureOption = Annotated[
    list[str] | None,
    typer.Option("--feature", help="NAME=FINGERPRINT, where the cache has a feature more than once; repeatable.",
                 show_default=False, rich_help_panel=_DATA),
]  # fmt: skip
ValidationShardsOption = Annotated[
    int | None,
    typer.Option(help="Shards of the highest numbers that are never trained on; default: one in 50, at most 4.",
                 show_default=False, rich_help_panel=_DATA),
]  # fmt: skip


@app.command()
def run(
    cache: Annotated[str | None, typer.Option(help=_CACHE_HELP, show_default=False, rich_help_panel=_DATA)]
    = None,
    output_dir: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the run: config, metrics, checkpoints.",
                                             show_default=False, rich_help_panel=_RUN)] = ...,  # type: ignore[assignment]
    preset: Annotated[str | None, typer.Option(help="tiny, cogvideox-2b or cogvideox-5b; a run "
                                               "that goes on keeps its own.",
                                               show_default=False, rich_help_panel=_SETTINGS)] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings, laid over the preset.", show_default=False,
                                                rich_help_panel=_SETTINGS)] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="One setting, over the file; "
                                                          "repeatable.", show_default=False,
                                                          rich_help_panel=_SETTINGS)] = None,
    feature: FeatureOption = None,
    global_batch_size: Annotated[int | None, typer.Option(help="Clips of a step over all ranks; packs, with "
                                                          "--tokens-per-pack.", min=1, show_default=False,
                                                          rich_help_panel=_DATA)] = None,
    tokens_per_pack: Annotated[int | None, typer.Option(help="Pack clips of all buckets into sequences of at most so "
                                                        "many tokens, unpadded; a step is then --global-batch-size "
                                                        "packs.", min=1, show_default=False,
                                                        rich_help_panel=_DATA)] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Clips at once on a rank; steps accumulate.", min=1,
                                                         show_default=False, rich_help_panel=_DATA)] = None,
    validation_shards: ValidationShardsOption = None,
    verify_reads: Annotated[str | None, typer.Option(help="always, first-epoch or never.", show_default=False,
                                                     rich_help_panel=_DATA)] = None,
    on_bad_sample: Annotated[str | None, typer.Option(help="A clip that cannot be read: error, or substitute another, "
                                                      "told in RUN/bad_samples.jsonl; at most 10 clips or "
                                                      "data.max_bad_share of them (1 %).", show_default=False,
                                                      rich_help_panel=_DATA)] = None,
    empty_text: Annotated[str | None, typer.Option(help="What dropped text becomes: zeros or cached (empty prompt).",
                                                   show_default=False, rich_help_panel=_DATA)] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Folder on a near disk that keeps what is read from a bucket.",
                                                  show_default=False, rich_help_panel=_DATA)] = None,
    cache_dir_gb: Annotated[float | None, typer.Option(help="The most that may lie there; default: 100",
                                                       show_default=False, rich_help_panel=_DATA)] = None,
    fuser: Annotated[str | None, typer.Option(help="baseline, direct, norm, norm_ss, zeroconv, zeroconv_ss, "
                                              "norm_zeroconv or mimir.", show_default=False,
                                              rich_help_panel=_MODEL)] = None,
    text_align: Annotated[str | None, typer.Option(help="How the LLM's tokens meet T5's: index (row by row) or "
                                                   "char_offset (by the characters that both cover).",
                                                   show_default=False, rich_help_panel=_MODEL)] = None,
    answer_variant: Annotated[str | None, typer.Option(help="Which of several cached answers is read: fixed (the "
                                                       "greedy one), cycle or random, anew each epoch.",
                                                       show_default=False, rich_help_panel=_DATA)] = None,
    stabilizer_start_step: Annotated[int | None, typer.Option(help="Append the stabilizer tokens from this step on.",
                                                              show_default=False, rich_help_panel=_MODEL)] = None,
    init_from: Annotated[str | None, typer.Option(help="Diffusers folder, hub id, or scratch.", show_default=False,
                                                  rich_help_panel=_MODEL)] = None,
    attention: Annotated[str | None, typer.Option(help="Who computes attention: sdpa (torch's own), xformers, varlen "
                                                  "or flex, where the machine has it.", show_default=False,
                                                  rich_help_panel=_MODEL)] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Train adapters of this rank on --init-from's transformer, not "
                                                  "the transformer itself; the fuser is trained in full.", min=1,
                                                  show_default=False, rich_help_panel=_MODEL)] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Their update is multiplied by alpha / rank; default: rank.",
                                                     show_default=False, rich_help_panel=_MODEL)] = None,
    lora_targets: Annotated[str | None, typer.Option(help="Which linear maps get one, by the ends of their names; "
                                                     "default: to_q,to_k,to_v,to_out.0", show_default=False,
                                                     rich_help_panel=_MODEL)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the transformer, or of the adapters.",
                                                        show_default=False, rich_help_panel=_OPTIMIZER)] = None,
    fuser_learning_rate: Annotated[float | None, typer.Option(help="Of the fuser.", show_default=False,
                                                              rich_help_panel=_OPTIMIZER)] = None,
    lr_scheduler: Annotated[str | None, typer.Option(help="After the warm-up: constant; cosine or linear, falling "
                                                     "until the last step; wsd, constant and falling at the end.",
                                                     show_default=False, rich_help_panel=_OPTIMIZER)] = None,
    lr_warmup_steps: Annotated[int | None, typer.Option(help="Steps in which the rates rise.", show_default=False,
                                                        rich_help_panel=_OPTIMIZER)] = None,
    lr_decay_steps: Annotated[int | None, typer.Option(help="Of wsd: steps in which the rates fall; default: a fifth.",
                                                       min=1, show_default=False, rich_help_panel=_OPTIMIZER)] = None,
    ema: Annotated[str | None, typer.Option(help="Keep running averages of the weights: power:SIGMA_REL (0.05 is a "
                                            "short memory, 0.2 a long one) or fixed:DECAY, several with a comma; "
                                            "default: none", show_default=False, rich_help_panel=_OPTIMIZER)] = None,
    seed: Annotated[int | None, typer.Option(help="Of order, draws and first weights; default: 42", show_default=False,
                                             rich_help_panel=_RUN)] = None,
    max_train_steps: Annotated[int | None, typer.Option(help="Steps of the whole training.", min=1, show_default=False,
                                                        rich_help_panel=_RUN)] = None,
    stop_at_step: Annotated[int | None, typer.Option(help="Save and leave after so many, to go on later.", min=1,
                                                     show_default=False, rich_help_panel=_RUN)] = None,
    resume_from_checkpoint: Annotated[str | None, typer.Option(help="latest, a step, or a checkpoint's path.",
                                                               show_default=False, rich_help_panel=_RUN)] = None,
    checkpointing_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints.", min=1,
                                                            rich_help_panel=_RUN)] = None,
    checkpoints_total_limit: Annotated[int | None, typer.Option(help="Keep only the newest so many.", min=1,
                                                                show_default=False, rich_help_panel=_RUN)] = None,
    checkpoints_keep_every: Annotated[int | None, typer.Option(help="With the limit: steps that are multiples of it "
                                                               "stay besides.", min=1, show_default=False,
                                                               rich_help_panel=_RUN)] = None,
    validation_steps: Annotated[int | None, typer.Option(help="Steps between validation losses.", min=1,
                                                         show_default=False, rich_help_panel=_RUN)] = None,
    report_to: Annotated[str | None, typer.Option(help="tensorboard, wandb, both with a comma, or none.",
                                                  show_default=False, rich_help_panel=_RUN)] = None,
    parallel: Annotated[str | None, typer.Option(help="How ranks share the model: ddp (each has it whole), fsdp (each "
                                                 "a part), hsdp (a part, repeated across machines) or auto.",
                                                 show_default=False, rich_help_panel=_PARALLEL)] = None,
    shard_size: Annotated[int | None, typer.Option(help="With hsdp: ranks that share one copy of the model; default: "
                                                   "those of a machine.", min=1, show_default=False,
                                                   rich_help_panel=_PARALLEL)] = None,
    activation_checkpointing: Annotated[str | None, typer.Option(help="What blocks compute again in backward to save "
                                                                 "memory: none, selective (all but matrix products and "
                                                                 "attention) or full.", show_default=False,
                                                                 rich_help_panel=_PARALLEL)] = None,
    compile_blocks: Annotated[bool | None, typer.Option("--compile/--no-compile", help="Run the transformer's blocks "
                                                        "through torch.compile.", show_default=False,
                                                        rich_help_panel=_PARALLEL)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default=False,
                                               rich_help_panel=_RUN)] = None,
    mixed_precision: Annotated[str | None, typer.Option(help="Compute in float32 or bfloat16; weights stay float32.",
                                                        show_default=False, rich_help_panel=_RUN)] = None,
) -> None:  # fmt: skip
    """Train transformer and fuser from a cache; stop it and run it again with --resume-from-checkpoint latest."""
    from mimir_train.cli.commands import RunRequest, build_config, parse_features, parse_names

    settings = build_config(
        RunRequest(
            preset=preset,
            output_dir=output_dir,
            config_file=config,
            assignments=tuple(assignments or ()),
            flags={
                "data.cache": cache,
                "data.features": parse_features(feature or []),
                "data.global_batch_size": global_batch_size,
                "data.tokens_per_pack": tokens_per_pack,
                "data.micro_batch_size": micro_batch_size,
                "data.validation_shards": validation_shards,
                "data.verify_reads": verify_reads,
                "data.on_bad_sample": on_bad_sample,
                "data.empty_text": empty_text,
                "data.answer_variant": answer_variant,
                "data.local_cache_dir": cache_dir,
                "data.local_cache_gb": cache_dir_gb,
                "model.fuser": fuser,
                "model.text_align": text_align,
                "model.stabilizer_start_step": stabilizer_start_step,
                "model.init_from": init_from,
                "model.lora.rank": lora_rank,
                "model.lora.alpha": lora_alpha,
                "model.lora.targets": parse_names(lora_targets),
                "model.attention": attention,
                "optimizer.learning_rate": learning_rate,
                "optimizer.fuser_learning_rate": fuser_learning_rate,
                "optimizer.schedule": lr_scheduler,
                "optimizer.warmup_steps": lr_warmup_steps,
                "optimizer.decay_steps": lr_decay_steps,
                "ema.profiles": parse_names(ema),
                "parallel.strategy": parallel,
                "parallel.shard_size": shard_size,
                "parallel.activation_checkpointing": activation_checkpointing,
                "parallel.compile": compile_blocks,
                "run.seed": seed,
                "run.max_train_steps": max_train_steps,
                "run.stop_at_step": stop_at_step,
                "run.checkpointing_steps": checkpointing_steps,
                "run.checkpoints_total_limit": checkpoints_total_limit,
                "run.checkpoints_keep_every": checkpoints_keep_every,
                "run.validation_steps": validation_steps,
                "run.report_to": parse_names(report_to),
                "run.device": device,
                "run.precision": mixed_precision,
            },
            resume=resume_from_checkpoint,
        )
    )
    from mimir_train.loop import train  # torch comes with it: settings are checked first

    try:
        outcome = train(settings, resume_from_checkpoint)
    except KeyboardInterrupt:
        typer.echo(
            "stopped by SIGINT without saving; --resume-from-checkpoint latest goes on from the last checkpoint "
            "(SIGTERM saves one first)", err=True,
        )  # fmt: skip
        raise
    if outcome.checkpoint is not None:
        echo(f"{outcome.checkpoint}: after {outcome.steps_done} steps")
    elif outcome.is_first and outcome.steps_trained == 0:
        echo(f"{output_dir}: {outcome.steps_done} steps were trained already; nothing to do")
    if outcome.stopped_by_signal:
        raise typer.Exit(143)


@app.command()
def order(
    cache: Cache,
    global_batch_size: Annotated[
        int, typer.Option(help="Clips (or packs) of a step over all ranks.", min=1, show_default=False)
    ],
    seed: Annotated[int, typer.Option(help="Of the run.")] = 42,
    start_step: Annotated[int, typer.Option(help="First step to print; 0 is the first of a run.", min=0)] = 0,
    steps: Annotated[int | None, typer.Option(help="How many; default: one epoch.", min=0, show_default=False)] = None,
    world_size: Annotated[int, typer.Option(help="Ranks that share a step.", min=1)] = 1,
    feature: FeatureOption = None,
    snapshot: Annotated[
        str | None,
        typer.Option(help="As data.snapshot in the run's config.yaml; default: the newest.", show_default=False),
    ] = None,
    validation_shards: ValidationShardsOption = None,
    shards_per_block: Annotated[int, typer.Option(help="As data.shards_per_block of the run.", min=1)] = 32,
    tokens_per_pack: Annotated[
        int | None, typer.Option(help="As data.tokens_per_pack of the run: its packs.", min=1, show_default=False)
    ] = None,
    patch_size: Annotated[int, typer.Option(help="Of the transformer, with --tokens-per-pack.", min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for a program to read.")] = False,
) -> None:
    """Say which clips each rank sees at each step."""
    from mimir_train.cache_reader import open_cache
    from mimir_train.cli.commands import OrderRequest, describe_order, order_lines, order_of, parse_features

    request = OrderRequest(
        cache=cache,
        features=parse_features(feature or []) or {},
        global_batch_size=global_batch_size,
        seed=seed,
        shards_per_block=shards_per_block,
        tokens_per_pack=tokens_per_pack,
        patch_size=patch_size,
        validation_shards=validation_shards,
        start_step=start_step,
        steps=steps,
        world_size=world_size,
        snapshot=snapshot,
    )
    opened = open_cache(request.cache, request.features, snapshot=request.snapshot)
    found = order_of(request, opened)
    if tokens_per_pack is not None:
        typer.echo("\n".join(found.describe()), err=True)
    for line in order_lines(request, opened, found):
        echo(describe_order(line, as_json=as_json))


add_commands(app)  # sample, export, decode
add_command(app)  # plot


def main() -> None:
    """Entry point of the program."""
    run_app(app)
