"""The token fuser: its algebra, what it is at step zero, and what it learns first."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from mimir_train.model.config import FUSERS, DiTConfig, FuserConfig, FuserName, FuserSwitches
from mimir_train.model.dit import DiT
from mimir_train.model.fuser import LlmFeatures, TokenFuser, join_llm_tokens

B, L, D, H, M, A, K = 3, 10, 8, 6, 7, 5, 4
T5_RMS = 0.2
EQUAL_TO_T5_AT_STEP_ZERO: list[FuserName] = ["baseline", "zeroconv", "norm_zeroconv"]
NAMES = get_args(FuserName)


def fuser_of(name: FuserName) -> TokenFuser:
    torch.manual_seed(0)
    return TokenFuser(FuserConfig(switches=FUSERS[name], t5_rms=T5_RMS, text_width=D, llm_width=H))


def features(query_lengths: tuple[int, ...] = (7, 3, 0), answer_lengths: tuple[int, ...] = (5, 2, 4)) -> LlmFeatures:
    """Hidden states whose pad rows hold what must never be read."""
    torch.manual_seed(1)
    query_mask = torch.arange(M) < torch.tensor(query_lengths)[:, None]
    answer_mask = torch.arange(A) < torch.tensor(answer_lengths)[:, None]
    return LlmFeatures(
        query_hidden=torch.randn(B, M, H).masked_fill(~query_mask[:, :, None], torch.nan),
        query_mask=query_mask,
        answer_hidden=torch.randn(B, A, H).masked_fill(~answer_mask[:, :, None], torch.nan),
        answer_mask=answer_mask,
        instruction_hidden=torch.randn(B, K, H),
    )


def t5() -> Tensor:
    torch.manual_seed(2)
    return T5_RMS * torch.randn(B, L, D)


def joined_one_by_one(llm: LlmFeatures, num_tokens: int) -> list[Tensor]:
    """Query then answer of each sample, without pads: (at most num_tokens, H) each."""
    return [
        torch.cat([query[query_mask], answer[answer_mask]])[:num_tokens]
        for query, query_mask, answer, answer_mask in zip(*llm[:4], strict=True)
    ]


@pytest.mark.parametrize("num_tokens", [1, 6, 7, 10, 12, 20])
def test_answer_follows_query_without_a_gap(num_tokens: int) -> None:
    llm = features()
    tokens, mask = join_llm_tokens(llm, num_tokens)
    assert tokens.shape == (B, num_tokens, H)
    for row, row_mask, wanted in zip(tokens, mask, joined_one_by_one(llm, num_tokens), strict=True):
        assert torch.equal(row[: len(wanted)], wanted)
        assert not row[len(wanted) :].any()
        assert row_mask.tolist() == [True] * len(wanted) + [False] * (num_tokens - len(wanted))


def test_masks_need_not_be_prefixes() -> None:
    llm = features()._replace(query_hidden=torch.randn(B, M, H), answer_hidden=torch.randn(B, A, H))
    llm = llm._replace(query_mask=torch.rand(B, M) < 0.5, answer_mask=torch.rand(B, A) < 0.5)
    for row, wanted in zip(join_llm_tokens(llm, L)[0], joined_one_by_one(llm, L), strict=True):
        assert torch.equal(row[: len(wanted)], wanted)


def test_mimir_computes_the_formula_of_the_paper() -> None:
    fuser = fuser_of("mimir")
    for parameter in fuser.parameters():
        torch.nn.init.normal_(parameter)
    weights = dict(fuser.named_parameters())
    llm, t5_embeds = features(), t5()
    condition_tokens = fuser(t5_embeds, llm)
    assert condition_tokens.shape == (B, L + K, D)

    def normed(rows: Tensor) -> Tensor:
        return weights["decoder_scale"] * rows / (rows.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()

    for row in range(B):
        fused_tokens = t5_embeds[row] + t5_embeds[row] @ weights["encoder_zero_proj.weight"].T
        llm_tokens = joined_one_by_one(llm, L)[row]
        fused_tokens[: len(llm_tokens)] += normed(llm_tokens) @ weights["decoder_zero_proj.weight"].T
        instruction_tokens = normed(llm.instruction_hidden[row]) @ weights["instruction_proj.weight"].T
        wanted = torch.cat([fused_tokens, instruction_tokens + weights["stabilizer_offsets"]])
        torch.testing.assert_close(condition_tokens[row], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EQUAL_TO_T5_AT_STEP_ZERO)
def test_fuser_equals_t5_alone_at_step_zero(name: FuserName) -> None:
    assert torch.equal(fuser_of(name)(t5(), features()), t5())


@pytest.mark.parametrize("name", ["zeroconv_ss", "mimir"])
def test_fuser_with_stabilizer_off_equals_t5_alone_at_step_zero(name: FuserName) -> None:
    fuser = fuser_of(name)
    assert torch.equal(fuser(t5(), features(), append_stabilizer=False), t5())
    with_stabilizer = fuser(t5(), features())
    assert torch.equal(with_stabilizer[:, :L], t5())
    assert with_stabilizer.shape == (B, L + K, D)


@pytest.mark.parametrize("name", ["direct", "norm", "norm_ss"])
def test_fuser_without_zeroconv_changes_t5_at_step_zero(name: FuserName) -> None:
    change = fuser_of(name)(t5(), features(), append_stabilizer=False) - t5()
    assert change.abs().amax(dim=(1, 2)).min() > 0.01


def test_model_equals_the_t5_only_model_at_step_zero() -> None:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "in_channels": 4, "out_channels": 4}
    dit = DiT(DiTConfig(**sizes, text_embed_dim=D))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    noisy_latents, timesteps = torch.randn(B, 4, 2, 4, 4), torch.tensor([0, 500, 999])
    t5_only = dit(noisy_latents, t5(), timesteps)
    for name in [*EQUAL_TO_T5_AT_STEP_ZERO, "zeroconv_ss", "mimir"]:
        condition_tokens = fuser_of(name)(t5(), features(), append_stabilizer=False)
        assert torch.equal(dit(noisy_latents, condition_tokens, timesteps), t5_only), name
    for name in ["direct", "norm"]:
        assert not torch.allclose(dit(noisy_latents, fuser_of(name)(t5(), features()), timesteps), t5_only), name


PARAMETERS: dict[FuserName, set[str]] = {
    "baseline": set(),
    "direct": {"decoder_seeded_proj.weight"},
    "norm": {"decoder_seeded_proj.weight", "decoder_scale"},
    "norm_ss": {"decoder_seeded_proj.weight", "decoder_scale", "instruction_proj.weight", "stabilizer_offsets"},
    "zeroconv": {"encoder_zero_proj.weight", "decoder_zero_proj.weight"},
    "zeroconv_ss": {
        "encoder_zero_proj.weight",
        "decoder_zero_proj.weight",
        "instruction_proj.weight",
        "stabilizer_offsets",
    },
    "norm_zeroconv": {"encoder_zero_proj.weight", "decoder_zero_proj.weight", "decoder_scale"},
    "mimir": {
        "encoder_zero_proj.weight",
        "decoder_zero_proj.weight",
        "decoder_scale",
        "instruction_proj.weight",
        "stabilizer_offsets",
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_each_switch_brings_its_parameters_and_each_gets_a_gradient(name: FuserName) -> None:
    fuser = fuser_of(name)
    assert {parameter for parameter, _ in fuser.named_parameters()} == PARAMETERS[name]
    condition_tokens = fuser(t5(), features())
    assert condition_tokens.shape == (B, L + K if FUSERS[name].stabilizer else L, D)
    if not PARAMETERS[name]:
        return
    reader = torch.nn.Linear(D, 3)  # stands for the transformer, which reads every token
    optimizer = torch.optim.SGD(fuser.parameters(), lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        reader(fuser(t5(), features())).square().sum().backward()
        for parameter_name, parameter in fuser.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), f"{parameter_name}: pad rows leak into the gradient"
            # behind a map that is zero, the scale waits one step
            waits = parameter_name == "decoder_scale" and FUSERS[name].zero_conv and not FUSERS[name].stabilizer
            assert bool(parameter.grad.any()) == (step > 0 or not waits), f"{parameter_name} at step {step}"
        optimizer.step()
    if FUSERS[name].zero_conv:
        assert not torch.equal(fuser(t5(), features())[:, :L], t5())


@pytest.mark.parametrize("name", NAMES)
def test_pad_rows_and_the_zero_unconditional_stay_zero(name: FuserName) -> None:
    fuser = fuser_of(name)
    with torch.no_grad():
        for parameter in fuser.parameters():
            parameter.add_(torch.randn_like(parameter))  # as after training
        with_text = fuser(t5(), features(), append_stabilizer=False)
        if FUSERS[name].decoder:
            decoder_tokens = fuser.decode(features(), L)
            lengths = [len(row) for row in joined_one_by_one(features(), L)]
            for tokens, length in zip(decoder_tokens, lengths, strict=True):
                assert not tokens[length:].any()
                assert tokens[:length].any(dim=1).all()
        llm = LlmFeatures(*(torch.zeros_like(tensor) for tensor in features()))
        condition_tokens = fuser(torch.zeros(B, L, D), llm)
    assert with_text.isfinite().all()
    assert not condition_tokens[:, :L].any()
    if fuser.stabilizer_offsets is not None:  # they tell nothing of the prompt, and stay
        assert torch.equal(condition_tokens[:, L:], fuser.stabilizer_offsets.expand(B, K, D))


def test_norm_brings_the_llm_into_the_range_of_t5() -> None:
    torch.manual_seed(0)
    config = FuserConfig(switches=FUSERS["norm_ss"], t5_rms=T5_RMS, text_width=256, llm_width=192)
    hidden = 50 * torch.randn(2, 40, 192)
    mask = torch.ones(2, 40, dtype=torch.bool)
    llm = LlmFeatures(hidden, mask, hidden, mask, hidden[:, :K])

    def rms(tokens: Tensor) -> float:
        return tokens.square().mean().sqrt().item()

    fuser = TokenFuser(config)
    assert rms(fuser.decode(llm, 80)) == pytest.approx(T5_RMS, rel=0.05)
    assert rms(fuser.stabilize(llm.instruction_hidden)) == pytest.approx(T5_RMS, rel=0.05)
    raw = TokenFuser(replace(config, switches=FUSERS["direct"]))
    assert rms(raw.decode(llm, 80)) == pytest.approx(50, rel=0.05)


def test_the_projection_in_place_of_zeroconv_is_the_same_in_every_run() -> None:
    first = fuser_of("direct").state_dict()["decoder_seeded_proj.weight"]
    torch.manual_seed(99)
    config = FuserConfig(switches=FUSERS["norm_ss"], t5_rms=1.0, text_width=D, llm_width=H)
    assert torch.equal(TokenFuser(config).state_dict()["decoder_seeded_proj.weight"], first)


def test_stabilizer_is_appended_from_its_start_step_on() -> None:
    config = FuserConfig(switches=FUSERS["mimir"], t5_rms=1.0, stabilizer_start_step=100)
    assert [config.appends_stabilizer(step) for step in (0, 99, 100, 5000)] == [False, False, True, True]
    assert not FuserConfig(switches=FUSERS["zeroconv"], t5_rms=1.0).appends_stabilizer(5000)


def test_tokens_come_in_the_dtype_of_the_weights() -> None:
    llm = LlmFeatures(*(tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in features()))
    t5_embeds = t5().bfloat16()
    assert torch.equal(fuser_of("mimir")(t5_embeds, llm)[:, :L], t5_embeds.float())
    assert fuser_of("mimir").bfloat16()(t5_embeds, llm).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fuser_of("norm_zeroconv")(t5_embeds, llm), t5_embeds.float())


def test_figures_show_each_branch_growing() -> None:
    fuser = fuser_of("mimir")
    figures = fuser.figures(t5(), features())
    assert figures.pop("stabilizer_offsets_norm") == pytest.approx(0.02 * (K * D) ** 0.5, rel=0.5)
    assert figures == {
        "encoder_zero_proj_norm": 0.0,
        "decoder_zero_proj_norm": 0.0,
        "decoder_scale_mean": pytest.approx(T5_RMS),
        "t5_share": 1.0,
        "encoder_residual_share": 0.0,
        "decoder_share": 0.0,
    }
    assert fuser.encoder_zero_proj is not None
    torch.nn.init.eye_(fuser.encoder_zero_proj.weight)
    figures = fuser.figures(t5(), features())
    assert figures["encoder_zero_proj_norm"] == pytest.approx(D**0.5)
    assert figures["t5_share"] == figures["encoder_residual_share"] == pytest.approx(0.5)
    assert fuser_of("baseline").figures(t5()) == {"t5_share": 1.0, "encoder_residual_share": 0.0}


def test_named_fusers_are_the_rows_of_the_paper_and_the_one_it_leaves_out() -> None:
    assert set(FUSERS) == set(NAMES)
    rows = {(s.norm, s.zero_conv, s.stabilizer) for s in FUSERS.values() if s.decoder}
    assert len(rows) == 7
    assert {name for name, switches in FUSERS.items() if not switches.needs_llm} == {"baseline"}
    assert fuser_of("baseline")(t5()).shape == (B, L, D), "the baseline runs without the LLM's features"


def test_input_that_does_not_fit_the_fuser_is_refused() -> None:
    fuser = fuser_of("mimir")
    with pytest.raises(ValueError, match="t5_embeds are 9 wide, the fuser takes 8"):
        fuser(torch.zeros(B, L, 9), features())
    with pytest.raises(ValueError, match="needs the LLM's features, and got none"):
        fuser(t5())
    with pytest.raises(ValueError, match="query_hidden is 5 wide, the fuser takes 6"):
        fuser(t5(), features()._replace(query_hidden=torch.zeros(B, M, 5)))
    with pytest.raises(ValueError, match=r"instruction_hidden has 3 rows.* takes 4"):
        fuser(t5(), features()._replace(instruction_hidden=torch.zeros(B, 3, H)))
    with pytest.raises(ValueError, match="t5_rms must be positive, got 0"):
        FuserConfig(switches=FUSERS["mimir"], t5_rms=0.0)
    with pytest.raises(ValueError, match="norm has nothing to normalise"):
        FuserConfig(switches=FuserSwitches(decoder=False, norm=True), t5_rms=1.0)
