"""Training that keeps averages of its weights: undisturbed, bit for bit after a stop, on any ranks, and read again."""

from pathlib import Path

import pytest
import torch

from mimir_shared.errors import CacheError, InputError
from mimir_train.checkpoint.opened import open_checkpoint
from mimir_train.ema_profile import parse_profile
from mimir_train.loop import train
from mimir_train.validation.latents import read_validation_latents, validation_folder
from tests.train.caches import flipped_byte, losses_of, metrics_of, resumed_config, tiny_config
from tests.train.checkpoints import tensors_of
from tests.train.ranks import train_on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

PROFILES = ["power:0.1", "fixed:0.9"]


@pytest.fixture(scope="module")
def averaged(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps with two averages and a checkpoint after each. Not to be written to."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("averaged") / "run"
    train(tiny_config(
        small_cache, run, ema__profiles=PROFILES, run__checkpointing_steps=1, data__validation_shards=1,
        run__validation_steps=5, run__validation_samples=1,
    ))  # fmt: skip
    return run


def checkpoint_of(run: Path, step: int) -> Path:
    return run / f"checkpoints/step-{step:08d}"


def test_averages_leave_the_training_alone_and_are_judged_beside_it(
    small_cache: Path, tmp_path: Path, averaged: Path
) -> None:
    common = {"data__validation_shards": 1, "run__validation_steps": 5, "run__validation_samples": 1}
    train(tiny_config(small_cache, tmp_path / "plain", **common))
    unjudged = {"ema__profiles": PROFILES, "ema__validation": False, "run__max_train_steps": 5}
    train(tiny_config(small_cache, tmp_path / "unjudged", **common, **unjudged))
    assert losses_of(averaged) == losses_of(tmp_path / "plain")
    for line, plain in zip(metrics_of(averaged), metrics_of(tmp_path / "plain"), strict=True):
        assert line.get("validation/loss") == plain.get("validation/loss")
    judged = [line for line in metrics_of(averaged) if "validation/ema_loss" in line]
    assert [line["step"] for line in judged] == [4, 9]
    assert {"validation/ema_loss_t100", "validation/ema_loss_t900"} <= judged[0].keys()
    assert all(line["validation/ema_loss"] != line["validation/loss"] for line in judged)
    for run in ("plain", "unjudged"):
        assert not any("validation/ema_loss" in line for line in metrics_of(tmp_path / run))

    sampled = {
        run: read_validation_latents(validation_folder(run, 5))
        for run in (averaged, tmp_path / "plain", tmp_path / "unjudged")
    }
    assert [latents.weights for latents in sampled.values()] == ["power:0.1", "raw", "raw"]
    by_average, plain_latents, unjudged_latents = (latents.tensors[0] for latents in sampled.values())
    assert torch.equal(plain_latents, unjudged_latents)
    assert not torch.equal(by_average, plain_latents)


@pytest.mark.parametrize(("part", "profile"), [("ema", "power:0.1"), ("ema-2", "fixed:0.9")])
def test_averages_are_those_of_the_weights_of_every_step(averaged: Path, part: str, profile: str) -> None:
    share = parse_profile(profile).kept_share
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 11):
        for name, weight in tensors_of(checkpoint_of(averaged, step), "model").items():
            name = name.removeprefix("model.")
            # of a fixed average, the little that is left of the weights before the first step is not in a checkpoint
            before = expected.get(name, weight.double())
            expected[name] = share(step) * before + (1 - share(step)) * weight.double()
    found = tensors_of(checkpoint_of(averaged, 10), part)
    assert {name.removeprefix(f"{part}.") for name in found} == expected.keys()
    tolerance = 1e-6 if part == "ema" else 1e-2
    for name, average in expected.items():
        torch.testing.assert_close(found[f"{part}.{name}"].double(), average, rtol=tolerance, atol=tolerance)


