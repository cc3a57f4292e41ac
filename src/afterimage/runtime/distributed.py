"""Processes (ranks) that train one run together, each on its part of every batch. A single process has no overhead.

All ranks run the same lines in the same order. Code that may fail on one rank alone belongs in a `raise_on_all_ranks`
block, and every operation first checks all ranks for errors: an error on one rank is raised on every rank at the same
place, so that none waits for a rank that has left. These messages use gloo on the CPU, even if the data use NCCL.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from afterimage.config import AfterimageError
from afterimage.runtime.device import TIMEOUT, create_fabric, create_single_device_fabric
from afterimage.runtime.failures import (
    EVERYTHING,
    UnexpectedError,
    error_scope,
    is_out_of_memory,
    one_line,
    traceback_text,
)
from afterimage.runtime.process import LockLost, ProcessIdentity, Stopped, has_ended, this_process
from afterimage.runtime.terminal import print_lines

if TYPE_CHECKING:  # importing it takes seconds, and building a decoder does not need it
    from lightning_fabric import Fabric


Value = TypeVar("Value")
Error = TypeVar("Error", bound=BaseException)
GRACE_SECONDS = 60.0
"""Seconds that a rank has to notice the end of another one, before `ProcessGroup.watch` ends it."""


class RankLost(Exception):
    """The end of another rank, without which this one cannot continue."""

    concerns = EVERYTHING


class ProcessGroup:
    """All ranks and their joint operations. Without a `fabric` there is one rank, and every operation is the identity.

    Attributes:
        fabric: the Fabric that connects the ranks, or None
        rank: number of this rank, from 0
        world_size: number of ranks
    """

    def __init__(self, fabric: Fabric | None = None) -> None:
        self.fabric = fabric
        self.rank = 0 if fabric is None else fabric.global_rank
        self.world_size = 1 if fabric is None else fabric.world_size
        self._messages = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.world_size > 1 else None
        self._peers: list[ProcessIdentity] = self.gather(this_process()) if self.world_size > 1 else []
        self._finished = threading.Event()
        self._noticed = False

    @property
    def is_main_process(self) -> bool:
        """True on the main process, the rank that writes files, holds the lock and prints."""
        return self.rank == 0

    def local_fabric(self, accelerator: str, precision: str) -> Fabric:
        """Create a Fabric for work that this rank does by itself, on its own device.

        Args:
            accelerator: `cpu`, `cuda`, `mps` or `auto`, for a single process; a rank keeps its device
            precision: one of `PRECISIONS`
        """
        if self.fabric is None:
            return create_single_device_fabric(accelerator, precision)
        device = self.fabric.device
        return create_single_device_fabric(
            device.type, precision, 1 if device.type == "cpu" else [device.index]
        )

    def rank_slice(self, total: int) -> slice:
        """Return this rank's slice of `total` consecutive images.

        The ranks' slices differ by at most one image; the first are larger.
        """
        least, more = divmod(total, self.world_size)
        first = self.rank * least + min(self.rank, more)
        return slice(first, first + least + (self.rank < more))

    def max_rank_size(self, total: int) -> int:
        """Return the size of the largest slice when `total` images are divided among the ranks."""
        return -(-total // self.world_size)

    @contextlib.contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raise on every rank, at the end of the block, an error that the block raises on any rank."""
        if self.world_size == 1:
            yield
            return
        try:
            yield
        except BaseException as error:
            if not hasattr(error, "known_to_all_ranks"):
                self._check_ranks(error)
            raise
        self._check_ranks()

    def main_process_first(self, work: Callable[[], Value]) -> Value:
        """Call `work` on the main process first, then on the other ranks, which find its stored results."""
        with self.raise_on_all_ranks():
            found = work() if self.is_main_process else None
        with self.raise_on_all_ranks():
            return found if self.is_main_process else work()

    def decide(self, flag: bool) -> bool:
        """Return the main process's flag on every rank."""
        return self._check_ranks(flag=flag and self.is_main_process)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over ranks, with one message for all tensors of the same type."""
        self._check_ranks()
        if self.world_size == 1:
            return
        for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
            own = [tensor for tensor in tensors if tensor.dtype == kind]
            flat = torch.cat([tensor.reshape(-1) for tensor in own])
            with self._exchange():
                flat = self.fabric.all_reduce(flat, reduce_op="sum")
            for tensor, total in zip(own, flat.split([t.numel() for t in own]), strict=True):
                tensor.copy_(total.view(tensor.shape))

    def moments(self, values: Float[Tensor, "count channels"]) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the moments of the rows of all ranks; some ranks may have no rows.

        Moments are in float64 and merged as in Chan, Golub and LeVeque (1979), which avoids the subtraction of large
        sums.

        Returns:
            the number of rows (a scalar), their mean and their population variance, `(channels,)` each
        """
        rows = values.new_zeros(self.world_size, 3, values.shape[1], dtype=torch.float64)
        if len(values):
            variance, mean = torch.var_mean(values.float(), 0, correction=0)
            rows[self.rank] = torch.stack([torch.full_like(mean, len(values)), mean, variance])
        self.sum([rows])
        counts, means, variances = rows.unbind(1)
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count
        return count[0], mean, (counts * (variances + (means - mean).square())).sum(0) / count

    def broadcast(self, value: Value) -> Value:
        """Return the main process's value on every rank; it must be a plain object or tensors on the CPU."""
        self._check_ranks()
        if self.world_size == 1:
            return value
        values = [value]
        with self._exchange():
            dist.broadcast_object_list(values, 0, group=self._messages)
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in the order of the ranks."""
        self._check_ranks()
        return self._gather(value)

    def gather_batches(self, parts: list[Value]) -> list[Value]:
        """Return the results of all ranks, one for each batch and rank, in the order of a single process."""
        return [part for batch in zip(*self.gather(parts), strict=True) for part in batch]

    def batch_offset(self, images: int) -> tuple[int, int]:
        """Return the number of images in the batch that precede this rank's part, and that of the whole batch.

        Args:
            images: number of images in this rank's part
        """
        counts = self.gather(images)
        return sum(counts[: self.rank]), sum(counts)

    def _gather(self, value: Value) -> list[Value]:
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._exchange():
            dist.all_gather_object(values, value, group=self._messages)
        return values

    def _check_ranks(self, error: BaseException | None = None, *, flag: bool = False) -> bool:
        """Wait for all ranks, and raise the error of the first rank that has one.

        Returns:
            whether any rank has set `flag`
        """
        if self.world_size == 1:
            return flag
        word = torch.tensor(2 if error is not None else int(flag))
        with self._exchange():
            dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._messages)
        if word < 2:
            return bool(word)
        errors = self._gather(None if error is None else _pack_error(error))
        rank = next(rank for rank, what in enumerate(errors) if what is not None)
        if rank != self.rank or errors[rank][0] == "stop":  # all ranks raise the same stop and save
            error = _unpack_error(rank, *errors[rank])
        raise _mark_as_known(error, by_other_rank=not self.is_main_process)

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Turn a failed exchange of messages into `RankLost`."""
        try:
            yield
        except RuntimeError as error:
            raise self._rank_lost_error(error) from error

    def _rank_lost_error(self, error: RuntimeError) -> RankLost:
        self._noticed = True
        until = time.monotonic() + 5
        while not (gone := self.ended_ranks()) and time.monotonic() < until:
            time.sleep(0.1)
        reports = self.rank == min(set(range(self.world_size)) - set(gone))
        if not reports:  # stay alive until the reporting rank has found the rank that ended first
            time.sleep(2)
        why = "" if gone else f" ({error!s:.200})"
        return _mark_as_known(RankLost(self._describe_ranks(gone) + why), by_other_rank=not reports)

    def ended_ranks(self) -> list[int]:
        """Return the ranks on this machine whose processes have ended."""
        return [rank for rank, peer in enumerate(self._peers) if rank != self.rank and has_ended(peer)]

    def _describe_ranks(self, gone: Sequence[int]) -> str:
        if not gone:
            others = {peer.machine for peer in self._peers} - {this_process().machine}
            where = " on another machine" if others else ""
            return f"a rank{where} has ended, or cannot be reached"
        names = " and ".join(f"rank {rank} ({self._peers[rank]})" for rank in gone)
        return f"{names} {'has' if len(gone) == 1 else 'have'} ended"

    def watch(self) -> None:
        """End this process `GRACE_SECONDS` after another rank has ended, if it still waits for it, as NCCL would."""
        since = None
        while not self._finished.wait(1.0):
            gone = self.ended_ranks()
            since = (since or time.monotonic()) if gone else None
            if since and not self._noticed and time.monotonic() - since > GRACE_SECONDS:
                print_lines(f"afterimage: {self._describe_ranks(gone)}; {RESUME_HINT}", error=True)
                os._exit(1)


