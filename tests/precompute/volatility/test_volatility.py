"""Asked again, the LLM reads the same and says something else; the numbers, the picture and the page say so."""

import json
from pathlib import Path

import numpy as np
import pytest

from mimir_precompute.config import ModelOptions
from mimir_precompute.volatility.command import VolatilityRequest, run_volatility
from mimir_precompute.volatility.measure import relative_spread
from mimir_precompute.volatility.pictures import project
from mimir_shared.errors import InputError

PROMPTS = ("A red circle moves to the left .", "A blue <script>alert(1)</script> square .", "A green triangle .")


def request(tmp_path: Path, models: Path, **fields: object) -> VolatilityRequest:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    asked: dict[str, object] = {
        "prompts": prompts,
        "output_dir": tmp_path / "out",
        "models": ModelOptions(models=str(models), device="cpu"),
        "preset": "tiny",
        "repeats": 50,
        "limit": None,
        "temperature": 1.0,
        "seed": 0,
        "fuser": None,
    }
    return VolatilityRequest(**{**asked, **fields})  # type: ignore[arg-type]


def test_query_tokens_of_50_repeats_are_the_same_and_answer_tokens_spread(tmp_path: Path, toy_world: Path) -> None:
    numbers = run_volatility(request(tmp_path, toy_world / "models"))
    assert (numbers["prompts"], numbers["repeats"]) == (3, 50)
    assert numbers["spread"]["query"]["max"] < 1e-5
    assert numbers["spread"]["answer"]["mean"] > 0.2
    assert 0 < numbers["spread"]["final"]["mean"] < numbers["spread"]["answer"]["mean"]
    assert all(entry["different_answers"] > 25 for entry in numbers["per_prompt"])
    assert json.loads((tmp_path / "out/volatility.json").read_text()) == numbers
    assert (tmp_path / "out/volatility.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out/index.html").read_text()
    assert "<script>" not in page
    assert "alert(1)" in page
    assert "http://" not in page and "https://" not in page  # noqa: PT018 (one claim: it stands alone)


def test_at_a_low_temperature_the_answers_are_all_but_the_same(tmp_path: Path, toy_world: Path) -> None:
    models = toy_world / "models"
    hot = run_volatility(request(tmp_path, models, repeats=8, limit=1))
    cold = run_volatility(request(tmp_path, models, repeats=8, limit=1, temperature=1e-4))
    assert cold["spread"]["answer"]["mean"] < 0.1 * hot["spread"]["answer"]["mean"]


def test_spread_is_the_distance_from_the_centre_over_its_length() -> None:
    points = np.array([[3.0, 0.0], [5.0, 0.0]], np.float32)
    assert relative_spread(points) == pytest.approx(1 / 4)
    assert relative_spread(np.ones((7, 5), np.float32)) == 0


def test_the_same_points_are_laid_out_the_same() -> None:
    rng = np.random.default_rng(0)
    groups = {"a": rng.standard_normal((9, 4)), "b": rng.standard_normal((7, 4)) + 9}
    first, second = project(groups, 3), project(groups, 3)
    assert {name: plane.shape for name, plane in first.items()} == {"a": (9, 2), "b": (7, 2)}
    assert all(np.array_equal(first[name], second[name]) for name in groups)


def test_a_folder_that_is_no_fuser_is_refused_before_any_model_loads(tmp_path: Path) -> None:
    (tmp_path / "fuser").mkdir()
    models = tmp_path / "none"
    with pytest.raises(InputError, match=r"models|mimir-train export"):
        run_volatility(request(tmp_path, models, fuser=tmp_path / "fuser"))
