"""`mimir-precompute volatility`: from what is typed to numbers, a picture and a page."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from mimir_precompute.config import EncodeSettings, ModelOptions
from mimir_precompute.device import choose_device
from mimir_precompute.encoders.base import Encoded, EncoderInput
from mimir_precompute.encoders.build import build_encoder
from mimir_precompute.identity import FeatureModels, resolve_models
from mimir_precompute.model_options import encode_settings
from mimir_precompute.presets import find_preset
from mimir_precompute.volatility.fusing import FusingWeights, load_weights, untrained_weights
from mimir_precompute.volatility.measure import PromptStates, fuse_prompts, read_states, summarise
from mimir_precompute.volatility.pictures import draw, require_sklearn
from mimir_precompute.workers.progress import Progress
from mimir_shared.errors import InputError
from mimir_shared.features import FeatureName
from mimir_shared.page.render import render_page
from mimir_shared.prompt_list import read_prompts
from mimir_shared.storage.folder import machine_faults

_FEATURES: tuple[FeatureName, ...] = ("t5", "answers", "llm")
_TEMPLATE = Path(__file__).parent / "volatility.html.j2"


@dataclass(frozen=True, kw_only=True)
class VolatilityRequest:
    """The options of `volatility`, as typed."""

    prompts: Path
    output_dir: Path
    models: ModelOptions
    preset: str | None
    repeats: int
    limit: int | None
    temperature: float
    seed: int
    fuser: Path | None


def run_volatility(request: VolatilityRequest) -> dict[str, Any]:
    """Write volatility.json, volatility.png and index.html; returns the numbers.

    Raises: InputError for prompts, models or a fuser that cannot be used; MachineError.
    """
    require_sklearn()
    prompts = read_prompts(request.prompts).prompts[: request.limit]
    device = choose_device(request.models.device)
    preset = find_preset(request.preset) if request.preset else None
    settings = encode_settings(request.models, preset, _FEATURES, device)
    # variant 0 is greedy: it stands for the prompt, and is none of the repeats
    answers = replace(
        settings.answers, variants=request.repeats + 1, temperature=request.temperature, seed=request.seed
    )
    settings = replace(settings, answers=replace(answers, instructions=()))
    trained = load_weights(request.fuser) if request.fuser is not None else None
    states = _ask(settings, resolve_models(settings, _FEATURES), prompts)
    weights = trained or _untrained(states)
    _refuse_other_widths(weights, states[0], request.fuser)
    numbers = {
        "model": settings.llm.source.name,
        "temperature": request.temperature,
        "seed": request.seed,
        "fuser": str(request.fuser) if request.fuser else None,
        **summarise(states),
    }
    picture = draw(states, fuse_prompts(states, weights), trained=weights.trained, seed=request.seed)
    _write(request.output_dir, numbers, picture)
    return numbers


def _ask(
    settings: EncodeSettings, models: dict[FeatureName, FeatureModels], prompts: Sequence[str]
) -> list[PromptStates]:
    """One model after the other, so that never two lie in memory."""
    inputs = [EncoderInput(key=prompt, caption=prompt) for prompt in prompts]
    encoded: dict[FeatureName, list[Encoded]] = {}
    progress = Progress()
    for feature in ("t5", "answers"):
        progress.say(f"{feature}: {len(prompts)} prompts")
        encoder = build_encoder(feature, settings, models[feature], settings.device)
        encoded[feature] = encoder.encode(inputs)
        encoder.close()
    for prompt, answered in zip(prompts, encoded["answers"], strict=True):
        if answered.rejection is not None:
            raise InputError(f"{prompt!r}: {answered.rejection.detail}; leave this prompt out")
    from mimir_precompute.encoders.llm import LlmEncoder

    llm = cast(LlmEncoder, build_encoder("llm", settings, models["llm"], settings.device))
    progress.say(f"llm: {len(prompts)} prompts, each with {settings.answers.variants} answers")
    states = read_states(llm, prompts, encoded["t5"], encoded["answers"])
    llm.close()
    return states


def _untrained(states: Sequence[PromptStates]) -> FusingWeights:
    t5_rms = float(summarise(states)["values"]["t5"]["rms"])
    return untrained_weights(t5_rms, states[0].t5_rows.shape[1], states[0].llm_rows.shape[1])


def _refuse_other_widths(weights: FusingWeights, state: PromptStates, fuser: Path | None) -> None:
    widths = (state.t5_rows.shape[1], state.llm_rows.shape[1])
    if weights.decoder.shape != widths:
        raise InputError(
            f"--fuser {fuser}: made for text of {weights.decoder.shape[0]} and an LLM of {weights.decoder.shape[1]} "
            f"channels, these models have {widths[0]} and {widths[1]}; give the models that it was trained with"
        )


def _write(folder: Path, numbers: dict[str, Any], picture: bytes) -> None:
    page = render_page(
        _TEMPLATE,
        {
            "model": numbers["model"],
            "temperature": numbers["temperature"],
            "numbers": numbers,
            "picture": "data:image/png;base64," + base64.b64encode(picture).decode(),
        },
    )
    with machine_faults(f"{folder}: writing"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "volatility.json").write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (folder / "volatility.png").write_bytes(picture)
        (folder / "index.html").write_text(page, "utf-8", errors="replace")
