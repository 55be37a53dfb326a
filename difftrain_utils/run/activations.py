"""Activations: what a forward pass keeps for the backward pass, or holds at most without one, counted without
computing it."""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from difftrain_utils.optimization.trained import trained_parameters

EMPTY = torch.ops.aten.empty.memory_format
Storages = dict[int, torch.UntypedStorage]  # by address


@dataclass
class Activations:
    """In bytes."""

    kept: int
    """For the backward pass."""
    checkpointed: int | None
    """The same with gradient checkpointing, at its peak; None: the denoiser has none."""


class Shapes:
    """For the block, tensors have shapes and devices but no values, and operations on them compute and draw nothing.
    What has values all the same, such as a mask, keeps them, so that a model may ask for lengths."""

    def __init__(self):
        self.modes = FakeTensorMode(allow_non_fake_inputs=True), _Values()  # the last one is asked first

    def __enter__(self) -> None:
        for mode in self.modes:
            mode.__enter__()

    def __exit__(self, *error) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


class _Values(TorchDispatchMode):
    """Operations on values alone are computed."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # a mask that a model makes, torch.ones(…, dtype=torch.long), has values
        is_mask = not tensors and kwargs.get("dtype") in (torch.int64, torch.bool) and function is not EMPTY
        if is_mask or (tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors)):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if function is torch.ops.aten.index.Tensor:
            args = args[0], [place for index in args[1] for place in _places(index)]
        return function(*args, **kwargs)


def _places(index: torch.Tensor | None) -> Iterable[torch.Tensor | None]:
    """A mask that has values as the places that it lets through, whose number is then known."""
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return [index]
    with unset_fake_temporarily():
        return index.nonzero().unbind(1)


def without_values(
    module: torch.nn.Module, device: torch.device | str, shapes: AbstractContextManager | None = None
) -> torch.nn.Module:
    """A copy whose parameters and buffers are empty, on the device; with `Shapes`, shapes alone."""
    emptied = {}
    besides = tree_leaves([list(vars(part).values()) for part in module.modules()])
    besides = [value for value in besides if isinstance(value, torch.Tensor) and value.is_meta]
    with shapes or nullcontext():  # not while copying: what else a module holds keeps its values
        for tensor in (*module.parameters(), *module.buffers(), *besides):
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            emptied[id(tensor)] = torch.nn.Parameter(value, tensor.requires_grad) if is_parameter else value
    return copy.deepcopy(module, emptied)


def count_activations(denoiser: torch.nn.Module, predict: Callable[..., Any], *inputs: Any) -> Activations:
    """Those of `predict(denoiser, *inputs)`: all that autograd saves, each storage once, parameters and buffers left
    out. Weights that autocast has rounded are in it.

    Each block that gradient checkpointing would compute once more is counted by itself: of it, only what it is given
    would be kept, and later the whole of one block at a time. Autocast holds all rounded weights to the end of the
    forward pass, which may be more. The denoiser's own checkpointing is replaced by this."""
    own = {tensor.untyped_storage()._cdata for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    outside, given, blocks = {}, {}, []

    def note(storages: Storages, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    @contextmanager
    def saved(storages: Storages) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: note(storages, tensor), lambda tensor: tensor):
            yield

    def block(function: Callable[..., Any], *args: Any) -> Any:
        for tensor in args:
            if isinstance(tensor, torch.Tensor):
                note(given, tensor)
        blocks.append({})
        with saved(blocks[-1]):
            return function(*args)

    is_of_transformers = isinstance(denoiser, PreTrainedModel)
    name = "supports_gradient_checkpointing" if is_of_transformers else "_supports_gradient_checkpointing"
    is_checkpointed = getattr(denoiser, name, False)
    if is_checkpointed and is_of_transformers:
        denoiser._set_gradient_checkpointing(True, block)
    elif is_checkpointed:
        denoiser.enable_gradient_checkpointing(block)
    # eager: compiled code would save what it sees fit
    with torch.compiler.set_stance("force_eager"), torch.enable_grad(), saved(outside):
        predict(denoiser, *inputs)
    kept = outside.copy()
    for of_block in blocks:
        kept |= of_block
    if not is_checkpointed:
        return Activations(num_bytes(kept), None)
    outside |= given
    recomputed = max((num_bytes(of_block, outside) for of_block in blocks), default=0)
    return Activations(num_bytes(kept), num_bytes(outside) + max(recomputed, rounded_bytes(denoiser)))


def peak_bytes(shapes: Shapes, function: Callable[..., Any], *inputs: Any) -> int:
    """The most bytes of all tensors that `function(*inputs)` makes, without gradients, that there are at a time; what
    was there before is left out."""
    with shapes, _Living() as living, torch.no_grad():
        function(*inputs)
    return living.most


class _Living(TorchDispatchMode):
    """The bytes of the storages that operations have made and nothing has let go of."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(output):
            if storage._cdata not in given | self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._let_go, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return output

    def _let_go(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def rounded_bytes(denoiser: torch.nn.Module) -> int:
    """Bytes of the weights that autocast, if it is on, rounds and holds."""
    parameters = trained_parameters(denoiser)
    kind = parameters[0].device.type
    if not torch.is_autocast_enabled(kind):
        return 0
    dtype = torch.get_autocast_dtype(kind)
    return dtype.itemsize * sum(parameter.numel() for parameter in parameters if parameter.dtype != dtype)


def num_bytes(storages: Storages, without: Storages | None = None) -> int:
    return sum(storage.nbytes() for key, storage in storages.items() if key not in (without or {}))
