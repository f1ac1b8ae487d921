"""One rank's share of a step, as model and fuser take it: read ahead by threads, on the device when it is asked for.

Ragged tensors are padded to the longest of the batch, with masks; bfloat16 is taken over bit for bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from mimir_shared.clip_table import Clip
from mimir_shared.errors import CacheError
from mimir_shared.features import FeatureTensor
from mimir_train.cache_reader import Cache
from mimir_train.config import TextAlign
from mimir_train.model.fuser import LlmFeatures
from mimir_train.objective import TextFeatures
from mimir_train.order.answer_variants import VariantChoice
from mimir_train.order.clip_order import PACKED, ClipOrder
from mimir_train.reading.bad_samples import clip_at
from mimir_train.reading.batch_layout import TensorRequest
from mimir_train.reading.batch_reader import BatchReader, HostBatch
from mimir_train.reading.device_copy import copied_ahead
from mimir_train.reading.step_reader import ReadOptions, StepBatch, StepReader
from mimir_train.tensors import to_tensor
from mimir_train.text_alignment import align_by_characters

LATENT_TENSORS: Final = ("vae_moments", "vae_sample", "vae_mean")
"""What a cache may hold of the posterior, the fullest first: that one is trained on."""


@dataclass(frozen=True, kw_only=True)
class FeatureLayout:
    """Which tensors of a cache make a batch, and their sizes."""

    latents: str
    """One of LATENT_TENSORS."""
    latent_channels: int
    """C of the sampled latents; moments have twice as many."""
    latent_sizes: dict[str, tuple[int, int, int]]
    """bucket → (T, h, w)."""
    t5_rows: int
    """L: a clip whose pad rows were not kept is padded with zeros to it."""
    text_width: int
    llm: bool
    """Whether the fuser reads the LLM's features."""
    llm_width: int | None
    num_instructions: int | None
    num_variants: int = 1
    """Answers that the cache holds to each prompt."""
    text_align: TextAlign = "index"
    """By what the LLM's tokens are laid onto T5's."""


