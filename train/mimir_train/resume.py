"""How a run goes on from a checkpoint, and what a checkpoint says of the run that wrote it."""

from collections.abc import Mapping

from mimir_shared.errors import CacheError, InputError
from mimir_train.cache_reader import Cache
from mimir_train.checkpoint import (
    MANIFEST,
    CheckpointInfo,
    DataRecord,
    FeatureRecord,
    FileDigest,
    ObjectiveRecord,
    TextRecord,
    TrainingRecord,
    read_checkpoint_info,
)
from mimir_train.checkpoint_parts import CheckpointPart, fill_parts
from mimir_train.config import TrainConfig
from mimir_train.config_document import from_record, to_document, training_digest
from mimir_train.fit import FittedRun
from mimir_train.initial_transformer import InitialTransformer
from mimir_train.model.config import DiTConfig, FuserConfig
from mimir_train.order import ClipOrder
from mimir_train.run_folder import RunFolder


def initial_of(run: RunFolder, config: TrainConfig) -> InitialTransformer | None:
    """The transformer that a run goes on with, its weights still to be read; None where it begins anew."""
    if run.checkpoint is None:
        return None
    path = run.checkpoint / MANIFEST
    transformer = from_record(DiTConfig, read_checkpoint_info(run.checkpoint, parts=()).transformer, str(path))
    if transformer != config.model.transformer:
        raise CacheError(f"{path}: has the sizes {transformer}, but config.yaml says {config.model.transformer}")
    return InitialTransformer(config=transformer, folder=None, vae_scaling_factor=None)


def load_checkpoint(run: RunFolder, parts: Mapping[str, CheckpointPart], order: ClipOrder, fitted: FittedRun) -> int:
    """Fill weights, optimizer and all other parts from the checkpoint.

    Returns: the next step; 0 where the run begins anew.
    Raises: InputError where order or settings are not those of the checkpoint; CacheError where it is damaged.
    """
    if run.checkpoint is None:
        return 0
    path = run.checkpoint / MANIFEST
    info = read_checkpoint_info(run.checkpoint, parts=())  # its files were checked when it was chosen
    expected = order.state(info.step)
    if info.training.order != expected:
        raise InputError(
            f"{path}: the order of the clips was {info.training.order}, now it is {expected}; the run cannot go on "
            f"with another one"
        )
    if info.training.config_sha256 != training_digest(fitted.config):
        raise InputError(
            f"{run.checkpoint}: was made with other settings than config.yaml beside it says; restore config.yaml"
        )
    fuser = from_record(FuserConfig, info.fuser, str(path))
    if fuser != fitted.fuser:
        raise CacheError(f"{path}: its fuser is {fuser}, the run's {fitted.fuser}")
    fill_parts(run.checkpoint, info, parts)
    return info.step


def checkpoint_info(
    fitted: FittedRun, cache: Cache, order: ClipOrder, step: int, files: Mapping[str, FileDigest]
) -> CheckpointInfo:
    """checkpoint.json: what the model is and what it was trained on."""
    config = fitted.config
    assert config.model.latent_scaling_factor is not None, "fit leaves nothing open"
    return CheckpointInfo(
        step=step,
        preset=config.preset,
        files=dict(files),
        training=TrainingRecord(order=order.state(step), config_sha256=training_digest(config)),
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
        transformer=to_document(config.model.transformer),
        fuser=to_document(fitted.fuser),
        text=TextRecord(
            t5_rows=fitted.layout.t5_rows,
            text_align=fitted.layout.text_align,
            empty_text=config.data.empty_text,
        ),
    )
