"""Nothing of what made a cache can change without a word: every field of every identity is refused by name."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimir_precompute import provenance
from mimir_precompute.config import (
    AnswersSettings,
    Bucket,
    EncodeSettings,
    Geometry,
    LlmSettings,
    ModelSource,
    T5Settings,
    VaeSettings,
)
from mimir_precompute.encoders.base import Encoder
from mimir_precompute.identity import FeatureModels, feature_identity
from mimir_precompute.model_encoders import ModelEncoders
from mimir_precompute.model_files import ResolvedModel
from mimir_precompute.pipeline import EncodeJob, encode_cache, open_features
from mimir_precompute.presets import PRESETS
from mimir_precompute.provenance import RunLog
from mimir_precompute.workers.progress import Progress
from mimir_shared.errors import CacheError
from mimir_shared.feature_folder import find_features
from mimir_shared.features import DEPENDENCIES, FEATURES, FeatureName, FeatureTensor
from mimir_shared.fingerprint import fingerprint
from mimir_shared.plan_file import read_plan
from mimir_shared.safetensors_bytes import tensors_to_safetensors
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import FakeEncoders, tree
from tests.faults.conftest import World
from tests.faults.workers import NUM_SHARDS, SHARD_SIZE, TEXT, encode

Identity = dict[str, Any]


@dataclasses.dataclass
class Identities:
    """An EncoderSource that has identities and no models: it must never come to encoding."""

    own: Mapping[FeatureName, Identity]

    def identity(self, feature: FeatureName, dependencies: Mapping[FeatureName, Mapping[str, Any]]) -> Identity:
        return self.own[feature]

    def batch_size(self, feature: FeatureName) -> int:
        raise AssertionError(f"{feature} is about to be encoded")

    def build(self, feature: FeatureName) -> Encoder:
        raise AssertionError(f"the model of {feature} is loaded")


def identities_of(preset: str) -> dict[FeatureName, Identity]:
    """What spec.json holds for the real encoders, with a model that has every kind of file and several variants."""
    sizes = PRESETS[preset]
    source = ModelSource(name="models")
    files = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
    model = ResolvedModel(
        folder=Path("/somewhere"),
        name="some/model",
        subfolder="part",
        commit="a" * 40,
        digests={file: hashlib.sha256(file.encode()).hexdigest() for file in files},
        config={"_class_name": "AutoencoderKLCogVideoX", "d_model": 64, "hidden_size": 48, "latent_channels": 16},
        chat_template_sha256="c" * 64,
    )
    caption_tokens = sizes.max_caption_tokens
    settings = EncodeSettings(
        latents=VaeSettings(source=source, dtype=sizes.dtype, stored=("moments", "sample")),
        t5=T5Settings(text_encoder=source, tokenizer=source, dtype=sizes.dtype, max_length=sizes.t5_max_length),
        answers=AnswersSettings(source=source, max_caption_tokens=caption_tokens, variants=2),
        llm=LlmSettings(source=source, max_caption_tokens=caption_tokens),
    )
    geometry = sizes.geometry
    models = FeatureModels(model=model, tokenizer=model)
    made: dict[FeatureName, Identity] = {}
    for feature in FEATURES:
        made[feature] = feature_identity(feature, settings, geometry, models, made.get("answers"))
    return made


def changed_values(value: Any) -> Iterator[Any]:
    """Other values for one leaf or container of an identity, of the same kind where that can be."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value + 1
    elif isinstance(value, str):
        yield value[:-1] + ("y" if value.endswith("x") else "x")
    elif value is None:
        yield 1
    elif isinstance(value, dict):
        yield {**value, "new field": 1}
    elif value:
        yield value[:-1]


