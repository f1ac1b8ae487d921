"""Nothing non-finite reaches the optimizer: every rank sees every rank's numbers, and all stop alike."""

import math
from collections.abc import Sequence

from mimir_shared.errors import NonFiniteLossError
from mimir_train.cache_reader import Clip

_SHOWN = 8


def refuse_non_finite(everyone: Sequence[Sequence[float]], step: int, clips: Sequence[Clip]) -> None:
    """Raise NonFiniteLossError naming step, rank and clips where a loss or the gradient's norm is not finite.

    Args:
        everyone: of each rank the losses of its clips, the norm of the gradient, and one number more.
        clips: of the global batch, by position.
    """
    share = len(clips) // len(everyone)
    bad = [
        (rank, clips[rank * share + i], loss)
        for rank, row in enumerate(everyone)
        for i, loss in enumerate(row[:-2])
        if not math.isfinite(loss)
    ]
    advice = (
        "stopped before the optimizer's step, the last checkpoint is good. Look at the clips with `mimir-precompute "
        "inspect CACHE KEY`; if nothing is wrong with them, lower the learning rates and go on with "
        "--resume-from-checkpoint latest in a copy of RUN"
    )
    if bad:
        shown = ", ".join(f"{loss} on rank {rank} for clip {clip}" for rank, clip, loss in bad[:_SHOWN])
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise NonFiniteLossError(f"step {step}: the loss is {shown}{more}; {advice}")
    for rank, row in enumerate(everyone):
        if not math.isfinite(row[-2]):
            shown = ", ".join(map(str, clips[rank * share : (rank + 1) * share][:_SHOWN]))
            raise NonFiniteLossError(
                f"step {step}: the norm of the gradient is {row[-2]} on rank {rank}, though every loss is finite; its "
                f"clips: {shown}{' and more' if share > _SHOWN else ''}; {advice}"
            )
