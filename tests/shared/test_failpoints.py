"""The failpoints in the code are those that are declared, and cost nothing while none is armed."""

import ast
from pathlib import Path

from mimir_shared import failpoints
from mimir_shared.storage.folder import LocalStorage
from tests.conftest import REPOSITORY


def _literal_calls(function: str, argument: int) -> set[str]:
    found = set()
    for folder in ("precompute", "train", "shared"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
                    name = node.args[argument]
                    assert isinstance(name, ast.Constant), f"{path}:{node.lineno}: not a literal"
                    found.add(str(name.value))
    return found


def test_the_points_in_the_code_are_those_that_are_declared() -> None:
    assert _literal_calls("failpoint", 0) == failpoints.DECLARED
    steps = _literal_calls("publishing_failpoint", 1)
    assert {name.split(".")[1] for name in failpoints.PUBLISHING} == steps


def test_every_step_of_publishing_is_passed_in_order_by_its_kind(tmp_path: Path) -> None:
    passed: list[str] = []
    failpoints.arm(passed.append)
    try:
        LocalStorage(tmp_path).create("t5/0123456789ab/manifests/000000.0.parquet", b"record")
    finally:
        failpoints.arm(None)
    assert passed == ["record.written", "record.synced", "record.linked", "record.dir_synced"]
    LocalStorage(tmp_path).create("t5/0123456789ab/spec.json", b"spec")
    assert len(passed) == 4
