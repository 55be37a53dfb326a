import pytest
import torch

from difftrain_utils.config.training import OptimizerConfig
from difftrain_utils.errors import InputError
from difftrain_utils.optimization.optimizers import build_optimizer


def parameters():
    return torch.nn.Linear(2, 2).parameters()


def test_any_optimizer_is_built_with_its_arguments():
    optimizer = build_optimizer(OptimizerConfig("torch.optim.SGD", {"lr": 0.1, "momentum": 0.5}), parameters())
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.5
    optimizer = build_optimizer(OptimizerConfig(), parameters())
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["lr"] == 1e-4


@pytest.mark.parametrize(
    ("class_path", "init_args", "message"),
    [
        ("torch.optim.AdamX", {}, "optimizer.class_path: cannot import 'torch.optim.AdamX'"),
        ("no_such_library.Adam", {}, "optimizer.class_path: cannot import 'no_such_library.Adam'"),
        ("AdamW", {}, "optimizer.class_path: cannot import 'AdamW'"),
        ("torch.nn.Linear", {}, "'torch.nn.Linear' is not a torch.optim.Optimizer"),
        ("torch.optim.AdamW", {"weight_decey": 0}, "optimizer.init_args.weight_decey: .* did you mean weight_decay?"),
        ("torch.optim.AdamW", {"lr": -1.0}, "optimizer.init_args: torch.optim.AdamW refuses .* Invalid learning rate"),
        ("torch.optim.AdamW", {"lr": "fast"}, "optimizer.init_args: torch.optim.AdamW refuses"),
    ],
)
def test_what_cannot_be_built_is_refused(class_path, init_args, message):
    with pytest.raises(InputError, match=message):
        build_optimizer(OptimizerConfig(class_path, init_args), parameters())