SINGLE_PROCESS = ProcessGroup()
"""The process group of a single process."""
RESUME_HINT = "the same command, on any number of devices, goes on from the last checkpoint"
"""Advice at the end of messages about lost ranks."""

_joined: list[ProcessGroup] = []
_depth = [0]


def is_distributed() -> bool:
    """Return whether this process was started as one of several ranks, by `torchrun` or by `--devices`."""
    elastic = dist.is_available() and dist.is_torchelastic_launched()
    return elastic and int(os.environ.get("WORLD_SIZE", "1")) > 1


def on_main_process() -> bool:
    """Return whether this process is the main process, without communication; a single process always is."""
    return not is_distributed() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def distributed_context(accelerator: str = "auto") -> Iterator[ProcessGroup]:
    """Yield the group of all ranks that were started with this process, or `SINGLE_PROCESS` if there are no others.

    Raises:
        AfterimageError: this machine has fewer devices than ranks, or a rank is lost
    """
    if not is_distributed():
        yield SINGLE_PROCESS
        return
    if not _joined:
        _joined.append(ProcessGroup(_launched(accelerator)))
    (ranks,) = _joined
    if _depth[0]:
        yield ranks
        return
    _depth[0] += 1
    ranks._finished.clear()
    watching = threading.Thread(target=ranks.watch, daemon=True)
    watching.start()
    try:
        yield ranks
        ranks._check_ranks()
    except RankLost as error:
        raise _mark_as_known(
            AfterimageError(f"{error}; {RESUME_HINT}"), by_other_rank=error.reported_by_other_rank
        ) from None
    finally:
        ranks._finished.set()
        watching.join()
        _depth[0] -= 1


