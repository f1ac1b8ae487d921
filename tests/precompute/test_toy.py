"""The toy world: captions true of the pixels, equal seeds equal bytes, models that the real classes load."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from PIL import Image
from scipy import ndimage
from transformers import AutoModelForCausalLM, AutoTokenizer, T5EncoderModel

from mimir_precompute.toy.clips import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    ToyScene,
    render,
    toy_scene,
    write_toy_clips,
)
from mimir_precompute.toy.models import VAE_WEIGHTS, write_toy_models

ANY_TEXT = "Zwölf 猫 😀 quick-brown foxes, jumped over {17} lazy dogs?"
LONG_CAPTION = (
    "A young woman with long brown hair sits at a wooden table near the window and slowly drinks a cup of coffee "
    "while heavy rain falls outside and a cat sleeps on the chair."
)

# --- captions: a reader of its own, which knows the language but nothing of the templates' code ---

NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3}
THING = re.compile(
    rf"\b(the )?(?:(a|an|two|three) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(s?)\b",
)
GO = r"(?:moves?|moving|slides?|sliding|drifts?|drifting)"
MOTION_PATTERNS = {
    "still": r"(?:stay(?:s|ing)? still|(?:does|do) not move|not moving|rest(?:s|ing)? in place)",
    "left": rf"{GO} (?:to the left|left|leftwards)",
    "right": rf"{GO} (?:to the right|right|rightwards)",
    "up": r"(?:mov(?:es?|ing) up|ris(?:es?|ing)|float(?:s|ing)? upwards)",
    "down": r"(?:mov(?:es?|ing) down|sink(?:s|ing)?|glid(?:es?|ing) downwards)",
}
RELATION_PATTERNS = {
    "left": (r"(?:to|on) the left of", "on the left"),
    "right": (r"(?:to|on) the right of", "on the right"),
    "above": (r"(?:above|over)", "at the top"),
    "below": (r"(?:below|under)", "at the bottom"),
}
Box = tuple[float, float]


class Observed:
    """What the pixels of the first nine frames show: for every colour, where its things are, first and last."""

    def __init__(self, scene: ToyScene) -> None:
        frames = render(scene, num_frames=9)[[0, 8]].astype(np.int16)
        self.background = frames[0, 0, 0]
        self.first = {colour: self._centres(frames[0], rgb) for colour, rgb in COLOURS.items()}
        self.last = {colour: self._centres(frames[1], rgb) for colour, rgb in COLOURS.items()}

    @staticmethod
    def _centres(frame: npt.NDArray[np.int16], rgb: tuple[int, int, int]) -> list[Box]:
        labels, count = ndimage.label((np.abs(frame - np.int16(rgb)) < 8).all(axis=-1))
        things = [np.argwhere(labels == number) for number in range(1, count + 1)]
        return [(float(x), float(y)) for y, x in (pixels.mean(axis=0) for pixels in things if len(pixels) > 60)]

    def motion(self, colour: str) -> str:
        x, y = np.mean(self.last[colour], axis=0) - np.mean(self.first[colour], axis=0)
        if max(abs(x), abs(y)) < 1:
            return "still"
        if abs(x) > abs(y):
            return "left" if x < 0 else "right"
        return "up" if y < 0 else "down"

    def holds(self, relation: str, one: str, other: str) -> bool:
        axis, sign = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
        return all(
            sign * (theirs[axis] - ours[axis]) > 10
            for when in (self.first, self.last)
            for ours in when[one]
            for theirs in when[other]
        )


def check_sentence(sentence: str, scene: ToyScene, seen: Observed) -> set[str]:
    """Assert all that a sentence says; returns the colours of the things it introduces."""
    things: list[str] = []

    def stand_in(match: re.Match[str]) -> str:
        definite, number, colour, shape, plural = match.groups()
        count = NUMBERS.get(number, 1)
        assert len(seen.first[colour]) == count, f"{match[0]!r}: the frame shows {len(seen.first[colour])}"
        assert {thing.shape for thing in scene.objects if thing.colour == colour} == {shape}
        assert (plural == "s") == (count > 1), f"grammar of {match[0]!r}"
        assert definite or number, f"no article: {match[0]!r}"
        things.append(colour)
        return f"@{colour}"

    text = THING.sub(stand_in, sentence[0].lower() + sentence[1:])
    name = "|".join(sorted(BACKGROUNDS))
    behind = re.search(rf"(?:^the background is|(?:on|in front of) a) ({name})(?: background)?", text)
    if behind is not None:
        assert np.abs(seen.background - np.asarray(BACKGROUNDS[behind[1]])).max() <= 16, text
        text = (text[: behind.start()] + text[behind.end() :]).strip(" ,")
    if text and not check_relation(text, seen):
        check_motion(text, seen)
    return set(things)


def check_relation(text: str, seen: Observed) -> bool:
    """Assert a sentence about places; False if it is none."""
    row = re.fullmatch(r"(?:from (left to right|right to left) there are )?@(\w+), @(\w+) and @(\w+)(.*)", text)
    if row is not None and (row[1] or row[5]):
        assert row[1] or row[5] == " side by side from left to right", text
        relation = "right" if row[1] == "right to left" else "left"
        assert seen.holds(relation, row[2], row[3]), text
        assert seen.holds(relation, row[3], row[4]), text
        return True
    for relation, (words, place) in RELATION_PATTERNS.items():
        plain = re.fullmatch(rf"(?:we see )?@(\w+)(?: is| are)? {words} @(\w+)", text)
        turned = re.fullmatch(rf"{words} @(\w+) there (?:is|are) @(\w+)", text)
        placed = re.fullmatch(rf"@(\w+) and @(\w+), @\2 {place}", text)
        for match, one, other in ((plain, 1, 2), (turned, 2, 1), (placed, 2, 1)):
            if match is not None:
                assert seen.holds(relation, match[one], match[other]), text
                return True
    return False


def check_motion(text: str, seen: Observed) -> None:
    present = [colour for colour, centres in seen.first.items() if centres]
    count = sum(len(centres) for centres in seen.first.values())
    clauses = re.split(r", while | and |, ", re.sub(r"^(?:there (?:is|are)|we see) ", "", text))
    for clause in clauses:
        readings = {
            motion: re.fullmatch(rf"(@\w+|both|all of them) {words}", clause)
            for motion, words in MOTION_PATTERNS.items()
        }
        motion, match = next((pair for pair in readings.items() if pair[1] is not None), ("", None))
        assert match is not None, f"cannot read {clause!r}"
        assert match[1] != "both" or count == 2, clause
        assert match[1] != "all of them" or count > 2, clause
        for colour in [match[1][1:]] if match[1].startswith("@") else present:
            assert seen.motion(colour) == motion, f"{clause!r}: {colour} is seen to move {seen.motion(colour)}"


def test_captions_are_true_of_the_pixels() -> None:
    for index in range(108):
        scene = toy_scene(11, index)
        seen = Observed(scene)
        named: set[str] = set()
        for sentence in scene.caption.removesuffix(".").split(". "):
            named |= check_sentence(sentence, scene, seen)
        assert named == {thing.colour for thing in scene.objects}, f"{scene.caption!r} leaves something out"


def test_caption_reader_notices_a_false_caption() -> None:
    scene = next(scene for scene in (toy_scene(0, index) for index in range(99)) if scene.relation == "left")
    red, blue = scene.subjects[0], scene.subjects[1]
    with pytest.raises(AssertionError):
        check_sentence(f"{red.indefinite} {red.is_or_are} to the right of {blue.indefinite}", scene, Observed(scene))


def test_a_hundred_scenes_have_every_shape_colour_motion_count_and_background() -> None:
    scenes = [toy_scene(0, index) for index in range(100)]
    subjects = [subject for scene in scenes for subject in scene.subjects]
    assert {subject.shape for subject in subjects} == set(SHAPES)
    assert {subject.colour for subject in subjects} == set(COLOURS)
    assert {subject.motion for subject in subjects} == set(MOTIONS)
    assert {subject.count for subject in subjects} == {1, 2, 3}
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.relation for scene in scenes} == {None, "left", "right", "above", "below"}
    assert len({scene.caption for scene in scenes}) > 90


# --- clips ---


def files_under(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def decode(path: Path) -> list[npt.NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_clips_are_h264_that_shows_the_scene(tmp_path: Path) -> None:
    write_toy_clips(tmp_path, 4, seed=3)
    rows = [json.loads(line) for line in (tmp_path / "clips" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [toy_scene(3, index).caption for index in range(4)]
    for index, row in enumerate(rows):
        path = tmp_path / "clips" / row["file_name"]
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.frames, stream.average_rate, stream.height, stream.width) == (25, 8, 128, 192)
        error = np.stack(decode(path)).astype(np.float64) - render(toy_scene(3, index))
        assert 10 * math.log10(255**2 / np.mean(error**2)) > 30


def test_equal_seeds_give_equal_bytes_and_more_clips_keep_the_first(tmp_path: Path) -> None:
    write_toy_clips(tmp_path / "a", 3, seed=0)
    write_toy_clips(tmp_path / "b", 5, seed=0)
    write_toy_clips(tmp_path / "c", 3, seed=1)
    some, more, other = (files_under(tmp_path / name) for name in "abc")
    for index in range(3):
        name = f"clips/{index:06d}.mp4"
        assert some[name] == more[name]
        assert some[name] != other[name]
    assert more["clips/metadata.jsonl"].startswith(some["clips/metadata.jsonl"])


# --- models ---


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("toy")
    write_toy_models(directory, seed=0)
    return directory / "models"


@pytest.fixture(scope="module")
def vae(models: Path) -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX.from_pretrained(models / "vae").eval()


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Clips as the tiny preset sees them, of a seed that the training never saw: (24, 3, 9, 64, 96) in -1..1."""
    directory = tmp_path_factory.mktemp("held_out")
    write_toy_clips(directory, 24, seed=77)
    clips = []
    for path in sorted((directory / "clips").glob("*.mp4")):
        images = [Image.fromarray(frame) for frame in decode(path)[:9]]
        small = np.stack([np.asarray(image.resize((96, 64), Image.Resampling.LANCZOS)) for image in images])
        clips.append(torch.from_numpy(small).permute(3, 0, 1, 2).float() / 127.5 - 1)
    return torch.stack(clips)


