"""Workers as actors of a Ray cluster, one a GPU: `encode --executor ray`. The one module that imports ray.

Ray places them and says when one is lost, with its node or alone; what is done stands in the commit records. Actors
that find no room wait for it, and are what an autoscaler sees: when they come, they take what is left.
"""

import contextlib
import os
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console

from mimir_precompute.open_encoders import open_encoders
from mimir_precompute.pipeline import FeatureOutcome
from mimir_precompute.team.team import Ending, ending_of
from mimir_precompute.team.worker_task import EncodersOf, WorkerTask, run_worker
from mimir_precompute.termination import leave_nothing
from mimir_precompute.workers.progress import Progress
from mimir_shared.errors import InputError
from mimir_shared.redaction import hide_secrets
from mimir_shared.storage.open import open_storage
from mimir_shared.storage.protocol import Storage

if TYPE_CHECKING:
    from mimir_precompute.team.view import TeamView

_QUIET: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class Worker:
    """The actor: `run` makes the task's shards, `stop` ends the process meanwhile."""

    def __init__(self) -> None:
        self._storage: Storage | None = None

    def run(self, task: WorkerTask, encoders_of: EncodersOf) -> Ending:
        """As a worker process (worker_process.py) does it; errors come back as what they say."""
        warnings = Console(file=sys.stderr, highlight=False, markup=False, soft_wrap=True)

        def work() -> list[FeatureOutcome]:
            self._storage = open_storage(task.cache)
            progress = Progress(quiet=True, watch=False, warnings=warnings)
            return run_worker(task, self._storage, progress, task.models.device, encoders_of)

        return ending_of(work)

    def stop(self) -> None:
        """End the process, as SIGTERM ends one that is no actor."""
        if self._storage is not None:
            leave_nothing(self._storage)
        os._exit(0)


class RayWorker:
    """One actor, as the team sees it."""

    def __init__(self, ray: Any, task: WorkerTask, num_gpus: int, encoders_of: EncodersOf) -> None:
        self.name = f"worker {task.number} (Ray)"
        self._ray = ray
        self._ending: Ending | None = None
        # two calls at once: `stop` must be heard while `run` works
        actor = ray.remote(Worker).options(num_cpus=1, num_gpus=num_gpus, max_concurrency=2)
        self._actor: Any = actor.remote()
        self._result: Any = self._actor.run.remote(task, encoders_of)

    def ending(self) -> Ending | None:
        if self._ending is None:
            ready, _ = self._ray.wait([self._result], timeout=0)
            if ready:
                self._ending = self._read_ending()
                self.kill()  # it gives its GPU back, for which another may wait
        return self._ending

    def stop(self) -> None:
        self._actor.stop.remote()

    def kill(self) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actor)

    def _read_ending(self) -> Ending:
        try:
            ending: Ending = self._ray.get(self._result)
            return ending
        except self._ray.exceptions.RayError as error:
            said = hide_secrets(str(error)).strip().splitlines()
            return Ending(
                message=f"was lost, with its process or its node ({said[0] if said else type(error).__name__})"
            )


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """A cluster that this process is connected to."""

    ray: Any
    device: str
    """Of each actor, as it sees it."""
    num_gpus: int
    """Of all nodes that there are now; 0 where the actors run on CPUs."""
    encoders_of: EncodersOf = open_encoders

    def start(self, task: WorkerTask, view: "TeamView") -> RayWorker:
        """Ask for an actor; it begins when there is room for it."""
        return RayWorker(self.ray, _from_anywhere(task), 1 if self.device == "cuda" else 0, self.encoders_of)


def connect(address: str, device: str) -> RayCluster:
    """Connect to a cluster.

    Args:
        address: auto, local or host:port, as ray.init takes it.
        device: auto, cpu or cuda: auto takes the GPUs of the cluster if it has any.
    Raises: InputError where ray is not installed, or there is no such cluster.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device}: Ray says which GPU an actor has; give auto, cuda or cpu")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as fault:
        raise InputError(
            "--executor ray: ray is not installed here; pip install 'mimir-t2v[ray]' on every node"
        ) from fault
    try:
        ray.init(address=address, log_to_driver=True, logging_level="warning", ignore_reinit_error=True)
    except (ConnectionError, ValueError, RuntimeError) as fault:
        said = str(fault).strip().splitlines()
        raise InputError(
            f"--ray-address {address}: no Ray cluster there ({said[0] if said else type(fault).__name__}); start one "
            f"with `ray start --head`, or give --ray-address local"
        ) from fault
    num_gpus = int(ray.cluster_resources().get("GPU", 0)) if device != "cpu" else 0
    return RayCluster(ray=ray, device="cuda" if device == "cuda" or num_gpus else "cpu", num_gpus=num_gpus)


def _from_anywhere(task: WorkerTask) -> WorkerTask:
    """The task with whole paths: an actor has another working directory."""
    models = task.models
    return replace(
        task,
        cache=os.path.abspath(task.cache) if "://" not in task.cache else task.cache,
        models=replace(
            models,
            models=_whole_path(models.models),
            vae=_whole_path(models.vae),
            t5=_whole_path(models.t5),
            llm=_whole_path(models.llm),
            instructions=_whole_path(models.instructions),
        ),
    )


def _whole_path(text: str | None) -> str | None:
    path = os.path.expanduser(text or "")
    return os.path.abspath(path) if text is not None and os.path.exists(path) else text
