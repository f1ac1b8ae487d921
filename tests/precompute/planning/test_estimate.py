"""What encoding costs, before it costs anything: against the known totals, and against what torch counts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, T5EncoderModel

from mimir_precompute.cli.plan_command import PlanCommand, run_plan_command
from mimir_precompute.config import Bucket, Geometry, ModelOptions
from mimir_precompute.encoders.prompts import PromptBuilder
from mimir_precompute.planning.estimate import (
    TEMPLATE_TOKENS,
    Estimate,
    EstimateRequest,
    estimate_encoding,
    transformer_sizes,
)
from mimir_precompute.planning.estimate_message import describe_estimate, summarise_estimate
from mimir_precompute.planning.model_sizes import TOY_CONFIGS, UnknownSizeError, sized_model
from mimir_precompute.planning.plan import PlanRequest
from mimir_precompute.planning.text_roofline import LlmSize, T5Size
from mimir_precompute.presets import PRESETS, PresetName
from mimir_shared.errors import InputError
from mimir_shared.gpus import find_gpu
from mimir_shared.transformer_flops import COGVIDEOX_2B, COGVIDEOX_5B


def _estimate(preset: PresetName, clips: int = 500_000, **changes: Any) -> Estimate:
    options = changes.pop("options", ModelOptions())
    request: dict[str, Any] = {"gpu": find_gpu("h200"), "utilisation": 0.4, "geometry": PRESETS[preset].geometry}
    asked = EstimateRequest(preset=PRESETS[preset], options=options, **{**request, **changes})
    return estimate_encoding(asked, clips=clips, new_clips=clips)


def _tflops(estimate: Estimate) -> dict[str, float]:
    return {one.feature: one.flops_per_clip / 1e12 for one in estimate.features}


@pytest.mark.parametrize(("preset", "training"), [("cogvideox-2b", 360.1), ("cogvideox-5b", 996.9)])
def test_a_full_clip_costs_the_known_totals(preset: PresetName, training: float) -> None:
    estimate = _estimate(preset)
    tflops = _tflops(estimate)
    assert tflops["latents"] == pytest.approx(149.0, abs=0.05)
    assert tflops["t5"] == pytest.approx(2.11, abs=0.005)
    assert estimate.training.flops_per_clip / 1e12 == pytest.approx(training, abs=0.1)
    by_feature = {one.feature: one for one in estimate.features}
    # moments of 13x16x60x90 twice, and 226 tokens of 4,096, both in two bytes: 4.493 and 1.851 MB
    assert by_feature["latents"].bytes_per_clip / 1e6 == pytest.approx(4.493, abs=0.004)
    assert by_feature["t5"].bytes_per_clip / 1e6 == pytest.approx(1.855, abs=0.004)
    # the caption's rows 1.389, the answer's 0.786, four instructions' 0.025
    assert by_feature["llm"].bytes_per_clip / 1e6 == pytest.approx(2.200, abs=0.005)
    assert [one.at_most for one in estimate.features] == [False, False, True, True]


def test_phi_costs_the_known_totals() -> None:
    phi = LlmSize.of(sized_model(ModelOptions(), PRESETS["cogvideox-5b"], "llm").config)
    assert (phi.body_weights, phi.head_weights) == (3_623_878_656, 98_500_608)
    assert phi.prefill_flops(226) / 1e12 == pytest.approx(1.65, abs=0.01)
    assert 4 * phi.answer_flops(160, 64) / 1e12 == pytest.approx(6.6, abs=0.05)
    # 256 sequences of 192 tokens: 7.6 GB of weights would be with the embeddings, 7.4 without; 19 GB of keys and values
    assert phi.answer_traffic_bytes(192, 1, sequences=256) * 256 / 1e9 == pytest.approx(7.4 + 19.3, abs=0.1)


def test_hours_follow_from_operations_the_data_sheet_and_the_utilisation() -> None:
    estimate = _estimate("cogvideox-5b")
    latents = estimate.features[0]
    assert latents.gpu_hours == pytest.approx(500_000 * 148.96e12 / (989.4e12 * 0.4) / 3600, rel=1e-3)
    assert _estimate("cogvideox-5b", utilisation=0.2).gpu_hours == pytest.approx(2 * estimate.gpu_hours)
    slower = _estimate("cogvideox-5b", gpu=find_gpu("a100"))
    assert slower.features[0].gpu_hours == pytest.approx(latents.gpu_hours * 989.4 / 312)
    assert estimate.saved_gpu_hours_per_epoch == pytest.approx(sum(one.gpu_hours for one in estimate.features))
    assert estimate.training.gpu_hours_per_epoch == pytest.approx(349.8, abs=0.1)


def test_writing_answers_takes_as_long_as_the_memory_needs_where_that_is_longer() -> None:
    by_gpu = {name: _estimate("cogvideox-5b", gpu=find_gpu(name)).features[2].gpu_hours for name in ("h100", "h200")}
    # equal arithmetic, slower memory
    assert by_gpu["h100"] > by_gpu["h200"]


def test_options_about_models_change_the_estimate(models: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("- name: one\n  text: What is it?\n")
    plain = _estimate("cogvideox-5b")
    samples = _estimate("cogvideox-5b", options=ModelOptions(stored_latents="sample"))
    assert samples.features[0].bytes_per_clip == pytest.approx(plain.features[0].bytes_per_clip / 2, rel=0.01)
    variants = _estimate("cogvideox-5b", options=ModelOptions(answer_variants=3))
    assert variants.features[2].flops_per_clip == 3 * plain.features[2].flops_per_clip
    one = _estimate("cogvideox-5b", options=ModelOptions(instructions=str(tmp_path / "own.yaml")))
    assert one.features[3].flops_per_clip < plain.features[3].flops_per_clip / 2
    toy = _estimate("cogvideox-5b", options=ModelOptions(models=str(models)), geometry=PRESETS["tiny"].geometry)
    assert toy.features[0].flops_per_clip == _estimate("tiny").features[0].flops_per_clip


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mimir_precompute.toy.models import write_toy_models

    directory = tmp_path_factory.mktemp("toy")
    write_toy_models(directory, 0)
    return directory / "models"


def test_the_toy_models_have_the_sizes_that_the_tiny_preset_counts_with(models: Path) -> None:
    for part, known in TOY_CONFIGS.items():
        written = json.loads((models / part / "config.json").read_text())
        found = {name: written[name] for name in known}
        assert found == {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}


def test_operations_of_t5_are_those_that_torch_counts(models: Path) -> None:
    model = T5EncoderModel.from_pretrained(models / "text_encoder", attn_implementation="eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(1, 37, dtype=torch.int64))
    assert T5Size.of(TOY_CONFIGS["text_encoder"]).encode_flops(37) == counter.get_total_flops()


@pytest.mark.parametrize("key_heads", [1, 2])
def test_operations_of_the_llm_are_those_that_torch_counts(models: Path, key_heads: int) -> None:
    config = AutoConfig.from_pretrained(models / "llm")
    config.num_key_value_heads = key_heads
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    size = LlmSize.of({**TOY_CONFIGS["llm"], "num_key_value_heads": key_heads})
    prompt = torch.arange(5, 28)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(input_ids=prompt)
    assert counter.get_total_flops() == size.prefill_flops(23)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.generate(prompt, max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert counter.get_total_flops() == size.answer_flops(23, 9)


def test_a_template_counts_about_as_many_tokens_as_phi_has(models: Path) -> None:
    prompts = PromptBuilder(AutoTokenizer.from_pretrained(models / "llm"), (), 64)
    assert abs(len(prompts.prefix_ids) + len(prompts.suffix_ids) - TEMPLATE_TOKENS) <= 3


def test_transformers_have_the_sizes_that_training_counts_with() -> None:
    for name, sizes in (("cogvideox-2b", COGVIDEOX_2B), ("cogvideox-5b", COGVIDEOX_5B)):
        assert transformer_sizes(sized_model(ModelOptions(), PRESETS[name], "transformer").config) == sizes


def test_every_clip_counts_as_one_of_the_largest_bucket() -> None:
    both = Geometry(buckets=(Bucket.parse("1x480x720"), Bucket.parse("49x480x720")), fps=8)
    assert _estimate("cogvideox-5b", geometry=both) == _estimate("cogvideox-5b")


def test_the_table_says_what_people_ask() -> None:
    text = describe_estimate(_estimate("cogvideox-5b"))
    assert "500000 clips of 49x480x720 on H200, at 40% of 989 TFLOP/s" in text
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert rows["latents"].split()[-5:] == ["MB", "2.25", "TB", "148.96", "52.3"]
    assert "≤ 1.10 TB" in rows["llm"]
    assert rows["total"].split()[-1] == "61.4"
    assert "996.93      349.9" in text
    assert "without a cache each epoch would pay 61.4 GPU-hours more" in text
    line = summarise_estimate(_estimate("cogvideox-5b"))
    assert line.startswith("estimate: 4.28 TB, 61.4 GPU-hours on H200 at 40%")


def _command(toy_clips: Path, cache: Path, **changes: Any) -> PlanCommand:
    plain: dict[str, Any] = {
        "clips": str(toy_clips), "cache": str(cache), "request": PlanRequest(preset="cogvideox-5b"), "limit": None,
        "video_key": "file_name", "caption_key": "text", "dry_run": True, "models": ModelOptions(), "gpu": "h100",
        "utilisation": 0.4,
    }  # fmt: skip
    return PlanCommand(**{**plain, **changes})


def test_what_is_new_in_a_longer_list_is_told_apart(toy_clips: Path, tmp_path: Path) -> None:
    run_plan_command(_command(toy_clips, tmp_path, limit=9, dry_run=False), as_json=False)
    command = _command(toy_clips, tmp_path, request=PlanRequest())
    assert "of these 3 clips new or changed" in run_plan_command(command, as_json=False)
    estimate = json.loads(run_plan_command(command, as_json=True))["estimate"]
    assert (estimate["clips"], estimate["new_clips"]) == (12, 3)
    assert estimate["new_gpu_hours"] == pytest.approx(estimate["gpu_hours"] / 4)


def test_an_unknown_model_costs_the_estimate_and_not_the_plan(toy_clips: Path, tmp_path: Path) -> None:
    command = _command(toy_clips, tmp_path, models=ModelOptions(llm="some/llm"), dry_run=False)
    said = run_plan_command(command, as_json=False)
    assert "1 shard: planned\nno estimate: the size of some/llm is not known here" in said
    assert (tmp_path / "plan" / "0000.parquet").is_file()
    assert json.loads(run_plan_command(command, as_json=True))["estimate"] is None


def test_a_mixture_of_experts_has_no_estimate() -> None:
    with pytest.raises(UnknownSizeError, match="num_local_experts"):
        LlmSize.of({**TOY_CONFIGS["llm"], "num_local_experts": 8})
    with pytest.raises(UnknownSizeError, match="hidden_size is None, expected a positive whole number"):
        LlmSize.of({})


def test_wrong_options_of_the_estimate_are_told_before_the_list_is_read(tmp_path: Path) -> None:
    for changes, message in (
        ({"gpu": "abacus"}, "--gpu 'abacus': expected one of b200"),
        ({"models": ModelOptions(models=str(tmp_path / "none"))}, "--models .*no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            run_plan_command(_command(tmp_path / "no-list", tmp_path, **changes), as_json=False)
