"""Launcher of a command as several ranks on this machine (`--devices N`), built on that of `torchrun`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from afterimage.config import AfterimageError
from afterimage.runtime.device import create_fabric
from afterimage.runtime.distributed import RESUME_HINT, is_distributed
from afterimage.runtime.process import available_cpus


def launch(arguments: Sequence[str], devices: int, accelerator: str) -> None:
    """Run `afterimage ARGUMENTS` as `devices` ranks, and return once all have succeeded.

    Raises:
        AfterimageError: the machine has fewer devices, or a signal killed a rank
        SystemExit: a rank failed; carries the exit code of the first that did
    """
    fabric = create_fabric(accelerator, devices)
    if fabric.device.type == "cpu" and devices > max(2, available_cpus()):
        raise AfterimageError(
            f"--devices {devices} on a CPU: this machine has {available_cpus()} cores for as many processes"
        )
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # the one-line message below replaces its long ones
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=60,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "afterimage", *arguments)
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:  # the rank has printed the reason
            raise SystemExit(failure.exitcode) from None
        name = signal.Signals(-failure.exitcode).name
        raise AfterimageError(
            f"rank {rank} (process {failure.pid}) was ended by {name}, and the others with it; {RESUME_HINT}"
        ) from None


def is_rank(devices: int) -> bool:
    """Return whether this process is already a rank.

    Raises:
        AfterimageError: `devices` contradicts the number of ranks on this machine
    """
    if not is_distributed():
        return False
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if devices not in (1, here):
        raise AfterimageError(
            f"--devices {devices}, but {here} ranks were started on this machine: leave it out"
        )
    return True
