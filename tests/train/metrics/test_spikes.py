"""A step that stands far above those before it is recorded, with its clips; it is trained all the same."""

from collections.abc import Sequence

import numpy as np

from mimir_shared.clip_table import Clip
from mimir_train.metrics.spikes import SpikeWatch, is_spike
from mimir_train.metrics.step_report import RankLoad, RankReport, StepReport

LOAD = RankLoad(tokens=1, model_flops=1.0, data_wait_s=0.0, forward_s=0.0, memory_bytes=1)


def report(losses: Sequence[Sequence[float]], grad_norm: float) -> StepReport:
    return StepReport(
        tuple(
            RankReport(
                clip_losses=tuple(own), attempts=(0,) * len(own), grad_norm=grad_norm, stop_requested=False,
                save_failed=False, load=LOAD,
            )
            for own in losses
        )
    )  # fmt: skip


def find_clips(attempts: Sequence[int]) -> list[Clip]:
    return [Clip(key=f"k{i}", shard=0, row=i, bucket="b", caption="", source=f"{i}.mp4") for i in range(len(attempts))]


def test_a_spike_names_the_clips_with_the_largest_losses_over_all_ranks() -> None:
    said: list[str] = []
    spikes = SpikeWatch(said.append)
    noise = np.random.default_rng(0)
    for step in range(40):
        loss = 1.0 + 0.1 * float(noise.standard_normal())
        assert spikes.note(report([[loss, loss], [loss, loss]], 0.5), step, find_clips) == {}
    figures = spikes.note(report([[1.0, 9.0], [1.0, 30.0]], 0.6), 40, find_clips)
    assert figures["spike_clips"] == "k3, k1, k0, k2"
    assert 9.0 < float(figures["loss_spike"]) < 11.5
    assert "grad_norm_spike" not in figures
    (line,) = said
    assert line.startswith("step 40: loss 10.25 is 10.")
    assert "the largest losses: 30 for clip 'k3' (shard 0, row 3, source 3.mp4), 9 for clip 'k1'" in line


def test_a_gradient_may_be_a_spike_by_itself() -> None:
    spikes = SpikeWatch(lambda line: None)
    for step in range(25):
        spikes.note(report([[1.0]], 0.5), step, find_clips)
    assert spikes.note(report([[1.0]], 5.0), 25, find_clips) == {"grad_norm_spike": 10.0, "spike_clips": "k0"}


def test_few_steps_wide_noise_and_small_rises_are_no_spikes() -> None:
    assert not is_spike(100.0, [1.0] * 19)
    assert is_spike(100.0, [1.0] * 20)
    assert not is_spike(1.9, [1.0] * 100)  # less than twice the median
    assert not is_spike(3.0, [0.2, 0.6, 1.0, 1.6, 2.5] * 20)  # within what came before
