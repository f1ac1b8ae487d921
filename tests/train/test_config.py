"""Settings: unknown names, wrong values, what overrides what, and what a run that goes on may change."""

from pathlib import Path

import pytest
import yaml

from mimir_shared.errors import InputError
from mimir_train.cli.commands import RunRequest, build_config, parse_features, parse_names
from mimir_train.config import TrainConfig
from mimir_train.config_document import (
    nest,
    overlay,
    parse_assignment,
    refuse_other_training,
    to_document,
    train_config,
    training_digest,
    write_document,
)
from mimir_train.presets import PRESETS


def request_of(tmp_path: Path, **given: object) -> RunRequest:
    base: dict[str, object] = {
        "preset": "tiny",
        "output_dir": tmp_path / "run",
        "config_file": None,
        "assignments": (),
        "flags": {"data.cache": "C"},
        "resume": None,
    }
    return RunRequest(**{**base, **given})  # type: ignore[arg-type]


def config_of(tmp_path: Path, **given: object) -> TrainConfig:
    return build_config(request_of(tmp_path, **given))


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_whole_but_for_cache_and_run(tmp_path: Path, name: str) -> None:
    config = config_of(tmp_path, preset=name)
    assert config.preset == name
    again = train_config(yaml.safe_load(write_document(config)))
    assert again == config
    assert training_digest(again) == training_digest(config)


def test_presets_have_the_official_sizes_and_scales(tmp_path: Path) -> None:
    small, large = (config_of(tmp_path, preset=f"cogvideox-{size}") for size in ("2b", "5b"))
    assert (small.model.latent_scaling_factor, large.model.latent_scaling_factor) == (1.15258426, 0.7)
    assert (small.objective.snr_shift_scale, large.objective.snr_shift_scale) == (3.0, 1.0)
    assert (small.model.transformer.width, small.model.transformer.num_layers) == (1920, 30)
    assert (large.model.transformer.width, large.model.transformer.num_layers) == (3072, 42)
    assert large.model.transformer.use_rotary_positional_embeddings
    assert not small.model.transformer.use_rotary_positional_embeddings
    for config in (small, large):
        assert (config.optimizer.learning_rate, config.optimizer.fuser_learning_rate) == (1e-5, 1e-4)
        assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.weight_decay) == (0.9, 0.95, 1e-4)


def test_flags_override_set_and_set_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("optimizer: {learning_rate: 1e-5, warmup_steps: 7, clip_norm: 0.5}\n")
    config = config_of(
        tmp_path,
        config_file=file,
        assignments=("optimizer.warmup_steps=8", "optimizer.clip_norm=0.25"),
        flags={"data.cache": "C", "optimizer.clip_norm": 0.1, "run.seed": None},
    )
    assert config.optimizer.learning_rate == 1e-5  # YAML 1.1 reads it as text
    assert config.optimizer.warmup_steps == 8
    assert config.optimizer.clip_norm == 0.1
    assert config.run.seed == 42


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.learning_rat=1", "unknown setting optimizer.learning_rat: did you mean optimizer.learning_rate"),
        ("optimiser.learning_rate=1", "unknown setting optimiser: did you mean optimizer"),
        ("run.zebra=1", "unknown setting run.zebra: there are run.checkpointing_steps"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: expected float, got 'fast'"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate must be positive, got -1"),
        ("data.global_batch_size=2.5", "data.global_batch_size: expected int, got 2.5"),
        ("data.global_batch_size=true", "expected int, got True"),
        ("model.fuser=mimi", "model.fuser: expected one of baseline, .*mimir, got 'mimi'"),
        ("objective.text_dropout=2", "objective.text_dropout must be from 0 to 1, got 2.0"),
        ("optimizer.schedule=sawtooth", "expected one of constant, cosine, linear, wsd, got 'sawtooth'"),
        ("run.report_to=tensorboard", r"run.report_to: expected a list, as \[tensorboard\], got 'tensorboard'"),
        ("model.transformer.attention_head_dim=24", "setting model.transformer: num_attention_heads . attention_head"),
        ("optimizer=5", "setting optimizer: expected a section"),
        ("data=5", "setting data: expected a section, got 5"),  # --cache is laid over it
        ("nothing", "--set nothing: expected section.name=value"),
        ("run.seed={", "--set run.seed={: the value is not YAML"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, assignment: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        config_of(tmp_path, assignments=(assignment,))
    assert caught.value.exit_code == 2


def test_an_unknown_preset_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--preset 'huge': expected one of tiny, cogvideox-2b, cogvideox-5b"):
        config_of(tmp_path, preset="huge")
    with pytest.raises(InputError, match="--preset is missing"):
        config_of(tmp_path, preset=None)


@pytest.mark.parametrize(("resume", "named"), [("latest", "run"), ("7", "run"), ("typo", "typo")])
def test_a_run_that_is_not_there_is_named_and_not_its_preset(tmp_path: Path, resume: str, named: str) -> None:
    with pytest.raises(InputError, match=rf"--resume-from-checkpoint {resume}: \S*{named} holds no checkpoint"):
        config_of(tmp_path, preset=None, resume=resume)


def test_a_config_file_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    with pytest.raises(InputError, match=r"settings.yaml: cannot be read"):
        config_of(tmp_path, config_file=file)
    for text in ("a: [", "- 1\n"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"--config .*settings.yaml"):
            config_of(tmp_path, config_file=file)


def test_without_a_cache_the_missing_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--cache is missing: give the folder of the cache"):
        config_of(tmp_path, flags={})


def test_init_from_keeps_the_sizes_of_what_it_loads(tmp_path: Path) -> None:
    config = config_of(tmp_path, flags={"data.cache": "C", "model.init_from": "somewhere"})
    assert not config.model.fit_to_cache


def test_what_decides_the_training_may_not_change_when_a_run_goes_on(tmp_path: Path) -> None:
    old = config_of(tmp_path)

    def changed(name: str, value: object) -> TrainConfig:
        return train_config(overlay(to_document(old), nest(name, value)))

    for name, value in (("run.device", "cpu"), ("run.max_train_steps", 7), ("data.cache", "D"), ("run.report_to", [])):
        refuse_other_training(old, changed(name, value), "config.yaml")
    for name, value in (("run.seed", 1), ("data.global_batch_size", 4), ("optimizer.learning_rate", 1e-4)):
        with pytest.raises(InputError, match=rf"{name}: .* → {value}"):
            refuse_other_training(old, changed(name, value), "config.yaml")
    cosine = changed("optimizer.schedule", "cosine")
    longer = train_config(overlay(to_document(cosine), nest("run.max_train_steps", 7)))
    with pytest.raises(InputError, match=r"run.max_train_steps: 300 → 7"):  # the cosine would end elsewhere
        refuse_other_training(cosine, longer, "config.yaml")


def test_lists_of_options_are_parsed() -> None:
    assert parse_features([]) is None
    assert parse_features(["llm=0f", "t5=1"]) == {"llm": "0f", "t5": "1"}
    with pytest.raises(InputError, match="--feature llm: expected name=fingerprint"):
        parse_features(["llm"])
    assert parse_names(None) is None
    assert parse_names("none") == []
    assert parse_names("tensorboard, wandb") == ["tensorboard", "wandb"]
    assert parse_assignment("a.b=[1, 2]") == {"a": {"b": [1, 2]}}
