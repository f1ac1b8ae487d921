"""The page about a cache of real clips, its gallery decoded by the VAE that encoded them."""

import re
from pathlib import Path

import numpy as np
import pytest

from mimir_precompute.config import ModelSource
from mimir_precompute.inspection.latent_decoder import load_decoder
from mimir_precompute.report.scan import choose_features
from mimir_shared.storage.folder import LocalStorage
from tests.pages import Outline
from tests.programs import run


def test_the_page_shows_real_clips_decoded_and_the_first_frame_of_the_damaged_one(
    real_cache: Path, toy_world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pages" / "report.html"
    done = run("mimir-precompute", "report", real_cache, "--models", toy_world / "models", "--out", out)
    assert done.code == 0, done.err
    assert f"{out}: 0." in done.out
    outline = Outline(out.read_text(encoding="utf-8"))
    alts = outline.attributes("img", "alt")
    assert sum(alt.startswith("Source frame") for alt in alts) == 11
    assert sum(alt.startswith("Decoded from the latents") for alt in alts) == 11
    assert "First frame that can be decoded of corrupted.mp4" in alts
    decibels = [float(value) for value in re.findall(r"decoded, ([\d.]+) dB", outline.text)]
    assert len(decibels) == 11
    assert min(decibels) > 12, "another moment or another clip would be far below"
    assert np.median(decibels) > 18


def test_another_vae_than_the_one_that_encoded_is_refused(real_cache: Path, toy_world: Path, tmp_path: Path) -> None:
    other = tmp_path / "vae"
    other.mkdir()
    for path in (toy_world / "models" / "vae").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    done = run("mimir-precompute", "report", real_cache, "--vae", other, "--out", tmp_path / "report.html")
    assert done.code == 4, done.err
    assert "not the VAE that made these latents (config.json differ)" in done.err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("num_frames", [1, 3, 5, 13])
def test_the_first_latent_frames_alone_decode_to_what_they_do_in_the_whole_clip(
    real_cache: Path, toy_world: Path, num_frames: int
) -> None:
    identity = choose_features(LocalStorage(real_cache), {})["latents"].read_spec().identity
    decoder = load_decoder(ModelSource(name=str(toy_world / "models"), subfolder="vae"), identity, "cpu")
    latents = np.random.default_rng(0).standard_normal((8, num_frames, 4, 6)).astype(np.float32)
    whole, part = decoder.decode_latents(latents), decoder.decode_latents(latents[:, :3])
    assert len(part) == min(len(whole), 9)
    assert np.abs(whole[: len(part)].astype(int) - part).max() <= 1
