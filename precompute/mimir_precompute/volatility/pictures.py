"""The pictures of `volatility`: points by t-SNE, and where the values of the two encoders lie."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from mimir_precompute.volatility.fusing import normalise
from mimir_precompute.volatility.measure import KINDS, Branches, PromptStates
from mimir_shared.errors import InputError

_COLOURS: Final = ("#3556c4", "#c2570c", "#1e8a5a")
_BINS: Final = 90


def require_sklearn() -> None:
    """Raise InputError where scikit-learn, which computes t-SNE, is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as fault:
        raise InputError("volatility needs scikit-learn: pip install 'mimir-t2v[analysis]'") from fault


def project(groups: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Lay points (n, H) of several groups into one plane by t-SNE: (n, 2) each. The same for the same seed."""
    from sklearn.manifold import TSNE

    points = np.concatenate(list(groups.values()))
    perplexity = min(30.0, max(1.0, (len(points) - 1) / 3))
    plane = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)
    ends = np.cumsum([len(group) for group in groups.values()])[:-1]
    return dict(zip(groups, np.split(plane, ends), strict=True))


def draw(states: Sequence[PromptStates], branches: Branches, *, trained: bool, seed: int) -> bytes:
    """One PNG of four panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 10), layout="constrained", dpi=110)
    (repeats, prompts), (raw, normalised) = figure.subplots(2, 2)
    first = states[0]
    _scatter(repeats, project(first.repeats, seed))
    repeats.set_title(f"One prompt asked {len(first.repeats['query'])} times (t-SNE):\n{', '.join(KINDS)} tokens")
    _scatter(prompts, project({"T5": branches.t5, "LLM": branches.llm, "fused": branches.fused}, seed))
    fuser = "by the trained fuser" if trained else "by norm, scale and a fixed random projection"
    prompts.set_title(f"{len(states)} prompts through each branch, and their sum (t-SNE),\n{fuser}")
    t5, llm = [state.t5_rows for state in states], [state.llm_rows for state in states]
    _histograms(raw, {"T5": t5, "LLM": llm})
    raw.set_title("Values as they are")
    _histograms(normalised, {"T5": [normalise(rows) for rows in t5], "LLM": [normalise(rows) for rows in llm]})
    normalised.set_title("Values over the root mean square of their token")
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _scatter(axes: Any, groups: Mapping[str, np.ndarray]) -> None:
    for (name, points), colour in zip(groups.items(), _COLOURS, strict=True):
        axes.scatter(points[:, 0], points[:, 1], s=22, color=colour, alpha=0.75, label=name, linewidths=0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(frameon=False)


def _histograms(axes: Any, groups: Mapping[str, Sequence[np.ndarray]]) -> None:
    values = {name: np.concatenate([rows.ravel() for rows in arrays]) for name, arrays in groups.items()}
    # the tails reach far: an axis that shows them all shows nothing of the rest
    edge = max(float(np.quantile(np.abs(flat), 0.995)) for flat in values.values())
    for (name, flat), colour in zip(values.items(), _COLOURS, strict=False):
        axes.hist(np.clip(flat, -edge, edge), bins=_BINS, range=(-edge, edge), density=True, histtype="stepfilled",
                  alpha=0.45, color=colour, label=name)  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("value (what lies further out is counted at the edge)")
    axes.set_ylabel("density")
    axes.legend(frameon=False)
