"""One shard of one feature while it is made: samples go in by row, bytes and their record come out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash

from mimir_precompute.clips.rejection import UNTRIED_STAGES, ClipRejected
from mimir_precompute.encoders.base import Encoded
from mimir_shared.features import FeatureTensor, TensorSpec
from mimir_shared.formats.shard_format import ShardFormat, WrittenFile
from mimir_shared.manifest import SampleRecord, TensorStatistics
from mimir_shared.plan_file import PlannedClip
from mimir_shared.statistics import StatisticsBuilder


@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """A shard whose bytes are written, under temporary names."""

    files: tuple[WrittenFile, ...]
    """In the order in which they are to be published."""
    samples: tuple[SampleRecord, ...]
    statistics: dict[str, TensorStatistics]

    @property
    def nbytes(self) -> int:
        return sum(file.data_file.bytes for file in self.files)

    @property
    def data_name(self) -> str:
        """The file or folder that all files are or lie in, named by its content; relative to the feature's folder."""
        return "/".join(self.files[0].data_file.path.split("/")[:2])


def caption_hash(caption: str) -> int:
    """xxh3-64 of a caption as UTF-8, as commit records have it."""
    return xxhash.xxh3_64_intdigest(caption.encode())


def answers_hash(sample: SampleRecord) -> int:
    """What an ok sample of `answers` is to `llm`: the `source_xxh3` of what is made from it."""
    assert sample.stored is not None, f"the answers to {sample.key!r} are {sample.status}: they have no text"
    return sample.stored.json_xxh3


def check_tensors(tensors: Mapping[str, FeatureTensor], specs: Sequence[TensorSpec]) -> None:
    """Let no tensor into the cache that departs from its spec, is not finite, or has one value throughout.

    A black or white clip is not constant after a VAE: the zero padding at the edges of its convolutions shows.

    Raises: ClipRejected at stage "encode" that names the tensor.
    """
    if set(tensors) != {spec.name for spec in specs}:
        expected = sorted(spec.name for spec in specs)
        raise ClipRejected("encode", "wrong_shape", f"has tensors {sorted(tensors)}, expected {expected}")
    for spec in specs:
        tensor = tensors[spec.name]
        mismatch = spec.mismatch(tensor.array, tensor.dtype)
        if mismatch is not None:
            raise ClipRejected("encode", "wrong_shape", mismatch)
        if tensor.dtype != "i32":
            values = tensor.to_float32()
            bad = int(np.count_nonzero(~np.isfinite(values)))
            if bad:
                raise ClipRejected(
                    "encode", "nonfinite", f"{spec.name!r} has {bad} NaN or infinite of {values.size} values"
                )
            # of moments the means alone: a log-variance may lie at its lower limit everywhere
            what, judged = ("the means of ", values[: len(values) // 2]) if spec.dims[0] == "2C" else ("", values)
            if judged.size > 1 and bool((judged == judged.flat[0]).all()):
                raise ClipRejected(
                    "encode", "constant", f"{what}{spec.name!r} have the one value {judged.flat[0]:g} throughout"
                )


class ShardWriter:
    """Writes the samples of one shard in row order and keeps count of what became of each clip."""

    def __init__(self, shard_format: ShardFormat, tries_before: Mapping[int, int] | None = None) -> None:
        """For one shard in a format.

        Args:
            tries_before: row → how many times its clip was tried and quarantined, in earlier generations.
        """
        self._tries_before = tries_before or {}
        self._format = shard_format
        self._samples: list[SampleRecord] = []
        self._statistics: dict[str, StatisticsBuilder] = {}

    def add(
        self,
        clip: PlannedClip,
        encoded: Encoded,
        specs: Sequence[TensorSpec],
        *,
        bucket: str | None,
        source_xxh3: int | None,
    ) -> None:
        """Check and append an encoded clip; one that fails the checks is recorded as quarantined."""
        try:
            if encoded.rejection is not None:
                raise encoded.rejection
            check_tensors(encoded.tensors, specs)
        except ClipRejected as rejection:
            self.add_quarantined(clip, rejection, bucket=bucket, source_xxh3=source_xxh3)
            return
        document: dict[str, Any] = {**encoded.document, "key": clip.key, "caption": clip.caption}
        if bucket is not None:
            document["bucket"] = bucket
        if encoded.valid_rows:
            document["valid_rows"] = dict(encoded.valid_rows)
        self._format.add(clip.row, document, encoded.tensors, specs, bucket)
        self._count(encoded.tensors, encoded.valid_rows, specs)
        self._samples.append(
            SampleRecord(
                row=clip.row,
                key=clip.key,
                status="ok",
                bucket=bucket,
                source_xxh3=source_xxh3,
                caption_xxh3=caption_hash(clip.caption),
            )
        )

    def add_quarantined(
        self, clip: PlannedClip, rejection: ClipRejected, *, bucket: str | None = None, source_xxh3: int | None = None
    ) -> None:
        """Record a clip that could not be used; this was one try more, unless there was nothing to try."""
        attempt = None if rejection.stage in UNTRIED_STAGES else self._tries_before.get(clip.row, 0) + 1
        self._samples.append(
            SampleRecord(
                row=clip.row,
                key=clip.key,
                status="quarantined",
                stage=rejection.stage,
                reason=rejection.reason,
                detail=rejection.detail,
                attempt=attempt,
                bucket=bucket,
                source_xxh3=source_xxh3,
                caption_xxh3=caption_hash(clip.caption),
            )
        )

    def add_untried(self, original: SampleRecord) -> None:
        """Take over a quarantined row of an earlier generation as it stands there."""
        assert original.status == "quarantined", f"row {original.row} is {original.status}: it has bytes to be copied"
        self._samples.append(original)

    @property
    def num_quarantined(self) -> int:
        return sum(sample.status == "quarantined" for sample in self._samples)

    def finish(self) -> FinishedShard:
        written = self._format.finish()
        results = {name: builder.result() for name, builder in self._statistics.items()}
        return FinishedShard(
            files=written.files,
            # where a sample lies is known now: some formats move it when the last one is there
            samples=tuple(replace(sample, stored=written.stored.get(sample.row)) for sample in self._samples),
            statistics={name: result for name, result in sorted(results.items()) if result is not None},
        )

    def _count(
        self, tensors: Mapping[str, FeatureTensor], valid_rows: Mapping[str, int], specs: Sequence[TensorSpec]
    ) -> None:
        for spec in specs:
            if spec.dtype != "i32":
                builder = self._statistics.setdefault(spec.name, StatisticsBuilder(spec.channel_dim))
                builder.add(tensors[spec.name], valid_rows.get(spec.name))
