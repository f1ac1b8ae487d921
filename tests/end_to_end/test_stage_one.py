"""Stage one as a user runs it: real clips, real encoder classes, kills and resumes."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from PIL import Image, ImageOps
from transformers import AutoModelForCausalLM, AutoTokenizer, T5EncoderModel

from mimir_precompute.config import DEFAULT_INSTRUCTIONS, Bucket, Geometry
from mimir_precompute.decoding.clip_pixels import read_clip
from mimir_precompute.inspection.clip_facts import describe_clip
from mimir_precompute.inspection.find_clip import find_clip, read_clip_tensors
from mimir_shared.feature_folder import find_features
from mimir_shared.features import FEATURES, FeatureTensor
from mimir_shared.plan_file import read_plan
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import tree
from tests.programs import run, start

GEOMETRY = Geometry(buckets=(Bucket.parse("9x64x96"), Bucket.parse("1x64x96")), fps=8.0)


def _bf16_error(cached: FeatureTensor, oracle: torch.Tensor) -> float:
    """Largest distance from the float32 oracle, in units of what rounding to bfloat16 may cost: 1 is half a place."""
    values = oracle.float().numpy()
    assert cached.array.shape == values.shape
    spacing = np.maximum(np.abs(values), np.abs(values).max() * 1e-3) * 2.0**-8
    return float((np.abs(cached.to_float32() - values) / spacing).max()) if values.size else 0.0


def test_real_clips_obey_the_law_and_the_damaged_one_is_quarantined_with_a_true_reason(real_cache: Path) -> None:
    storage = LocalStorage(real_cache)
    plan = read_plan(storage)
    for folder in find_features(storage):
        (record,) = [folder.read_record(shard, 0) for shard in range(plan.num_shards)]
        assert [s.key for s in record.samples] == [clip.key for clip in plan.shard_clips(0)]
        bad = {s.key: (s.stage, s.reason) for s in record.samples if s.status == "quarantined"}
        assert bad == ({"corrupted.mp4": ("decode", "undecodable")} if folder.feature == "latents" else {})
    assert [folder.feature for folder in find_features(storage)] == list(FEATURES)
    verified = run("mimir-precompute", "verify", real_cache, "--json")
    assert verified.code == 0, verified.out


def test_the_rotated_clip_lies_upright_in_the_one_frame_bucket(
    real_cache: Path, real_clips: Path, toy_world: Path, tmp_path: Path
) -> None:
    storage = LocalStorage(real_cache)
    facts = describe_clip(storage, "rotated_90.mov")["features"]
    assert next(value["bucket"] for name, value in facts.items() if name.startswith("latents")) == "1x64x96"
    video = tmp_path / "rotated.mp4"
    arguments = ("inspect", real_cache, "rotated_90", "--video", video, "--models", toy_world / "models")
    done = run("mimir-precompute", *arguments)
    assert done.code == 0, done.err
    (frame,) = _frames(video)
    assert frame.shape == (64, 96, 3)
    stored = _frames(real_clips / "rotated_90.mov")[0]  # as the camera wrote it: the display matrix turns it by -90

    def likeness(quarter_turns: int) -> float:
        turned = Image.fromarray(np.rot90(stored, quarter_turns))
        fitted = np.asarray(ImageOps.fit(turned, (96, 64)), dtype=float)
        return float(np.corrcoef(frame.astype(float).ravel(), fitted.ravel())[0, 1])

    found = [likeness(quarter_turns) for quarter_turns in range(4)]
    assert int(np.argmax(found)) == 3, found  # counted anticlockwise
    assert found[3] > 0.7, found


def _frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _check_latents(cache: Path, clips: Path, models: Path, keys: tuple[str, ...]) -> None:
    vae = AutoencoderKLCogVideoX.from_pretrained(models / "vae", torch_dtype=torch.float32)
    for key in keys:
        cached = read_clip_tensors(LocalStorage(cache), key, "latents")["vae_moments"]
        pixels = torch.from_numpy(read_clip(clips / key, geometry=GEOMETRY).pixels)
        video = (pixels.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]  # (1, 3, F, H, W)
        with torch.no_grad():
            oracle = vae.encode(video).latent_dist.parameters[0]
        assert _bf16_error(cached, oracle) < 1.01, key


def test_cached_latents_of_toy_clips_are_those_of_diffusers(toy_cache: Path, toy_world: Path) -> None:
    _check_latents(toy_cache, toy_world / "clips", toy_world / "models", ("000000.mp4", "000005.mp4"))


def test_cached_latents_of_real_clips_are_those_of_diffusers(
    real_cache: Path, real_clips: Path, toy_world: Path
) -> None:
    keys = ("horse.mp4", "nasa.mp4", "h265_10bit.mp4", "rotated_90.mov")
    _check_latents(real_cache, real_clips, toy_world / "models", keys)


@pytest.mark.parametrize(
    ("which", "keys"), [("toy_cache", ("000001.mp4",)), ("real_cache", ("horse.mp4", "corrupted.mp4"))]
)
def test_cached_t5_embeds_are_those_of_transformers(
    request: pytest.FixtureRequest, toy_world: Path, which: str, keys: tuple[str, ...]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_world / "models" / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(toy_world / "models" / "text_encoder", dtype=torch.float32).eval()
    storage = LocalStorage(request.getfixturevalue(which))
    for key in keys:
        caption = find_clip(read_plan(storage), key).caption
        ids = tokenizer([caption], padding="max_length", max_length=64, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            oracle = encoder(ids)[0][0]
        cached = read_clip_tensors(storage, key, "t5")
        assert cached["t5_ids"].array.tolist() == ids[0].tolist()
        assert _bf16_error(cached["t5_embeds"], oracle) < 1.01


def _states_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]


@pytest.mark.parametrize(
    ("which", "keys"), [("toy_cache", ("000001.mp4",)), ("real_cache", ("train.mp4", "cog_4.mp4"))]
)
def test_cached_hidden_states_are_those_of_transformers_over_prompt_and_answer(
    request: pytest.FixtureRequest, toy_world: Path, which: str, keys: tuple[str, ...]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_world / "models" / "llm")
    model = AutoModelForCausalLM.from_pretrained(toy_world / "models" / "llm", dtype=torch.float32).eval()
    storage = LocalStorage(request.getfixturevalue(which))
    plan = read_plan(storage)

    def prompt_of(content: str) -> list[int]:
        turn = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]

    for key in keys:
        caption = find_clip(plan, key).caption
        facts = describe_clip(storage, key)["features"]
        document = next(value["document"] for name, value in facts.items() if name.startswith("answers"))
        answers = document["variants"][0]
        cached = read_clip_tensors(storage, key, "llm")
        plain = tokenizer(caption, add_special_tokens=False)["input_ids"][:64]
        prompt = prompt_of(caption)
        where = next(n for n in range(len(prompt)) if prompt[n : n + len(plain)] == plain)
        answer = answers["answer"]["token_ids"]
        states = _states_of(model, prompt + answer)
        assert _bf16_error(cached["query_hidden"], states[where : where + len(plain)]) < 1.01
        assert _bf16_error(cached["answer_hidden_0"], states[len(prompt) :]) < 1.01
        for number, instruction in enumerate(DEFAULT_INSTRUCTIONS):
            ids = answers["instructions"][number]["token_ids"]
            full = prompt_of(f"{caption}\n\n{instruction.text}")
            pooled = _states_of(model, full + ids)[len(full) :].mean(0)
            got = FeatureTensor(cached["instruction_hidden_0"].array[number], "bf16")
            assert _bf16_error(got, pooled) < 1.01
        with torch.no_grad():
            made = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
        assert made[: len(answer)] == answer


def test_encode_that_is_killed_ten_times_and_run_again_gives_the_same_bytes(toy_world: Path, tmp_path: Path) -> None:
    arguments = ("encode", toy_world / "clips", "--preset", "tiny", "--models", toy_world / "models", "--shard-size", 1)
    assert run("mimir-precompute", *arguments, "--cache", tmp_path / "whole").code == 0
    killed = tmp_path / "killed"
    choose = random.Random(0)
    for _ in range(10):
        process = start("mimir-precompute", *arguments, "--cache", killed)
        _wait_for_more_records(process, killed, choose.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    unfinished = run("mimir-precompute", "status", killed, "--json")
    assert '"complete": false' in unfinished.out
    assert run("mimir-precompute", *arguments, "--cache", killed).code == 0
    assert tree(killed) == tree(tmp_path / "whole")
    again = run("mimir-precompute", *arguments, "--cache", killed)
    assert again.code == 0
    assert "nothing to do" in again.out


def test_sigterm_ends_encode_within_seconds_with_143_and_leaves_no_temporary(toy_world: Path, tmp_path: Path) -> None:
    arguments = ("encode", toy_world / "clips", "--preset", "tiny", "--models", toy_world / "models", "--shard-size", 2)
    process = start("mimir-precompute", *arguments, "--cache", tmp_path)
    _wait_for_more_records(process, tmp_path, 0.1)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert time.monotonic() - asked < 5
    assert "stopped by SIGTERM" in err
    assert not (tmp_path / "tmp").exists()
    assert run("mimir-precompute", "verify", tmp_path).code == 0


def _wait_for_more_records(process: Any, cache: Path, then_s: float) -> None:
    """Wait until the running encode has committed one more shard, and then a little."""
    before = _count_records(cache)
    deadline = time.monotonic() + 300
    while _count_records(cache) == before:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(then_s)


def _count_records(cache: Path) -> int:
    # by feature: the folder of temporary files comes and goes while a process writes
    return sum(len(list((cache / feature).glob("*/manifests/*"))) for feature in FEATURES)
