"""A worker process as `encode --workers` starts it, with fake encoders: `python -m tests.precompute.team.fake_worker`.

What they are to do stands in the option --vae, as JSON: fields of Misfortune.
"""

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mimir_precompute.config import ModelOptions
from mimir_precompute.encoders.base import Encoded, Encoder, EncoderInput
from mimir_precompute.team.worker_process import main
from mimir_shared.errors import CacheError, MachineError
from mimir_shared.features import FeatureName
from mimir_shared.plan_file import Plan
from tests.fake_encoders import FakeEncoders


@dataclass(frozen=True, kw_only=True)
class Misfortune:
    """What befalls a worker."""

    clip_s: float = 0.0
    key: str = ""
    """The clip at which it happens; none where this is empty."""
    what: str = "killed"
    """killed, bug, damaged (exit code 4), disk (exit code 5)."""
    once: str = ""
    """A file that is made the first time, after which it does not happen again."""

    def models(self) -> ModelOptions:
        return ModelOptions(vae=json.dumps(asdict(self)), device="cpu")


class UnluckyEncoders(FakeEncoders):
    """Fake encoders that a misfortune befalls."""

    def __init__(self, misfortune: Misfortune) -> None:
        super().__init__(clip_s=misfortune.clip_s)
        self._misfortune = misfortune

    def build(self, feature: FeatureName) -> Encoder:
        encoder = super().build(feature)
        encode = encoder.encode

        def encode_if_lucky(batch: Sequence[EncoderInput]) -> list[Encoded]:
            if self._misfortune.key in [item.key for item in batch]:
                strike(self._misfortune)
            return encode(batch)

        encoder.encode = encode_if_lucky  # type: ignore[method-assign]
        return encoder


def strike(misfortune: Misfortune) -> None:
    if misfortune.once:
        try:
            Path(misfortune.once).touch(exist_ok=False)
        except FileExistsError:
            return
    if misfortune.what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    if misfortune.what == "damaged":
        raise CacheError("this cache is damaged, says the test")
    if misfortune.what == "disk":
        raise MachineError("the disk fails, says the test")
    raise AssertionError("a fault of ours, says the test")


def unlucky_encoders(plan: Plan, models: ModelOptions, features: Sequence[FeatureName]) -> UnluckyEncoders:
    return UnluckyEncoders(Misfortune(**json.loads(models.vae or "{}")))


if __name__ == "__main__":
    main(unlucky_encoders)
