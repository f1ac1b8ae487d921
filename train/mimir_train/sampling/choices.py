"""The closed choices of sampling and export. No torch here, so that the command line can check them at once."""

from dataclasses import dataclass
from typing import Final, Literal

SchedulerName = Literal["dpm", "ddim"]
GuidanceName = Literal["fixed", "ramp", "official"]
SampleDType = Literal["auto", "float32", "bfloat16"]
ExportDType = Literal["stored", "float32", "bfloat16"]

SCHEDULERS: Final[tuple[SchedulerName, ...]] = ("dpm", "ddim")
GUIDANCES: Final[tuple[GuidanceName, ...]] = ("fixed", "ramp", "official")
SAMPLE_DTYPES: Final[tuple[SampleDType, ...]] = ("auto", "float32", "bfloat16")
EXPORT_DTYPES: Final[tuple[ExportDType, ...]] = ("stored", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How the predictions with and without text are put together."""

    name: GuidanceName
    scale: float
    """1 turns guidance off: the model is then asked once a step."""

    @property
    def is_on(self) -> bool:
        return self.scale > 1
