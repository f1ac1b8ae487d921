"""How a block of the transformer is run: what it keeps for its backward, and whether it is compiled.

Set from outside on a plain model, block by block; names of parameters stay as they are. It goes inside of sharding:
a block's parameters are whole while it is run, and again while it is recomputed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import MethodType
from typing import Any, Final

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mimir_train.config import ActivationCheckpointing
from mimir_train.model.dit import DiT

_MATMULS: Final = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation"})


def set_block_execution(dit: DiT, *, checkpointing: ActivationCheckpointing, compiled: bool) -> None:
    """Let every block keep less for its backward, or run compiled.

    Args:
        checkpointing: none: all is kept. full: a block keeps its inputs, and is computed again in backward, a third
            more work. selective: results of matrix products and of attention are kept besides, and only what lies
            between them (norms, GELU, rotations, gates) is computed again: little work, less than half the memory.
        compiled: by torch.compile; blocks are alike, so that one compilation serves all.
    """
    for block in dit.transformer_blocks:
        if checkpointing == "full":
            block.forward = MethodType(_recomputed, block)
        elif checkpointing == "selective":
            block.forward = MethodType(_recomputed_selectively, block)
        if compiled:
            block.forward = torch.compile(block.forward)


def _recomputed(block: nn.Module, *inputs: Any) -> Any:  # Any: a block's inputs and outputs, passed on as they are
    # nothing in a block is random
    return checkpoint(type(block).forward, block, *inputs, use_reentrant=False, preserve_rng_state=False)


def _recomputed_selectively(block: nn.Module, *inputs: Any) -> Any:  # Any: as above
    return checkpoint(
        type(block).forward, block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_products
    )


def is_product(operation: str) -> bool:
    """Whether an operation of torch or another library is a matrix product, or attention in any of its kernels."""
    return operation in _MATMULS or "attention" in operation or "flash_fwd" in operation


def _policy(
    _context: object, operation: Any, *_inputs: object, **_named: object
) -> CheckpointPolicy:  # Any: an OpOverload
    return CheckpointPolicy.MUST_SAVE if is_product(operation.name()) else CheckpointPolicy.PREFER_RECOMPUTE


_keep_products: Final[Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]] = partial(
    create_selective_checkpoint_contexts, _policy
)
