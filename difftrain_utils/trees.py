"""Nested dicts and lists, such as an optimizer's state, as JSON with the tensors beside it."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


def to_json(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What JSON can hold of nested dicts, lists and tuples: each tensor is put into `tensors`, by a name that says
    where it was; one that is in several places once. Raises TypeError for anything else."""
    return _to_json(tree, tensors, {}, "")


def _to_json(tree: Any, tensors: dict[str, torch.Tensor], names: dict[int, str], path: str) -> Any:
    if isinstance(tree, torch.Tensor):
        name = names.setdefault(id(tree), path)
        if name == path and tensors.setdefault(path, tree) is not tree:
            raise TypeError(f"two tensors would be called {path} in a checkpoint")
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": [[k, _to_json(v, tensors, names, f"{path}.{k}".lstrip("."))] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        values = [_to_json(value, tensors, names, f"{path}.{number}") for number, value in enumerate(tree)]
        return values if isinstance(tree, list) else {"tuple": values}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{path} is a {type(tree).__name__}, which a checkpoint cannot hold")


def from_json(tree: Any, tensor_of: Callable[[str], torch.Tensor]) -> Any:
    """What `to_json` was given; each tensor is asked for once."""
    return _from_json(tree, cache(tensor_of))


def _from_json(tree: Any, tensor_of: Callable[[str], torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_from_json(value, tensor_of) for value in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensor_of(content)
    if kind == "tuple":
        return tuple(_from_json(value, tensor_of) for value in content)
    return {key: _from_json(value, tensor_of) for key, value in content}
