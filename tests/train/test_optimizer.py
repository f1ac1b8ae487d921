"""The optimizer: who is in which group, and that clipping sees the whole step's gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mimir_train.config import OptimizerConfig
from mimir_train.loop import train
from mimir_train.model.config import FUSERS, DiTConfig, FuserConfig
from mimir_train.model.dit import DiT
from mimir_train.model.fuser import TokenFuser
from mimir_train.optimizer import build_optimizer
from tests.train.caches import metrics_of, tiny_config

DECAYED_DIT = [
    "time_embedding.linear_1.weight",
    "time_embedding.linear_2.weight",
    "patch_embed.proj.weight",
    "patch_embed.text_proj.weight",
    "transformer_blocks.0.norm1.linear.weight",
    "transformer_blocks.0.norm2.linear.weight",
    "transformer_blocks.0.attn1.to_q.weight",
    "transformer_blocks.0.attn1.to_k.weight",
    "transformer_blocks.0.attn1.to_v.weight",
    "transformer_blocks.0.attn1.to_out.0.weight",
    "transformer_blocks.0.ff.net.0.proj.weight",
    "transformer_blocks.0.ff.net.2.weight",
    "norm_out.linear.weight",
    "proj_out.weight",
]
PLAIN_DIT = [
    "time_embedding.linear_1.bias",
    "time_embedding.linear_2.bias",
    "patch_embed.proj.bias",
    "patch_embed.text_proj.bias",
    "transformer_blocks.0.norm1.linear.bias",
    "transformer_blocks.0.norm2.linear.bias",
    "transformer_blocks.0.norm1.norm.weight",
    "transformer_blocks.0.norm1.norm.bias",
    "transformer_blocks.0.norm2.norm.weight",
    "transformer_blocks.0.norm2.norm.bias",
    "transformer_blocks.0.attn1.to_q.bias",
    "transformer_blocks.0.attn1.to_k.bias",
    "transformer_blocks.0.attn1.to_v.bias",
    "transformer_blocks.0.attn1.to_out.0.bias",
    "transformer_blocks.0.attn1.norm_q.weight",
    "transformer_blocks.0.attn1.norm_q.bias",
    "transformer_blocks.0.attn1.norm_k.weight",
    "transformer_blocks.0.attn1.norm_k.bias",
    "transformer_blocks.0.ff.net.0.proj.bias",
    "transformer_blocks.0.ff.net.2.bias",
    "norm_final.weight",
    "norm_final.bias",
    "norm_out.linear.bias",
    "norm_out.norm.weight",
    "norm_out.norm.bias",
    "proj_out.bias",
]
DECAYED_FUSER = ["encoder_zero_proj.weight", "decoder_zero_proj.weight", "instruction_proj.weight"]
PLAIN_FUSER = ["decoder_scale", "stabilizer_offsets"]


def small_models(*, rotary: bool = False, fuser: Any = "mimir") -> tuple[DiT, TokenFuser]:
    sizes = {"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 1, "in_channels": 4, "out_channels": 4}
    dit = DiT(DiTConfig(**sizes, use_rotary_positional_embeddings=rotary))
    return dit, TokenFuser(FuserConfig(switches=FUSERS[fuser], t5_rms=1.0, text_width=16, llm_width=12))


def groups_of(dit: DiT, fuser: TokenFuser) -> dict[tuple[str, float, float], list[str]]:
    """(part, rate, decay) → names of its parameters."""
    optimizer = build_optimizer(OptimizerConfig(learning_rate=1e-5, fuser_learning_rate=1e-4), dit, fuser)
    names = {id(p): name for module in (dit, fuser) for name, p in module.named_parameters()}
    return {
        (group["part"], group["lr"], group["weight_decay"]): [names[id(p)] for p in group["params"]]
        for group in optimizer.param_groups
    }


@pytest.mark.parametrize("rotary", [False, True], ids=["2B", "5B"])
def test_every_parameter_has_its_part_rate_and_decay(rotary: bool) -> None:
    groups = groups_of(*small_models(rotary=rotary))
    expected = {
        ("dit", 1e-5, 1e-4): DECAYED_DIT,
        ("dit", 1e-5, 0.0): PLAIN_DIT,
        ("fuser", 1e-4, 1e-4): DECAYED_FUSER,
        ("fuser", 1e-4, 0.0): PLAIN_FUSER,
    }
    assert {group: sorted(names) for group, names in groups.items()} == {
        group: sorted(names) for group, names in expected.items()
    }


def test_fusers_without_zero_maps_decay_their_seeded_one_and_the_baseline_has_no_group() -> None:
    assert groups_of(*small_models(fuser="norm"))["fuser", 1e-4, 1e-4] == ["decoder_seeded_proj.weight"]
    assert {part for part, _, _ in groups_of(*small_models(fuser="baseline"))} == {"dit"}


@pytest.mark.usefixtures("one_thread")
def test_the_gradient_of_the_whole_step_is_clipped_however_it_was_accumulated(
    small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the optimizer is given has the norm allowed, and the direction of the unclipped gradient."""
    seen: list[list[torch.Tensor]] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None])

    monkeypatch.setattr(torch.optim.AdamW, "step", look)  # nothing moves: every step has the first weights
    for name, micro, limit in (("whole", None, 1e9), ("clipped", None, 0.01), ("parts", 1, 0.01)):
        settings = {"data__micro_batch_size": micro, "optimizer__clip_norm": limit}
        train(tiny_config(small_cache, tmp_path / name, run__max_train_steps=1, **settings))
    whole, clipped, parts = seen
    norm = float(nn.utils.get_total_norm(whole))
    assert norm > 0.1
    for name, grads in (("clipped", clipped), ("parts", parts)):
        assert metrics_of(tmp_path / name)[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)  # before it was clipped
        assert float(nn.utils.get_total_norm(grads)) == pytest.approx(0.01, rel=1e-3)
        for gradient, unclipped in zip(grads, whole, strict=True):
            torch.testing.assert_close(gradient, unclipped * (0.01 / norm), rtol=1e-3, atol=1e-8)