def test_equal_seeds_give_equal_models_and_leave_the_random_state_alone(models: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    write_toy_models(tmp_path / "same", seed=0)
    write_toy_models(tmp_path / "other", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    one, same, other = (files_under(path) for path in (models, tmp_path / "same/models", tmp_path / "other/models"))
    assert one == same
    differing = {name for name in one if one[name] != other[name]}
    assert differing == {
        "llm/model.safetensors",
        "text_encoder/model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
    }


def test_weights_of_the_vae_are_small() -> None:
    assert VAE_WEIGHTS.stat().st_size <= 1.5e6


@torch.no_grad()
def test_vae_reconstructs_clips_it_never_saw(vae: AutoencoderKLCogVideoX, held_out: torch.Tensor) -> None:
    psnrs, stds = [], []
    for clip in held_out[:9]:
        posterior = vae.encode(clip[None]).latent_dist
        decoded = vae.decode(posterior.mean).sample[0].clamp(-1, 1)
        psnrs.append(10 * math.log10(4 / (decoded - clip).square().mean().item()))
        stds.append(posterior.std.mean().item())
    assert sum(psnrs) / len(psnrs) >= 26, psnrs
    assert sum(stds) / len(stds) <= 0.1


@torch.no_grad()
def test_scaled_latents_have_unit_variance(vae: AutoencoderKLCogVideoX, held_out: torch.Tensor) -> None:
    latents = torch.cat([vae.encode(clips).latent_dist.mean for clips in held_out.split(4)])
    assert latents.shape == (24, 8, 3, 16, 24)
    assert 0.8 <= (latents * vae.config.scaling_factor).var().item() <= 1.25


@torch.no_grad()
def test_vae_reconstructs_images(vae: AutoencoderKLCogVideoX, held_out: torch.Tensor) -> None:
    images = held_out[:9, :, :1]
    posterior = vae.encode(images).latent_dist
    assert posterior.mean.shape == (9, 8, 1, 16, 24)
    error = vae.decode(posterior.mean).sample.clamp(-1, 1) - images
    assert 10 * math.log10(4 / error.square().mean().item()) >= 25


@pytest.mark.parametrize("folder", ["tokenizer", "llm"])
def test_tokenizers_write_any_text_and_give_offsets(models: Path, folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / folder)
    caption = toy_scene(5, 4).caption
    for text in (ANY_TEXT, LONG_CAPTION, caption):
        encoded = tokenizer(text, return_offsets_mapping=True)
        assert tokenizer.unk_token_id not in encoded.input_ids
        assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == text
        covered = {place for start, end in encoded.offset_mapping for place in range(start, end)}
        assert covered >= {place for place, character in enumerate(text) if not character.isspace()}
    assert len(tokenizer(LONG_CAPTION).input_ids) <= 64
    assert tokenizer.pad_token_id is not None


def test_t5_tokenizer_ends_and_pads_as_t5_does(models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "tokenizer")
    encoded = tokenizer("a red circle", padding="max_length", max_length=64, truncation=True)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token) == ("<pad>", 0, "</s>")
    assert encoded.input_ids[3:] == [tokenizer.eos_token_id] + [0] * 60
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids[:3]) == ["▁a", "▁red", "▁circle"]


