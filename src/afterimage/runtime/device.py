"""Choose one device and its precision."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from afterimage.config import AfterimageError

if TYPE_CHECKING:  # it takes seconds to import, and a decoder is built without it
    from lightning_fabric import Fabric


TIMEOUT = timedelta(days=7)
"""How long a rank waits for another, which may be reading a million images; a dead one is noticed by other means."""


def one_device(accelerator: str, precision: str = "32-true", devices: Any = 1) -> Fabric:
    """A Fabric of one device. Raises `AfterimageError` for one that is not there, or lacks the precision."""
    from lightning_fabric import Fabric

    with _refused(f"the accelerator {accelerator!r} cannot be used here (cpu, cuda, mps or auto)"):
        fabric = Fabric(accelerator=accelerator, devices=devices)
    if precision == "32-true":
        return fabric
    if precision == "16-mixed" and fabric.device.type == "cpu":  # where it would take bfloat16
        raise AfterimageError("precision 16-mixed needs a GPU; on a CPU take bf16-mixed or 32-true")
    return Fabric(accelerator=accelerator, devices=devices, precision=precision)


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Fabric's words about a device as one of ours."""
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise AfterimageError(f"{what}: {str(error).strip()}") from None


def create_fabric(accelerator: str, devices: int, nodes: int = 1) -> Fabric:
    """A Fabric of so many ranks, not yet launched. Raises `AfterimageError` where there are fewer devices."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    asked = f"{devices} devices were asked for on {socket.gethostname()}"
    with _refused(f"{asked}, which the accelerator {accelerator!r} does not have"):
        strategy = DDPStrategy(timeout=TIMEOUT)
        return Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy=strategy)
