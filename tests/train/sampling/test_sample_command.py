"""`mimir-train sample` from the command line to videos that play, with toy models."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimir_shared.errors import CacheError, InputError, MimirError
from mimir_train.checkpoint.adapter_base import record_adapters
from mimir_train.config import LoraConfig
from mimir_train.sampling import files as sample_files
from mimir_train.sampling import frozen_models
from mimir_train.sampling import sample as sample_module
from mimir_train.sampling.video_check import plays
from mimir_train.trained_model import TrainedModel
from mimir_train.weights.lora import adapter_parameters, add_adapters, merge_adapters
from mimir_train.weights.transformer_folder import save_transformer
from tests.train.hand_made_checkpoint import (
    command,
    flip_last_bit,
    identities,
    random_model,
    sample,
    write_checkpoint,
)

CAT, DOG = "a red circle moves to the left", "two blue squares"


@pytest.fixture(scope="module")
def models(toy_world: Path) -> Path:
    return toy_world / "models"


@pytest.fixture(scope="module")
def recorded(models: Path) -> dict[str, dict[str, Any]]:
    return identities(models)


@pytest.fixture(scope="module")
def run_folder(recorded: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a `mimir` fuser; not to be changed."""
    run = tmp_path_factory.mktemp("run")
    write_checkpoint(run, recorded, random_model("mimir"))
    return run


