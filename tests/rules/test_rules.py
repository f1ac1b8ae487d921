"""Rules of the house that a machine can check."""

import ast
import importlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FOLDERS = ("precompute", "train", "shared", "scripts", "benchmarks")


def _sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((REPOSITORY / folder).rglob("*.py"))


def test_import_rules_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_no_file_is_longer_than_400_lines_and_no_function_than_60() -> None:
    # the two main paths, and functions that only list the options of a command, may be longer
    long_by_right = {("mimir_train/loop.py", "train"), ("mimir_train/cli/app.py", "run")}
    long_by_right |= {("mimir_train/cli/sample.py", "sample"), ("mimir_precompute/cli/app.py", "encode")}
    long_by_right |= {("mimir_precompute/cli/remake.py", "verify"), ("mimir_precompute/cli/remake.py", "retry")}
    found = []
    for path in _sources():
        text = path.read_text()
        if text.count("\n") > 400:
            found.append(f"{path}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            where = path.relative_to(REPOSITORY).as_posix().partition("/")[2]
            if isinstance(node, ast.FunctionDef) and (where, node.name) not in long_by_right:
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 60:
                    found.append(f"{path}:{node.lineno} {node.name}: {length} lines")
    assert found == []


def test_what_needs_other_machines_imports_names_that_are_there() -> None:
    """Tests that are skipped here stop before their imports: a name that was moved would show on a GPU alone."""
    missing = []
    paths = [path for folder in ("tests/gpu", "tests/with_vllm") for path in (REPOSITORY / folder).glob("test_*.py")]
    for path in sorted(paths):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(("mimir_", "tests.", "benchmarks.")):
                module = importlib.import_module(str(node.module))
                missing += [f"{path}: {name.name}" for name in node.names if not hasattr(module, name.name)]
    assert missing == []
    assert len(paths) > 5


def test_no_folder_holds_more_modules_than_a_newcomer_reads_the_names_of() -> None:
    folders = Counter(path.parent for path in _sources())
    assert {str(folder): count for folder, count in folders.items() if count > 32} == {}


def test_no_file_is_named_for_nothing() -> None:
    names = {path.stem for path in _sources()}
    assert names.isdisjoint({"utils", "util", "common", "helpers", "misc", "core"})


@pytest.mark.parametrize(
    "module",
    [
        "mimir_shared.snapshot",
        "mimir_precompute.pipeline",
        "mimir_precompute.inspection.verify",
        "mimir_precompute.report.command",
    ],
)
def test_modules_that_need_no_model_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
