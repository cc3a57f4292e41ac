"""The processes that train one run together, each on its part of every batch. Alone, nothing here costs anything.

Ranks run the same lines in the same order. What can go wrong on one of them alone stands in a `raise_on_all_ranks`
block, and every operation first asks whether all are well: an error anywhere is raised everywhere, at the same
place, so that no rank waits for one that has turned back. Those words go over gloo on the CPU, also where the data
go over NCCL.
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
from afterimage.runtime.device import TIMEOUT, create_fabric, one_device
from afterimage.runtime.failures import EVERYTHING, Unexpected, concerns, one_line, out_of_memory, story
from afterimage.runtime.process import Holder, LockLost, ended, this_process
from afterimage.runtime.signals import Stopped
from afterimage.runtime.terminal import say

if TYPE_CHECKING:  # it takes seconds to import, and a decoder is built without it
    from lightning_fabric import Fabric


Value = TypeVar("Value")
Error = TypeVar("Error", bound=BaseException)
GRACE = 60.0
"""Seconds in which a rank must notice by itself that another has ended, before it is ended too."""


class RankLost(Exception):
    """Another rank has ended; this one cannot go on alone."""

    concerns = EVERYTHING


class ProcessGroup:
    """What ranks do together. Without a `fabric` there is one, for which every operation is the identity."""

    def __init__(self, fabric: Fabric | None = None) -> None:
        self.fabric = fabric
        self.rank = 0 if fabric is None else fabric.global_rank
        self.count = 1 if fabric is None else fabric.world_size
        self._words = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.count > 1 else None
        self._peers: list[Holder] = self.gather(this_process()) if self.count > 1 else []
        self._over = threading.Event()
        self._noticed = False

    @property
    def is_main_process(self) -> bool:
        """Whether this rank writes, locks and speaks for all."""
        return self.rank == 0

    def local_fabric(self, accelerator: str, precision: str) -> Fabric:
        """A Fabric for what this rank computes by itself, on its own device."""
        if self.fabric is None:
            return one_device(accelerator, precision)
        device = self.fabric.device
        return one_device(device.type, precision, 1 if device.type == "cpu" else [device.index])

    def part(self, total: int) -> slice:
        """Which of `total` images in a row are this rank's; parts differ by one at most, the first are larger."""
        least, more = divmod(total, self.count)
        first = self.rank * least + min(self.rank, more)
        return slice(first, first + least + (self.rank < more))

    def most(self, total: int) -> int:
        """The size of the largest part."""
        return -(-total // self.count)

    @contextlib.contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """An error in this block, on whatever rank, is raised by the block on every rank."""
        if self.count == 1:
            yield
            return
        try:
            yield
        except BaseException as error:
            if not hasattr(error, "agreed"):
                self._settle(error)
            raise
        self._settle()

    def main_process_first(self, work: Callable[[], Value]) -> Value:
        """What `work` gives, done by the leading rank first: the others find what it has stored."""
        with self.raise_on_all_ranks():
            found = work() if self.is_main_process else None
        with self.raise_on_all_ranks():
            return found if self.is_main_process else work()

    def decide(self, flag: bool) -> bool:
        """What the leading rank's flag is."""
        return self._settle(flag=flag and self.is_main_process)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over ranks; one message for all that share a type."""
        self._settle()
        if self.count == 1:
            return
        for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
            own = [tensor for tensor in tensors if tensor.dtype == kind]
            flat = torch.cat([tensor.reshape(-1) for tensor in own])
            with self._talking():
                flat = self.fabric.all_reduce(flat, reduce_op="sum")
            for tensor, total in zip(own, flat.split([t.numel() for t in own]), strict=True):
                tensor.copy_(total.view(tensor.shape))

    def moments(self, values: Float[Tensor, "count channels"]) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and population variance `(channels,)` of all ranks' rows, of which one may have none.

        In float64, merged as Chan, Golub and LeVeque (1979) do, so that no large sums are subtracted.
        """
        rows = values.new_zeros(self.count, 3, values.shape[1], dtype=torch.float64)
        if len(values):
            variance, mean = torch.var_mean(values.float(), 0, correction=0)
            rows[self.rank] = torch.stack([torch.full_like(mean, len(values)), mean, variance])
        self.sum([rows])
        counts, means, variances = rows.unbind(1)
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count
        return count[0], mean, (counts * (variances + (means - mean).square())).sum(0) / count

    def broadcast(self, value: Value) -> Value:
        """The leading rank's value, a plain object or tensors on the CPU."""
        self._settle()
        if self.count == 1:
            return value
        values = [value]
        with self._talking():
            dist.broadcast_object_list(values, 0, group=self._words)
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, in their order."""
        self._settle()
        return self._gather(value)

    def gather_batches(self, parts: list[Value]) -> list[Value]:
        """All ranks' results, of which each gives one a batch, in the order of one process."""
        return [part for batch in zip(*self.gather(parts), strict=True) for part in batch]

    def place(self, images: int) -> tuple[int, int]:
        """Where this rank's images lie among those of the batch: how many come before, how many there are."""
        counts = self.gather(images)
        return sum(counts[: self.rank]), sum(counts)

    def _gather(self, value: Value) -> list[Value]:
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with self._talking():
            dist.all_gather_object(values, value, group=self._words)
        return values

    def _settle(self, error: BaseException | None = None, *, flag: bool = False) -> bool:
        """Hear whether all ranks are well and raise the first one's error if not; returns whether one has the flag."""
        if self.count == 1:
            return flag
        word = torch.tensor(2 if error is not None else int(flag))
        with self._talking():
            dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._words)
        if word < 2:
            return bool(word)
        told = self._gather(None if error is None else _told(error))
        rank = next(rank for rank, what in enumerate(told) if what is not None)
        if rank != self.rank or told[rank][0] == "stop":  # a stop must be the same to all, for all then save
            error = _retold(rank, *told[rank])
        raise _known(error, elsewhere=not self.is_main_process)

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> RankLost:
        self._noticed = True
        until = time.monotonic() + 5
        while not (gone := self.gone()) and time.monotonic() < until:
            time.sleep(0.1)
        speaks = self.rank == min(set(range(self.count)) - set(gone))
        if not speaks:  # it must still see who was first
            time.sleep(2)
        why = "" if gone else f" ({error!s:.200})"
        return _known(RankLost(self._named(gone) + why), elsewhere=not speaks)

    def gone(self) -> list[int]:
        """The ranks on this machine whose processes have ended."""
        return [rank for rank, peer in enumerate(self._peers) if rank != self.rank and ended(peer)]

    def _named(self, gone: Sequence[int]) -> str:
        if not gone:
            others = {peer.machine for peer in self._peers} - {this_process().machine}
            where = " on another machine" if others else ""
            return f"a rank{where} has ended, or cannot be reached"
        names = " and ".join(f"rank {rank} ({self._peers[rank]})" for rank in gone)
        return f"{names} {'has' if len(gone) == 1 else 'have'} ended"

    def watch(self) -> None:
        """End this process where another rank has ended and this one waits for it in vain, as NCCL lets it."""
        since = None
        while not self._over.wait(1.0):
            gone = self.gone()
            since = (since or time.monotonic()) if gone else None
            if since and not self._noticed and time.monotonic() - since > GRACE:
                say(f"afterimage: {self._named(gone)}; {GO_ON}", error=True)
                os._exit(1)


