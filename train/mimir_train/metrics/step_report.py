"""What the ranks tell one another of a step, before the optimizer may act on it.

Every rank gets every rank's numbers, so that all judge alike: a non-finite loss stops all of them, and so does a
request to stop that reached one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate

from mimir_shared.clip_table import Clip
from mimir_shared.errors import NonFiniteLossError
from mimir_train.parallel.processes import Parallel

_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class RankLoad:
    """What a step was for one rank: the work in it, and the time and memory that this took."""

    tokens: int
    """Of text and video."""
    model_flops: float
    """Of forward and backward; see `mimir_shared.transformer_flops`."""
    data_wait_s: float
    forward_s: float
    """Until its last forward was done, or on a CUDA device launched: before gradients are exchanged."""
    memory_bytes: int
    """The most that was in use so far."""

    @property
    def own_s(self) -> float:
        """Seconds that this rank spent before it could be held up by another."""
        return self.data_wait_s + self.forward_s


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """One rank's step."""

    clip_losses: tuple[float, ...]
    attempts: tuple[int, ...]
    """How many stand-ins each clip took; zeros, unless clips could not be read."""
    grad_norm: float
    """Of the gradient averaged over ranks, before it was clipped."""
    stop_requested: bool
    save_failed: bool
    """Whether the checkpoint that was being written came to a fault."""
    load: RankLoad


@dataclass(frozen=True)
class StepReport:
    """A step over all ranks."""

    ranks: tuple[RankReport, ...]

    @property
    def loss(self) -> float:
        """Mean over the global batch, summed in the order of the batch: the same for any number of ranks."""
        losses = [loss for rank in self.ranks for loss in rank.clip_losses]
        return sum(losses) / len(losses)

    @property
    def grad_norm(self) -> float:
        return self.ranks[0].grad_norm

    @property
    def attempts(self) -> tuple[int, ...]:
        """Of every position of the global batch."""
        return tuple(attempts for rank in self.ranks for attempts in rank.attempts)

    @property
    def loads(self) -> tuple[RankLoad, ...]:
        return tuple(rank.load for rank in self.ranks)

    @property
    def stop_requested(self) -> bool:
        return any(rank.stop_requested for rank in self.ranks)

    @property
    def save_failed(self) -> bool:
        return any(rank.save_failed for rank in self.ranks)


def exchange(parallel: Parallel, own: RankReport, most_clips: int) -> StepReport:
    """Tell all ranks of this rank's step, and learn of theirs.

    Args:
        most_clips: that any rank has in any step: with packs some have fewer, and all must say equally much.
    """
    count = len(own.clip_losses)
    unused = [0.0] * (most_clips - count)
    flags = (float(own.stop_requested), float(own.save_failed))
    rows = parallel.gather(
        [*own.clip_losses, *unused, *own.attempts, *unused, count, own.grad_norm, *flags, *astuple(own.load)]
    )
    return StepReport(tuple(_parse(row, most_clips) for row in rows))


def _parse(row: Sequence[float], most_clips: int) -> RankReport:
    """One rank's report from its numbers, in the order in which `exchange` gives them."""
    count, grad_norm, stop_requested, save_failed, *load = row[2 * most_clips :]
    clip_losses, attempts = row[: int(count)], row[most_clips : most_clips + int(count)]
    tokens, model_flops, data_wait_s, forward_s, memory_bytes = load
    return RankReport(
        clip_losses=tuple(clip_losses),
        attempts=tuple(int(value) for value in attempts),
        grad_norm=grad_norm,
        stop_requested=stop_requested > 0,
        save_failed=save_failed > 0,
        load=RankLoad(
            tokens=int(tokens),
            model_flops=model_flops,
            data_wait_s=data_wait_s,
            forward_s=forward_s,
            memory_bytes=int(memory_bytes),
        ),
    )


def refuse_non_finite(report: StepReport, step: int, find_clips: Callable[[Sequence[int]], Sequence[Clip]]) -> None:
    """Raise NonFiniteLossError naming step, rank and clips where a loss or the gradient's norm is not finite.

    Args:
        find_clips: gives the clips of the global batch, by position, from how many stand-ins each took.
    """
    finite = all(math.isfinite(x) for rank in report.ranks for x in (*rank.clip_losses, rank.grad_norm))
    if finite:
        return
    clips = find_clips(report.attempts)
    ends = list(accumulate(len(rank.clip_losses) for rank in report.ranks))
    clips_of = [clips[end - len(rank.clip_losses) : end] for rank, end in zip(report.ranks, ends, strict=True)]
    advice = (
        "stopped before the optimizer's step: no checkpoint holds what would have come of it. Look at the clips with "
        "`mimir-precompute inspect CACHE KEY`; if nothing is wrong with them, begin a new run with lower rates, in "
        "another --output-dir: one that goes on keeps its own"
    )
    bad = [
        f"{loss} on rank {number} for clip {clips_of[number][i]}"
        for number, rank in enumerate(report.ranks)
        for i, loss in enumerate(rank.clip_losses)
        if not math.isfinite(loss)
    ]
    if bad:
        raise NonFiniteLossError(f"step {step}: the loss is {_some(bad)}; {advice}")
    # the norm is of all ranks' gradients together: none can be blamed by it
    largest = []
    for number, rank in enumerate(report.ranks):
        loss, clip = max(zip(rank.clip_losses, clips_of[number], strict=True), key=lambda pair: pair[0])
        largest.append(f"{loss:.4g} on rank {number} for clip {clip}")
    raise NonFiniteLossError(
        f"step {step}: the norm of the gradient over all ranks is {report.grad_norm}, though all losses are finite; "
        f"the largest of each rank: {_some(largest)}; {advice}"
    )


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
