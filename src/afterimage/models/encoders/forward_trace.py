"""Record one forward pass of a model, module by module and operation by operation."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from afterimage.models.encoders.position_tracing import PositionTracer, storage
from afterimage.models.encoders.positions import Positions
from afterimage.models.encoders.tensor_layout import Key, NotAFeatureMap, Shapes, reorder, tensors

_ATEN = torch.ops.aten
_FACTORS = {  # indices of the arguments that multiply features
    _ATEN.mul: (0, 1),
    _ATEN.mul_: (0, 1),
    _ATEN.addcmul: (1, 2),
    _ATEN.native_batch_norm: (1,),
    _ATEN._native_batch_norm_legit_no_training: (1,),
    _ATEN.native_layer_norm: (2,),
    _ATEN.native_group_norm: (1,),
    _ATEN._fused_rms_norm: (2,),
}
_MATRICES = frozenset([_ATEN.convolution, _ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm])


@dataclass
class ModuleCall:
    """One finished call of a module.

    Attributes:
        order: number of modules that finished before this one
        operation_index: number of operations that had run by then
        macs: multiply-adds until then
        shapes: shapes of the returned tensors that depend on the images
        runs: number of calls of this module so far
        rejection_reason: reason why the output cannot be used; empty if it can
        positions: positions in the image of the returned tensors, if they were traced
    """

    order: int
    operation_index: int
    macs: int
    shapes: Shapes
    runs: int
    rejection_reason: str
    positions: dict[Key, Positions | None]


class ForwardTrace(TorchDispatchMode):
    """Record of one forward pass of a model: each finished module, and each tensor's first read.

    On the meta device this takes neither weights nor memory. A pass that fails keeps the modules that
    finished, and stores the reason in `failure`.

    Args:
        model: the model
        images: `(B, 3, H, W)`
        follow: whether to trace the positions of values in the image

    Attributes:
        events: the last call of each module, by module path, which is empty for the model itself
        first_read: number of the operation that first reads a tensor, by the tensor's storage
        factors: names of the parameters that multiply features, elementwise or as a norm's weight
        matrices: names of the matrices and convolutions that act on features
        failure: reason why the pass failed; empty if it did not
        flow: the positions of values, or None
    """

    def __init__(self, model: nn.Module, images: Tensor, *, follow: bool = False) -> None:
        super().__init__()
        self.model = model
        self.flow = PositionTracer(images) if follow else None
        self.events: dict[str, ModuleCall] = {}
        self.first_read: dict[int, int] = {}
        self.factors: set[str] = set()
        self.matrices: set[str] = set()
        self.failure = ""
        # A view of a parameter counts as the parameter; a result computed from it does not.
        self._names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names[storage(parameter)].append(name)
        self._operation_index = self._flops = self._finished = 0
        # Weak references keep the memory of a tensor that is gone from passing for a new one's.
        self._seen = {storage(images): StorageWeakRef(images.untyped_storage())}
        fast = torch.backends.mha.get_fastpath_enabled()
        hooks = [
            module.register_forward_hook(functools.partial(self._finish, path))
            for path, module in model.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)  # scripted modules accept no hooks
        ]
        try:
            # Attention as plain matrix products can be counted and followed on every device.
            torch.backends.mha.set_fastpath_enabled(False)
            with torch.no_grad(), torch.device(images.device), sdpa_kernel(SDPBackend.MATH), self:
                model(images)
        except Exception as error:
            self.failure = (str(error).splitlines() or [""])[0] or type(error).__name__
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._operation_index += 1
        read = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for key in read:
            self.first_read.setdefault(key, self._operation_index)
        packet, on_features = func._overloadpacket, not self._seen.keys().isdisjoint(read)
        for index, argument in enumerate(args):
            if isinstance(argument, Tensor) and (names := self._names.get(storage(argument))):
                if index in _FACTORS.get(packet, ()):
                    self.factors.update(names)
                elif packet in _MATRICES and on_features:
                    self.matrices.update(names)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and on_features:
                self._seen[storage(leaf)] = StorageWeakRef(leaf.untyped_storage())
            elif isinstance(leaf, Tensor):
                self._seen.pop(storage(leaf), None)
        if self.flow is not None:
            self.flow.trace_operation(func, args, kwargs, result)
        if packet in flop_registry:
            self._flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif packet is torch.ops.aten.mkldnn_rnn_layer:
            sequence, input_weights, hidden_weights = args[:3]
            steps = sequence.shape[0] * sequence.shape[1]
            self._flops += 2 * steps * (input_weights.numel() + hidden_weights.numel())
        return result

    def _finish(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        rejection_reason = ""
        try:
            roll = reorder(self.model, path)
            output = roll(output) if roll else output
        except NotAFeatureMap as reason:
            rejection_reason = str(reason)
        found = [(key, tensor) for key, tensor in tensors(output) if storage(tensor) in self._seen]
        if not found and not rejection_reason:
            kind = type(output).__name__
            rejection_reason = f"it returns a {kind}, in which torch finds nothing that depends on the image"
        self.events[path] = ModuleCall(
            order=self._finished,
            operation_index=self._operation_index,
            macs=self._flops // 2,
            shapes=[(key, tuple(tensor.shape)) for key, tensor in found],
            runs=self.events[path].runs + 1 if path in self.events else 1,
            rejection_reason=rejection_reason,
            positions={key: self.flow.positions_of(tensor) for key, tensor in found}
            if self.flow is not None
            else {},
        )
        self._finished += 1