def find_layout(cache: Cache, *, llm: bool, text_align: TextAlign = "index") -> FeatureLayout:
    """Take the layout from the specs. Raises InputError where `llm` is wanted and absent, CacheError for odd specs."""
    buckets = cache.snapshot.buckets
    latents_spec, t5_spec = cache.spec("latents"), cache.spec("t5")
    of_bucket = {bucket: {spec.name: spec.sizes for spec in latents_spec.tensor_specs(bucket)} for bucket in buckets}
    latents = next((name for name in LATENT_TENSORS if all(name in sizes for sizes in of_bucket.values())), None)
    if latents is None:
        expected = ", ".join(LATENT_TENSORS)
        raise CacheError(f"{cache.storage.root}: `latents` has {of_bucket}, expected one of {expected} in every bucket")
    sizes_of = {bucket: tuple(int(size or 0) for size in sizes[latents]) for bucket, sizes in of_bucket.items()}
    channels = {sizes[0] // (2 if latents == "vae_moments" else 1) for sizes in sizes_of.values()}
    assert len(channels) == 1, f"buckets with different channels: {sizes_of}"
    (t5,) = (spec for spec in t5_spec.tensor_specs(buckets[0]) if spec.name == "t5_embeds")
    rows, text_width = t5.sizes
    num_rows = rows if rows is not None else t5_spec.identity["max_length"]
    llm_sizes = {}
    if llm:
        llm_sizes = {spec.name: spec.sizes for spec in cache.spec("llm").tensor_specs(buckets[0])}
    instructions = llm_sizes.get("instruction_hidden_0", (None,))
    return FeatureLayout(
        latents=latents,
        latent_channels=channels.pop(),
        latent_sizes={bucket: (sizes[1], sizes[2], sizes[3]) for bucket, sizes in sizes_of.items()},
        t5_rows=int(num_rows),
        text_width=int(text_width or 0),
        llm=llm,
        llm_width=llm_sizes.get("query_hidden", (None, None))[1],
        num_instructions=instructions[0],
        num_variants=max(1, sum(name.startswith("answer_hidden_") for name in llm_sizes)),
        text_align=text_align,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Clips of one bucket, or packs of clips of several, in the order of the global batch."""

    step: int
    epoch: int
    bucket: str
    clips: tuple[Clip, ...]
    positions: tuple[int, ...]
    """Of the clips in the global batch: every draw of a step is keyed by them."""
    step_clips: int
    """Clips of the step over all ranks."""
    packs: tuple[range, ...] = ()
    """Rows of this batch that go through the transformer in one sequence; () for clips of one bucket."""
    attempts: tuple[int, ...] = ()
    """How many stand-ins were tried for each clip before one could be read; () for zeros."""
    latents: Tensor | tuple[Tensor, ...]
    """(B, 2C, T, h, w) moments, or (B, C, T, h, w) where the cache holds means or samples; as stored, unscaled. Of
    packs, one tensor a clip: (2C, T, h, w) or (C, T, h, w)."""
    holds_moments: bool
    text: TextFeatures

    @property
    def device(self) -> torch.device:
        return self.text.t5_embeds.device

    def part(self, start: int, stop: int) -> "TrainingBatch":
        """Some of its clips: a micro-batch, or a pack."""
        rows = slice(start, stop)
        llm = self.text.llm
        return replace(
            self,
            clips=self.clips[rows],
            packs=(range(stop - start),) if self.packs else (),
            positions=self.positions[rows],
            attempts=self.attempts[rows],
            latents=self.latents[rows],
            text=TextFeatures(
                self.text.t5_embeds[rows], None if llm is None else LlmFeatures(*(tensor[rows] for tensor in llm))
            ),
        )

    def of_one_size(self) -> "list[TrainingBatch]":
        """The batch, or where its clips are of several sizes, each clip as a batch of one."""
        if isinstance(self.latents, Tensor):
            return [self]
        return [replace(self.part(i, i + 1), latents=clip[None], packs=()) for i, clip in enumerate(self.latents)]

    def micro_batches(self, size: int | None) -> "Iterator[TrainingBatch]":
        """What goes through the model at once: `size` clips, or a pack."""
        for pack in self.packs:
            yield self.part(pack.start, pack.stop)
        if self.packs:
            return
        size = size or len(self.clips)
        for start in range(0, len(self.clips), size):
            yield self.part(start, start + size)

    def tensors(self) -> list[Tensor]:
        """All of them, in no order that means anything."""
        latents = [self.latents] if isinstance(self.latents, Tensor) else self.latents
        return [*latents, self.text.t5_embeds, *(self.text.llm or ())]

    def to(self, device: torch.device) -> "TrainingBatch":
        llm = self.text.llm
        moved = None if llm is None else LlmFeatures(*(tensor.to(device, non_blocking=True) for tensor in llm))
        latents: Tensor | tuple[Tensor, ...]
        if isinstance(self.latents, Tensor):
            latents = self.latents.to(device, non_blocking=True)
        else:
            latents = tuple(clip.to(device, non_blocking=True) for clip in self.latents)
        return replace(
            self,
            latents=latents,
            text=TextFeatures(self.text.t5_embeds.to(device, non_blocking=True), moved),
        )


def to_torch(tensors: Sequence[FeatureTensor]) -> Tensor:
    """Stack tensors of one shape: (B, …), a copy; bfloat16 bit for bit."""
    return to_tensor(FeatureTensor(np.stack([tensor.array for tensor in tensors]), tensors[0].dtype))


def pad_to_torch(tensors: Sequence[FeatureTensor], num_rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Stack tensors (R, D) whose R differ, padded with zeros.

    Args:
        num_rows: to pad to; None: the longest, and at least 1.
    Returns: (B, rows, D), and (B, rows) bool, True for rows that were there.
    """
    lengths = [len(tensor.array) for tensor in tensors]
    rows = max(*lengths, 1) if num_rows is None else num_rows
    first = tensors[0].array
    padded = np.zeros((len(tensors), rows, *first.shape[1:]), first.dtype)
    for i, tensor in enumerate(tensors):
        padded[i, : lengths[i]] = tensor.array
    mask = torch.arange(rows) < torch.tensor(lengths)[:, None]
    return to_tensor(FeatureTensor(padded, tensors[0].dtype)), mask


def collate_text(
    t5: Sequence[Mapping[str, FeatureTensor]],
    llm: Sequence[Mapping[str, FeatureTensor]] | None,
    *,
    t5_rows: int,
    text_align: TextAlign,
    variant: int = 0,
) -> TextFeatures:
    """The text of some clips as the fuser takes it.

    Args:
        t5, llm: the tensors of each clip; llm is None for a fuser that does not read it.
        t5_rows, text_align: as FeatureLayout has them.
        variant: whose answers are taken.
    """
    t5_embeds, _ = pad_to_torch([tensors["t5_embeds"] for tensors in t5], t5_rows)  # (B, L, D)
    if llm is None:
        return TextFeatures(t5_embeds, None)
    query_hidden, query_mask = pad_to_torch([tensors["query_hidden"] for tensors in llm])  # (B, M, H), (B, M)
    answer_hidden, answer_mask = pad_to_torch([tensors[f"answer_hidden_{variant}"] for tensors in llm])
    instruction_hidden = to_torch([tensors[f"instruction_hidden_{variant}"] for tensors in llm])  # (B, K, H)
    features = LlmFeatures(query_hidden, query_mask, answer_hidden, answer_mask, instruction_hidden)
    if text_align == "char_offset":
        query_offsets, _ = pad_to_torch([tensors["query_offsets"] for tensors in llm])  # (B, M, 2)
        t5_offsets, _ = pad_to_torch([tensors["t5_offsets"] for tensors in t5], t5_rows)  # (B, L, 2)
        features = align_by_characters(features, query_offsets, t5_offsets)
    return TextFeatures(t5_embeds, features)


def batch_requests(layout: FeatureLayout, *, packed: bool = False) -> list[TensorRequest]:
    """The tensors of the cache that make a TrainingBatch; `packed`: of clips of several buckets."""
    requests = [
        TensorRequest(feature="latents", name=layout.latents, apart=packed),
        TensorRequest(feature="t5", name="t5_embeds", num_rows=layout.t5_rows),
    ]
    if layout.llm:
        requests.append(TensorRequest(feature="llm", name="query_hidden"))
        for name in ("answer_hidden", "instruction_hidden"):
            variants = tuple(f"{name}_{variant}" for variant in range(layout.num_variants))
            requests.append(TensorRequest(feature="llm", name=name, variants=variants))
    if layout.llm and layout.text_align == "char_offset":
        requests.append(TensorRequest(feature="t5", name="t5_offsets", num_rows=layout.t5_rows))
        requests.append(TensorRequest(feature="llm", name="query_offsets"))
    return requests


def text_of(host: HostBatch, layout: FeatureLayout) -> TextFeatures:
    """The text of a batch as the fuser takes it; views of the batch but for the masks and what is laid out anew."""
    if not layout.llm:
        return TextFeatures(host.tensors["t5_embeds"], None)
    llm = LlmFeatures(
        host.tensors["query_hidden"],  # (B, M, H)
        host.mask("query_hidden"),  # (B, M)
        host.tensors["answer_hidden"],  # (B, A, H)
        host.mask("answer_hidden"),  # (B, A)
        host.tensors["instruction_hidden"],  # (B, K, H)
    )
    if layout.text_align == "char_offset":
        llm = align_by_characters(llm, host.tensors["query_offsets"], host.tensors["t5_offsets"])
    return TextFeatures(host.tensors["t5_embeds"], llm)


def read_batch(
    cache: Cache, layout: FeatureLayout, numbers: Sequence[int], *, verify: bool
) -> tuple[tuple[Clip, ...], Tensor, TextFeatures]:
    """Read and collate some clips of one bucket, now. Raises CacheError, MachineError as `Cache.read`."""
    with BatchReader(cache, batch_requests(layout), batch_size=len(numbers), num_threads=1) as reader:
        pending = reader.start(numbers, verify=verify)
        faults = reader.wait(pending)
        if faults:
            raise faults[min(faults)]
        host = pending.tensors()
    return tuple(cache.clip(number) for number in numbers), host.tensors[layout.latents], text_of(host, layout)


def read_empty_text(cache: Cache, layout: FeatureLayout) -> TextFeatures:
    """The cached features of the empty prompt, with B = 1. Raises CacheError."""
    llm = [cache.read_empty("llm")] if layout.llm else None
    return collate_text([cache.read_empty("t5")], llm, t5_rows=layout.t5_rows, text_align=layout.text_align)


class BatchLoader:
    """Reads one rank's batches of consecutive steps ahead of the training, and brings them to its device.

    Whatever goes wrong in a thread is raised where its batch is asked for.
    """

    def __init__(
        self,
        cache: Cache,
        order: ClipOrder,
        layout: FeatureLayout,
        *,
        rank: int = 0,
        world_size: int = 1,
        options: ReadOptions | None = None,
        variants: VariantChoice | None = None,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            variants: which of the cached answers are read; None: the first.
            device: where batches are wanted; None: the CPU.
        """
        self._cache = cache
        self._order = order
        self._layout = layout
        self._variants = variants or VariantChoice()
        self._rank = rank
        self._world_size = world_size
        self._device = device if device is not None and device.type == "cuda" else None
        options = options or ReadOptions()
        # what is copied to a device is let go of there, when the copy is done
        self._options = options if self._device is None else replace(options, pinned=True, borrow=False)

    def batches(self, first_step: int, stop_step: int) -> Iterator[TrainingBatch]:
        """The batches of steps first_step … stop_step-1."""
        with StepReader(
            self._cache, self._order, batch_requests(self._layout, packed=self._order.is_packed), self._options,
            rank=self._rank, world_size=self._world_size, variants=self._variants,
        ) as reader:  # fmt: skip
            read = (self._training_batch(batch) for batch in reader.steps(first_step, stop_step))
            if self._device is None:
                yield from read
            else:
                yield from copied_ahead(read, self._device, is_next_ready=lambda: reader.is_next_read)

    def _training_batch(self, batch: StepBatch) -> TrainingBatch:
        first, stop = batch.parts[0].start, batch.parts[-1].stop
        is_packed, name = batch.bucket == PACKED, self._layout.latents
        return TrainingBatch(
            step=batch.step,
            epoch=batch.epoch,
            bucket=batch.bucket,
            clips=tuple(self._cache.clip(number) for number in batch.numbers),
            positions=tuple(range(first, stop)),
            step_clips=batch.num_clips,
            packs=tuple(range(p.start - first, p.stop - first) for p in batch.parts) if is_packed else (),
            attempts=batch.attempts,
            latents=batch.host.apart[name] if is_packed else batch.host.tensors[name],
            holds_moments=self._layout.latents == "vae_moments",
            text=text_of(batch.host, self._layout),
        )


def clips_of_step(cache: Cache, order: ClipOrder, step: int, attempts: Sequence[int] = ()) -> tuple[Clip, ...]:
    """The clips of a step over all ranks, in the order of their positions.

    Args:
        attempts: of each position, how many stand-ins were tried; () where all clips could be read.
    """
    tried = attempts or (0,) * order.num_clips(step)
    return tuple(clip_at(cache, order, step, position, attempt) for position, attempt in enumerate(tried))
