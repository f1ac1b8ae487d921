"""A checkpoint of random weights, trained on nothing, whose record says that toy models made its cache; and the
program run on it in this process.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer

from mimir_precompute.config import (
    AnswersSettings,
    Bucket,
    EncodeSettings,
    Geometry,
    LlmSettings,
    ModelSource,
    T5Settings,
    VaeSettings,
)
from mimir_precompute.identity import feature_identity, resolve_models
from mimir_shared.command_line import make_app
from mimir_shared.features import FEATURES
from mimir_shared.fingerprint import fingerprint
from mimir_train.checkpoint.folder import EMA, MODEL, CheckpointInfo, LoraRecord
from mimir_train.checkpoint.parts import ModelPart
from mimir_train.checkpoint.saver import CheckpointSaver, Kept
from mimir_train.cli.sample import add_commands
from mimir_train.config_document import to_document
from mimir_train.model.config import FUSERS, DiTConfig, FuserConfig, FuserName
from mimir_train.model.dit import DiT
from mimir_train.model.fuser import TokenFuser
from mimir_train.parallel.launch import Place
from mimir_train.parallel.processes import Parallel
from mimir_train.trained_model import TrainedModel

BUCKETS = ("1x32x48", "9x32x48")
FPS = 8.0
SCALING_FACTOR = 1.1
T5_ROWS = 24
TRANSFORMER = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    in_channels=8,
    out_channels=8,
    time_embed_dim=24,
    text_embed_dim=64,
    sample_height=8,
    sample_width=12,
    sample_frames=9,
    max_text_seq_length=T5_ROWS,
    use_rotary_positional_embeddings=True,
)


def identities(models: Path, **t5: Any) -> dict[str, dict[str, Any]]:
    """What a cache made with the toy models would record.

    Args:
        t5: settings of T5 other than these.
    """
    source = {
        part: ModelSource(name=str(models), subfolder=part) for part in ("vae", "text_encoder", "tokenizer", "llm")
    }
    settings = EncodeSettings(
        latents=VaeSettings(source=source["vae"], dtype="float32"),
        t5=T5Settings(
            text_encoder=source["text_encoder"],
            tokenizer=source["tokenizer"],
            **{"dtype": "float32", "max_length": T5_ROWS, **t5},
        ),
        answers=AnswersSettings(
            source=source["llm"],
            dtype="float32",
            max_caption_tokens=T5_ROWS,
            max_answer_tokens=6,
            max_instruction_tokens=3,
            variants=2,
        ),
        llm=LlmSettings(source=source["llm"], dtype="float32", max_caption_tokens=T5_ROWS),
    )
    geometry = Geometry(buckets=tuple(Bucket.parse(bucket) for bucket in BUCKETS), fps=FPS)
    resolved = resolve_models(settings, FEATURES)
    made: dict[str, dict[str, Any]] = {}
    for feature in FEATURES:
        made[feature] = feature_identity(feature, settings, geometry, resolved[feature], answers=made.get("answers"))
    return made


def random_model(fuser: FuserName, *, rotary: bool = True, **fuser_fields: Any) -> TrainedModel:
    """Weights without a zero, that keep the size of what goes in, so that every input counts for something."""
    torch.manual_seed(0)
    config = FuserConfig(switches=FUSERS[fuser], t5_rms=0.3, text_width=64, llm_width=64, **fuser_fields)
    transformer = replace(TRANSFORMER, use_rotary_positional_embeddings=rotary)
    model = TrainedModel(DiT(transformer), TokenFuser(config))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(model.dit.proj_out.weight, std=0.3 * TRANSFORMER.width**-0.5)
    return model


def write_checkpoint(
    run: Path,
    recorded: Mapping[str, Mapping[str, Any]],
    model: TrainedModel,
    step: int = 20,
    snr_shift_scale: float = 1.0,
    empty_text: str = "zeros",
    average: TrainedModel | None = None,
    adapters: LoraRecord | None = None,
) -> Path:
    """Write RUN/checkpoints/step-…; gives that folder.

    Args:
        average: the weights that "power:0.1" came to; None: none was kept.
        adapters: what is said of them, where the transformer has some; it is not written itself then.
    """

    def describe(step: int, files: Mapping[str, Any]) -> CheckpointInfo:
        return CheckpointInfo.model_validate(
            {
                "step": step,
                "preset": "tiny",
                "files": dict(files),
                "training": {"order": {}, "config_sha256": "0" * 64},
                "data": {
                    "snapshot": "5" * 64,
                    "features": {
                        name: {"fingerprint": fingerprint(identity), "identity": identity}
                        for name, identity in recorded.items()
                    },
                    "buckets": BUCKETS,
                    "fps": FPS,
                    "latent_scaling_factor": SCALING_FACTOR,
                    "latents_std": 1 / SCALING_FACTOR,
                },
                "objective": {"snr_shift_scale": snr_shift_scale},
                "transformer": to_document(model.dit.config),
                "fuser": to_document(model.fuser.config),
                "text": {"t5_rows": T5_ROWS, "text_align": "index", "empty_text": empty_text},
                "ema": [] if average is None else ["power:0.1"],
                "lora": None if adapters is None else adapters.model_dump(),
            }
        )

    alone = Parallel(place=Place(), device=torch.device("cpu"))
    parts = {MODEL: ModelPart(model)} | ({} if average is None else {EMA: ModelPart(average)})
    with CheckpointSaver(run, parts, describe, alone, kept=Kept(), background=False) as saver:
        saver.start(step)
        written = saver.wait()
    assert written is not None
    return written


def command(*arguments: str | Path) -> None:
    """Run `mimir-train` with the commands of sampling; what it raises comes through."""
    app = make_app("")
    add_commands(app)
    typer.main.get_command(app).main([str(argument) for argument in arguments], standalone_mode=False)


def sample(run: Path, models: Path, output_dir: Path, *arguments: str | Path) -> None:
    """Two steps, on the CPU."""
    options = ("--num-inference-steps", "2", "--device", "cpu")
    command("sample", "--checkpoint", run, "--models", models, "--output-dir", output_dir, *options, *arguments)


def flip_last_bit(path: Path) -> None:
    """Damage a file by one bit."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
