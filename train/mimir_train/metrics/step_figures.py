"""What metrics.jsonl says of a step: loss and rates, how fast it went, and what it waited for.

tokens_per_s      text and video tokens of all ranks, over the step's seconds
mfu               model FLOPs over what all devices could do in that time (model_flops.py); absent without a peak
data_wait_s       of the rank that waited longest for its batch, and data_wait_share, its part of the step
clips, pack_fill  with packs: clips of the step, and the share of its packs' budget that tokens fill
memory_gb         the most that was in use on any rank so far, 10^9 bytes: of a CUDA device what torch allocated,
                  else of the process
slowest_rank      with several ranks: the one whose wait for data and forward took longest, slowest_rank_s, and
                  fastest_rank_s of the quickest. Later all wait for one another, and no rank's own time can be
                  told apart.
"""

import resource

import torch

from mimir_shared.transformer_flops import num_video_tokens, training_flops
from mimir_train.batch import FeatureLayout, TrainingBatch
from mimir_train.config import TrainConfig
from mimir_train.metrics.model_flops import device_peak_tflops, transformer_sizes
from mimir_train.metrics.step_report import RankLoad, StepReport
from mimir_train.model.config import FuserConfig
from mimir_train.model.fuser import TokenFuser
from mimir_train.parallel.processes import Parallel
from mimir_train.parallel.sharding import gathered

Figures = dict[str, float | int | str]
"""One step's: step, epoch, loss and so on."""


class StepMeter:
    """Counts the work of steps, and puts it beside the seconds that they took."""

    def __init__(self, config: TrainConfig, layout: FeatureLayout, fuser: FuserConfig, parallel: Parallel) -> None:
        self._sizes = transformer_sizes(config.model.transformer)
        self._frozen = config.model.lora is not None
        self._layout = layout
        self._fuser = fuser
        self._tokens_per_pack = config.data.tokens_per_pack
        self._device = parallel.device
        self._peak_tflops = device_peak_tflops(parallel.device, config.run.precision, config.run.peak_tflops)

    def load(self, batch: TrainingBatch, *, data_wait_s: float, forward_s: float) -> RankLoad:
        """This rank's part of a step."""
        num_text = self._layout.t5_rows
        num_text += self._fuser.num_instructions if self._fuser.appends_stabilizer(batch.step) else 0
        sizes = [self._layout.latent_sizes[clip.bucket] for clip in batch.clips]
        return RankLoad(
            tokens=sum(num_text + num_video_tokens(self._sizes, size) for size in sizes),
            model_flops=float(sum(training_flops(self._sizes, size, num_text, frozen=self._frozen) for size in sizes)),
            data_wait_s=data_wait_s,
            forward_s=forward_s,
            memory_bytes=peak_memory_bytes(self._device),
        )

    def figures(self, batch: TrainingBatch, report: StepReport, rates: dict[str, float], step_s: float) -> Figures:
        """All that is said of every step.

        Args:
            step_s: from the wait for its batch to the optimizer's step.
        """
        loads = report.loads
        data_wait_s = max(load.data_wait_s for load in loads)
        figures: Figures = {
            "step": batch.step,
            "epoch": batch.epoch,
            "bucket": batch.bucket,
            **self._pack_figures(batch, report),
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": rates["dit"],
            **({"lr_fuser": rates["fuser"]} if "fuser" in rates else {}),
            "step_s": step_s,
            "data_wait_s": data_wait_s,
            "data_wait_share": min(data_wait_s / step_s, 1.0),
            "samples_per_s": sum(len(rank.clip_losses) for rank in report.ranks) / step_s,
            "tokens_per_s": sum(load.tokens for load in loads) / step_s,
            "memory_gb": max(load.memory_bytes for load in loads) / 1e9,
        }
        if self._peak_tflops is not None:
            could_do = self._peak_tflops * 1e12 * step_s * len(loads)
            figures["mfu"] = sum(load.model_flops for load in loads) / could_do
        if len(loads) > 1:
            own_s = [load.own_s for load in loads]
            figures["slowest_rank"] = own_s.index(max(own_s))
            figures["slowest_rank_s"], figures["fastest_rank_s"] = max(own_s), min(own_s)
        return figures

    def _pack_figures(self, batch: TrainingBatch, report: StepReport) -> Figures:
        if self._tokens_per_pack is None:
            return {}
        budget = self._tokens_per_pack * len(batch.packs) * len(report.ranks)
        return {"clips": batch.step_clips, "pack_fill": sum(load.tokens for load in report.loads) / budget}


def peak_memory_bytes(device: torch.device) -> int:
    """The most that was in use so far: what torch allocated on a CUDA device, else what the process had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux tells kibibytes


@torch.no_grad()
def fuser_figures(fuser: TokenFuser, batch: TrainingBatch, parallel: Parallel) -> dict[str, float]:
    """Norms and shares of the fuser's branches on the first rank's clips; {} on other ranks.

    All ranks must call it, for the parts of a sharded fuser are fetched by all at once.
    """
    with gathered(fuser):
        if not parallel.is_first:
            return {}
        text = batch.to(parallel.device).text
        return {f"fuser/{name}": value for name, value in fuser.figures(text.t5_embeds, text.llm).items()}
