"""What a group of runs takes of a machine, and whether a cluster has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from afterimage.config import AfterimageError, RunConfig, split_source
from afterimage.experiments.cost import plan
from afterimage.models.encoders.layers import layer_info
from afterimage.runtime.failures import let_go
from afterimage.training.trainer import VALIDATION_BYTES

BASE_BYTES = 2**30
"""PyTorch, the images of a batch, and what a worker is before it does anything."""


def group_bytes(configs: Iterable[RunConfig]) -> int:
    """Memory that runs take which are trained together, an estimate: their plans, the encoders, kept features.

    Runs whose networks cannot be built count nothing: they will fail by that.
    """
    total, encoders = BASE_BYTES + VALIDATION_BYTES, {}
    for config in configs:
        try:
            (one,) = plan([config])
            for source in config.sources:
                model = split_source(source)[0]
                parameters = layer_info(source, config.data.crop).encoder_parameters
                encoders[model] = max(encoders.get(model, 0), 4 * parameters)
        except Exception as error:
            let_go(error)
            continue
        total += one.bytes
    return total + sum(encoders.values())


def share(
    sizes: Sequence[int],
    nodes: Sequence[Mapping[str, Any]],
    *,
    accelerator: str,
    cpus: int | None,
    say: Callable[[str], None],
) -> list[dict[str, int]]:
    """What each group asks Ray for: `num_cpus`, which is its number of threads too, `num_gpus` and `memory`.

    `sizes` are the groups' bytes, `nodes` are as `ray.nodes()` lists them. Without `cpus` a group gets an even share
    of a machine; that depends on the study and the cluster alone, not on what is done already, since the number of
    threads shows in the last bits of a result. Raises `AfterimageError` for what no machine of the cluster has.
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
            1,
            min(
                int(machine["CPU"]) // max(1, min(at_once, int(machine["GPU"])) if on_gpu else at_once)
                for machine in usable
            ),
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
            say(
                f"a group may take {size / 2**30:.1f} GiB, the largest machine has {largest / 2**30:.1f} GiB: "
                "it is given that machine's, and may run out"
            )
        needs.append({"num_cpus": cpus, "num_gpus": 1 if on_gpu else 0, "memory": min(size, largest)})
    return needs


def describe(need: Mapping[str, int]) -> str:
    """`2 CPUs, 1 GPU, 3.1 GiB`"""
    parts = [
        f"{need[f'num_{kind}s']:g} {kind.upper()}{'s' * (need[f'num_{kind}s'] > 1)}"
        for kind in ("cpu", "gpu")
    ]
    return ", ".join(
        [part for part in parts if not part.startswith("0 ")] + [f"{need['memory'] / 2**30:.1f} GiB"]
    )
