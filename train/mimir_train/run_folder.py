"""RUN: the folder of one training, and the place in it from which a run starts or goes on.

config.yaml   metrics.jsonl   bad_samples.jsonl   tensorboard/   checkpoints/step-00000020/
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mimir_shared.errors import CacheError, InputError, MachineError
from mimir_shared.storage.folder import machine_faults
from mimir_train.checkpoint.folder import (
    ALONE,
    CHECKPOINTS,
    Share,
    check_checkpoint,
    find_checkpoint,
    is_checkpoint_folder,
    list_checkpoints,
    read_checkpoint_info,
    step_folder_name,
    step_of,
)
from mimir_train.config import TrainConfig
from mimir_train.config_document import (
    Document,
    read_document,
    refuse_other_training,
    train_config,
    write_document,
)
from mimir_train.learning_rate import refuse_other_rates

CONFIG_NAME: Final = "config.yaml"
METRICS_NAME: Final = "metrics.jsonl"
BAD_SAMPLES_NAME: Final = "bad_samples.jsonl"
TENSORBOARD_NAME: Final = "tensorboard"


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a run writes, and the checkpoint that it goes on from."""

    path: Path
    checkpoint: Path | None
    """None: a new training."""

    def write_config(self, config: TrainConfig) -> None:
        with machine_faults(f"{self.path / CONFIG_NAME}: writing"):
            self.path.mkdir(parents=True, exist_ok=True)
            temporary = self.path / f".{CONFIG_NAME}.tmp"
            temporary.write_text(write_document(config), encoding="utf-8")
            temporary.replace(self.path / CONFIG_NAME)


def resumed_run(output_dir: Path, resume: str) -> Path:
    """The run that --resume-from-checkpoint belongs to: RUN itself, or that of the path given."""
    path = Path(resume)
    if _is_name(resume):
        return output_dir
    return path.parent.parent if is_checkpoint_folder(path) else path


def resumed_settings(output_dir: Path, resume: str | None) -> Document | None:
    """The settings that a run began with; None for a new training."""
    if resume is None:
        return None
    run = resumed_run(output_dir, resume)
    if not list_checkpoints(run):
        return None
    if not (run / CONFIG_NAME).is_file():
        raise InputError(f"{run}: has checkpoints but no {CONFIG_NAME}; the settings of the run are not known")
    settings = read_document(run / CONFIG_NAME)
    if isinstance(settings.get("run"), dict):
        settings["run"].pop("stop_at_step", None)  # said of one call, not of the training
    return settings


def open_run(config: TrainConfig, resume: str | None, say: Callable[[str], None], share: Share = ALONE) -> RunFolder:
    """Find out where to start.

    Args:
        resume: "latest", the number of a step, the path of a checkpoint or of a run; None: begin anew.
        share: of the ranks that begin together.
    Raises: InputError where a new run would write over another, or settings changed that decide the training;
        CacheError where no checkpoint to go on from is good; MachineError where ranks see different checkpoints.
    """
    path = Path(config.run.output_dir)
    _refuse_different_views(path if resume is None else resumed_run(path, resume), share)
    if resume is None:
        if list_checkpoints(path):
            raise InputError(
                f"{path}: holds a training already ({list_checkpoints(path)[-1].name}); go on with it: "
                f"--resume-from-checkpoint latest, or give another --output-dir"
            )
        return RunFolder(path=path, checkpoint=None)
    settings = resumed_settings(path, resume)
    if settings is None:
        if resume != "latest":
            raise InputError(f"--resume-from-checkpoint {resume}: no checkpoint there")
        say(f"{path}: no checkpoint to go on from; this is a new training")
        return RunFolder(path=path, checkpoint=None)
    run = resumed_run(path, resume)
    began_with = train_config(settings)
    refuse_other_training(began_with, config, str(run / CONFIG_NAME))
    checkpoint = _checkpoint(run, resume, say, share)
    refuse_other_rates(began_with, config, read_checkpoint_info(checkpoint, parts=()).step, str(checkpoint))
    say(f"goes on from {checkpoint}")
    return RunFolder(path=path, checkpoint=checkpoint)


def _refuse_different_views(run: Path, share: Share) -> None:
    """Ranks that went on from different steps would train on, and wrongly."""
    newest = max(map(step_of, list_checkpoints(run)), default=-1)
    steps = [int(step) for (step,) in share.tell([newest])]
    if len(set(steps)) > 1:
        seen = ", ".join(
            f"rank {rank}: {step_folder_name(step) if step >= 0 else 'none'}" for rank, step in enumerate(steps)
        )
        raise MachineError(
            f"{run}: ranks see different checkpoints ({seen}); --output-dir must be a folder that all of them share: "
            f"if it is, the file system was slow to show a new one: run the same command again"
        )


def _checkpoint(run: Path, resume: str, say: Callable[[str], None], share: Share) -> Path:
    if resume.isdecimal():
        folder = run / CHECKPOINTS / step_folder_name(int(resume))
        if folder not in list_checkpoints(run):
            names = ", ".join(found.name for found in list_checkpoints(run))
            raise InputError(f"--resume-from-checkpoint {resume}: {run} has only {names}")
        problem = check_checkpoint(folder, share=share)
        if problem is not None:
            raise CacheError(f"--resume-from-checkpoint {resume}: {problem}; `latest` takes the newest good one")
        return folder
    return find_checkpoint(run if resume == "latest" else Path(resume), say=say, share=share)


def _is_name(resume: str) -> bool:
    return resume == "latest" or resume.isdecimal()
