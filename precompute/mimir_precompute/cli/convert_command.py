"""From the options of `convert`, checked, to one call of the work."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from mimir_precompute.conversion.convert import ConvertOutcome, convert_cache
from mimir_precompute.conversion.merge import MergeOutcome, merge_features
from mimir_precompute.option_values import parse_choice, parse_feature_choices
from mimir_precompute.termination import working_on
from mimir_precompute.workers.progress import Progress
from mimir_shared.errors import InputError
from mimir_shared.manifest import CacheFormat
from mimir_shared.snapshot_reader import open_snapshot
from mimir_shared.storage.open import open_storage
from mimir_shared.storage.protocol import Storage


def run_convert(cache: str, out: str, data_format: str, progress: Progress) -> ConvertOutcome:
    """Write a cache once more in another format."""
    chosen: CacheFormat = parse_choice("--format", data_format, get_args(CacheFormat))
    source = open_storage(cache)
    target = _open_target(source, out)
    with working_on(target):
        return convert_cache(source, target, chosen, progress)


def run_merge(cache: str, out: str, wanted: Sequence[str], progress: Progress) -> MergeOutcome:
    """Write the newest snapshot of a cache as tars with all features of a clip in one sample."""
    reader = open_snapshot(cache, parse_feature_choices(wanted))
    target = _open_target(reader.storage, out)
    with working_on(target):
        return merge_features(reader, target, progress)


def _open_target(source: Storage, out: str) -> Storage:
    target = open_storage(out)
    roots = [root.resolve() if isinstance(root, Path) else root for root in (source.root, target.root)]
    if roots[0] == roots[1]:
        raise InputError(f"--out {out}: is the cache itself; a shard is never changed in place: give another folder")
    target.check_writable()
    return target
