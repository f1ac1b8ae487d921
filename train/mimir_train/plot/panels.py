"""What is drawn of runs: a panel for each figure, in groups, with the points of every run. No drawing here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mimir_shared.page.charts import Look, Series, smoothed, thinned
from mimir_train.plot.runs import PlottedRun, Points

MOST_POINTS: Final = 600
"""Of a line: more cannot be told apart in a chart, and make a page heavy."""
MOST_MARKED: Final = 30
MAX_WINDOW: Final = 200


@dataclass(frozen=True, kw_only=True)
class PanelKind:
    """One figure of metrics.jsonl, and how it is shown."""

    figure: str
    title: str
    says: str
    is_smoothed: bool = False
    """Single steps are noisy: their mean is the line, they themselves stand faintly behind it."""


@dataclass(frozen=True, kw_only=True)
class PanelGroup:
    name: str
    """Of its picture's file."""
    title: str
    kinds: tuple[PanelKind, ...]


_LOSS_SAYS = "Mean squared error of the predicted v; a model that knows nothing is near 1."
GROUPS: Final = (
    PanelGroup(
        name="loss",
        title="Loss",
        kinds=(
            PanelKind(figure="loss", title="Training loss", says=_LOSS_SAYS, is_smoothed=True),
            PanelKind(
                figure="validation/loss",
                title="Validation loss",
                says="On clips that are never trained on, with the same noise each time; mean over five timesteps.",
            ),
            PanelKind(
                figure="validation/ema_loss",
                title="Validation loss of the average",
                says="Of the first running average of the weights, on the same clips with the same noise.",
            ),
        ),
    ),
    PanelGroup(
        name="fuser",
        title="Token fuser",
        kinds=(
            PanelKind(
                figure="fuser/decoder_zero_proj_norm",
                title="Norm of Zβ",
                says="The zero-initialised map on the LLM's tokens. At zero the model knows T5 alone.",
            ),
            PanelKind(
                figure="fuser/encoder_zero_proj_norm",
                title="Norm of Zθ",
                says="The zero-initialised residual map on T5's tokens.",
            ),
            PanelKind(
                figure="fuser/decoder_share",
                title="Share of the LLM",
                says="Root mean square of the LLM's branch over the sum of all branches of the fused tokens.",
            ),
            PanelKind(
                figure="fuser/encoder_residual_share", title="Share of T5's residual", says="Of what Zθ adds to T5."
            ),
            PanelKind(figure="fuser/t5_share", title="Share of T5", says="1 where nothing else counts yet."),
            PanelKind(
                figure="fuser/decoder_scale_mean",
                title="Scale of the LLM's tokens",
                says="Mean of the learnable scale behind the norm; it starts at T5's root mean square.",
            ),
            PanelKind(
                figure="fuser/stabilizer_offsets_norm",
                title="Norm of the stabilizer's offsets",
                says="The learnable part of the tokens that stand for the instructions.",
            ),
        ),
    ),
    PanelGroup(
        name="optimizer",
        title="Optimizer",
        kinds=(
            PanelKind(figure="lr", title="Learning rate", says="Of the transformer."),
            PanelKind(figure="lr_fuser", title="Learning rate of the fuser", says="Of the token fuser."),
            PanelKind(
                figure="grad_norm",
                title="Gradient norm",
                says="Over all parameters, before clipping.",
                is_smoothed=True,
            ),
        ),
    ),
    PanelGroup(
        name="throughput",
        title="Throughput",
        kinds=(
            PanelKind(figure="samples_per_s", title="Samples a second", says="Clips of all ranks.", is_smoothed=True),
            PanelKind(figure="tokens_per_s", title="Tokens a second", says="Of text and video.", is_smoothed=True),
            PanelKind(
                figure="mfu",
                title="MFU",
                says="Operations of the model, none computed twice, over what the devices could do.",
                is_smoothed=True,
            ),
            PanelKind(
                figure="data_wait_share",
                title="Data-wait share",
                says="Part of a step in which the slowest reader waited for its batch.",
                is_smoothed=True,
            ),
            PanelKind(figure="memory_gb", title="Memory, GB", says="The most that any rank used so far."),
        ),
    ),
)

_NOT_SHOWN: Final = frozenset({"step", "epoch", "step_s", "data_wait_s", "slowest_rank", "slowest_rank_s",
                               "fastest_rank_s"})  # fmt: skip
_QUANTILE = re.compile(r"validation/(ema_)?loss_t(\d+)")


