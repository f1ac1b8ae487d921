"""The README and the guides of both stages are true: commands and snippets run, and files and options are there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from mimir_precompute.cli.app import app as precompute_app
from mimir_train.cli.app import app as train_app
from tests.conftest import REPOSITORY
from tests.programs import BIN, environment

README = (REPOSITORY / "README.md").read_text()
GUIDES = tuple(map(Path, ("README.md", "precompute/README.md", "train/README.md")))


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


def run_snippets(folder: Path, blocks: list[str]) -> str:
    """What some blocks of Python print, one after the other in one process."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_snippets_that_read_a_cache_without_us_run(folder: Path) -> None:
    printed = run_snippets(folder, [block for block in _blocks("python") if "mimir_" not in block])
    assert "torch.Size([64, 64])" in printed
    assert "torch.Size([16, 3, 16, 24]) torch.Size([4, 64])" in printed
    assert "torch.Size([16, 3, 16, 24]) torch.Size([64, 64]) {'answer'" in printed


def test_the_snippets_that_read_a_cache_with_us_run(folder: Path) -> None:
    blocks = [block for block in _blocks("python") if "mimir_" in block]
    assert len(blocks) == 2
    with_torch, with_numpy = (run_snippets(folder, [block]) for block in blocks)
    assert with_torch.count("torch.bfloat16") + with_torch.count("torch.float32") == 2  # ten clips, batches of four
    assert with_torch.splitlines()[-1] == "torch.Size([64, 64]) 10"
    assert len(with_numpy.splitlines()) == 10


def test_every_file_that_the_readme_names_is_there() -> None:
    """A name stands for a file of the repository, of the folder that the table is about, or of the last file's."""
    table = README[README.index("## I want to") :]
    about = last = REPOSITORY
    missing, num_names = [], 0
    for line in table.splitlines():
        if heading := re.search(r"`([\w./]+/)`.*:$", line):
            about = REPOSITORY / heading[1]
        for name in re.findall(r"`([\w./]+(?:\.py|\.yaml|/))`", line):
            places = [place / name for place in (REPOSITORY, about, last.parent)]
            found = next((place for place in places if place.exists()), None)
            missing += [] if found else [name]
            last = found or last
            num_names += 1
    assert missing == []
    assert num_names > 80


@pytest.mark.parametrize("page", GUIDES, ids=str)
def test_every_option_that_a_guide_names_is_there(page: Path) -> None:
    known = {"--help", "--nproc-per-node", "--shutdown-timeout"}  # torchrun has the latter two
    for app in (precompute_app, train_app):
        commands = typer.main.get_command(app)
        assert isinstance(commands, TyperGroup)
        for command in commands.commands.values():
            known.update(name for option in command.params for name in (*option.opts, *option.secondary_opts))
    text = re.sub(r"```python\n.*?```", "", (REPOSITORY / page).read_text(), flags=re.DOTALL)
    assert sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - known) == []


@pytest.mark.parametrize("page", GUIDES, ids=str)
def test_every_page_that_a_guide_leads_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+?)(#[\w-]+)?\)", (REPOSITORY / page).read_text())
    missing = [name for name, _ in links if not (REPOSITORY / page).parent.joinpath(name).exists()]
    headings = {
        f"#{re.sub(r'[^a-z0-9 -]', '', line.lstrip('# ').lower()).replace(' ', '-')}"
        for guide in GUIDES
        for line in (REPOSITORY / guide).read_text().splitlines()
        if line.startswith("#")
    }
    assert missing == []
    assert {anchor for _, anchor in links if anchor} <= headings
