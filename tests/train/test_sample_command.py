"""`mimir-train sample` and `decode` from the command line to videos that play, with toy models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from mimir_precompute.toy.models import load_toy_vae
from mimir_shared.command_line import make_app
from mimir_shared.errors import CacheError, InputError, MimirError
from mimir_train import sample as sample_module
from mimir_train.cli_sample import add_commands
from mimir_train.contact_sheet import SheetRow, pick_frames, write_contact_sheet
from mimir_train.frozen_models import FrozenModels, ModelLocations
from mimir_train.validation_latents import ValidationLatents, validation_folder, write_validation_latents
from mimir_train.video_check import plays, read_video
from tests.train.hand_made_checkpoint import (
    FPS,
    SCALING_FACTOR,
    T5_ROWS,
    identities,
    random_model,
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


class Quiet:
    """Progress that remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def start(self, what: str, total: int) -> None:
        self.said.append(what)

    def advance(self) -> None:
        pass


def command(*arguments: str | Path) -> None:
    """Run the program in this process; what it raises comes through."""
    app = make_app("")
    add_commands(app)
    typer.main.get_command(app).main([str(argument) for argument in arguments], standalone_mode=False)


def difference(one: Path, other: Path) -> float:
    """Mean distance of two videos' pixels, of 255. Equal runs may differ in the last bits of a sum on some machines,
    and so in a pixel here and there by one step; another noise or another text gives more than 1.
    """
    videos = [read_video(path) for path in (one, other)]
    assert videos[0] is not None, one
    assert videos[1] is not None, other
    return float(np.abs(videos[0].astype(np.float64) - videos[1]).mean())


SAME, OTHER = 1.0, 2.0
"""Below the first, two videos are the same; above the second they are not."""


def sample(run: Path, models: Path, output_dir: Path, *arguments: str | Path) -> None:
    options = ("--num-inference-steps", "2", "--device", "cpu")
    command("sample", "--checkpoint", run, "--models", models, "--output-dir", output_dir, *options, *arguments)


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


def test_a_video_depends_on_its_own_prompt_seed_and_index_alone(run_folder: Path, models: Path, tmp_path: Path) -> None:
    alone, together, other = tmp_path / "alone", tmp_path / "together", tmp_path / "other"
    sample(run_folder, models, alone, "--prompt", DOG)
    sample(run_folder, models, together, "--prompt", CAT, "--prompt", DOG, "--num-samples-per-prompt", "2")
    sample(run_folder, models, other, "--prompt", DOG, "--seed", "1")
    assert difference(alone / f"{DOG}-0.mp4", together / f"{DOG}-0.mp4") < SAME
    assert difference(together / f"{DOG}-0.mp4", together / f"{DOG}-1.mp4") > OTHER
    assert difference(alone / f"{DOG}-0.mp4", other / f"{DOG}-0.mp4") > OTHER