def walk(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every node below a value, with its path."""
    yield path, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from walk(child, (*path, name))


def put(value: Any, path: tuple[str | int, ...], new: Any) -> Any:
    """A copy with one node replaced."""
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = put(value[path[0]], path[1:], new)  # type: ignore[index]
    return changed


def open_with(cache: Path, identities: Mapping[FeatureName, Identity], features: tuple[FeatureName, ...]) -> None:
    storage = LocalStorage(cache)
    plan = read_plan(storage)
    job = EncodeJob(
        storage=storage, plan=plan, encoders=Identities(identities), shards=tuple(range(NUM_SHARDS)), features=features
    )
    open_features(job)
    # what open_features lets pass would be encoded
    encode_cache(job, Progress(quiet=True), RunLog(storage, "cpu"))


@pytest.mark.parametrize("preset", ["tiny", "cogvideox-5b"])
@pytest.mark.parametrize("feature", FEATURES)
def test_every_field_of_every_identity_is_refused_by_name_old_and_new(
    world: World, tmp_path: Path, feature: FeatureName, preset: str
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(world.whole / "plan", cache / "plan")
    identities = identities_of(preset)
    features = (*DEPENDENCIES[feature], feature)
    with pytest.raises(AssertionError, match="the model of"):
        open_with(cache, identities, features)  # nothing is wrong: it goes on to the model
    before = tree(cache)
    tried = 0
    for path, value in walk(identities[feature]):
        for new in changed_values(value) if path else ():
            tried += 1
            other = {**identities, feature: put(identities[feature], path, new)}
            with pytest.raises(CacheError) as refusal:
                open_with(cache, other, features)
            message = str(refusal.value)
            assert refusal.value.exit_code == 4
            assert "→" in message
            assert "--on-mismatch new" in message
            assert str(path[0]) in message
            if not isinstance(value, dict | list):
                assert f"{value!r} → {new!r}" in message
            assert tree(cache) == before
    assert tried > {"latents": 50, "t5": 40, "answers": 40, "llm": 50}[feature]


def write_models(folder: Path) -> Path:
    """Model folders with every file that an identity digests; the bytes are nobody's weights."""
    weights = tensors_to_safetensors({"weight": FeatureTensor(np.arange(6, dtype=np.float32), "f32")})
    configs: dict[str, dict[str, Any]] = {
        "vae": {"_class_name": "AutoencoderKLCogVideoX", "latent_channels": 4, "block_out_channels": [8, 8, 8]},
        "text_encoder": {"d_model": 8},
        "llm": {"hidden_size": 8, "model_type": "phi3"},
    }
    for name, config in configs.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        stem = "diffusion_pytorch_model" if name == "vae" else "model"
        (folder / name / f"{stem}.safetensors").write_bytes(weights)
    for name in ("tokenizer", "llm"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "tokenizer.json").write_text('{"vocab": ["a"]}')
        (folder / name / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return folder


def model_identities(models: Path) -> dict[FeatureName, Identity]:
    def part(name: str) -> ModelSource:
        return ModelSource(name=str(models), subfolder=name)

    settings = EncodeSettings(
        latents=VaeSettings(source=part("vae")),
        t5=T5Settings(text_encoder=part("text_encoder"), tokenizer=part("tokenizer")),
        answers=AnswersSettings(source=part("llm")),
        llm=LlmSettings(source=part("llm")),
    )
    encoders = ModelEncoders(settings, Geometry(buckets=(Bucket.parse("9x64x96"),), fps=8))
    encoders.resolve(FEATURES)
    made: dict[FeatureName, Identity] = {}
    for feature in FEATURES:
        made[feature] = encoders.identity(feature, made)
    return made


@pytest.mark.parametrize(
    ("file", "features"),
    [
        ("vae/diffusion_pytorch_model.safetensors", {"latents"}),
        ("vae/config.json", {"latents"}),
        ("text_encoder/model.safetensors", {"t5"}),
        ("text_encoder/config.json", {"t5"}),
        ("tokenizer/tokenizer.json", {"t5"}),
        ("tokenizer/tokenizer_config.json", {"t5"}),
        ("llm/model.safetensors", {"answers", "llm"}),
        ("llm/config.json", {"answers", "llm"}),
        ("llm/tokenizer.json", {"answers", "llm"}),
        ("llm/tokenizer_config.json", {"answers", "llm"}),
    ],
)
def test_one_byte_of_any_model_file_is_refused_by_the_features_that_load_it(
    world: World, tmp_path: Path, file: str, features: set[FeatureName]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(world.whole / "plan", cache / "plan")
    models = write_models(tmp_path / "models")
    before = model_identities(models)
    with pytest.raises(AssertionError, match="the model of"):
        open_with(cache, before, FEATURES)
    data = bytearray((models / file).read_bytes())
    if file.endswith(".json"):
        data += b" "
    else:
        data[-3] ^= 1  # in the weights themselves
    (models / file).write_bytes(bytes(data))
    after = model_identities(models)
    assert {feature for feature in FEATURES if fingerprint(before[feature]) != fingerprint(after[feature])} == features
    for feature in sorted(features):
        with pytest.raises(CacheError, match=Path(file).name) as refusal:
            open_with(cache, {**before, feature: after[feature]}, (*DEPENDENCIES[feature], feature))
        assert hashlib.sha256(bytes(data)).hexdigest() in str(refusal.value)


def test_an_edited_spec_is_refused_whatever_was_edited(world: World, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(world.whole, tmp_path / "cache"))
    for folder in find_features(LocalStorage(cache)):
        path = cache / folder.directory / "spec.json"
        whole = path.read_text()
        document = json.loads(whole)
        for place, value in walk(document["identity"], ("identity",)):
            for new in changed_values(value):
                path.write_text(json.dumps(put(document, place, new)))
                with pytest.raises(CacheError, match=r"spec\.json: its identity has the fingerprint"):
                    encode(cache, world.clips)
        for broken in ("", "{}", whole[:-9], json.dumps({**document, "fingerprint": "0" * 64})):
            path.write_text(broken)
            with pytest.raises(CacheError, match=r"spec\.json"):
                encode(cache, world.clips)
        path.write_text(whole)
    encode(cache, world.clips)


def warnings_of(capfd: pytest.CaptureFixture[str], cache: Path, shard: int, device: str = "cpu") -> str:
    """What a person is told while one more shard of `t5` is made."""
    storage = LocalStorage(cache)
    job = EncodeJob(
        storage=storage, plan=read_plan(storage), encoders=FakeEncoders(), shards=(shard,), features=("t5",)
    )
    capfd.readouterr()
    encode_cache(job, Progress(), RunLog(storage, device))
    return capfd.readouterr().err


CHANGES = [
    ("libraries.torch: '9.9' → ", "library"),
    ("libraries.mimir-t2v: '0.1' → '0.2'", "release"),
    ("device: 'cpu' → 'cuda'", "device"),
    ("threads: ", "threads"),
    ("python: ", "python"),
    ("machine: ", "machine"),
]


@pytest.mark.parametrize(("expected", "what"), CHANGES)
def test_a_change_of_provenance_is_told_and_the_run_goes_on(
    world: World,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    expected: str,
    what: str,
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(world.whole / "plan", cache / "plan")
    monkeypatch.setattr(provenance, "_installed_versions", lambda: {"torch": "9.9", "mimir-t2v": "0.1"})
    assert "other means" not in warnings_of(capfd, cache, 0)
    assert "other means" not in warnings_of(capfd, cache, 1), "nothing has changed"
    if what == "library":
        monkeypatch.setattr(provenance, "_installed_versions", lambda: {"torch": "10.0", "mimir-t2v": "0.1"})
    elif what == "release":
        monkeypatch.setattr(provenance, "_installed_versions", lambda: {"torch": "9.9", "mimir-t2v": "0.2"})
    elif what == "threads":
        monkeypatch.setenv("OMP_NUM_THREADS", "77")
    elif what != "device":
        monkeypatch.setattr(provenance.platform, {"python": "python_version", "machine": what}[what], lambda: "other")
    device = "cuda:3" if what == "device" else "cpu"
    assert expected in warnings_of(capfd, cache, 2, device)
    assert "other means" not in warnings_of(capfd, cache, 3, device), "told once, for it is compared with the newest"
    if what == "device":
        assert "other means" not in warnings_of(capfd, cache, 4, "cuda:5"), "another of the same GPUs"
    (folder,) = find_features(LocalStorage(cache))
    assert set(folder.generations()) >= {0, 1, 2, 3}


def test_a_log_that_was_cut_or_is_nonsense_stops_nobody(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(world.whole / "plan", cache / "plan")
    warnings_of(capfd, cache, 0)
    (log,) = (cache / "logs").glob("*.jsonl")
    log.write_bytes(b"[1, 2]\nnull\n\xff\xfe\n" + log.read_bytes()[:40])
    assert "other means" not in warnings_of(capfd, cache, 1)


def test_a_changed_llm_makes_answers_and_llm_alone(world: World, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(world.whole, tmp_path / "cache"))
    salt: dict[FeatureName, str] = {"answers": "other", "llm": "other"}
    storage = LocalStorage(cache)

    def job(**options: Any) -> EncodeJob:
        encoders = FakeEncoders(salt=salt)
        shards = tuple(range(NUM_SHARDS))
        return EncodeJob(
            storage=storage, plan=read_plan(storage), encoders=encoders, shards=shards, features=TEXT, **options
        )

    with pytest.raises(CacheError, match="`answers` was made otherwise"):
        encode_cache(job(), Progress(quiet=True), RunLog(storage, "cpu"))
    assert tree(cache) == tree(world.whole)
    outcome = encode_cache(job(on_mismatch="new"), Progress(quiet=True), RunLog(storage, "cpu"))
    made = {feature.feature: feature.encoded for feature in outcome.features}
    assert made == {"t5": 0, "answers": NUM_SHARDS * SHARD_SIZE, "llm": NUM_SHARDS * SHARD_SIZE}
    assert tree(world.whole).items() <= tree(cache).items()
