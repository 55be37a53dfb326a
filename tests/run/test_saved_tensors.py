"""The tensors of a checkpoint: what is written is what is read, whoever reads it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from difftrain_utils.run.saved_tensors import SavedTensors, merge_indices


@pytest.fixture
def shared(tmp_path):
    """A folder of two processes with a matrix cut by rows, of which the second has fewer, and a number."""
    matrix = torch.arange(20.0).view(5, 4)
    save_file(
        {"denoiser/weight": matrix[:3], "optimizer/step": torch.tensor(7.0)}, tmp_path / "shard-00000.safetensors"
    )
    save_file({"denoiser/weight": matrix[3:].clone()}, tmp_path / "shard-00001.safetensors")
    names = {"denoiser/weight": [5, 4], "optimizer/step": []}
    indices = [{name: {"shape": shape, "chunks": []} for name, shape in names.items()} for _ in range(2)]
    for number, (start, rows) in enumerate(((0, 3), (3, 2))):
        indices[number]["denoiser/weight"]["chunks"] = [[f"shard-{number:05d}.safetensors", [start, 0], [rows, 4]]]
    indices[0]["optimizer/step"]["chunks"] = [["shard-00000.safetensors", [], []]]
    (tmp_path / "index.json").write_text(json.dumps(merge_indices(indices)))
    return tmp_path, matrix


def test_shares_are_put_together(shared):
    folder, matrix = shared
    with SavedTensors(folder) as saved:
        assert saved.shapes("denoiser") == {"weight": (5, 4)}
        assert torch.equal(saved.read("denoiser", "weight"), matrix)
        assert saved.read("optimizer", "step") == 7
        for offset, shape in (((1, 1), (4, 2)), ((4, 0), (1, 4)), ((0, 0), (3, 4)), ((5, 0), (0, 4))):
            part = saved._region("denoiser", "weight", offset, shape)
            ends = [slice(o, o + n) for o, n in zip(offset, shape, strict=True)]
            assert torch.equal(part, matrix[ends[0], ends[1]]) and part.dtype == matrix.dtype


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([0], r"of denoiser/weight, which is \(5, 4\), there are 3 rows"),
        ([], r"of denoiser/weight, which is \(5, 4\), there are 0 rows"),
        ([0, 0], r"of denoiser/weight, which is \(5, 4\), a chunk begins at \[0, 0\] and is \(3, 4\)"),
        ([1], r"a chunk begins at \[3, 0\]"),
    ],
)
def test_what_is_missing_or_twice_is_said(shared, chunks, message):
    folder, _ = shared
    index = json.loads((folder / "index.json").read_text())
    entry = index["denoiser/weight"]
    entry["chunks"] = [entry["chunks"][number] for number in chunks]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        SavedTensors(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"do not both have weight of denoiser"),
        ({"weight": torch.zeros(5, 4), "bias": torch.zeros(4)}, r"do not both have bias of denoiser"),
        ({"weight": torch.zeros(4, 4)}, r"weight is \(5, 4\) in .*, and here \(4, 4\)"),
    ],
)
def test_other_models_are_refused(shared, tensors, message):
    with SavedTensors(shared[0]) as saved, pytest.raises(ValueError, match=message):
        saved.load("denoiser", tensors)
    assert all(not tensor.any() for tensor in tensors.values())
