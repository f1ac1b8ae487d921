"""Hand a checkpoint on: a folder that diffusers reads, and the token fuser beside it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mimir_shared.errors import InputError
from mimir_shared.storage.folder import machine_faults
from mimir_train.checkpoint.adapter_base import lora_config
from mimir_train.checkpoint.folder import LoraRecord
from mimir_train.checkpoint.opened import OpenCheckpoint, open_checkpoint
from mimir_train.sampling.choices import ExportDType, SchedulerName
from mimir_train.sampling.schedulers import build_scheduler
from mimir_train.weights.fuser_folder import save_fuser
from mimir_train.weights.lora import WEIGHTS_NAME, save_adapters
from mimir_train.weights.transformer_folder import save_transformer


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    checkpoint: Path
    output_dir: Path
    weights: str | None
    """raw, ema or the profile of an average; None: an average where there is one."""
    merge_lora: bool
    """Of adapters: write the whole transformer, with them in it."""
    base: str | None
    """Where the transformer is that adapters were trained on; None: where it was then."""
    scheduler: SchedulerName
    dtype: ExportDType
    """Of the weights that are written; stored: as the checkpoint has them."""


def export_checkpoint(request: ExportRequest, say: Callable[[str], None]) -> OpenCheckpoint:
    """Write transformer/ (or the file of adapters), scheduler/, fuser/ and README.md.

    Returns: what was exported.
    Raises: InputError for a checkpoint that is not there, or a folder in use; CacheError for a damaged one.
    """
    checkpoint = open_checkpoint(request.checkpoint, say, weights=request.weights, base=request.base)
    if request.merge_lora and checkpoint.info.lora is None:
        raise InputError(f"--merge-lora: {checkpoint.folder} has no adapters; all of the transformer was trained")
    output_dir = request.output_dir
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"--output-dir {output_dir}: exists and is not empty; choose another folder, or remove it")
    # under another name first: a reader must see a whole export or none
    unfinished = output_dir.with_name(f".{output_dir.name}.tmp")
    with machine_faults(f"{output_dir}: writing"):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write(request, checkpoint, unfinished)
        if output_dir.is_dir():
            output_dir.rmdir()
        unfinished.replace(output_dir)
    return checkpoint


def _write(request: ExportRequest, checkpoint: OpenCheckpoint, folder: Path) -> None:
    dtype = torch.float32 if request.dtype == "stored" else getattr(torch, request.dtype)
    if checkpoint.info.lora is not None and not request.merge_lora:
        adapters = {name: tensor.to(dtype) for name, tensor in checkpoint.load_adapters().items()}
        save_adapters(lora_config(checkpoint.info.lora), adapters, folder)
        size = sum(tensor.numel() for tensor in adapters.values())
    else:
        dit = checkpoint.load_transformer(dtype)
        config = replace(dit.config, max_text_seq_length=_text_tokens(checkpoint))
        save_transformer(config, dit.state_dict(), folder / "transformer")
        size = _count(dit)
    fuser = checkpoint.load_fuser(dtype)
    save_fuser(fuser.config, fuser.state_dict(), folder / "fuser")
    build_scheduler(request.scheduler, checkpoint.info.objective.snr_shift_scale).save_pretrained(folder / "scheduler")
    (folder / "README.md").write_text(_model_card(request, checkpoint, size, _count(fuser)), encoding="utf-8")


def _text_tokens(checkpoint: OpenCheckpoint) -> int:
    """Condition tokens of a clip: with added positions, diffusers takes just as many as its config says."""
    stabilizer_tokens = checkpoint.fuser.num_instructions if checkpoint.appends_stabilizer else 0
    return checkpoint.info.text.t5_rows + stabilizer_tokens


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _model_card(request: ExportRequest, checkpoint: OpenCheckpoint, size: int, fuser_size: int) -> str:
    info, switches = checkpoint.info, checkpoint.fuser.switches
    adapters = None if request.merge_lora else info.lora
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
        f"| preset | {info.preset} |",
        f"| training steps | {info.step} |",
        *([f"| weights | {checkpoint.weights} |"] if info.ema else []),
        *_trained_rows(request, checkpoint, size),
        f"| token fuser | {fuser_size:,} parameters; parts: {', '.join(parts) or 'none (T5 alone)'} |",
        f"| sizes trained on | {', '.join(info.data.buckets)} (frames x height x width) at {info.data.fps:g} fps |",
        f"| latent scaling factor | {info.data.latent_scaling_factor!r} |",
        f"| noise schedule | v-prediction, zero terminal SNR, snr_shift_scale {info.objective.snr_shift_scale:g} |",
        f"| data | snapshot `{info.data.snapshot}` |",
        f"| checkpoint | `{checkpoint.digest}` (sha256 of its checkpoint.json) |",
        "",
        "## Frozen models that it was trained with",
        "",
        "| feature | model | file | sha256 |",
        "|---|---|---|---|",
        *_model_rows(checkpoint),
        "",
        "## Use",
        "",
        "`mimir-train sample` makes videos from the checkpoint. In diffusers:",
        "",
        "```python",
        *(_LOAD_TRANSFORMER if adapters is None else _load_adapters(checkpoint, adapters)),
        "```",
        "",
        _on_text(checkpoint),
        "",
    ]
    return "\n".join(lines)


_LOAD_TRANSFORMER = (
    "from diffusers import CogVideoXTransformer3DModel",
    "",
    'transformer = CogVideoXTransformer3DModel.from_pretrained("THIS_FOLDER", subfolder="transformer")',
)


def _load_adapters(checkpoint: OpenCheckpoint, adapters: LoraRecord) -> list[str]:
    length = "" if checkpoint.transformer.use_rotary_positional_embeddings else (
        f", max_text_seq_length={_text_tokens(checkpoint)}"
    )  # fmt: skip
    return [
        "from diffusers import CogVideoXTransformer3DModel",
        "",
        f"transformer = CogVideoXTransformer3DModel.from_pretrained({adapters.base.name!r}, "
        f'subfolder="transformer"{length})',
        f'transformer.load_lora_adapter("THIS_FOLDER", weight_name="{WEIGHTS_NAME}")',
        '# or, of a whole pipeline: pipeline.load_lora_weights("THIS_FOLDER")',
    ]


def _trained_rows(request: ExportRequest, checkpoint: OpenCheckpoint, size: int) -> list[str]:
    lora, stored = checkpoint.info.lora, f"{size:,} parameters, weights as {request.dtype}"
    if lora is None:
        return [f"| transformer | {stored} |"]
    merged = f", merged into the {size:,} of the transformer, weights as {request.dtype}"
    return [
        f"| adapters | rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}"
        f"{merged if request.merge_lora else f': {stored}'} |",
        f"| trained on the transformer | {lora.base.name}, by sha256: "
        f"{', '.join(f'{name} `{file.sha256}`' for name, file in sorted(lora.base.files.items()))} |",
    ]


def _model_rows(checkpoint: OpenCheckpoint) -> list[str]:
    rows = []
    for feature, identity in checkpoint.identities.items():
        files = identity["model"]
        name = "/".join(part for part in (files["name"], files["subfolder"]) if part)
        commit = f" at {files['commit']}" if files["commit"] else ""
        for number, (file, digest) in enumerate(sorted(files["sha256"].items())):
            which = f"{feature} | {name}{commit}" if number == 0 else " | "
            rows.append(f"| {which} | {file} | `{digest}` |")
    return rows


def _on_text(checkpoint: OpenCheckpoint) -> str:
    if not checkpoint.fuser.switches.needs_llm and not checkpoint.fuser.switches.zero_conv:
        return "This transformer takes the T5 embeddings as they are: CogVideoXPipeline runs it unchanged."
    return (
        "The transformer is conditioned on the tokens that the fuser in `fuser/` makes; give those as `prompt_embeds` "
        "and `negative_prompt_embeds` to CogVideoXPipeline. T5's embeddings alone are not what it was trained on."
    )