@torch.no_grad()
def test_t5_tells_captions_apart(models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(models / "text_encoder").eval()
    assert encoder.config.vocab_size == len(tokenizer)
    captions = ["a red circle above a blue square", "a blue square above a red circle", "a red circle", "two red rings"]
    ids = tokenizer(captions, padding=True, return_tensors="pt").input_ids
    embeds = encoder(ids).last_hidden_state  # (4, L, 64)
    assert embeds.shape[2] == 64
    apart = torch.cdist(embeds.flatten(1), embeds.flatten(1)) / embeds.flatten(1).norm(dim=1)
    assert apart[~torch.eye(4, dtype=torch.bool)].min() > 0.2


def test_llm_suits_vllm_and_chats_like_phi3(models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "llm")
    llm = AutoModelForCausalLM.from_pretrained(models / "llm").eval()
    assert llm.config.architectures == ["Phi3ForCausalLM"]
    assert llm.config.hidden_size // llm.config.num_attention_heads == 32
    assert llm.config.vocab_size == len(tokenizer)
    assert llm.config.max_position_embeddings >= 2048
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two red rings."}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>\nBe brief.<|end|>\n<|user|>\nTwo red rings.<|end|>\n<|assistant|>\n"
    answers = set()
    for index in range(8):
        turns = [{"role": "user", "content": toy_scene(0, index).caption}]
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = llm.generate(**encoded, do_sample=False, max_new_tokens=64)
        answer = tokenizer.decode(output[0, encoded.input_ids.shape[1] :], skip_special_tokens=True)
        assert answer.replace("\n", " ").isprintable()
        answers.add(answer)
    assert len(answers) >= 5
    assert min(len(answer) for answer in answers) > 0


@torch.no_grad()
def test_folder_is_a_diffusers_pipeline(models: Path) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(models, local_files_only=True)
    assert isinstance(pipeline.transformer, CogVideoXTransformer3DModel)
    assert isinstance(pipeline.scheduler, CogVideoXDDIMScheduler)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    frames = pipeline(
        "A red circle moves up.", num_inference_steps=2, max_sequence_length=64, generator=generator, output_type="np"
    ).frames
    assert frames.shape == (1, 9, 64, 96, 3)


def test_importing_the_package_loads_no_model_library() -> None:
    code = (
        "import sys, mimir_precompute.toy; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'diffusers', 'av')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