def test_vbench_file_is_resumed_and_only_what_does_not_play_is_made_again(
    baseline_run: Path, models: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "vbench.json"
    prompts.write_text(json.dumps([{"prompt_en": CAT, "dimension": ["color"]}]))
    out = tmp_path / "out"
    sample(baseline_run, models, out, "--prompts", prompts)
    videos = [out / f"{CAT}-{index}.mp4" for index in range(5)]
    first = shutil.copytree(out, tmp_path / "first")
    made_at = [video.stat().st_mtime_ns for video in videos]
    videos[1].unlink()
    videos[3].write_bytes(videos[3].read_bytes()[:-2000])
    videos[4].write_bytes(b"")
    sample(baseline_run, models, out, "--prompts", prompts)
    assert max(difference(video, first / video.name) for video in videos) < SAME
    kept = [video.stat().st_mtime_ns == before for video, before in zip(videos, made_at, strict=True)]
    assert kept == [True, False, True, False, False]


def test_a_call_that_was_stopped_goes_on_from_the_latents_that_it_left(
    baseline_run: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert difference(stopped / f"{CAT}-0.mp4", whole / f"{CAT}-0.mp4") < SAME
    assert not (stopped / "latents").exists()


def test_a_folder_of_other_settings_is_refused_by_their_names(baseline_run: Path, models: Path, tmp_path: Path) -> None:
    sample(baseline_run, models, tmp_path / "a", "--prompt", CAT)
    with pytest.raises(InputError, match=r"guidance_scale: 6\.0 -> 3\.0"):
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
    baseline_run: Path, models: Path, tmp_path: Path, arguments: tuple[str, str]
) -> None:
    sample(baseline_run, models, tmp_path / "plain", "--prompt", CAT)
    sample(baseline_run, models, tmp_path / "other", "--prompt", CAT, *arguments)
    plain, other = (tmp_path / folder / f"{CAT}-0.mp4" for folder in ("plain", "other"))
    if "1x32x48" in arguments:
        assert plays(other, 1, 32, 48)
    else:
        print(arguments, difference(plain, other))
        assert difference(plain, other) > SAME


def test_a_run_trained_on_the_cached_empty_prompt_is_guided_away_from_that(
    recorded: dict[str, Any], baseline_run: Path, models: Path, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "run", recorded, random_model("baseline"), empty_text="cached")
    sample(tmp_path / "run", models, tmp_path / "cached", "--prompt", CAT)
    sample(baseline_run, models, tmp_path / "empty", "--prompt", CAT, "--negative-prompt", "")
    sample(baseline_run, models, tmp_path / "zeros", "--prompt", CAT)
    cached, empty, zeros = (tmp_path / folder / f"{CAT}-0.mp4" for folder in ("cached", "empty", "zeros"))
    assert difference(cached, empty) < SAME
    print(difference(cached, zeros))
    assert difference(cached, zeros) > OTHER


def test_stabilizer_tokens_are_there_only_if_the_last_trained_step_had_them(
    recorded: dict[str, Any], tmp_path: Path
) -> None:
    from mimir_train.open_checkpoint import open_checkpoint

    for step, expected in ((20, False), (21, True)):
        model = random_model("mimir", stabilizer_start_step=20)
        folder = write_checkpoint(tmp_path, recorded, model, step=step)
        assert open_checkpoint(folder, print).appends_stabilizer is expected


# --- the frozen models --------------------------------------------------------------------------------------------


def found(recorded: dict[str, Any], models: Path) -> FrozenModels:
    return FrozenModels(recorded, ("t5", "answers", "llm"), ModelLocations(models=str(models)), "cpu")  # type: ignore[arg-type]


def test_prompts_are_encoded_as_captions_were(recorded: dict[str, Any], models: Path) -> None:
    frozen = found(recorded, models)
    text = frozen.encode_texts([CAT, DOG], T5_ROWS, 0, Quiet())[CAT]
    alone = frozen.encode_texts([CAT], T5_ROWS, 0, Quiet())[CAT]
    assert text.t5_embeds.shape == (1, T5_ROWS, 64)
    assert text.t5_embeds.dtype == torch.bfloat16
    assert torch.equal(text.t5_embeds, alone.t5_embeds)
    assert text.llm is not None
    assert alone.llm is not None
    assert all(torch.equal(a, b) for a, b in zip(text.llm, alone.llm, strict=True))
    assert text.llm.instruction_hidden.shape == (1, 4, 64)
    assert text.llm.query_mask.all()


def test_a_text_that_t5_cuts_is_told(recorded: dict[str, Any], models: Path) -> None:
    progress = Quiet()
    found(recorded, models).encode_texts(["a red circle " * 30], T5_ROWS, 0, progress)
    assert any("T5 reads 24 tokens" in line for line in progress.said)


def test_latents_are_unscaled_before_the_vae_decodes_them(recorded: dict[str, Any], models: Path) -> None:
    latents = torch.randn(8, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    with found(recorded, models).decoder(SCALING_FACTOR) as decode:
        pixels = decode(latents * SCALING_FACTOR)
    with torch.no_grad():
        expected = load_toy_vae().decode(latents[None]).sample[0].permute(1, 2, 3, 0)
    difference = np.abs(pixels.astype(float) - (expected.numpy() * 127.5 + 127.5).clip(0, 255))
    assert difference.max() <= 1


def change_file(name: str) -> Callable[[Path], None]:
    def change(models: Path) -> None:
        path = models / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    return change


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "latents model.sha256"),
        ("text_encoder/model.safetensors", "t5 model.sha256"),
        ("llm/model.safetensors", "answers model.sha256"),
    ],
)
def test_models_that_differ_from_those_of_training_are_refused_by_field(
    run_folder: Path, models: Path, tmp_path: Path, changed: str, said: str
) -> None:
    copy = shutil.copytree(models, tmp_path / "models")
    change_file(changed)(copy)
    with pytest.raises(CacheError, match=said) as caught:
        sample(run_folder, copy, tmp_path / "out", "--prompt", CAT)
    assert " -> " in str(caught.value)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_a_field_that_this_release_makes_otherwise_is_refused(
    recorded: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    older = {**recorded, "t5": {**recorded["t5"], "version": 0}}
    write_checkpoint(tmp_path / "run", older, random_model("baseline"))
    with pytest.raises(CacheError, match=r"t5 version: 0 -> \d"):
        sample(tmp_path / "run", models, tmp_path / "out", "--prompt", CAT)


def test_a_model_under_another_name_with_the_same_files_is_the_same_model(
    recorded: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    on_the_hub = {"name": "somebody/t5", "subfolder": "text_encoder", "commit": "a" * 40}
    renamed = {**recorded["t5"], "model": {**recorded["t5"]["model"], **on_the_hub}}
    write_checkpoint(tmp_path / "run", {**recorded, "t5": renamed}, random_model("baseline"))
    sample(tmp_path / "run", models, tmp_path / "out", "--prompt", CAT)
    assert (tmp_path / "out" / f"{CAT}-0.mp4").exists()


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


@pytest.mark.parametrize(
    "name", ["transformer/diffusion_pytorch_model.safetensors", "fuser/model.safetensors", "checkpoint.json"]
)
def test_a_damaged_checkpoint_is_exit_code_four(
    recorded: dict[str, Any], models: Path, tmp_path: Path, name: str
) -> None:
    folder = write_checkpoint(tmp_path / "run", recorded, random_model("mimir"))
    change_file(name)(folder)
    with pytest.raises(CacheError, match=name.split("/")[-1]) as caught:
        sample(folder, models, tmp_path / "out", "--prompt", CAT)
    assert caught.value.exit_code == 4


def test_latents_that_are_not_finite_are_refused(recorded: dict[str, Any], models: Path, tmp_path: Path) -> None:
    model = random_model("baseline")
    torch.nn.init.constant_(model.dit.proj_out.bias, float("nan"))
    write_checkpoint(tmp_path / "run", recorded, model)
    with pytest.raises(CacheError, match="NaN or infinite"):
        sample(tmp_path / "run", models, tmp_path / "out", "--prompt", CAT)


# --- videos, pages ------------------------------------------------------------------------------------------------


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


# --- decode -------------------------------------------------------------------------------------------------------


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


def test_decoding_again_makes_only_what_is_missing_or_older_than_its_latents(
    validated_run: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("decode", validated_run, "--models", models)
    (validated_run / "validation" / "step-00000010" / "0.mp4").unlink()
    (validated_run / "validation" / "step-00000020" / "latents.safetensors").touch()
    capsys.readouterr()
    command("decode", validated_run, "--models", models)
    assert capsys.readouterr().out == f"{validated_run}: 3 videos made\n"


def test_another_vae_is_refused_for_decoding(validated_run: Path, models: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(models / "vae", tmp_path / "vae")
    change_file("diffusion_pytorch_model.safetensors")(copy)
    with pytest.raises(CacheError, match=r"latents model.sha256.* -> ") as caught:
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
