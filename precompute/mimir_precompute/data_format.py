"""Which format the shards of a feature are written in: a property of the feature in its cache, not of its identity."""

from mimir_shared.errors import CacheError
from mimir_shared.feature_folder import FeatureFolder, FeatureSpec, find_features
from mimir_shared.features import FeatureName
from mimir_shared.layout import spec_name
from mimir_shared.manifest import CacheFormat
from mimir_shared.storage.protocol import Storage

DEFAULT_FORMAT: CacheFormat = "webdataset"


def choose_format(storage: Storage, feature: FeatureName, fingerprint: str, asked: CacheFormat | None) -> CacheFormat:
    """The format to write a feature in: its own where it is begun, else what is asked for, else the cache's.

    Raises: CacheError where the feature is begun in another format than is asked for.
    """
    if storage.exists(spec_name(feature, fingerprint)):
        spec = FeatureFolder(storage, feature, fingerprint).read_spec()
        refuse_other_format(storage, spec, asked)
        return spec.format
    if asked is not None:
        return asked
    present = {folder.read_spec().format for folder in find_features(storage)}
    return present.pop() if len(present) == 1 else DEFAULT_FORMAT


def refuse_other_format(storage: Storage, spec: FeatureSpec, asked: CacheFormat | None) -> None:
    """Raise CacheError where a feature that is begun has another format than is asked for."""
    if asked is not None and asked != spec.format:
        folder = FeatureFolder(storage, spec.feature, spec.fingerprint)
        raise CacheError(
            f"{storage.root}/{folder.directory}: `{spec.feature}` is written in another format than asked for now: "
            f"{spec.format!r} → {asked!r}. Go on without --format, in {spec.format}; once complete, turn it into the "
            f"other: `mimir-precompute convert {storage.root} --format {asked} --out B`; or encode into a new --cache"
        )
