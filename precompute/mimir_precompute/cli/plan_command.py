"""`plan`: bring the plan up to the list, and say what changed and what encoding it will cost."""

import json
from dataclasses import asdict, dataclass

from mimir_precompute.cli.commands import run_plan
from mimir_precompute.cli.messages import describe_plan
from mimir_precompute.config import ModelOptions
from mimir_precompute.model_options import refuse_missing_models
from mimir_precompute.planning.estimate import EstimateRequest, estimate_encoding
from mimir_precompute.planning.estimate_message import describe_estimate, summarise_estimate
from mimir_precompute.planning.model_sizes import UnknownSizeError
from mimir_precompute.planning.plan import PlanRequest, geometry_of
from mimir_precompute.presets import find_preset
from mimir_shared.gpus import find_gpu


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """The options of `plan`, as typed."""

    clips: str
    cache: str
    request: PlanRequest
    limit: int | None
    video_key: str
    caption_key: str
    dry_run: bool
    models: ModelOptions
    """For the estimate."""
    gpu: str
    utilisation: float
    """Share of the GPU's data sheet that is reached."""


def run_plan_command(command: PlanCommand, *, as_json: bool) -> str:
    """Plan, or say what would be planned.

    Returns: what to print. A model whose size is not known here costs the estimate, and nothing else.
    Raises: InputError for options and lists that cannot be right; CacheError where they contradict the plan.
    """
    gpu = find_gpu(command.gpu)
    refuse_missing_models(command.models.models)
    plan, report = run_plan(
        command.clips,
        command.cache,
        command.request,
        command.video_key,
        command.caption_key,
        command.limit,
        dry_run=command.dry_run,
    )
    preset = plan.settings.preset if plan else command.request.preset
    asked = EstimateRequest(
        geometry=geometry_of(plan.settings) if plan else command.request.geometry(),
        preset=find_preset(preset) if preset else None,
        options=command.models,
        gpu=gpu,
        utilisation=command.utilisation,
    )
    planned = describe_plan(report, dry_run=command.dry_run)
    try:
        estimate = estimate_encoding(asked, clips=report.clips, new_clips=report.new + report.changed)
    except UnknownSizeError as unknown:
        return json.dumps({**asdict(report), "estimate": None}) if as_json else f"{planned}\nno estimate: {unknown}"
    if as_json:
        return json.dumps({**asdict(report), "estimate": asdict(estimate)})
    return f"{planned}\n{describe_estimate(estimate) if command.dry_run else summarise_estimate(estimate)}"
