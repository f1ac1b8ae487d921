"""`mimir-train decode`: the latents of validation become videos."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimir_shared.errors import CacheError, InputError
from mimir_train.sampling.contact_sheet import SheetRow, pick_frames, write_contact_sheet
from mimir_train.sampling.video_check import plays
from mimir_train.validation.latents import (
    ValidationLatents,
    read_validation_latents,
    validation_folder,
    write_validation_latents,
)
from mimir_train.validation.page import ValidationPage, spread_steps
from tests.pages import Outline, visit_page
from tests.train.hand_made_checkpoint import FPS, SCALING_FACTOR, command, flip_last_bit, identities

CAT, DOG = "a red circle moves to the left", "two blue squares"


@pytest.fixture(scope="module")
def models(toy_world: Path) -> Path:
    return toy_world / "models"


@pytest.fixture(scope="module")
def recorded(models: Path) -> dict[str, dict[str, Any]]:
    return identities(models)


@pytest.fixture
def validated_run(recorded: dict[str, Any], tmp_path: Path) -> Path:
    """A run whose validation at two steps wrote latents of two sizes."""
    for step in (10, 20):
        generator = torch.Generator().manual_seed(step)
        latents = ValidationLatents(
            step=step,
            prompts=(CAT, DOG),
            tensors=(torch.randn(8, 3, 8, 12, generator=generator), torch.randn(8, 1, 8, 12, generator=generator)),
            fps=FPS,
            latent_scaling_factor=SCALING_FACTOR,
            latents_identity=recorded["latents"],
        )
        write_validation_latents(validation_folder(tmp_path / "run", step), latents)
    return tmp_path / "run"


def test_latents_of_validation_become_videos_and_a_sheet_for_each_step(validated_run: Path, models: Path) -> None:
    command("decode", validated_run, "--models", models, "--device", "cpu")
    for step in (10, 20):
        folder = validated_run / "validation" / f"step-{step:08d}"
        assert plays(folder / "0.mp4", 9, 32, 48)
        assert plays(folder / "1.mp4", 1, 32, 48)
        assert (folder / "contact_sheet.png").exists()


def test_a_page_shows_each_prompt_over_the_steps(validated_run: Path, models: Path, tmp_path: Path) -> None:
    (validated_run / "metrics.jsonl").write_text('{"step": 9, "validation/loss": 0.25}\n')
    command("decode", validated_run, "--models", models)
    path = validated_run / "validation" / "index.html"
    page = Outline(path.read_text())
    assert page.text.index(CAT) < page.text.index(DOG)
    assert page.attributes("img", "alt") == ["After 10 steps", "After 20 steps"] * 2
    assert "loss 0.2500" in page.text
    visit = visit_page(path, tmp_path)
    assert (visit.console, visit.requests) == ([], [])


def test_a_page_says_of_samples_by_an_average_what_they_are_by_and_that_averages_loss(
    validated_run: Path, models: Path
) -> None:
    folder = validation_folder(validated_run, 10)
    write_validation_latents(folder, replace(read_validation_latents(folder), weights="power:0.1"))
    lines = [
        '{"step": 9, "validation/loss": 0.25, "validation/ema_loss": 0.125}',
        '{"step": 19, "validation/loss": 0.5}',
    ]
    (validated_run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    command("decode", validated_run, "--models", models)
    page = Outline((validated_run / "validation" / "index.html").read_text())
    assert "running average of the weights (power:0.1)" in page.text
    assert "loss 0.1250" in page.text
    assert "loss 0.2500" not in page.text
    assert "loss 0.5000" in page.text


def test_one_step_alone_has_no_page(validated_run: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("decode", validated_run / "validation" / "step-00000010", "--models", models)
    assert "over the steps" not in capsys.readouterr().out
    assert not list(validated_run.rglob("index.html"))


def test_a_page_shows_few_of_many_steps_and_prompts_as_they_are(tmp_path: Path) -> None:
    assert spread_steps(range(100, 5100, 100)) >= {100, 5000}
    assert len(spread_steps(range(100, 5100, 100))) == 12
    assert spread_steps([7]) == {7}
    page = ValidationPage(tmp_path / "run", range(1, 31))
    frames = np.full((5, 480, 720, 3), 200, np.uint8)
    for step in range(1, 31):
        page.add(step, 0, "<script>alert(1)</script> {{ 7*7 }}", frames, FPS)
        page.add(step, 1, "", frames[:1, :32, :48], FPS)
    page.write(tmp_path / "index.html")
    shown = Outline((tmp_path / "index.html").read_text())
    assert "<script>alert(1)</script> {{ 7*7 }}" in shown.text
    assert "Of 30 validations 12 are shown" in shown.text
    assert shown.attributes("img", "width") == ["256"] * 12 + ["48"] * 12


def test_decoding_again_makes_only_what_is_missing_or_older_than_its_latents(
    validated_run: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("decode", validated_run, "--models", models)
    (validated_run / "validation" / "step-00000010" / "0.mp4").unlink()
    (validated_run / "validation" / "step-00000020" / "latents.safetensors").touch()
    capsys.readouterr()
    command("decode", validated_run, "--models", models)
    assert capsys.readouterr().out == (
        f"{validated_run}/validation/step-00000010 to step-00000020: 3 videos made, 1 kept, as 0.mp4 and on\n"
        f"{validated_run}/validation/index.html: each prompt over the steps\n"
    )


def test_another_vae_is_refused_for_decoding(validated_run: Path, models: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(models / "vae", tmp_path / "vae")
    flip_last_bit(copy / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CacheError, match=r"latents model.sha256.* → ") as caught:
        command("decode", validated_run, "--vae", copy)
    assert caught.value.exit_code == 4
    assert not list(validated_run.rglob("*.mp4"))


def test_a_run_without_validation_and_damaged_latents_are_told_apart(
    validated_run: Path, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"no validation/step-\*/prompts.json there"):
        command("decode", tmp_path, "--models", models)
    latents = validated_run / "validation" / "step-00000020" / "latents.safetensors"
    latents.write_bytes(latents.read_bytes()[:-10])
    with pytest.raises(CacheError, match="step-00000020: the latents of a validation cannot be read"):
        command("decode", validated_run, "--models", models)


def test_a_contact_sheet_shows_first_and_last_frame_and_any_caption(tmp_path: Path) -> None:
    assert pick_frames(49) == [0, 10, 19, 29, 38, 48]
    assert pick_frames(1) == [0]
    frames = np.zeros((9, 32, 48, 3), np.uint8)
    frames[0], frames[8] = (255, 0, 0), (0, 0, 255)
    rows = [
        SheetRow(caption=caption, note="sample 0", frames=frames, fps=FPS)
        for caption in ("short", "", "long " * 300, "x" * 1000, "猫 in the rain\nand more")
    ]
    write_contact_sheet(tmp_path / "page.png", rows)
    with Image.open(tmp_path / "page.png") as page:
        colours = {colour for _, colour in page.convert("RGB").getcolors(1 << 20) or []}
    assert {(255, 0, 0), (0, 0, 255), (20, 20, 20)} <= colours