@pytest.fixture(scope="module")
def baseline_run(recorded: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Needs no LLM, so it samples in a blink; not to be changed."""
    run = tmp_path_factory.mktemp("baseline")
    write_checkpoint(run, {name: recorded[name] for name in ("latents", "t5")}, random_model("baseline"))
    return run


@pytest.fixture(autouse=True)
def pixels(monkeypatch: pytest.MonkeyPatch) -> dict[Path, list[np.ndarray]]:
    """What was given to the video encoder, by file: x264's own choices can differ between two equal calls."""
    written: dict[Path, list[np.ndarray]] = {}
    write = frozen_models.write_video

    def record(path: Path, frames: np.ndarray, fps: float) -> None:
        name = path.name.removeprefix(".").removesuffix(".tmp")
        written.setdefault(path.parent / name, []).append(frames)
        write(path, frames, fps)

    monkeypatch.setattr(sample_files, "write_video", record)
    return written


def is_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal but for a step of a pixel here and there, as sums in another order give it."""
    return one.shape == other.shape and float(np.abs(one.astype(np.float64) - other).mean()) < 0.01


def test_prompts_become_videos_a_contact_sheet_and_a_list(run_folder: Path, models: Path, tmp_path: Path) -> None:
    sample(run_folder, models, tmp_path, "--prompt", CAT, "--prompt", DOG, "--num_samples_per_prompt", "2")
    names = [f"{prompt}-{index}.mp4" for prompt in (CAT, DOG) for index in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*names, "contact_sheet.png", "samples.jsonl", "sampling.json"]
    )
    assert all(plays(tmp_path / name, 9, 32, 48) for name in names)
    entries = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(entry["prompt"], entry["index"], entry["file"]) for entry in entries] == [
        (prompt, index, f"{prompt}-{index}.mp4") for prompt in (CAT, DOG) for index in (0, 1)
    ]
    assert entries[0]["settings"]["guidance_scale"] == 6.0
    assert entries[0]["settings"]["bucket"] == "9x32x48"
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.height > 4 * 128


def test_a_video_depends_on_its_own_prompt_seed_and_index_alone(
    run_folder: Path, models: Path, tmp_path: Path, pixels: dict[Path, list[np.ndarray]]
) -> None:
    alone, together, other = tmp_path / "alone", tmp_path / "together", tmp_path / "other"
    sample(run_folder, models, alone, "--prompt", DOG)
    sample(run_folder, models, together, "--prompt", CAT, "--prompt", DOG, "--num-samples-per-prompt", "2")
    sample(run_folder, models, other, "--prompt", DOG, "--seed", "1")
    (one,) = pixels[alone / f"{DOG}-0.mp4"]
    assert is_same(one, pixels[together / f"{DOG}-0.mp4"][0])
    assert not is_same(one, pixels[together / f"{DOG}-1.mp4"][0])
    assert not is_same(one, pixels[other / f"{DOG}-0.mp4"][0])


def test_vbench_file_is_resumed_and_only_what_does_not_play_is_made_again(
    baseline_run: Path, models: Path, tmp_path: Path, pixels: dict[Path, list[np.ndarray]]
) -> None:
    prompts = tmp_path / "vbench.json"
    prompts.write_text(json.dumps([{"prompt_en": CAT, "dimension": ["color"]}]))
    out = tmp_path / "out"
    sample(baseline_run, models, out, "--prompts", prompts)
    videos = [out / f"{CAT}-{index}.mp4" for index in range(5)]
    made_at = [video.stat().st_mtime_ns for video in videos]
    videos[1].unlink()
    videos[3].write_bytes(videos[3].read_bytes()[:-2000])
    videos[4].write_bytes(b"")
    sample(baseline_run, models, out, "--prompts", prompts)
    kept = [video.stat().st_mtime_ns == before for video, before in zip(videos, made_at, strict=True)]
    assert kept == [True, False, True, False, False]
    assert [len(pixels[video]) for video in videos] == [1, 2, 1, 2, 2]
    assert all(plays(video, 9, 32, 48) and is_same(pixels[video][0], pixels[video][-1]) for video in videos)


def test_a_call_that_was_stopped_goes_on_from_the_latents_that_it_left(
    baseline_run: Path,
    models: Path,
    tmp_path: Path,
    pixels: dict[Path, list[np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    sample(baseline_run, models, whole, "--prompt", CAT, "--prompt", DOG)

    def stop(*arguments: Any) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(sample_module, "_decode", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            sample(baseline_run, models, stopped, "--prompt", CAT, "--prompt", DOG)
    assert len(list((stopped / "latents").iterdir())) == 2
    monkeypatch.setattr(sample_module, "_encode_texts", stop)  # nothing is encoded or denoised again
    sample(baseline_run, models, stopped, "--prompt", CAT, "--prompt", DOG)
    assert is_same(pixels[stopped / f"{CAT}-0.mp4"][0], pixels[whole / f"{CAT}-0.mp4"][0])
    assert not (stopped / "latents").exists()


def test_a_folder_of_other_settings_is_refused_by_their_names(baseline_run: Path, models: Path, tmp_path: Path) -> None:
    sample(baseline_run, models, tmp_path / "a", "--prompt", CAT)
    with pytest.raises(InputError, match=r"guidance_scale: 6\.0 → 3\.0"):
        sample(baseline_run, models, tmp_path / "a", "--prompt", DOG, "--guidance-scale", "3")
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / f"{CAT}-0.mp4", tmp_path / "b")
    with pytest.raises(InputError, match="what made it is not known"):
        sample(baseline_run, models, tmp_path / "b", "--prompt", CAT)


def test_more_prompts_in_the_same_folder_are_added_to_its_list(
    baseline_run: Path, models: Path, tmp_path: Path
) -> None:
    sample(baseline_run, models, tmp_path, "--prompt", CAT)
    sample(baseline_run, models, tmp_path, "--prompt", DOG)
    entries = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [entry["prompt"] for entry in entries] == [CAT, DOG]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--scheduler", "ddim"),
        ("--guidance", "ramp"),
        ("--guidance", "official"),
        ("--guidance-scale", "1"),
        ("--negative-prompt", "blurry"),
        ("--bucket", "1x32x48"),
        ("--dtype", "bfloat16"),
    ],
    ids=" ".join,
)
def test_each_option_gives_another_video(
    baseline_run: Path,
    models: Path,
    tmp_path: Path,
    pixels: dict[Path, list[np.ndarray]],
    arguments: tuple[str, str],
) -> None:
    sample(baseline_run, models, tmp_path / "plain", "--prompt", CAT)
    sample(baseline_run, models, tmp_path / "other", "--prompt", CAT, *arguments)
    plain, other = (pixels[tmp_path / folder / f"{CAT}-0.mp4"][0] for folder in ("plain", "other"))
    assert len(other) == (1 if "1x32x48" in arguments else 9)
    assert not is_same(plain, other)


def test_a_run_trained_on_the_cached_empty_prompt_is_guided_away_from_that(
    recorded: dict[str, Any],
    baseline_run: Path,
    models: Path,
    tmp_path: Path,
    pixels: dict[Path, list[np.ndarray]],
) -> None:
    write_checkpoint(tmp_path / "run", recorded, random_model("baseline"), empty_text="cached")
    sample(tmp_path / "run", models, tmp_path / "cached", "--prompt", CAT)
    sample(baseline_run, models, tmp_path / "empty", "--prompt", CAT, "--negative-prompt", "")
    sample(baseline_run, models, tmp_path / "zeros", "--prompt", CAT)
    cached, empty, zeros = (pixels[tmp_path / name / f"{CAT}-0.mp4"][0] for name in ("cached", "empty", "zeros"))
    assert is_same(cached, empty)
    assert not is_same(cached, zeros)


def test_stabilizer_tokens_are_there_only_if_the_last_trained_step_had_them(
    recorded: dict[str, Any], tmp_path: Path
) -> None:
    from mimir_train.checkpoint.opened import open_checkpoint

    for step, expected in ((20, False), (21, True)):
        model = random_model("mimir", stabilizer_start_step=20)
        folder = write_checkpoint(tmp_path, recorded, model, step=step)
        assert open_checkpoint(folder, print).appends_stabilizer is expected


def test_the_average_is_sampled_unless_raw_weights_are_asked_for(
    recorded: dict[str, Any], baseline_run: Path, models: Path, tmp_path: Path, pixels: dict[Path, list[np.ndarray]]
) -> None:
    average = random_model("baseline")
    torch.nn.init.normal_(average.dit.proj_out.weight, std=0.1)
    features = {name: recorded[name] for name in ("latents", "t5")}
    write_checkpoint(tmp_path / "run", features, random_model("baseline"), average=average)
    write_checkpoint(tmp_path / "alone", features, average)
    sample(tmp_path / "run", models, tmp_path / "auto", "--prompt", CAT)
    sample(tmp_path / "run", models, tmp_path / "raw", "--prompt", CAT, "--weights", "raw")
    sample(tmp_path / "alone", models, tmp_path / "expected", "--prompt", CAT)
    sample(baseline_run, models, tmp_path / "plain", "--prompt", CAT)
    auto, raw, expected, plain = (
        pixels[tmp_path / name / f"{CAT}-0.mp4"][0] for name in ("auto", "raw", "expected", "plain")
    )
    assert is_same(auto, expected)
    assert is_same(raw, plain)
    assert not is_same(auto, raw)
    with pytest.raises(InputError, match="weights"):  # one folder holds videos of one kind
        sample(tmp_path / "run", models, tmp_path / "raw", "--prompt", CAT, "--weights", "power:0.1")


def test_adapters_are_sampled_on_their_base(
    recorded: dict[str, Any], models: Path, tmp_path: Path, pixels: dict[Path, list[np.ndarray]]
) -> None:
    features = {name: recorded[name] for name in ("latents", "t5")}
    lora = LoraConfig(rank=2)
    model = random_model("baseline")
    save_transformer(model.dit.config, model.dit.state_dict(), tmp_path / "base")
    add_adapters(model.dit, lora)
    for parameter in adapter_parameters(model.dit).values():
        torch.nn.init.normal_(parameter, std=0.3)
    record = record_adapters(lora, str(tmp_path / "base"), tmp_path / "base")
    write_checkpoint(tmp_path / "run", features, model, adapters=record)
    merge_adapters(model.dit)
    write_checkpoint(tmp_path / "merged", features, TrainedModel(model.dit, model.fuser).requires_grad_(True))
    sample(tmp_path / "merged", models, tmp_path / "expected", "--prompt", CAT)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"--base .*base: expected a diffusers folder"):
        sample(tmp_path / "run", models, tmp_path / "found", "--prompt", CAT)
    assert not (tmp_path / "found").exists()
    sample(tmp_path / "run", models, tmp_path / "found", "--prompt", CAT, "--base", str(tmp_path / "moved"))
    found, expected = (pixels[tmp_path / name / f"{CAT}-0.mp4"][0] for name in ("found", "expected"))
    assert is_same(found, expected)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt", CAT, "--scheduler", "euler"), "--scheduler 'euler': expected one of dpm, ddim"),
        (("--prompt", CAT, "--guidance", "cosine"), "--guidance 'cosine': expected one of fixed, ramp, official"),
        (("--prompt", CAT, "--guidance-scale", "0.5"), "--guidance-scale 0.5: expected 1"),
        (("--prompt", CAT, "--guidance-scale", "nan"), "--guidance-scale nan: expected 1"),
        (("--prompt", CAT, "--dtype", "int8"), "--dtype 'int8': expected one of"),
        (("--prompt", CAT, "--device", "tpu"), "--device 'tpu': expected auto"),
        (("--prompt", CAT, "--num-inference-steps", "0"), "--num-inference-steps 0: expected 1 to 1000"),
        (("--prompt", CAT, "--bucket", "9x32x50"), "multiples of 16"),
        (("--prompt", CAT, "--bucket", "10x32x48"), "frames must be 1 or 8k"),
        (("--prompt", CAT, "--bucket", "large"), "expected frames x height x width"),
        ((), "give prompts, either by"),
        (("--prompt", CAT, "--prompts", "p.txt"), "give prompts, either by"),
        (("--prompts", "absent.txt"), "absent.txt: no such file"),
        (("--prompt", CAT, "--models", "/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_wrong_options_end_with_exit_code_two_and_one_line(
    baseline_run: Path, models: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        sample(baseline_run, models, tmp_path / "out", *arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_models_are_named_by_part_and_option(baseline_run: Path, models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no vae: give --models .* or --vae"):
        command("sample", "--checkpoint", baseline_run, "--prompt", CAT, "--output-dir", tmp_path / "out")
    copy = shutil.copytree(models, tmp_path / "models")
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(InputError, match="no subfolder 'text_encoder'"):
        sample(baseline_run, copy, tmp_path / "out", "--prompt", CAT)


def test_a_fuser_without_llm_needs_no_llm_folder(baseline_run: Path, models: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(models, tmp_path / "models")
    shutil.rmtree(copy / "llm")
    sample(baseline_run, copy, tmp_path / "out", "--prompt", CAT)
    assert plays(tmp_path / "out" / f"{CAT}-0.mp4", 9, 32, 48)


@pytest.mark.parametrize(("step", "code"), [("step-00000099", 2), ("", 2)])
def test_no_checkpoint_is_exit_code_two(models: Path, tmp_path: Path, step: str, code: int) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(MimirError, match=r"no such folder|no checkpoint here") as caught:
        sample(tmp_path / "run" / step, models, tmp_path / "out", "--prompt", CAT)
    assert caught.value.exit_code == code


@pytest.mark.parametrize("name", ["model/00000.safetensors", "checkpoint.json"])
def test_a_damaged_checkpoint_is_exit_code_four(
    recorded: dict[str, Any], models: Path, tmp_path: Path, name: str
) -> None:
    folder = write_checkpoint(tmp_path / "run", recorded, random_model("mimir"))
    flip_last_bit(folder / name)
    with pytest.raises(CacheError, match=name.split("/")[-1]) as caught:
        sample(folder, models, tmp_path / "out", "--prompt", CAT)
    assert caught.value.exit_code == 4


def test_latents_that_are_not_finite_are_refused(recorded: dict[str, Any], models: Path, tmp_path: Path) -> None:
    model = random_model("baseline")
    torch.nn.init.constant_(model.dit.proj_out.bias, float("nan"))
    write_checkpoint(tmp_path / "run", recorded, model)
    with pytest.raises(CacheError, match="NaN or infinite"):
        sample(tmp_path / "run", models, tmp_path / "out", "--prompt", CAT)


def test_only_a_whole_video_of_the_right_size_plays(baseline_run: Path, models: Path, tmp_path: Path) -> None:
    sample(baseline_run, models, tmp_path, "--prompt", CAT)
    video = tmp_path / f"{CAT}-0.mp4"
    assert plays(video, 9, 32, 48)
    assert not plays(video, 8, 32, 48)
    assert not plays(video, 9, 48, 32)
    assert not plays(tmp_path / "absent.mp4", 9, 32, 48)
    assert not plays(tmp_path / "samples.jsonl", 9, 32, 48)
    video.write_bytes(video.read_bytes()[:-1000])
    assert not plays(video, 9, 32, 48)
