import json

import pytest
import torch

from difftrain_utils.trees import from_json, to_json


def test_trees_survive_json():
    tree = {
        "state": {
            0: {"exp_avg": torch.ones(2), "step": torch.tensor(3.0), "lists": [torch.zeros(1), (1, None)]},
            1: {},
        },
        "param_groups": [{"betas": (0.9, 0.999), "lr": 1e-4, "d": float("inf"), "name": "denoiser", "params": [0, 1]}],
    }
    tensors = {}
    text = json.dumps(to_json(tree, tensors))
    assert list(tensors) == ["state.0.exp_avg", "state.0.step", "state.0.lists.0"]
    assert str(from_json(json.loads(text), tensors.__getitem__)) == str(tree)
    with pytest.raises(TypeError, match=r"two tensors would be called a\.b"):
        to_json({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, {})
    with pytest.raises(TypeError, match=r"state\.0\.of is a set, which a checkpoint cannot hold"):
        to_json({"state": {0: {"of": {1}}}}, {})


def test_a_tensor_in_several_places_is_one():
    shared, tensors = torch.ones(2), {}
    tree = to_json({"a": {"map": shared}, "b": {"map": shared}, "c": shared.clone()}, tensors)
    assert list(tensors) == ["a.map", "c"]
    back = from_json(tree, lambda name: tensors[name].clone())
    assert back["a"]["map"] is back["b"]["map"] is not back["c"]