def close_process_group() -> None:
    """Close the connections to other ranks at the end of the program.

    A communication thread that still runs when the interpreter exits can abort the process.
    """
    if _joined:
        _joined.clear()
        dist.destroy_process_group()


def _launched(accelerator: str) -> Fabric:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    nodes = int(os.environ["WORLD_SIZE"]) // here
    # Fabric's start-up messages would disturb the progress display.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning_utilities").setLevel(logging.WARNING)
    fabric = create_fabric(accelerator, here, nodes)
    fabric.launch()
    return fabric


def _mark_as_known(error: Error, by_other_rank: bool) -> Error:
    """Mark an error as known to all ranks; `by_other_rank`: another rank reports it to the user."""
    error.known_to_all_ranks, error.reported_by_other_rank = True, by_other_rank
    return error


def _pack_error(error: BaseException) -> tuple[str, Any, str, str]:
    """Return an error's kind, message, traceback and affected scope, to send to other ranks."""
    if isinstance(error, KeyboardInterrupt):
        return "stop", getattr(error, "code", 130) - 128, "", ""
    if isinstance(error, LockLost):
        kind, what = "lock", str(error)
    elif isinstance(error, UnexpectedError):
        kind, what = "unexpected", str(error)
    elif isinstance(error, AfterimageError):
        kind, what = "error", str(error)
    elif is_out_of_memory(error):
        kind, what = "memory", str(error)
    else:
        kind, what = "unexpected" if isinstance(error, Exception) else "other", one_line(error)
    return kind, what, traceback_text(error), error_scope(error)


def _unpack_error(rank: int, kind: str, what: Any, traceback: str, concerns: str) -> BaseException:
    """Create the error that another rank sent, from the values of `_pack_error`."""
    if kind == "stop":
        return Stopped(what)
    if kind == "other":
        return RankLost(f"rank {rank} has failed: {what:.1000}")
    if kind == "unexpected":
        what = f"on rank {rank}: {what}"
    kinds = {"lock": LockLost, "error": AfterimageError, "memory": MemoryError, "unexpected": UnexpectedError}
    error = kinds[kind](what)
    error.traceback_text, error.concerns = traceback, concerns
    return error
