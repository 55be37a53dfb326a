"""Nested dicts and lists, such as an optimizer's state, as JSON with the tensors beside it."""

from collections.abc import Callable
from typing import Any

import torch


def to_json(tree: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """What JSON can hold of nested dicts, lists and tuples: each tensor is put into `tensors`, by a name that says
    where it was. Raises TypeError for anything else."""
    if isinstance(tree, torch.Tensor):
        if path in tensors:
            raise TypeError(f"two tensors would be called {path} in a checkpoint")
        tensors[path] = tree
        return {"tensor": path}
    if isinstance(tree, dict):
        return {"dict": [[key, to_json(value, tensors, f"{path}.{key}".lstrip("."))] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        values = [to_json(value, tensors, f"{path}.{number}") for number, value in enumerate(tree)]
        return values if isinstance(tree, list) else {"tuple": values}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{path} is a {type(tree).__name__}, which a checkpoint cannot hold")


def from_json(tree: Any, tensor_of: Callable[[str], torch.Tensor]) -> Any:
    """What `to_json` was given."""
    if isinstance(tree, list):
        return [from_json(value, tensor_of) for value in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensor_of(content)
    if kind == "tuple":
        return tuple(from_json(value, tensor_of) for value in content)
    return {key: from_json(value, tensor_of) for key, value in content}
