"""The README is true: its commands run, its snippets run, and the files that it names are there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.programs import BIN, environment

README = (REPOSITORY / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's step-by-step block has been run, with fewer clips and steps."""
    place = tmp_path_factory.mktemp("readme")
    (block,) = [block for block in _blocks("sh") if "mimir-precompute toy" in block]
    assert "--max-train-steps 200" in block
    (convert,) = [block for block in _blocks("sh") if "mimir-precompute convert" in block]
    for line in [*block.splitlines(), *convert.splitlines()]:
        command = shlex.split(line, comments=True)
        if command[1] == "toy":
            command += ["--clips", "10"]
        if command[1] == "run":
            command[command.index("200")] = "4"
        if command[1] == "sample":
            command += ["--num-inference-steps", "2"]
        done = subprocess.run(
            [BIN / command[0], *command[1:]], cwd=place, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return place


def test_the_step_by_step_commands_end_with_a_video(folder: Path) -> None:
    assert (folder / "clip.mp4").stat().st_size > 500
    assert len(list((folder / "samples").rglob("*.mp4"))) == 1


def test_the_snippets_that_read_a_cache_run(folder: Path) -> None:
    code = "\n".join(_blocks("python"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([64, 64])" in done.stdout
    assert "torch.Size([16, 3, 16, 24]) torch.Size([4, 64])" in done.stdout
    assert "torch.Size([16, 3, 16, 24]) torch.Size([64, 64]) {'answer'" in done.stdout
    assert "mimir_shared" not in code
    assert "mimir_precompute" not in code


def test_every_file_that_the_readme_names_is_there() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| ") and "`" in line and "→" not in line]
    missing = []
    for row in rows:
        last = Path(".")
        for name in re.findall(r"`([\w./{},]+(?:\.py|\.md|/))`", row):
            for part in _expand(name):
                path = Path(part) if "/" in part else last.parent / part
                last = path
                if not (REPOSITORY / path).exists():
                    missing.append(part)
    assert missing == []


def _expand(name: str) -> list[str]:
    match = re.search(r"\{([^}]*)\}", name)
    return [name.replace(match[0], choice) for choice in match[1].split(",")] if match else [name]
