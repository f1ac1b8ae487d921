"""How a run goes on from a checkpoint, and what a checkpoint says of the run that wrote it."""

from collections.abc import Mapping

from mimir_shared.errors import CacheError, InputError
from mimir_train.cache_reader import Cache
from mimir_train.checkpoint.adapter_base import find_base, record_adapters
from mimir_train.checkpoint.folder import (
    MANIFEST,
    CheckpointInfo,
    DataRecord,
    FeatureRecord,
    FileDigest,
    LoraRecord,
    ObjectiveRecord,
    TextRecord,
    TrainingRecord,
    read_checkpoint_info,
)
from mimir_train.checkpoint.parts import CheckpointPart, fill_parts
from mimir_train.config import TrainConfig
from mimir_train.config_document import from_record, to_document, training_digest
from mimir_train.fit import FittedRun
from mimir_train.model.config import DiTConfig, FuserConfig
from mimir_train.order.clip_order import ClipOrder
from mimir_train.run_folder import RunFolder
from mimir_train.weights.initial_transformer import InitialTransformer


def initial_of(run: RunFolder, config: TrainConfig, *, verify_base: bool) -> InitialTransformer | None:
    """The transformer that a run goes on with, its weights still to be read; None where it begins anew.

    Args:
        verify_base: of adapters, compare what they stand on with what they were trained on; one rank will do.
    """
    if run.checkpoint is None:
        return None
    path = run.checkpoint / MANIFEST
    info = read_checkpoint_info(run.checkpoint, parts=())
    transformer = from_record(DiTConfig, info.transformer, str(path))
    if transformer != config.model.transformer:
        raise CacheError(f"{path}: has the sizes {transformer}, but config.yaml says {config.model.transformer}")
    folder = None
    if info.lora is not None:
        folder = find_base(info.lora.base, config.model.init_from, "--init-from", verify=verify_base)
    return InitialTransformer(config=transformer, folder=folder, vae_scaling_factor=None)


def starting_point(run: RunFolder, fitted: FittedRun) -> dict[str, str]:
    """What ranks that train together must have found alike, each by itself: what it is → which."""
    checkpoint = "none"
    if run.checkpoint is not None:
        checkpoint = f"{run.checkpoint.name} ({read_checkpoint_info(run.checkpoint, parts=()).seal[:12]})"
    return {
        "the checkpoint to go on from": checkpoint,
        "the snapshot of the cache": str(fitted.config.data.snapshot),
        "the digest of the settings": training_digest(fitted.config),
    }


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


def adapters_of(run: RunFolder, fitted: FittedRun) -> LoraRecord | None:
    """What the run's checkpoints say of its adapters; None where all of the transformer is trained."""
    model = fitted.config.model
    if model.lora is None:
        return None
    if run.checkpoint is not None:
        return read_checkpoint_info(run.checkpoint, parts=()).lora
    assert fitted.initial.folder is not None, "adapters on nothing"
    return record_adapters(model.lora, model.init_from, fitted.initial.folder)


def checkpoint_info(
    fitted: FittedRun,
    cache: Cache,
    order: ClipOrder,
    adapters: LoraRecord | None,
    step: int,
    files: Mapping[str, FileDigest],
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
        ema=tuple(profile.name for profile in config.ema.parsed),
        lora=adapters,
    )