SINGLE_PROCESS = ProcessGroup()
GO_ON = "the same command, on any number of devices, goes on from the last checkpoint"

_joined: list[ProcessGroup] = []
_depth = [0]


def started_together() -> bool:
    """Whether `torchrun` (or `--devices`, which uses it) has started this process as one of several ranks."""
    elastic = dist.is_available() and dist.is_torchelastic_launched()
    return elastic and int(os.environ.get("WORLD_SIZE", "1")) > 1


def on_main_process() -> bool:
    """Whether this process is the leading rank, or the only one; asks nobody."""
    return not started_together() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def distributed_context(accelerator: str = "auto") -> Iterator[ProcessGroup]:
    """All ranks that were started with this process; `SINGLE_PROCESS` where there are no others.

    Raises `AfterimageError` where this machine has fewer devices than ranks, and where a rank is lost.
    """
    if not started_together():
        yield SINGLE_PROCESS
        return
    if not _joined:
        _joined.append(ProcessGroup(_launched(accelerator)))
    (ranks,) = _joined
    if _depth[0]:
        yield ranks
        return
    _depth[0] += 1
    ranks._over.clear()
    watching = threading.Thread(target=ranks.watch, daemon=True)
    watching.start()
    try:
        yield ranks
        ranks._settle()
    except RankLost as error:
        raise _known(AfterimageError(f"{error}; {GO_ON}"), elsewhere=error.elsewhere) from None
    finally:
        ranks._over.set()
        watching.join()
        _depth[0] -= 1


def leave() -> None:
    """Close what connects this process with other ranks, once all is done.

    Left to the interpreter's own end, a thread of it may still be at work then, which can abort the process.
    """
    if _joined:
        _joined.clear()
        dist.destroy_process_group()


def _launched(accelerator: str) -> Fabric:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    nodes = int(os.environ["WORLD_SIZE"]) // here
    # What Fabric says of its start is of no use to who reads the progress.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning_utilities").setLevel(logging.WARNING)
    fabric = create_fabric(accelerator, here, nodes)
    fabric.launch()
    return fabric


def _known(error: Error, elsewhere: bool) -> Error:
    """Mark an error as one that all ranks know of; `elsewhere`: that another rank tells the user."""
    error.agreed, error.elsewhere = True, elsewhere
    return error


def _told(error: BaseException) -> tuple[str, Any, str, str]:
    """An error as others can be told of it: its kind, its words, its traceback, and what it concerns."""
    if isinstance(error, KeyboardInterrupt):
        return "stop", getattr(error, "code", 130) - 128, "", ""
    if isinstance(error, LockLost):
        kind, what = "lock", str(error)
    elif isinstance(error, Unexpected):
        kind, what = "unexpected", str(error)
    elif isinstance(error, AfterimageError):
        kind, what = "error", str(error)
    elif out_of_memory(error):
        kind, what = "memory", str(error)
    else:
        kind, what = "unexpected" if isinstance(error, Exception) else "other", one_line(error)
    return kind, what, story(error), concerns(error)


def _retold(rank: int, kind: str, what: Any, story: str, concerns: str) -> BaseException:
    if kind == "stop":
        return Stopped(what)
    if kind == "other":
        return RankLost(f"rank {rank} has failed: {what:.1000}")
    if kind == "unexpected":
        what = f"on rank {rank}: {what}"
    kinds = {"lock": LockLost, "error": AfterimageError, "memory": MemoryError, "unexpected": Unexpected}
    error = kinds[kind](what)
    error.story, error.concerns = story, concerns
    return error
