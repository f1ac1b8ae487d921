"""When the last shard of a cache is committed, its snapshot is written."""

from collections.abc import Mapping

from mimir_precompute.quarantine import is_within_share, unusable_clips
from mimir_shared.feature_folder import FeatureFolder, find_features
from mimir_shared.features import FEATURES, FeatureName
from mimir_shared.plan_file import Plan
from mimir_shared.snapshot import Snapshot, incomplete_shards, list_snapshots, write_snapshot
from mimir_shared.storage.protocol import Storage


def write_snapshot_if_complete(
    storage: Storage,
    plan: Plan,
    folders: Mapping[FeatureName, FeatureFolder],
    *,
    max_quarantined: float = 1.0,
) -> Snapshot | None:
    """Snapshot some features and those that the cache has besides; None while shards of the former are missing.

    Where the cache has a feature besides more than once, the newest snapshot says which.

    Args:
        max_quarantined: share of unusable clips above which none is written; 1 where it was judged before.
    """
    if incomplete_shards(plan, folders.values()):
        return None
    chosen = dict(folders)
    present = find_features(storage)
    newest = list_snapshots(storage)[-1:]
    for feature in FEATURES:
        others = [folder for folder in present if folder.feature == feature]
        pinned = {one.features[feature].fingerprint for one in newest if feature in one.features}
        if len(others) > 1:
            others = [folder for folder in others if any(name.startswith(folder.fingerprint) for name in pinned)]
        if feature not in folders and others and not incomplete_shards(plan, others):
            chosen[feature] = others[0]
    unusable = unusable_clips(plan, chosen.values()) if max_quarantined < 1 else {}
    if not chosen or not is_within_share(plan, range(plan.num_shards), unusable, max_quarantined):
        return None
    return write_snapshot(storage, plan, chosen)