@dataclass(frozen=True, kw_only=True)
class PanelLine:
    """One run in a panel."""

    run: str
    colour: int
    """The number of the run."""
    points: Points
    """Means, where the panel is smoothed."""
    raw: Points
    """What the means are of; empty where the panel is not smoothed."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure of all runs that have it."""

    kind: PanelKind
    lines: tuple[PanelLine, ...]
    y_range: tuple[float, float]
    """What is to be seen."""

    @property
    def is_marked(self) -> bool:
        """Whether there are so few points that each is to be seen."""
        return not self.kind.is_smoothed and max(len(line.points) for line in self.lines) <= MOST_MARKED

    def description(self) -> str:
        """For those who do not see it."""
        ends = "; ".join(f"{line.run} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in self.lines)
        return f"{self.kind.title}: {ends}."

    def series(self) -> list[Series]:
        """As a page draws it: what is faint lies behind."""
        faint = [
            Series(label=f"{line.run}, each step", points=line.raw, colour=line.colour, look="faint")
            for line in self.lines
            if line.raw
        ]
        look: Look = "marked" if self.is_marked else "line"
        return faint + [
            Series(label=line.run, points=line.points, colour=line.colour, look=look) for line in self.lines
        ]


@dataclass(frozen=True, kw_only=True)
class DrawnGroup:
    name: str
    title: str
    panels: tuple[Panel, ...]


def smoothing_window(runs: Sequence[PlottedRun]) -> int:
    """Steps that a mean is over: one in twenty of the longest run, the same for all of them."""
    return max(1, min(MAX_WINDOW, max(len(run.lines) for run in runs) // 20))


def panel_groups(runs: Sequence[PlottedRun], window: int) -> list[DrawnGroup]:
    """The panels of all figures that at least one run has; those that we know nothing of stand in a group of theirs.

    Args:
        window: steps that the means of noisy figures are over.
    """
    names = list(dict.fromkeys(name for run in runs for line in run.lines for name in line))
    groups = [_with_quantiles(group, names) if group.name == "loss" else group for group in GROUPS]
    known = {kind.figure for group in groups for kind in group.kinds} | _NOT_SHOWN
    further = [name for name in names if name not in known and _is_number(runs, name)]
    kinds = tuple(PanelKind(figure=name, title=name, says="") for name in further)
    groups.append(PanelGroup(name="more", title="More", kinds=kinds))
    drawn = []
    for group in groups:
        panels = tuple(_panel(kind, runs, window) for kind in group.kinds if kind.figure in names)
        if panels:
            drawn.append(DrawnGroup(name=group.name, title=group.title, panels=panels))
    return drawn


def _with_quantiles(group: PanelGroup, names: Sequence[str]) -> PanelGroup:
    matches = [match for name in names if (match := _QUANTILE.fullmatch(name))]
    found = sorted((match[1] or "", int(match[2])) for match in matches)  # those of the weights first
    kinds = tuple(
        PanelKind(
            figure=f"validation/{average}loss_t{timestep}",
            title=f"Validation loss{' of the average' if average else ''} at timestep {timestep}",
            says="Timestep 0 is data, 999 is noise." if (average, timestep) == found[0] else "",
        )
        for average, timestep in found
    )
    return PanelGroup(name=group.name, title=group.title, kinds=group.kinds + kinds)


def _is_number(runs: Sequence[PlottedRun], name: str) -> bool:
    values = (line[name] for run in runs for line in run.lines if name in line)
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _panel(kind: PanelKind, runs: Sequence[PlottedRun], window: int) -> Panel:
    lines = []
    for number, run in enumerate(runs):
        raw = run.points(kind.figure)
        if raw:
            points = smoothed(raw, window) if kind.is_smoothed else raw
            lines.append(
                PanelLine(
                    run=run.name,
                    colour=number,
                    points=thinned(points, MOST_POINTS),
                    raw=thinned(raw, MOST_POINTS) if kind.is_smoothed and window > 1 else [],
                )
            )
    return Panel(kind=kind, lines=tuple(lines), y_range=_visible_range(lines))


def _visible_range(lines: Sequence[PanelLine]) -> tuple[float, float]:
    """All lines, and of the raw values behind them all but single spikes; from zero, where that costs little room."""
    values = [y for line in lines for _, y in line.points]
    for line in lines:
        ordered = sorted(y for _, y in line.raw)
        values += ordered[len(ordered) // 50 : len(ordered) - len(ordered) // 50]
    low, high = min(values), max(values)
    if low >= 0 and low < 0.6 * high:
        low = 0.0
    if low == high:  # a constant: in the middle of its panel, or zero at the bottom
        low, high = (0.0, 2 * high) if high > 0 else (high - 1, high + 1) if high < 0 else (0.0, 1.0)
    return low, high
