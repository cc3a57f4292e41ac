"""Connect to a Ray cluster, or start one on this machine, and share its machines among groups of runs."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from afterimage.config import AfterimageError, RunConfig, split_source
from afterimage.experiments.cost import plan
from afterimage.experiments.ray.worker import Messages
from afterimage.models.encoders.layers import layer_info
from afterimage.runtime.failures import let_go
from afterimage.training.feature_loader import VALIDATION_BYTES

TICK = 0.2
"""Seconds between two looks at what workers say and which have ended."""
STORE_BYTES = 256 * 2**20
"""Shared memory of a cluster started here: its workers see the run folders, so only messages pass through it."""
BASE_BYTES = 2**30
"""PyTorch, the images of a batch, and what a worker is before it does anything."""
SETTINGS = {
    "RAY_gcs_server_port_wait_time_s": "120",  # on a busy machine Ray's own patience is too short
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray changes its mind about the devices of tasks without one, and warns of that in every worker.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def import_ray() -> Any:
    """Import the ray package.

    Raises:
        AfterimageError: it is not installed; the message says how to install it
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise AfterimageError(
            f"the ray executor needs Ray ({error}): pip install 'afterimage[cluster]', or pip install ray"
        ) from None
    return ray


@contextlib.contextmanager
def connect(address: str, log: Callable[[str], None]) -> Iterator[Any]:
    """Connect to a cluster inside the block, and yield the ray package.

    Args:
        address: `HOST:PORT` or `auto`; empty for RAY_ADDRESS, and without that a cluster is started on this machine; a
            process that is connected already stays with its cluster
        log: is told which cluster it is

    Raises:
        AfterimageError: the cluster cannot be reached, or is lost inside the block
    """
    ray = import_ray()
    connected = ray.is_initialized()
    if not connected:
        _connect(ray, address or os.environ.get("RAY_ADDRESS", ""), log)
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


def _connect(ray: Any, address: str, log: Callable[[str], None]) -> None:
    logging.getLogger("ray").setLevel(
        logging.ERROR
    )  # Ray warns of its own settings before it reads the next line's
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not address:
        log("starting Ray on this machine (no --address)")
        options |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "local", **options)
    except Exception as error:  # Ray raises just that where it does not come up
        ray.shutdown()
        raise AfterimageError(f"no Ray cluster ({address or 'on this machine'}): {error!s:.500}") from None
    finally:
        if signal.getsignal(signal.SIGTERM) is not before:  # Ray takes it for itself
            signal.signal(signal.SIGTERM, before)
    if address:
        log(f"connected to Ray at {address}")


def messages_here(ray: Any) -> Any:
    """Start the actor that keeps messages of workers, on the driver's own machine."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Messages).options(num_cpus=0, scheduling_strategy=here).remote()


def group_bytes(configs: Iterable[RunConfig]) -> int:
    """Estimate the memory of runs that are trained together: their plans, the encoders, and kept features.

    Runs whose networks cannot be built count nothing; they fail when they are trained.
    """
    total, encoders = BASE_BYTES + VALIDATION_BYTES, {}
    for config in configs:
        try:
            (one,) = plan([config])
            for source in config.sources:
                model = split_source(source)[0]
                parameters = layer_info(source, config.data.size).encoder_parameters
                encoders[model] = max(encoders.get(model, 0), 4 * parameters)
        except Exception as error:
            let_go(error)
            continue
        total += one.bytes
    return total + sum(encoders.values())


def share_machines(
    sizes: Sequence[int],
    nodes: Sequence[Mapping[str, Any]],
    *,
    accelerator: str,
    cpus: int | None,
    log: Callable[[str], None],
) -> list[dict[str, int]]:
    """Find what each group asks Ray for: `num_cpus`, which is also its number of threads, `num_gpus` and `memory`.

    Args:
        sizes: memory of each group in bytes
        nodes: the machines, as `ray.nodes()` lists them
        accelerator: `cpu`, `cuda`, `mps` or `auto`
        cpus: CPUs of each group; None for an even share of a machine, which depends on the study and the cluster and
            not on what is done already, because the number of threads changes the last bits of a result
        log: is told of groups that may run out of memory on any machine

    Raises:
        AfterimageError: no machine has what is asked for
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
        # On a GPU most of it is the device's memory, of which Ray keeps no account.
        size = BASE_BYTES if on_gpu else size
        if size > largest:
            log(
                f"a group may take {size / 2**30:.1f} GiB, the largest machine has {largest / 2**30:.1f} GiB: "
                "it is given that machine's, and may run out"
            )
        needs.append({"num_cpus": cpus, "num_gpus": int(on_gpu), "memory": min(size, largest)})
    return needs


def describe(need: Mapping[str, int]) -> str:
    """Describe what a group needs: `2 CPUs, 1 GPU, 3.1 GiB`."""
    cpus, gpus = need["num_cpus"], need["num_gpus"]
    return f"{cpus} CPU{'s' * (cpus > 1)}, {'1 GPU, ' * gpus}{need['memory'] / 2**30:.1f} GiB"
