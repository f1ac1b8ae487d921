"""manifests/: the schemas are those of the code, and the example is a cache that verifies."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from mimir_precompute.inspection.verify import verify_cache
from mimir_shared.feature_folder import find_features
from mimir_shared.storage.folder import LocalStorage
from tests.conftest import REPOSITORY

TINY = REPOSITORY / "manifests" / "tiny"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["plan", "commit_record", "spec", "snapshot"])
def test_the_published_schemas_are_those_of_the_code(name: str) -> None:
    published = (REPOSITORY / "manifests" / "schemas" / f"{name}.schema.json").read_text()
    assert published == _script("make_manifests").schema_text(name), "run: python scripts/make_manifests.py schemas"


def test_the_example_verifies_and_has_two_shards_and_a_quarantined_clip() -> None:
    report = verify_cache(LocalStorage(TINY))
    assert report.problems == []
    assert report.unfinished == {}
    folders = find_features(LocalStorage(TINY))
    assert [folder.feature for folder in folders] == ["latents", "t5", "answers", "llm"]
    metadata = [folders[0].read_record_metadata(shard, 0)[0] for shard in range(2)]
    assert sum(one.quarantined for one in metadata) == 1


def test_the_example_is_small_and_names_no_machine() -> None:
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 600_000
    assert not any(path.name == "logs" for path in TINY.iterdir())
    snapshot = json.loads(next(TINY.glob("snapshots/*/snapshot.json")).read_text())
    assert snapshot["clips"] == 3


def test_the_example_can_be_read_from_a_read_only_copy(tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(TINY, tmp_path / "copy"))
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert verify_cache(LocalStorage(copy)).ok
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o755)
