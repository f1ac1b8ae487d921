"""The options about models, written once for every command that encodes. Nothing heavy is imported up here."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Final, get_type_hints

from mimir_precompute.cli.options import (
    AnswerVariantsOption,
    DeviceOption,
    DtypeOption,
    InstructionPoolingOption,
    InstructionsOption,
    LatentsOption,
    LlmEngineOption,
    LlmHiddenEngineOption,
    LlmLayerOption,
    LlmMemoryShareOption,
    LlmOption,
    LlmTensorParallelOption,
    ModelsOption,
    T5Option,
    T5RowsOption,
    VaeEngineOption,
    VaeOption,
    VaeTilingOption,
)
from mimir_precompute.config import ModelOptions

_OPTIONS: Final[dict[str, Any]] = {
    "models": ModelsOption,
    "vae": VaeOption,
    "t5": T5Option,
    "llm": LlmOption,
    "dtype": DtypeOption,
    "stored_latents": LatentsOption,
    "vae_tiling": VaeTilingOption,
    "vae_engine": VaeEngineOption,
    "t5_rows": T5RowsOption,
    "answer_variants": AnswerVariantsOption,
    "llm_engine": LlmEngineOption,
    "llm_hidden_engine": LlmHiddenEngineOption,
    "llm_tensor_parallel": LlmTensorParallelOption,
    "llm_memory_share": LlmMemoryShareOption,
    "instructions": InstructionsOption,
    "llm_layer": LlmLayerOption,
    "instruction_pooling": InstructionPoolingOption,
    "device": DeviceOption,
}
"""Each field of ModelOptions: how it is typed on the command line."""


def with_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Put every option about models in the place of the parameter `models: ModelOptions` of a command."""
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name != "models":
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=_OPTIONS[field.name]
            )
            for field in dataclasses.fields(ModelOptions)
        ]

    @functools.wraps(command)
    def with_models(**values: Any) -> None:
        models = ModelOptions(**{name: values.pop(name) for name in _OPTIONS})
        command(models=models, **values)

    # what typer reads of a command
    with_models.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_models.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_models
