"""`encode` by several workers: how many, where each runs, what each makes, and what they made together."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mimir_precompute.config import ModelOptions, TeamOptions
from mimir_precompute.device import choose_device, visible_gpus
from mimir_precompute.empty_prompt import lacks_empty_prompt
from mimir_precompute.model_options import choose_engine
from mimir_precompute.option_values import parse_choice
from mimir_precompute.pipeline import EncodeJob, EncodeOutcome, FeatureOutcome, conclude, open_features
from mimir_precompute.team.crowd import conclude_once
from mimir_precompute.team.local_workers import LocalWorker
from mimir_precompute.team.placement import DECODERS_EACH, Placement, features_of, parse_placement, share_decoders
from mimir_precompute.team.team import BACKOFF_S, RunningWorker, Team
from mimir_precompute.team.view import TeamView
from mimir_precompute.team.worker_task import WorkerTask
from mimir_precompute.termination import when_stopped
from mimir_precompute.workers.together import SharedWork, work_left
from mimir_shared.errors import InputError
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.features import FeatureName
from mimir_shared.wording import counted

Starter = Callable[[WorkerTask, TeamView], RunningWorker]


@dataclass(frozen=True, kw_only=True)
class TeamPlan:
    """Who works."""

    placement: Placement
    decoders: tuple[int, ...]
    """Processes that decode, worker by worker."""
    devices: tuple[str, ...]
    """The device of each, as it sees it: "cuda" is the one GPU that it is given."""
    start: Starter
    told: str
    """For a person: how many, and where."""
    is_one: bool
    """Whether it is this process alone."""


def choose_team(
    options: TeamOptions, models: ModelOptions, features: Sequence[FeatureName], decode_workers: int | None
) -> TeamPlan:
    """From the options to workers, on this machine or a cluster. Raises InputError for what cannot be."""
    if parse_choice("--executor", options.executor, ("local", "ray")) == "ray":
        return _choose_actors(options, models, features, decode_workers)
    device = choose_device(models.device)
    gpus = visible_gpus() if device == "cuda" else ()
    num_workers = _num_workers(options.workers or "1", len(gpus))
    placement = parse_placement(options.place, num_workers, features)
    if num_workers == 1:
        gpus = ()
    else:
        _refuse_devices(num_workers, device, len(gpus), models, features)
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // num_workers)
    where = ", one on each GPU" if gpus else f" on the CPU, {counted(threads, 'thread')} each"
    return TeamPlan(
        placement=placement,
        decoders=tuple(share_decoders(decode_workers, n, placement, cores) for n in range(num_workers)),
        devices=("cuda" if gpus else device,) * num_workers,
        start=_starter(gpus, threads),
        told=f"{counted(num_workers, 'worker')}{where}",
        is_one=num_workers == 1,
    )


def _choose_actors(
    options: TeamOptions, models: ModelOptions, features: Sequence[FeatureName], decode_workers: int | None
) -> TeamPlan:
    from mimir_precompute.team.ray_executor import connect

    cluster = connect(options.ray_address, models.device)
    num_workers = _num_workers(options.workers or "auto", cluster.num_gpus)
    return TeamPlan(
        placement=parse_placement(options.place, num_workers, features),
        decoders=(decode_workers or DECODERS_EACH,) * num_workers,
        devices=(cluster.device,) * num_workers,
        start=cluster.start,
        told=f"{counted(num_workers, 'Ray actor')}{', one on each GPU' if cluster.num_gpus else ''}",
        is_one=False,
    )


def _refuse_devices(
    num_workers: int, device: str, num_gpus: int, models: ModelOptions, features: Sequence[FeatureName]
) -> None:
    """Raise InputError where the GPUs do not suffice for so many workers."""
    if ":" in device:
        raise InputError(
            f"--device {device}: is one device and --workers {num_workers} asks for several; leave --device out, "
            f"and choose among the GPUs with CUDA_VISIBLE_DEVICES"
        )
    if device == "cuda" and num_workers > num_gpus:
        raise InputError(
            f"--workers {num_workers}: this process sees {counted(num_gpus, 'GPU')}, and each worker has one of its "
            f"own; give --workers auto"
        )
    if models.llm_tensor_parallel > 1 and not {"answers", "llm"}.isdisjoint(features):
        raise InputError(
            f"--llm-tensor-parallel {models.llm_tensor_parallel}: each of several --workers has one GPU; encode "
            f"answers and llm by a call of their own, without --workers: --features answers,llm"
        )


def _num_workers(text: str, num_gpus: int) -> int:
    if text == "auto":
        return max(1, num_gpus)
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--workers {text!r}: expected a number, or auto: one for each GPU")
    return int(text)


def _starter(gpus: Sequence[str], threads: int) -> Starter:
    def start(task: WorkerTask, view: TeamView) -> LocalWorker:
        environment, name = (
            {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))},
            f"worker {task.number}",
        )
        if gpus:
            environment, name = {"CUDA_VISIBLE_DEVICES": gpus[task.number]}, f"{name} (GPU {gpus[task.number]})"
        return LocalWorker(task, name=name, environment=environment, say=view.say)

    return start


def encode_together(job: EncodeJob, task: WorkerTask, team: TeamPlan, *, backoff_s: float = BACKOFF_S) -> EncodeOutcome:
    """As encode_cache, by several workers.

    Args:
        job, task: the whole, to be divided.
        backoff_s: as for Team.
    """
    specs = open_features(job)
    works, lacking = _works(job, {feature: spec.fingerprint for feature, spec in specs.items()})
    copied: dict[str, int] = {}
    if lacking:
        view = TeamView([work for work in works.values() if work.clips_of_shard])
        members = Team(
            [_share(task, team, number) for number in range(len(team.decoders))],
            lambda share: team.start(share, view),
            view,
            backoff_s=backoff_s,
        )
        with when_stopped(members.stop), view.showing(team.told):
            for made in members.run():
                copied[made.feature] = copied.get(made.feature, 0) + made.copied
    outcome = EncodeOutcome(features=[_made(job, work, copied.get(work.folder.feature, 0)) for work in works.values()])
    (conclude if task.crowd == 1 else conclude_once)(job, specs, outcome)
    return outcome


def _works(job: EncodeJob, fingerprints: Mapping[FeatureName, str]) -> tuple[dict[FeatureName, SharedWork], bool]:
    """What is missing of each feature, and whether anything is."""
    works: dict[FeatureName, SharedWork] = {}
    lacking = False
    for feature in job.features:
        folder = FeatureFolder(job.storage, feature, fingerprints[feature])
        works[feature] = work_left(folder, job.plan, job.shards)
        lacking = lacking or bool(works[feature].clips_of_shard) or lacks_empty_prompt(folder, folder.generations())
    return works, lacking


def _share(task: WorkerTask, team: TeamPlan, number: int) -> WorkerTask:
    features, device = features_of(number, team.placement), team.devices[number]
    return replace(
        task,
        number=number,
        # the engine as it is here, for a node where vLLM is not installed would choose another
        models=replace(task.models, device=device, llm_engine=choose_engine(task.models.llm_engine, device)),
        features=features,
        others_make=frozenset(team.placement) - frozenset(features),
        decode_workers=team.decoders[number],
    )


def _made(job: EncodeJob, work: SharedWork, copied: int) -> FeatureOutcome:
    """What all workers made of a feature, as the commit records have it.

    Args:
        copied: clips, as the workers that came to their end said.
    """
    made = {shard: work.folder.generations()[shard] for shard in sorted(work.committed())}
    outcome = FeatureOutcome(feature=work.folder.feature, shards_done_before=len(job.shards) - len(work.clips_of_shard))
    for metadata, _ in work.folder.read_all_metadata(made):
        outcome.shards_made += 1
        outcome.encoded += metadata.ok
        outcome.quarantined += metadata.quarantined
        outcome.nbytes += sum(file.bytes for file in metadata.files)
    outcome.copied = min(copied, outcome.encoded)
    outcome.encoded -= outcome.copied
    return outcome
