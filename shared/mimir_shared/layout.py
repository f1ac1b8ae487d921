"""Names of the files of a cache, relative to its folder (DESIGN.md section 4)."""

import re

from mimir_shared.features import FeatureName

FINGERPRINT_DIGITS = 12

_RECORD_NAME = re.compile(r"(\d{6,})\.(\d+)\.parquet")


def plan_name(index: int) -> str:
    return f"plan/{index:04d}.parquet"


def feature_directory(feature: FeatureName, fingerprint: str) -> str:
    return f"{feature}/{fingerprint[:FINGERPRINT_DIGITS]}"


def spec_name(feature: FeatureName, fingerprint: str) -> str:
    return f"{feature_directory(feature, fingerprint)}/spec.json"


def empty_name(feature: FeatureName, fingerprint: str) -> str:
    """The features of the empty prompt; of `answers`, the text that `llm` needs for its own."""
    ending = "json" if feature == "answers" else "safetensors"
    return f"{feature_directory(feature, fingerprint)}/empty.{ending}"


def data_name(shard: int, sha256: str, ending: str) -> str:
    """Relative to the feature's folder, as commit records have it."""
    return f"data/{shard:06d}-{sha256[:8]}.{ending}"


def record_name(shard: int, generation: int) -> str:
    """Relative to the feature's folder."""
    return f"manifests/{shard:06d}.{generation}.parquet"


def parse_record_name(name: str) -> tuple[int, int] | None:
    """(shard, generation) of a file name in manifests/; None for any other file."""
    match = _RECORD_NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def sample_stem(shard: int, row: int) -> str:
    """Name of a sample in a shard, without its endings."""
    return f"{shard:06d}{row:05d}"


def lease_directory(feature: FeatureName, fingerprint: str) -> str:
    return f"leases/{feature_directory(feature, fingerprint)}"


def lease_name(feature: FeatureName, fingerprint: str, shard: int) -> str:
    """Of the file by which a worker tells the others that it is making a shard."""
    return f"{lease_directory(feature, fingerprint)}/{shard:06d}"


def second_lease_name(feature: FeatureName, fingerprint: str, shard: int) -> str:
    """Of the file by which a worker says that it makes a shard too, which another one has had for long."""
    return f"{lease_name(feature, fingerprint, shard)}.again"


def snapshot_directory(digest: str) -> str:
    return f"snapshots/{digest[:FINGERPRINT_DIGITS]}"
