"""A Ray cluster: connected to where an address is given, else started inside this process for as long as it is used."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from afterimage.config import AfterimageError

STORE_BYTES = 256 * 2**20
"""Shared memory of a cluster started here: tasks only pass on checkpoints, in small parts."""
SETTINGS = {
    "RAY_gcs_server_port_wait_time_s": "120",  # on a busy machine Ray's own patience is too short
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray changes its mind about the devices of tasks without one, and warns of that in every worker.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def import_ray() -> Any:
    """The ray package; raises `AfterimageError` saying how to install it."""
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
def cluster(address: str, say: Callable[[str], None]) -> Iterator[Any]:
    """The ray package, connected to the cluster at `address`, at RAY_ADDRESS, or to one of this machine alone.

    Where this process is connected already that is used, and stays. Raises `AfterimageError` for a cluster that
    cannot be reached.
    """
    ray = import_ray()
    if ray.is_initialized():
        with _told(ray):
            yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS", "")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not address:
        say("starting Ray on this machine (no --address)")
        options |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        _init(ray, address or "local", options)
    except AfterimageError as error:
        if address:
            raise
        say(f"{error}; trying once more")  # Ray waits 30 seconds for itself, too few on a busy machine
        _init(ray, "local", options)
    if address:
        say(f"connected to Ray at {address}")
    try:
        with _told(ray):
            yield ray
    finally:
        ray.shutdown()


def _init(ray: Any, address: str, options: dict[str, Any]) -> None:
    with _own_handlers():
        try:
            ray.init(address, **options)
        except Exception as error:  # Ray raises just that where it does not come up
            ray.shutdown()
            raise AfterimageError(f"no Ray cluster ({address}): {error!s:.500}") from None


@contextlib.contextmanager
def _told(ray: Any) -> Iterator[None]:
    try:
        yield
    except ray.exceptions.RayError as error:
        raise AfterimageError(
            f"the Ray cluster was lost ({type(error).__name__}: {error!s:.500}); what is done is kept, the same "
            "command goes on from there"
        ) from error


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Ray takes SIGTERM for itself where it is started: give it back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
