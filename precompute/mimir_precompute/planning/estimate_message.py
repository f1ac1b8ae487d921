"""What `plan` says of costs to people: a table for --dry-run, a line else."""

from mimir_precompute.planning.estimate import Estimate
from mimir_shared.wording import counted, format_size

_WIDTHS = (10, 12, 13, 11)


def describe_estimate(estimate: Estimate) -> str:
    """The table of `plan --dry-run`."""
    name_width = max(len(feature.model) for feature in estimate.features) + 2
    name_width = max(name_width, len(estimate.training.model) + 2)

    def row(feature: str, model: str, *numbers: str) -> str:
        right = "".join(f"{number:>{width}}" for number, width in zip(numbers, _WIDTHS, strict=True))
        return f"{feature:<10}{model:<{name_width}}{right}".rstrip()

    lines = [
        f"estimate for {counted(estimate.clips, 'clip')} of {estimate.bucket} on {estimate.gpu}, at "
        f"{estimate.utilisation:.0%} of {estimate.peak_tflops:.0f} TFLOP/s (dense bfloat16, data sheet):",
        row("feature", "model", "a clip", "all", "TFLOP/clip", "GPU-hours"),
    ]
    for one in estimate.features:
        most = "≤ " if one.at_most else ""
        lines.append(
            row(
                one.feature,
                one.model,
                most + format_size(one.bytes_per_clip),
                most + format_size(one.bytes),
                most + _tflops(one.flops_per_clip),
                _hours(one.gpu_hours, at_most=one.at_most),
            )
        )
    clip_bytes = sum(one.bytes_per_clip for one in estimate.features)
    flops = sum(one.flops_per_clip for one in estimate.features)
    total = (format_size(clip_bytes), format_size(estimate.bytes), _tflops(flops), _hours(estimate.gpu_hours))
    training = estimate.training
    lines += [
        row("total", "", *total),
        row("training", training.model, "", "", _tflops(training.flops_per_clip), _hours(training.gpu_hours_per_epoch)),
        f"training is forward and backward, an epoch; without a cache each epoch would pay "
        f"{_hours(estimate.saved_gpu_hours_per_epoch)} GPU-hours more for the encoders",
    ]
    if estimate.new_clips == 0:
        lines.append("none of these clips is new or changed")
    elif estimate.new_clips != estimate.clips:
        lines.append(
            f"of these {counted(estimate.new_clips, 'clip')} new or changed: {_hours(estimate.new_gpu_hours)} GPU-hours"
        )
    lines.append("≤: as if every text were as long as it may be; answers in batches of 256")
    return "\n".join(lines)


def summarise_estimate(estimate: Estimate) -> str:
    """One line: what all of it takes."""
    return (
        f"estimate: {format_size(estimate.bytes)}, {_hours(estimate.gpu_hours)} GPU-hours on {estimate.gpu} at "
        f"{estimate.utilisation:.0%} of its data sheet (--dry-run says what for)"
    )


def _tflops(flops: int) -> str:
    return f"{flops / 1e12:.2f}" if flops >= 1e10 else f"{flops / 1e12:.1e}"


def _hours(hours: float, *, at_most: bool = False) -> str:
    if 0 < hours < 0.1:
        return "< 0.1"
    return f"{'≤ ' if at_most else ''}{hours:,.1f}"
