"""`mimir-precompute volatility`: what is typed, checked and handed on. Nothing heavy is imported up here."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mimir_precompute.cli.options import (
    MODELS,
    WHAT,
    DeviceOption,
    DtypeOption,
    Json,
    LlmEngineOption,
    LlmLayerOption,
    LlmOption,
    ModelsOption,
    PresetOption,
    T5Option,
)
from mimir_shared.command_line import echo


def add_commands(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(volatility)


def volatility(
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="A .txt with one prompt a line, a .jsonl, or "
                                            "VBench's .json.", show_default=False)],
    output_dir: Annotated[Path, typer.Option(help="Folder for index.html, volatility.png and volatility.json.",
                                             rich_help_panel=WHAT)] = Path("volatility"),
    repeats: Annotated[int, typer.Option(help="Sampled answers to each prompt.", min=2, rich_help_panel=WHAT)] = 50,
    limit: Annotated[int | None, typer.Option(help="Take the first so many prompts.", min=1, rich_help_panel=WHAT,
                                              show_default=False)] = None,
    temperature: Annotated[float, typer.Option(help="Of the sampled answers.", rich_help_panel=WHAT)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the answers and of t-SNE.", rich_help_panel=WHAT)] = 0,
    fuser: Annotated[Path | None, typer.Option(help="A trained fuser: the folder `fuser` that `mimir-train export` "
                                               "writes; default: norm, scale and a fixed random projection.",
                                               rich_help_panel=MODELS, show_default=False)] = None,
    preset: PresetOption = None,
    models: ModelsOption = None,
    t5: T5Option = None,
    llm: LlmOption = None,
    dtype: DtypeOption = None,
    llm_engine: LlmEngineOption = "auto",
    llm_layer: LlmLayerOption = "last",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Ask the LLM the same again and again, and show how far its answers and states differ (the paper's figure 7)."""
    from mimir_precompute.config import ModelOptions
    from mimir_precompute.volatility.command import VolatilityRequest, run_volatility

    numbers = run_volatility(
        VolatilityRequest(
            prompts=prompts,
            output_dir=output_dir,
            models=ModelOptions(
                models=models, t5=t5, llm=llm, dtype=dtype, llm_engine=llm_engine, llm_layer=llm_layer, device=device
            ),
            preset=preset,
            repeats=repeats,
            limit=limit,
            temperature=temperature,
            seed=seed,
            fuser=fuser,
        )
    )
    if as_json:
        echo(json.dumps(numbers, ensure_ascii=False))
        return
    for kind in ("query", "answer", "final"):
        echo(f"spread of {kind} tokens over {numbers['repeats']} repeats: {numbers['spread'][kind]['mean']:.4f}")
    echo(f"{output_dir}/index.html: pictures and numbers of {numbers['prompts']} prompts")
