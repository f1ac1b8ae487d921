"""Hand a checkpoint on: a folder that diffusers reads, and the token fuser beside it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mimir_shared.errors import InputError
from mimir_shared.storage import machine_faults
from mimir_train.fuser_folder import load_fuser, save_fuser
from mimir_train.sampler import SchedulerName
from mimir_train.schedulers import build_scheduler
from mimir_train.trained_model import FUSER_FOLDER, TRANSFORMER_FOLDER, TrainedModel, open_checkpoint
from mimir_train.transformer_folder import load_transformer, save_transformer

ExportDType = Literal["stored", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    checkpoint: Path
    output_dir: Path
    scheduler: SchedulerName
    dtype: ExportDType
    """Of the weights that are written; stored: as the checkpoint has them."""


def export_checkpoint(request: ExportRequest) -> TrainedModel:
    """Write transformer/, scheduler/, fuser/ and README.md.

    Returns: what was exported.
    Raises: InputError for a checkpoint that is not there, or a folder in use; CacheError for a damaged one.
    """
    model = open_checkpoint(request.checkpoint)
    output_dir = request.output_dir
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"--output-dir {output_dir}: exists and is not empty; choose another folder, or remove it")
    # under another name first: a reader must see a whole export or none
    unfinished = output_dir.with_name(f".{output_dir.name}.tmp")
    with machine_faults(f"{output_dir}: writing"):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write(request, model, unfinished)
        if output_dir.is_dir():
            output_dir.rmdir()
        unfinished.replace(output_dir)
    return model


def _write(request: ExportRequest, model: TrainedModel, folder: Path) -> None:
    dtype = None if request.dtype == "stored" else getattr(torch, request.dtype)
    dit = load_transformer(model.folder / TRANSFORMER_FOLDER, dtype=dtype)
    save_transformer(dit.config, dit.state_dict(), folder / TRANSFORMER_FOLDER)
    fuser = load_fuser(model.folder / FUSER_FOLDER, dtype=dtype)
    save_fuser(fuser.config, fuser.state_dict(), folder / FUSER_FOLDER)
    build_scheduler(request.scheduler, model.snr_shift_scale).save_pretrained(folder / "scheduler")
    (folder / "README.md").write_text(_model_card(request, model, _count(dit), _count(fuser)), encoding="utf-8")


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _model_card(request: ExportRequest, model: TrainedModel, dit_size: int, fuser_size: int) -> str:
    switches = model.fuser.switches
    parts = [name for name in ("decoder", "norm", "zero_conv", "stabilizer") if getattr(switches, name)]
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-video",
        "---",
        "",
        "# A CogVideoX transformer with a token fuser",
        "",
        "Trained with Mimir. What follows is read from the checkpoint; add what the model is for and its licence.",
        "",
        "| | |",
        "|---|---|",
        f"| preset | {model.preset} |",
        f"| training steps | {model.step} |",
        f"| transformer | {dit_size:,} parameters, weights as {request.dtype} |",
        f"| token fuser | {fuser_size:,} parameters; parts: {', '.join(parts) or 'none (T5 alone)'} |",
        f"| sizes trained on | {', '.join(model.buckets)} (frames x height x width) at {model.fps:g} fps |",
        f"| latent scaling factor | {model.latent_scaling_factor!r} |",
        f"| noise schedule | v-prediction, zero terminal SNR, snr_shift_scale {model.snr_shift_scale:g} |",
        f"| data | snapshot `{model.snapshot}` |",
        f"| checkpoint | `{model.digest}` (sha256 of its checkpoint.json) |",
        "",
        "## Frozen models that it was trained with",
        "",
        "| feature | model | sha256 of its files |",
        "|---|---|---|",
        *_model_rows(model),
        "",
        "## Use",
        "",
        "`mimir-train sample` makes videos from the checkpoint. In diffusers:",
        "",
        "```python",
        "from diffusers import CogVideoXTransformer3DModel",
        "",
        'transformer = CogVideoXTransformer3DModel.from_pretrained("THIS_FOLDER", subfolder="transformer")',
        "```",
        "",
        _on_text(model),
        "",
    ]
    return "\n".join(lines)


def _model_rows(model: TrainedModel) -> list[str]:
    rows = []
    for feature, identity in model.identities.items():
        files = identity["model"]
        name = "/".join(part for part in (files["name"], files["subfolder"]) if part)
        commit = f" at {files['commit']}" if files["commit"] else ""
        digests = json.dumps(files["sha256"], sort_keys=True)
        rows.append(f"| {feature} | {name}{commit} | `{digests}` |")
    return rows


def _on_text(model: TrainedModel) -> str:
    if not model.fuser.switches.needs_llm and not model.fuser.switches.zero_conv:
        return "This transformer takes the T5 embeddings as they are: CogVideoXPipeline runs it unchanged."
    return (
        "The transformer is conditioned on the tokens that the fuser in `fuser/` makes; give those as `prompt_embeds` "
        "and `negative_prompt_embeds` to CogVideoXPipeline. T5's embeddings alone are not what it was trained on."
    )
