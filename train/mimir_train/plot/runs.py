"""What runs have recorded: figures by step, settings, and a short name for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mimir_shared.errors import InputError
from mimir_shared.fingerprint import differences
from mimir_train.config_document import Document, read_document
from mimir_train.json_lines import Line, read_steps
from mimir_train.run_folder import CONFIG_NAME, METRICS_NAME

Points = list[tuple[float, float]]
"""(steps done, value)."""


@dataclass(frozen=True, kw_only=True)
class PlottedRun:
    """One run, as far as it went."""

    name: str
    """Unlike those of the other runs that are shown."""
    path: Path
    lines: list[Line]
    """Of each step; never empty."""
    settings: Document
    """Of its config.yaml; {} where there is none."""

    def points(self, figure: str) -> Points:
        """A figure at each step that has it."""
        return [(line["step"] + 1, float(line[figure])) for line in self.lines if figure in line]

    def median_of(self, figure: str) -> float | None:
        values = [value for _, value in self.points(figure)]
        return median(values) if values else None

    @property
    def steps_done(self) -> int:
        return int(self.lines[-1]["step"]) + 1

    @property
    def seconds(self) -> float:
        """Spent in steps."""
        return sum(float(line.get("step_s", 0.0)) for line in self.lines)


def read_runs(paths: Sequence[Path]) -> list[PlottedRun]:
    """Read what runs have recorded; of a folder that is given twice, once.

    Raises: InputError for a folder that is no run, or of which no step is done; CacheError for damaged lines.
    """
    folders: list[Path] = []
    for path in paths:
        folder = path.parent if path.name == METRICS_NAME else path
        if folder.resolve() not in [known.resolve() for known in folders]:
            folders.append(folder)
    names = short_names([folder.resolve() for folder in folders])
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_run(folder: Path, name: str) -> PlottedRun:
    path = folder / METRICS_NAME
    if not path.is_file():
        raise InputError(f"{folder}: no {METRICS_NAME} there; give the folder of a run, its --output-dir")
    lines = read_steps(path)
    if not lines:
        raise InputError(f"{path}: no step is recorded yet; look again when the run has done one")
    config = folder / CONFIG_NAME
    return PlottedRun(name=name, path=folder, lines=lines, settings=read_document(config) if config.is_file() else {})


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as it takes to tell them apart."""
    parts = [folder.parts for folder in folders]
    longest = max(map(len, parts))
    for count in range(1, longest + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def differing_settings(runs: Sequence[PlottedRun]) -> list[tuple[str, list[str]]]:
    """The settings that are not alike in all runs, with the value of each; where a run writes is not of interest."""
    names: dict[str, None] = {}
    for run in runs[1:]:
        changed = (name for name, _, _ in differences(runs[0].settings, run.settings))
        names |= dict.fromkeys(name.partition("[")[0] for name in changed)  # a list is told whole
    names.pop("run.output_dir", None)
    return [(name, [_setting(run.settings, name) for run in runs]) for name in names]


def _setting(settings: Document, name: str) -> str:
    value: object = settings
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, list):
        value = ", ".join(map(str, value)) or None
    return "–" if value is None else str(value)
