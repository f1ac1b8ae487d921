"""Drift: what a cache holds is never taken for what is asked for now, where one identity field differs."""

from mimir_shared.errors import CacheError
from mimir_shared.feature_folder import FeatureSpec, find_features
from mimir_shared.fingerprint import differences
from mimir_shared.storage.protocol import Storage


def refuse_other_identity(storage: Storage, spec: FeatureSpec) -> None:
    """Raise CacheError, field by field, where the cache holds this feature made in another way."""
    present = [folder for folder in find_features(storage) if folder.feature == spec.feature]
    if not present or any(spec.fingerprint.startswith(folder.fingerprint) for folder in present):
        return
    nearest = min(present, key=lambda folder: len(differences(folder.read_spec().identity, spec.identity)))
    changed = differences(nearest.read_spec().identity, spec.identity)
    shown = "; ".join(f"{name}: {before!r} → {after!r}" for name, before, after in changed[:8])
    more = f"; and {len(changed) - 8} more fields" if len(changed) > 8 else ""
    raise CacheError(
        f"{storage.root}/{nearest.directory}: `{spec.feature}` was made otherwise than asked for now: "
        f"{shown}{more}. "
        f"Go back to the old models and settings, or keep both side by side: --on-mismatch new"
    )
