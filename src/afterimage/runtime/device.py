"""Choice of the device and the numerical precision, and retries with smaller batches when memory runs out."""

from __future__ import annotations

import contextlib
import gc
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from afterimage.config import AfterimageError
from afterimage.runtime.failures import is_out_of_memory

if TYPE_CHECKING:  # importing it takes seconds, and building a decoder does not need it
    from lightning_fabric import Fabric


TIMEOUT = timedelta(days=7)
"""Time that a rank waits for another, which may be reading a million images. `ProcessGroup.watch` notices ranks that
have ended sooner.
"""


def create_single_device_fabric(accelerator: str, precision: str = "32-true", devices: Any = 1) -> Fabric:
    """Create a Fabric that runs on one device.

    Args:
        accelerator: `cpu`, `cuda`, `mps` or `auto`
        precision: one of `PRECISIONS`
        devices: the device, in the form that Fabric accepts

    Raises:
        AfterimageError: the device does not exist here, or lacks the precision
    """
    from lightning_fabric import Fabric

    with _convert_device_errors(
        f"the accelerator {accelerator!r} cannot be used here (cpu, cuda, mps or auto)"
    ):
        fabric = Fabric(accelerator=accelerator, devices=devices)
    if precision == "32-true":
        return fabric
    if precision == "16-mixed" and fabric.device.type == "cpu":  # Fabric would silently use bfloat16
        raise AfterimageError("precision 16-mixed needs a GPU; on a CPU take bf16-mixed or 32-true")
    return Fabric(accelerator=accelerator, devices=devices, precision=precision)


def device_name(accelerator: str) -> str:
    """Return the name of the device that an accelerator selects, such as `cuda:0`.

    Raises:
        AfterimageError: as `create_single_device_fabric`
    """
    return str(create_single_device_fabric(accelerator).device)


@contextlib.contextmanager
def _convert_device_errors(what: str) -> Iterator[None]:
    """Turn Fabric's errors about devices into `AfterimageError`."""
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise AfterimageError(f"{what}: {str(error).strip()}") from None


def create_fabric(accelerator: str, devices: int, nodes: int = 1) -> Fabric:
    """Create a Fabric of `devices` ranks on each of `nodes` nodes, without launching it.

    Raises:
        AfterimageError: this machine has fewer devices
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    requested = f"{devices} devices were asked for on {socket.gethostname()}"
    with _convert_device_errors(f"{requested}, which the accelerator {accelerator!r} does not have"):
        strategy = DDPStrategy(timeout=TIMEOUT)
        return Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy=strategy)


Result = TypeVar("Result")


def retry_with_smaller_batch(work: Callable[[int], Result], size: int, what: str) -> tuple[Result, int]:
    """Call `work(size)`, and halve the size until the work fits into memory; return the result and that size.

    Raises:
        AfterimageError: a single image does not fit; the message begins with `what`
    """
    while True:
        try:
            return work(size), size
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error) or type(error).__name__
        if size <= 1:
            raise AfterimageError(f"{what}: out of memory even with one image at a time ({reason:.200})")
        size = (size + 1) // 2
        # The failed frames are gone now, so their tensors can be freed.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
