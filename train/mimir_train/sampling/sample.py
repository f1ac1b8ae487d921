"""From a checkpoint and prompts to videos: `sample_videos` is the whole of it.

One model at a time: texts are encoded, then all latents are made, then all are decoded. Latents wait on disk in
OUTPUT/latents, so that a call that was stopped goes on where it was, whatever it was doing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimir_shared.errors import CacheError, InputError, MachineError
from mimir_shared.prompt_list import PromptList
from mimir_shared.wording import noun_for
from mimir_train.checkpoint.opened import OpenCheckpoint, open_checkpoint
from mimir_train.model.fuser import TokenFuser
from mimir_train.objective import TextFeatures, drop_text
from mimir_train.sampling.choices import Guidance, SampleDType, SchedulerName
from mimir_train.sampling.contact_sheet import MAX_ROWS, SheetRow, write_contact_sheet
from mimir_train.sampling.files import SampleFolder, Video
from mimir_train.sampling.frozen_models import FrozenModels, ModelLocations, Progress, choose_device
from mimir_train.sampling.sampler import denoise, initial_noise, sample_generator
from mimir_train.sampling.schedulers import make_scheduler
from mimir_train.sampling.video_check import plays, read_video
from mimir_train.sampling.video_name import video_name


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What is asked for."""

    checkpoint: Path
    locations: ModelLocations
    prompts: PromptList
    output_dir: Path
    seed: int
    samples_per_prompt: int
    num_inference_steps: int
    guidance: Guidance
    scheduler: SchedulerName
    bucket: str | None
    """FxHxW; None: the largest of those trained on."""
    negative_prompt: str | None
    """Stands where no text would; None: what stood in training where text was dropped."""
    device: str
    """auto, cpu, cuda or cuda:N."""
    weights: str | None
    """raw, ema or the profile of an average; None: an average where there is one."""
    base: str | None
    """Where the transformer is that adapters were trained on; None: where it was then."""
    dtype: SampleDType
    """In which fuser and transformer compute; auto: bfloat16 on CUDA, float32 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class SampleOutcome:
    """What a call did."""

    made: int
    kept: int
    """Videos that were there and play."""
    sheet: Path
    sheet_rows: int


def sample_videos(request: SampleRequest, progress: Progress) -> SampleOutcome:
    """Make every video that is not there yet, the list of them, and a contact sheet.

    Raises:
        InputError: no such checkpoint or model, a size or number of steps that cannot be, or a folder that holds
            videos made otherwise.
        CacheError: the checkpoint is damaged, or the models are not those that it was trained with.
    """
    device = choose_device(request.device)
    checkpoint = open_checkpoint(request.checkpoint, progress.say, weights=request.weights, base=request.base)
    make_scheduler(
        request.scheduler, checkpoint.info.objective.snr_shift_scale, request.num_inference_steps
    )  # refused before all else
    checkpoint.check_base()
    frozen = FrozenModels(checkpoint.identities, checkpoint.text_features, request.locations, device)
    bucket, latent_shape = _choose_size(request, checkpoint, frozen, progress)
    size = tuple(int(part) for part in bucket.split("x"))
    folder = SampleFolder(request.output_dir)
    videos = _list_videos(request)
    folder.claim(_settings(request, checkpoint, bucket, device), videos)

    missing = [video for video in videos if not plays(folder.video_path(video), *size)]
    if len(missing) < len(videos):
        progress.say(f"{len(videos) - len(missing)} of {len(videos)} videos are there and play; they are kept")
    undrawn = [video for video in missing if folder.read_latents(video, latent_shape) is None]
    with _device_memory(bucket, device):
        if undrawn:
            texts = _encode_texts(request, checkpoint, frozen, undrawn, progress)
            _make_latents(request, checkpoint, folder, undrawn, latent_shape, texts, device, progress)
        _decode(checkpoint, frozen, folder, missing, latent_shape, progress)
    folder.write_list(videos)
    rows = [_sheet_row(folder, video, checkpoint.info.data.fps) for video in videos[:MAX_ROWS]]
    write_contact_sheet(folder.sheet_path, rows)
    return SampleOutcome(
        made=len(missing), kept=len(videos) - len(missing), sheet=folder.sheet_path, sheet_rows=len(rows)
    )


def _choose_size(
    request: SampleRequest, checkpoint: OpenCheckpoint, frozen: FrozenModels, progress: Progress
) -> tuple[str, tuple[int, int, int, int]]:
    """The size of the videos, and (C, T, h, w) of their latents."""

    def volume(bucket: str) -> int:
        frames, height, width = (int(part) for part in bucket.split("x"))
        return frames * height * width

    bucket = request.bucket.lower() if request.bucket is not None else max(checkpoint.info.data.buckets, key=volume)
    shape = frozen.latent_shape(bucket)
    config = checkpoint.transformer
    if shape[0] != config.in_channels:
        raise CacheError(
            f"{checkpoint.folder}: its transformer takes {config.in_channels} channels, the VAE's latents have "
            f"{shape[0]}; the checkpoint does not fit its own record"
        )
    if shape[2] % config.patch_size or shape[3] % config.patch_size:
        raise InputError(
            f"--bucket {bucket}: its latents are {shape[2]}x{shape[3]}, which cannot be cut into the transformer's "
            f"patches of {config.patch_size}x{config.patch_size}"
        )
    if bucket not in checkpoint.info.data.buckets:
        progress.say(f"note: the model was trained on {', '.join(checkpoint.info.data.buckets)}, not on {bucket}")
    return bucket, shape


def _list_videos(request: SampleRequest) -> list[Video]:
    return [
        Video(prompt=prompt, index=index, name=video_name(prompt, index))
        for prompt in request.prompts.prompts
        for index in range(request.samples_per_prompt)
    ]


def _settings(request: SampleRequest, checkpoint: OpenCheckpoint, bucket: str, device: str) -> dict[str, Any]:
    """Everything that changes a video, beside its prompt and index."""
    return {
        "version": 1,
        "checkpoint": checkpoint.digest,
        "step": checkpoint.info.step,
        "weights": checkpoint.weights,
        "preset": checkpoint.info.preset,
        "seed": request.seed,
        "scheduler": request.scheduler,
        "num_inference_steps": request.num_inference_steps,
        "guidance": request.guidance.name,
        "guidance_scale": request.guidance.scale,
        "negative_prompt": request.negative_prompt,
        "bucket": bucket,
        "fps": checkpoint.info.data.fps,
        "dtype": _dtype_name(request, device),
    }


def _dtype_name(request: SampleRequest, device: str) -> str:
    if request.dtype != "auto":
        return request.dtype
    return "float32" if device == "cpu" else "bfloat16"


def _encode_texts(
    request: SampleRequest,
    checkpoint: OpenCheckpoint,
    frozen: FrozenModels,
    videos: Sequence[Video],
    progress: Progress,
) -> dict[str, TextFeatures]:
    """The features of every prompt, of the negative one, and of "" where that stood in training."""
    texts = [video.prompt for video in videos]
    if request.guidance.is_on and request.negative_prompt is not None:
        texts.append(request.negative_prompt)
    elif request.guidance.is_on and checkpoint.uses_empty_prompt:
        texts.append("")
    text = checkpoint.info.text
    return frozen.encode_texts(list(dict.fromkeys(texts)), text.t5_rows, text.text_align, progress)


def _make_latents(
    request: SampleRequest,
    checkpoint: OpenCheckpoint,
    folder: SampleFolder,
    videos: Sequence[Video],
    latent_shape: tuple[int, int, int, int],
    texts: Mapping[str, TextFeatures],
    device: str,
    progress: Progress,
) -> None:
    """Denoise one video after the other, and leave its latents in the folder."""
    dtype = torch.bfloat16 if _dtype_name(request, device) == "bfloat16" else torch.float32
    dit, fuser = checkpoint.load_transformer(dtype, device), checkpoint.load_fuser(dtype, device)
    progress.start("denoising steps", len(videos) * request.num_inference_steps)
    for video in videos:
        generator = sample_generator(request.seed, video.prompt, video.index)
        condition_tokens, unconditional_tokens = _fuse(request, checkpoint, fuser, texts, video.prompt, device)
        latents = denoise(
            dit,
            make_scheduler(
                request.scheduler, checkpoint.info.objective.snr_shift_scale, request.num_inference_steps, device
            ),
            initial_noise(latent_shape, generator).to(device),
            condition_tokens,
            unconditional_tokens,
            request.guidance,
            generator,
            after_step=lambda step_index: progress.advance(),
        )
        if not torch.isfinite(latents).all():
            raise CacheError(
                f"{checkpoint.folder}: the latents of {video.prompt!r} are NaN or infinite; the model has diverged, or "
                f"overflows in {dtype}: take an earlier checkpoint, or --dtype float32"
            )
        folder.write_latents(video, latents[0].cpu())


@torch.inference_mode()
def _fuse(
    request: SampleRequest,
    checkpoint: OpenCheckpoint,
    fuser: TokenFuser,
    texts: Mapping[str, TextFeatures],
    prompt: str,
    device: str,
) -> tuple[Tensor, Tensor]:
    """The tokens with the prompt and without, (1, L, D) or (1, L+K, D) each."""
    text = _to_device(texts[prompt], device)
    condition_tokens = fuser(*text, append_stabilizer=checkpoint.appends_stabilizer)
    if not request.guidance.is_on:
        return condition_tokens, condition_tokens
    if request.negative_prompt is not None:
        no_text = _to_device(texts[request.negative_prompt], device)
    else:
        empty = _to_device(texts[""], device) if checkpoint.uses_empty_prompt else None
        no_text = drop_text(text, torch.ones(1, dtype=torch.bool), empty)
    return condition_tokens, fuser(*no_text, append_stabilizer=checkpoint.appends_stabilizer)


def _to_device(text: TextFeatures, device: str) -> TextFeatures:
    llm = None if text.llm is None else type(text.llm)(*(tensor.to(device) for tensor in text.llm))
    return TextFeatures(text.t5_embeds.to(device), llm)


def _decode(
    checkpoint: OpenCheckpoint,
    frozen: FrozenModels,
    folder: SampleFolder,
    videos: Sequence[Video],
    latent_shape: tuple[int, int, int, int],
    progress: Progress,
) -> None:
    """Turn latents into videos; those of a video that is written are removed."""
    if not videos:
        return
    progress.start(f"{noun_for(len(videos), 'video')} decoded", len(videos))
    with frozen.decoder(checkpoint.info.data.latent_scaling_factor) as decode:
        for video in videos:
            latents = folder.read_latents(video, latent_shape)
            if latents is None:
                raise MachineError(
                    f"{folder.latents_path(video)}: gone since it was written; run the same command again"
                )
            folder.write_video(video, decode(latents), checkpoint.info.data.fps)
            progress.advance()


def _sheet_row(folder: SampleFolder, video: Video, fps: float) -> SheetRow:
    frames = read_video(folder.video_path(video))
    if frames is None:
        raise MachineError(f"{folder.video_path(video)}: does not play; run the same command again")
    return SheetRow(caption=video.prompt, note=f"sample {video.index}", frames=frames, fps=fps)


@contextmanager
def _device_memory(bucket: str, device: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as fault:
        raise MachineError(
            f"{device}: not enough memory for {bucket}; take a smaller --bucket, --dtype bfloat16, or another device"
        ) from fault
