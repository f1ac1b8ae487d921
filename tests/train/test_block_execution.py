"""A block may keep less for its backward, or be compiled: what it computes stays the same."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mimir_train.block_execution import is_product, set_block_execution
from mimir_train.config import ActivationCheckpointing
from mimir_train.loop import train
from mimir_train.model.config import DiTConfig
from mimir_train.model.dit import DiT
from tests.train.caches import metrics_of, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DiTConfig(
    num_attention_heads=2, attention_head_dim=16, num_layers=3, in_channels=4, out_channels=4, text_embed_dim=16,
    time_embed_dim=32, use_rotary_positional_embeddings=True,
)  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts what is computed: matrix products and attention, and everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts["products" if is_product(func.name()) else "others"] += 1
        return func(*args, **(kwargs or {}))


def step(checkpointing: ActivationCheckpointing, precision: torch.dtype) -> tuple[dict[str, Tensor], Counter[str]]:
    torch.manual_seed(0)
    dit = DiT(CONFIG)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    set_block_execution(dit, checkpointing=checkpointing, compiled=False)
    noisy_latents, condition_tokens = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        v_prediction = dit(noisy_latents, condition_tokens, torch.tensor([5, 900]))
    with Operations() as in_backward:
        v_prediction.square().mean().backward()
    results = {name: parameter.grad for name, parameter in dit.named_parameters() if parameter.grad is not None}
    assert len(results) == len(list(dit.parameters()))
    return {**results, "v": v_prediction.detach()}, in_backward.counts


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_recomputing_changes_no_bit_and_selective_repeats_no_product(precision: torch.dtype) -> None:
    kept, of_kept = step("none", precision)
    selective, of_selective = step("selective", precision)
    full, of_full = step("full", precision)
    for name, tensor in kept.items():
        assert torch.equal(selective[name], tensor), name
        assert torch.equal(full[name], tensor), name
    assert of_selective["products"] == of_kept["products"]
    assert of_selective["others"] > of_kept["others"]
    # of each block: 8 linear maps and attention, but the last map, whose result no gradient needs
    assert of_full["products"] >= of_kept["products"] + 8 * CONFIG.num_layers


def test_compiled_blocks_give_the_same_losses_from_one_graph(
    small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # captured, differentiated and run as graphs; only the generated C++ is left out, whose compiler takes a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    settings = {"run__max_train_steps": 3, "parallel__activation_checkpointing": "selective"}
    train(tiny_config(small_cache, tmp_path / "plain", **settings))
    torch._dynamo.utils.counters.clear()
    train(tiny_config(small_cache, tmp_path / "compiled", parallel__compile=True, **settings))
    for line, other in zip(metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "compiled"), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # one for all blocks
    assert not torch._dynamo.utils.counters["graph_break"]
