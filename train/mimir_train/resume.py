"""How a run goes on from a checkpoint, and what a checkpoint says of the run that wrote it."""

import torch

from mimir_shared.errors import CacheError, InputError
from mimir_train.cache_reader import Cache
from mimir_train.checkpoint import (
    FUSER,
    OPTIMIZER,
    STATE,
    TRANSFORMER,
    CheckpointInfo,
    DataRecord,
    FeatureRecord,
    FileDigest,
    ObjectiveRecord,
    TextRecord,
    TrainingState,
    read_state,
)
from mimir_train.config import TrainConfig
from mimir_train.config_document import training_digest
from mimir_train.fit import FittedRun
from mimir_train.fuser_folder import fuser_document, load_fuser
from mimir_train.initial_transformer import InitialTransformer
from mimir_train.optimizer import load_optimizer_tensors
from mimir_train.order import TrainingOrder
from mimir_train.run_folder import RunFolder
from mimir_train.sharding import rows_held, write_held_rows
from mimir_train.trained_model import TrainedModel
from mimir_train.transformer_folder import read_transformer_config


def initial_of(run: RunFolder, config: TrainConfig) -> InitialTransformer | None:
    """The transformer that a run goes on with; None where it begins anew."""
    if run.checkpoint is None:
        return None
    folder = run.checkpoint / TRANSFORMER
    transformer = read_transformer_config(folder)
    if transformer != config.model.transformer:
        raise CacheError(f"{folder}: has the sizes {transformer}, but config.yaml says {config.model.transformer}")
    return InitialTransformer(config=transformer, folder=folder, vae_scaling_factor=None)


def load_checkpoint(
    run: RunFolder, model: TrainedModel, optimizer: torch.optim.Optimizer, order: TrainingOrder, fitted: FittedRun
) -> int:
    """Fill fuser and optimizer from the checkpoint (the transformer has been loaded from it).

    Returns: the next step; 0 where the run begins anew.
    Raises: InputError where order or settings are not those of the checkpoint; CacheError where it is damaged.
    """
    if run.checkpoint is None:
        return 0
    state, tensors = read_state(run.checkpoint)
    expected = order.state(state.step)
    if state.order != expected:
        raise InputError(
            f"{run.checkpoint / STATE}: the order of the clips was {state.order}, now it is {expected}; the run cannot "
            f"go on with another one"
        )
    if state.config_sha256 != training_digest(fitted.config):
        raise InputError(
            f"{run.checkpoint}: was made with other settings than config.yaml beside it says; restore config.yaml"
        )
    fuser = load_fuser(run.checkpoint / FUSER)
    if fuser.config != model.fuser.config:
        raise CacheError(f"{run.checkpoint / FUSER}: is of {fuser.config}, the run of {model.fuser.config}")
    parameters = dict(model.fuser.named_parameters())
    for name, whole in fuser.named_parameters():
        start, stop = rows_held(parameters[name])
        write_held_rows(parameters[name], whole[start:stop])
    load_optimizer_tensors(optimizer, model, tensors, str(run.checkpoint / OPTIMIZER))
    return state.step


def training_state(config: TrainConfig, order: TrainingOrder, steps_done: int) -> TrainingState:
    return TrainingState(step=steps_done, order=order.state(steps_done), config_sha256=training_digest(config))


def checkpoint_info(
    fitted: FittedRun, cache: Cache, order: TrainingOrder, step: int, files: dict[str, FileDigest]
) -> CheckpointInfo:
    """checkpoint.json: what the model is and what it was trained on."""
    config = fitted.config
    assert config.model.latent_scaling_factor is not None, "fit leaves nothing open"
    return CheckpointInfo(
        step=step,
        preset=config.preset,
        files=files,
        data=DataRecord(
            snapshot=cache.snapshot.digest,
            features={
                name: FeatureRecord(fingerprint=feature.fingerprint, identity=feature.identity)
                for name, feature in cache.snapshot.features.items()
            },
            buckets=tuple(bucket.name for bucket in order.buckets),
            fps=cache.snapshot.fps,
            latent_scaling_factor=config.model.latent_scaling_factor,
            latents_std=fitted.latents_std,
        ),
        objective=ObjectiveRecord(snr_shift_scale=config.objective.snr_shift_scale),
        fuser=fuser_document(fitted.fuser),
        text=TextRecord(
            t5_rows=fitted.layout.t5_rows,
            text_align=fitted.layout.text_align,
            empty_text=config.data.empty_text,
        ),
    )
