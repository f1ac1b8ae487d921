"""Writes manifests/schemas from the code, and manifests/tiny from the toy world.

Run it after a change of a format: `python scripts/make_manifests.py [schemas|tiny]`; a test compares the schemas.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
from pydantic import BaseModel

from mimir_shared.feature_folder import FeatureSpec
from mimir_shared.manifest import RECORD_SCHEMA, RecordMetadata
from mimir_shared.plan_file import OWN_COLUMNS, PlanSettings
from mimir_shared.snapshot import Snapshot

MANIFESTS = Path(__file__).resolve().parent.parent / "manifests"

DOCUMENTS: dict[str, tuple[type[BaseModel], pa.Schema | None]] = {
    "plan": (PlanSettings, OWN_COLUMNS),
    "commit_record": (RecordMetadata, RECORD_SCHEMA),
    "spec": (FeatureSpec, None),
    "snapshot": (Snapshot, None),
}
"""Name → what its JSON is, and for Parquet files the columns."""


def schema_text(name: str) -> str:
    """The JSON schema of one document; of a Parquet file, of the footer "mimir", with the columns beside it."""
    model, columns = DOCUMENTS[name]
    schema = model.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    if columns is not None:
        schema["x-parquet-columns"] = [
            {"name": field.name, "type": str(field.type), "nullable": field.nullable} for field in columns
        ]
    return json.dumps(schema, indent=2) + "\n"


def write_schemas() -> None:
    folder = MANIFESTS / "schemas"
    folder.mkdir(parents=True, exist_ok=True)
    for name in DOCUMENTS:
        (folder / f"{name}.schema.json").write_text(schema_text(name))


def write_tiny() -> None:
    """A cache of four toy clips in two shards, one of them quarantined, as the programs write it."""
    program = Path(sys.executable).parent / "mimir-precompute"
    # a plan keeps the folder of its clips: a neutral one, the same on every machine
    world, cache = Path("/tmp/mimir-example"), Path("/tmp/mimir-example/cache")
    shutil.rmtree(world, ignore_errors=True)
    subprocess.run([program, "toy", world, "--clips", "4"], check=True)
    damaged = world / "clips" / "000002.mp4"
    damaged.write_bytes(damaged.read_bytes()[:700])
    arguments = ["--cache", cache, "--preset", "tiny", "--models", world / "models", "--shard-size", "2"]
    command = [program, "encode", world / "clips", *arguments, "--max-quarantined", "0.5"]
    subprocess.run([str(part) for part in command], check=True)
    shutil.rmtree(MANIFESTS / "tiny", ignore_errors=True)
    shutil.copytree(cache, MANIFESTS / "tiny", ignore=shutil.ignore_patterns("logs"))
    shutil.rmtree(world)


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["schemas", "tiny"]
    if "schemas" in wanted:
        write_schemas()
    if "tiny" in wanted:
        write_tiny()
