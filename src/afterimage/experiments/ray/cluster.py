"""Connection to a Ray cluster, or start of one on this machine, division of its machines among tasks, and the tasks."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from afterimage.config import AfterimageError, RunConfig, split_source
from afterimage.experiments.cost import estimate_cost
from afterimage.experiments.ray import worker
from afterimage.models.encoders.tracing import layer_info
from afterimage.runtime.failures import UnexpectedError, clear_error_frames, one_line
from afterimage.runtime.terminal import Progress
from afterimage.training.feature_loader import VALIDATION_BYTES

POLL_SECONDS = 0.2
"""Seconds between two checks for messages of workers and for tasks that have ended."""
STORE_BYTES = 256 * 2**20
"""Bytes of Ray's object store on a cluster started here: workers see the run folders, so only messages use it."""
BASE_BYTES = 2**30
"""Estimated base memory of a worker in bytes: the process itself, PyTorch, and the images of a batch."""
SETTINGS = {
    "RAY_gcs_server_port_wait_time_s": "120",  # Ray's default timeout is too short on a busy machine
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray plans to change the visible devices of tasks without a GPU, and warns of that in every worker.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextlib.contextmanager
def connect(address: str, log: Callable[[str], None]) -> Iterator[Any]:
    """Connect to a cluster for the duration of the block, and yield the ray package.

    A process that is already connected keeps its cluster.

    Args:
        address: `HOST:PORT` or `auto`; empty for the environment variable RAY_ADDRESS, or, if that is not set, to start
            a cluster on this machine
        log: callback for a message that names the cluster

    Raises:
        AfterimageError: Ray is not installed (the message says how to install it), or the cluster cannot be reached or
            is lost inside the block
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise AfterimageError(
            f"the ray executor needs Ray ({error}): pip install 'afterimage[cluster]', or pip install ray"
        ) from None
    connected, address = ray.is_initialized(), address or os.environ.get("RAY_ADDRESS", "")
    if not connected:
        # Ray warns about its own settings before `logging_level` takes effect.
        logging.getLogger("ray").setLevel(logging.ERROR)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if not address:
            log("starting Ray on this machine (no --address)")
            options |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address or "local", **options)
        except Exception as error:  # Ray raises a plain Exception if it cannot start
            ray.shutdown()
            where = address or "on this machine"
            raise AfterimageError(f"no Ray cluster ({where}): {error!s:.500}") from None
        finally:
            if signal.getsignal(signal.SIGTERM) is not before:  # ray.init installs a handler of its own
                signal.signal(signal.SIGTERM, before)
        if address:
            log(f"connected to Ray at {address}")
    try:
        yield ray
    except ray.exceptions.RayError as error:
        raise AfterimageError(
            f"the Ray cluster was lost ({type(error).__name__}: {error!s:.500}); what is done is kept, the same "
            "command goes on from there"
        ) from error
    finally:
        if not connected:
            ray.shutdown()


def group_bytes(configs: Iterable[RunConfig]) -> int:
    """Estimate the memory in bytes of runs that are trained together: base, runs, encoders and validation features.

    Runs whose networks cannot be built count as zero; they fail when they are trained.
    """
    total, encoders = BASE_BYTES + VALIDATION_BYTES, {}
    for config in configs:
        try:
            memory = estimate_cost(config).bytes
            for source in config.sources:
                model = split_source(source)[0]
                parameters = layer_info(source, config.data.size).encoder_parameters
                encoders[model] = max(encoders.get(model, 0), 4 * parameters)
        except Exception as error:
            clear_error_frames(error)
            continue
        total += memory
    return total + sum(encoders.values())


def allocate_resources(
    sizes: Sequence[int],
    nodes: Sequence[Mapping[str, Any]],
    *,
    accelerator: str,
    cpus: int | None,
    log: Callable[[str], None],
) -> list[dict[str, int]]:
    """Compute the resources of each group: `num_cpus` (also its number of threads), `num_gpus` and `memory` in bytes.

    Args:
        sizes: memory of each group in bytes
        nodes: the machines, as listed by `ray.nodes()`
        accelerator: `cpu`, `cuda`, `mps` or `auto`
        cpus: CPUs of each group; None for an even share of a machine, which depends on the study and the cluster but
            not on the runs that are done already, because the number of threads changes the last bits of a result
        log: callback for a message on each group that may run out of memory on every machine

    Raises:
        AfterimageError: no machine has the requested CPUs or GPUs
    """
    machines = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not machines:
        raise AfterimageError("the Ray cluster has no machine with a CPU to give")
    gpus = max(int(machine.get("GPU", 0)) for machine in machines)
    if accelerator == "cuda" and not gpus:
        raise AfterimageError("--device cuda: no machine of the Ray cluster has a GPU to give")
    on_gpu = bool(gpus) and accelerator in ("auto", "cuda")
    usable = [machine for machine in machines if machine.get("GPU", 0) >= 1] if on_gpu else machines
    most = max(int(machine["CPU"]) for machine in usable)
    if cpus is None:
        at_once = math.ceil(len(sizes) / len(usable))
        cpus = max(
            1, min(int(m["CPU"]) // (min(at_once, int(m["GPU"])) if on_gpu else at_once) for m in usable)
        )
    elif not 1 <= cpus <= most:
        raise AfterimageError(
            f"--cpus must lie between 1 and {most}, what the largest machine has, got {cpus}"
        )
    largest = max(int(machine.get("memory", 0)) for machine in usable)
    needs = []
    for size in sizes:
        # On a GPU most of this is device memory, which Ray does not track.
        size = BASE_BYTES if on_gpu else size
        if size > largest:
            log(
                f"a group may take {size / 2**30:.1f} GiB, the largest machine has {largest / 2**30:.1f} GiB: "
                "it is given that machine's, and may run out"
            )
        needs.append({"num_cpus": cpus, "num_gpus": int(on_gpu), "memory": min(size, largest)})
    return needs


def describe(resources: Mapping[str, int]) -> str:
    """Describe the resources of a group, such as `2 CPUs, 1 GPU, 3.1 GiB`."""
    cpus, gpus = resources["num_cpus"], resources["num_gpus"]
    return f"{cpus} CPU{'s' * (cpus > 1)}, {'1 GPU, ' * gpus}{resources['memory'] / 2**30:.1f} GiB"


class WorkerLost(AfterimageError):
    """Error that a task's worker was lost or stopped, so that the task may be submitted again; the text says how."""


class Tasks:
    """Numbered tasks on a cluster, whose messages are shown as they arrive.

    Args:
        ray: the ray package
        progress: callback for the progress and messages of each task
        needs: resources of each task, see `allocate_resources`
        retries: number of times that a task whose worker is lost may be submitted again
    """

    def __init__(
        self, ray: Any, progress: Progress, needs: Sequence[Mapping[str, int]], retries: int
    ) -> None:
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.ray, self.progress, self.needs, self.retries = ray, progress, needs, retries
        # On this machine, which is not lost before the tasks are.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.messages = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self.run_task = ray.remote(worker.run_task)
        self.lost = [0] * len(needs)
        self.running: dict[Any, int] = {}
        """Numbers of the tasks that have not ended, by Ray's reference to the task."""

    def show(self, number: int, what: str, done: int = 1, total: int = 1, **figures: Any) -> None:
        """Show the progress or a message of a task."""
        self.progress(what, done, total, group=f"[{number + 1}/{len(self.needs)}]", **figures)

    def submit(self, number: int, work: Callable[..., Any], names: str, **arguments: Any) -> None:
        """Submit a task.

        Args:
            number: number of the task, from 0
            work: function of `worker` that the task calls
            names: what the task does, for a message
            arguments: arguments of `work`
        """
        resources = self.needs[number]
        # No retries by Ray: they would ignore checkpoints and the limit `retries`.
        task = self.run_task.options(max_retries=0, **resources).remote(
            work,
            arguments,
            number=number,
            threads=resources["num_cpus"],
            messages=self.messages,
            **worker.driver_context(),
        )
        self.running[task] = number
        self.show(number, f"waits for {describe(resources)}: {names}", 0, 1)

    def count_lost(self, number: int, who: str, why: str, start: str) -> None:
        """Count a lost worker of the task that does `who`, and say where the next worker starts.

        Raises:
            AfterimageError: the retries are used up
        """
        self.lost[number] += 1
        if self.lost[number] > self.retries:
            times = f"{self.lost[number]} times, the last time by {why}"
            raise AfterimageError(f"{who}: the worker was lost {times}")
        retry = f"retry {self.lost[number]} of {self.retries}, {start} ({why:.200})"
        self.show(number, f"the worker was lost: {retry}")

    def ended(self) -> list[tuple[int, Any]]:
        """Wait a moment, show new messages, and return the tasks that have ended since the last call.

        Returns:
            the number of each task with its result, or with the error that ended it: `WorkerLost`, or one of the task
        """
        time.sleep(POLL_SECONDS)
        running = list(self.running)
        ended = self.ray.wait(running, num_returns=len(running), timeout=0)[0] if running else []
        for number, what, done, total, figures in self.messages.get_nowait_batch(self.messages.qsize()):
            self.show(number, what, done, total, **figures)
        return [(self.running.pop(task), self._outcome(task)) for task in ended]

    def _outcome(self, task: Any) -> Any:
        exceptions = self.ray.exceptions
        try:
            return self.ray.get(task)
        except exceptions.RayTaskError as error:  # raised by the task, so a retry would raise it again
            cause = error.cause or error
            return (
                cause if isinstance(cause, AfterimageError) else UnexpectedError(one_line(cause), str(error))
            )
        except exceptions.TaskCancelledError:
            return WorkerLost("it was stopped")
        except exceptions.RayError as error:
            why = str(error).strip().partition("\n")[0]
            return WorkerLost(f"{type(error).__name__}: {why:.500}")

    def cancel(self) -> None:
        """Cancel all tasks; a task that has begun is interrupted with the effect of Ctrl-C."""
        for task in self.running:
            self.ray.cancel(task, recursive=False)

    def close(self) -> None:
        """Cancel all tasks and take no more messages."""
        self.cancel()
        self.messages.shutdown(force=True)
