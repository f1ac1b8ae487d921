"""Caches to be damaged, of every feature and of two buckets, and the damage."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimir_precompute.clips.clip_list import read_clip_list
from mimir_precompute.config import Geometry
from mimir_precompute.decoding.clip_pixels import ClipPixels
from mimir_precompute.inspection.verify import Problem, VerifyReport, verify_feature
from mimir_precompute.pipeline import EncodeJob, encode_cache
from mimir_precompute.planning.plan import PlanRequest, update_plan
from mimir_precompute.provenance import RunLog
from mimir_precompute.workers.progress import Progress
from mimir_shared.feature_folder import FeatureFolder, FeatureSpec, find_features
from mimir_shared.manifest import CacheFormat
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import FakeEncoders
from tests.faults.workers import make_clips

SHARD_SIZE, NUM_CLIPS = 3, 6


class _DrawnPixels:
    """A decoder that needs no video: random pixels that follow from the name, every third clip a single frame."""

    def decode(
        self, source: bytes | Path, *, geometry: Geometry, start_s: float | None = None, end_s: float | None = None
    ) -> ClipPixels:
        assert isinstance(source, Path)
        number = int(source.stem)
        bucket = sorted(geometry.buckets, key=lambda one: one.frames)[0 if number % 3 == 0 else -1]
        shape = (bucket.frames, bucket.height, bucket.width, 3)
        pixels = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
        return ClipPixels(pixels=pixels, bucket=bucket, source_xxh3=number)

    def close(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A committed shard of the cache, and what is needed to check it alone."""

    plan: Plan
    folder: FeatureFolder
    spec: FeatureSpec
    number: int
    files: tuple[Path, ...]

    def problems(self) -> list[Problem]:
        """What `verify` finds in this shard, looking as a new process would."""
        storage = LocalStorage(Path(self.folder.storage.root))
        folder = FeatureFolder(storage, self.folder.feature, self.folder.fingerprint)
        report = VerifyReport()
        verify_feature(self.plan, folder, find_features(storage), report, {self.number})
        return report.problems

    def kinds(self) -> set[str]:
        return {problem.kind for problem in self.problems()}


def make_cache(root: Path, data_format: CacheFormat) -> list[Shard]:
    """Encode six clips into two shards of each feature with fake models."""
    clips = make_clips(root / "clips", NUM_CLIPS)
    storage = LocalStorage(root / "cache")
    storage.check_writable()
    update_plan(storage, None, read_clip_list(str(clips)), PlanRequest(preset="tiny", shard_size=SHARD_SIZE))
    plan = read_plan(storage)
    job = EncodeJob(
        storage=storage,
        plan=plan,
        encoders=FakeEncoders(),
        shards=tuple(range(plan.num_shards)),
        data_format=data_format,
        decoder=_DrawnPixels(),
    )
    encode_cache(job, Progress(quiet=True), RunLog(storage, "cpu"))
    shards = []
    for folder in find_features(storage):
        for number in range(plan.num_shards):
            names = [file.path for file in folder.read_record(number, 0).metadata.files]
            files = tuple(storage.root / folder.directory / name for name in names)
            shards.append(Shard(plan=plan, folder=folder, spec=folder.read_spec(), number=number, files=files))
    return shards


def choose_byte(shards: list[Shard], choose: random.Random) -> tuple[Shard, Path, int]:
    """A byte of any data file, each byte of the cache as likely as any other."""
    places = [(shard, path, path.stat().st_size) for shard in shards for path in shard.files]
    shard, path, size = choose.choices(places, [size for _, _, size in places])[0]
    return shard, path, choose.randrange(size)


@contextmanager
def replaced(path: Path, data: bytes | None) -> Iterator[None]:
    """A file holds other bytes, or is gone, inside the block."""
    before = path.read_bytes()
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)