def test_ten_steps_are_five_and_five_more_bit_for_bit_averages_too(
    small_cache: Path, tmp_path: Path, averaged: Path
) -> None:
    settings = {"data__validation_shards": 1, "run__validation_steps": 5}
    train(tiny_config(small_cache, tmp_path / "parts", ema__profiles=PROFILES, run__stop_at_step=5, **settings))
    train(resumed_config(tmp_path / "parts"), "latest")
    for part in ("model", "optimizer", "ema", "ema-2"):
        expected, found = (tensors_of(checkpoint_of(run, 10), part) for run in (averaged, tmp_path / "parts"))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name
    with pytest.raises(InputError, match=r"ema.profiles"):
        train(resumed_config(tmp_path / "parts", ema__profiles=["fixed:0.99"]), "latest")


def test_each_rank_averages_its_shards_and_all_together_what_one_process_does(
    small_cache: Path, tmp_path: Path, averaged: Path
) -> None:
    settings = {"data__validation_shards": 1, "run__validation_steps": 5, "parallel__strategy": "fsdp"}
    train_on_ranks(2, [tiny_config(small_cache, tmp_path / "two", ema__profiles=PROFILES, **settings)])
    folder = checkpoint_of(tmp_path / "two", 10)
    sizes = [path.stat().st_size for path in sorted((folder / "ema").iterdir())]
    assert len(sizes) == 2
    assert sizes[1] > 0.4 * sizes[0]  # the tensors of each are its own half
    for line, other in zip(metrics_of(averaged), metrics_of(tmp_path / "two"), strict=True):
        for figure in ("loss", "validation/loss", "validation/ema_loss"):
            assert other.get(figure) == pytest.approx(line.get(figure), abs=1e-5), (line["step"], figure)
    for part in ("ema", "ema-2"):
        for name, tensor in tensors_of(checkpoint_of(averaged, 10), part).items():
            torch.testing.assert_close(tensors_of(folder, part)[name], tensor, rtol=1e-3, atol=1e-3)


# --- read again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "name", "part"),
    [
        (None, "power:0.1", "ema"),
        ("ema", "power:0.1", "ema"),
        ("fixed:0.9", "fixed:0.9", "ema-2"),
        ("raw", "raw", "model"),
    ],
)
def test_sampling_takes_the_weights_that_are_asked_for(
    averaged: Path, weights: str | None, name: str, part: str
) -> None:
    said: list[str] = []
    opened = open_checkpoint(averaged, said.append, weights=weights)
    assert opened.weights == name
    assert said == [f"step-00000010: weights {name}, of raw, power:0.1, fixed:0.9"]
    expected = tensors_of(checkpoint_of(averaged, 10), part)
    loaded = {f"dit.{key}": value for key, value in opened.load_transformer().state_dict().items()}
    loaded |= {f"fuser.{key}": value for key, value in opened.load_fuser().state_dict().items()}
    assert {f"{part}.{key}" for key in loaded} == expected.keys()
    for key, value in loaded.items():
        assert torch.equal(value, expected[f"{part}.{key}"]), key


def test_weights_that_are_not_there_are_refused_with_those_that_are(
    small_cache: Path, tmp_path: Path, averaged: Path
) -> None:
    with pytest.raises(InputError, match=r"--weights power:0.2: .* has raw, ema, power:0.1, fixed:0.9; averages are"):
        open_checkpoint(averaged, print, weights="power:0.2")
    train(tiny_config(small_cache, tmp_path / "run", run__max_train_steps=1))
    with pytest.raises(InputError, match=r"--weights ema: .*run has raw; averages are kept where training is told"):
        open_checkpoint(tmp_path / "run", print, weights="ema")
    assert open_checkpoint(tmp_path / "run", print).weights == "raw"


def test_a_damaged_average_is_not_read_and_harms_no_one_else(averaged: Path) -> None:
    folder = checkpoint_of(averaged, 10)
    (path,) = (folder / "ema").iterdir()
    said: list[str] = []
    with flipped_byte(path, path.stat().st_size - 1):
        assert open_checkpoint(averaged, said.append).folder == checkpoint_of(averaged, 9)
        assert "step-00000010 is damaged and passed over" in said[0]
        with pytest.raises(CacheError, match="no good checkpoint"):
            open_checkpoint(folder, print, weights="ema")
        assert open_checkpoint(folder, print, weights="raw").weights == "raw"
