"""`mimir-train sample`, `export` and `decode`: what is typed, checked and handed on. Nothing heavy up here."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from mimir_shared.command_line import echo
from mimir_shared.errors import InputError
from mimir_shared.wording import noun_for
from mimir_train.sampling.choices import EXPORT_DTYPES, GUIDANCES, SAMPLE_DTYPES, SCHEDULERS, Guidance

_WHAT = "What is sampled"
_HOW = "How it is sampled"
_MODELS = "Models"

T = TypeVar("T", bound=str)

Checkpoint = Annotated[
    Path,
    typer.Option(help="A run's folder (its newest good checkpoint is taken) or RUN/checkpoints/step-N.",
                 show_default=False),
]  # fmt: skip
OutputDir = Annotated[Path, typer.Option(help="Folder to write to.", show_default=False)]
Models = Annotated[
    str | None,
    typer.Option(help="Folder or hub id with vae, text_encoder, tokenizer (and llm): those that made the cache.",
                 rich_help_panel=_MODELS, show_default=False),
]  # fmt: skip
VaeOption = Annotated[
    str | None,
    typer.Option(help="VAE alone: folder, hub id or id@revision.", rich_help_panel=_MODELS, show_default=False),
]
Weights = Annotated[
    str | None,
    typer.Option(help="raw; ema, the first average that training kept; or another by its profile, as power:0.1. "
                 "Default: ema where there is one.", show_default=False),
]  # fmt: skip
Base = Annotated[
    str | None,
    typer.Option(help="Of adapters (--lora-rank): folder or hub id of the transformer that they were trained on; "
                 "default: where it was then.", show_default=False),
]  # fmt: skip
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_HOW)]


def add_commands(app: typer.Typer) -> None:
    """Register the three commands."""
    app.command()(sample)
    app.command()(export)
    app.command()(decode)


def sample(
    checkpoint: Checkpoint,
    output_dir: OutputDir,
    weights: Weights = None,
    base: Base = None,
    models: Models = None,
    t5: Annotated[str | None, typer.Option(help="Folder or hub id with text_encoder and tokenizer.",
                                           rich_help_panel=_MODELS, show_default=False)] = None,
    vae: VaeOption = None,
    llm: Annotated[str | None, typer.Option(help="The LLM: folder, hub id or id@revision.", rich_help_panel=_MODELS,
                                            show_default=False)] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable.", rich_help_panel=_WHAT,
                                                     show_default=False)] = None,
    prompts: Annotated[Path | None, typer.Option(help='A file of them: .txt (one a line), .jsonl ({"prompt"} or '
                                                 '{"text"} a line), or VBench\'s own .json.', rich_help_panel=_WHAT,
                                                 show_default=False)] = None,
    num_samples_per_prompt: Annotated[int | None, typer.Option(help="Videos of each prompt, each with its own noise; "
                                                               "default: 1, for VBench's file 5", min=1,
                                                               rich_help_panel=_WHAT, show_default=False)] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from; default: from no text, as text "
                                                        "was dropped in training", rich_help_panel=_WHAT,
                                                        show_default=False)] = None,
    bucket: Annotated[str | None, typer.Option(help="Frames x height x width; default: the largest trained on",
                                               rich_help_panel=_WHAT, show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of the noise, which is keyed by seed, prompt and number of the video.",
                                      rich_help_panel=_HOW)] = 0,
    num_inference_steps: Annotated[int, typer.Option(help="Denoising steps; a divisor of 1000 ends on no noise at all.",
                                                     rich_help_panel=_HOW)] = 50,
    guidance_scale: Annotated[float, typer.Option(help="How strongly the text is followed; 1: no guidance.",
                                                  rich_help_panel=_HOW)] = 6.0,
    guidance: Annotated[str, typer.Option(help="fixed; ramp: rising with the steps; official: CogVideoX's dynamic one, "
                                          "as diffusers computes it.", rich_help_panel=_HOW)] = "fixed",
    scheduler: Annotated[str, typer.Option(help="dpm or ddim.", rich_help_panel=_HOW)] = "dpm",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, in which the trained model computes; auto: bfloat16 "
                                       "on CUDA, float32 on a CPU.", rich_help_panel=_HOW)] = "auto",
    device: Device = "auto",
) -> None:  # fmt: skip
    """Make videos from prompts; run it again and what is there and plays is not made again.

    Writes <prompt>-<number>.mp4, a contact sheet, samples.jsonl and the settings.
    Where no file name can hold a prompt, it is cut and gets 12 digits of its sha256.
    """
    if (prompt is None) == (prompts is None):
        raise InputError("give prompts, either by --prompt (repeatable) or by --prompts FILE")
    scheduler_name = _choice("--scheduler", scheduler, SCHEDULERS)
    guidance_name = _choice("--guidance", guidance, GUIDANCES)
    dtype_name = _choice("--dtype", dtype, SAMPLE_DTYPES)
    if not 1 <= guidance_scale < float("inf"):
        raise InputError(f"--guidance-scale {guidance_scale}: expected 1 (no guidance) or more")

    from mimir_shared.prompt_list import prompts_from_texts, read_prompts

    prompt_list = read_prompts(prompts) if prompts is not None else prompts_from_texts(prompt or [])

    from mimir_train.sampling.frozen_models import ModelLocations
    from mimir_train.sampling.sample import SampleRequest, sample_videos

    request = SampleRequest(
        checkpoint=checkpoint,
        locations=ModelLocations(models=models, t5=t5, vae=vae, llm=llm),
        prompts=prompt_list,
        output_dir=output_dir,
        seed=seed,
        samples_per_prompt=num_samples_per_prompt or prompt_list.samples_per_prompt,
        num_inference_steps=num_inference_steps,
        guidance=Guidance(name=guidance_name, scale=guidance_scale),
        scheduler=scheduler_name,
        bucket=bucket,
        negative_prompt=negative_prompt,
        device=device,
        weights=weights,
        base=base,
        dtype=dtype_name,
    )
    with ConsoleProgress() as progress:
        if prompt_list.duplicates:
            progress.say(f"note: {prompt_list.duplicates} prompts stand there twice; each is sampled once")
        outcome = sample_videos(request, progress)
    kept = f", {outcome.kept} kept" if outcome.kept else ""
    echo(
        f"{output_dir}: {outcome.made} {noun_for(outcome.made, 'video')} made{kept}; "
        f"{outcome.sheet.name} shows {outcome.sheet_rows} of them"
    )


def export(
    checkpoint: Checkpoint,
    output_dir: OutputDir,
    weights: Weights = None,
    merge_lora: Annotated[bool, typer.Option("--merge-lora", help="Of adapters: write the whole transformer with them "
                                             "merged into it, not their own file.")] = False,
    base: Base = None,
    scheduler: Annotated[str, typer.Option(help="Whose scheduler_config.json is written: dpm or ddim.")] = "dpm",
    dtype: Annotated[str, typer.Option(help="Of the weights: stored (as the checkpoint has them), float32 or "
                                       "bfloat16.")] = "stored",
) -> None:  # fmt: skip
    """Write a diffusers folder (transformer, scheduler), the token fuser beside it, and a model card to fill in.

    Of adapters, pytorch_lora_weights.safetensors takes the transformer's place, for diffusers' load_lora_weights.
    """
    scheduler_name = _choice("--scheduler", scheduler, SCHEDULERS)
    dtype_name = _choice("--dtype", dtype, EXPORT_DTYPES)

    from mimir_train.export import ExportRequest, export_checkpoint

    request = ExportRequest(
        checkpoint=checkpoint, output_dir=output_dir, weights=weights, merge_lora=merge_lora, base=base,
        scheduler=scheduler_name, dtype=dtype_name,
    )  # fmt: skip
    with ConsoleProgress() as progress:
        exported = export_checkpoint(request, progress.say)
    what = "adapters" if exported.info.lora is not None and not merge_lora else "transformer"
    echo(f"{output_dir}: {what}, scheduler and fuser of {exported.folder.name}, and README.md")


def decode(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or one of its validation/step-N.",
                                        show_default=False)],
    models: Models = None,
    vae: VaeOption = None,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Turn the latents that validation wrote into mp4, and show each prompt over the steps on a page.

    Videos that are decoded already are kept. RUN/validation/index.html stands alone.
    """
    from mimir_train.sampling.frozen_models import ModelLocations
    from mimir_train.validation.decode import decode_validation

    with ConsoleProgress() as progress:
        decoded = decode_validation(run, ModelLocations(models=models, vae=vae), device, progress)
    kept = f", {decoded.kept} kept" if decoded.kept else ""
    steps = "" if len(decoded.folders) == 1 else f" to {decoded.folders[-1].name}"
    echo(f"{decoded.folders[0]}{steps}: {decoded.made} {noun_for(decoded.made, 'video')} made{kept}, as 0.mp4 and on")
    if decoded.page is not None:
        echo(f"{decoded.page}: each prompt over the steps")


def _choice(option: str, value: str, choices: Sequence[T]) -> T:
    """The choice that was typed. Raises InputError that lists them."""
    for choice in choices:
        if choice == value:
            return choice
    raise InputError(f"{option} {value!r}: expected one of {', '.join(choices)}")


class ConsoleProgress:
    """On stderr: one line for each piece of work that is done, and on a terminal a bar while it is under way."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._what, self._total, self._done, self._started_s = "", 0, 0, 0.0
        self._console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )

    def __enter__(self) -> "ConsoleProgress":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def start(self, what: str, total: int) -> None:
        """Begin a piece of work of so many parts."""
        self._what, self._total, self._done, self._started_s = what, total, 0, time.monotonic()
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._progress.add_task(what, total=total)

    def advance(self) -> None:
        """One part is done."""
        self._done += 1
        self._progress.advance(self._progress.task_ids[0])
        if self._done == self._total:
            self.say(f"{self._total} {self._what} in {time.monotonic() - self._started_s:.1f} s")
