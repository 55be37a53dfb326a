import re

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel
from helpers import ROOT

from difftrain_utils.config.training import LrSchedulerConfig, OptimizerConfig
from difftrain_utils.errors import InputError
from difftrain_utils.optimization.optimizers import build_lr_scheduler, build_optimizer, clip_gradients


def models():
    return {"denoiser": torch.nn.Linear(2, 2)}


def test_any_optimizer_is_built_with_its_arguments():
    optimizer = build_optimizer(OptimizerConfig("torch.optim.SGD", {"lr": 0.1, "momentum": 0.5}), models())
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.5
    optimizer = build_optimizer(OptimizerConfig(), models())
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["lr"] == 1e-4


def test_each_model_has_a_group_of_its_name():
    both = models() | {"projector": torch.nn.Linear(3, 1, bias=False)}
    optimizer = build_optimizer(OptimizerConfig("torch.optim.SGD", {"lr": 0.1}), both)
    assert [group["name"] for group in optimizer.param_groups] == ["denoiser", "projector"]
    for group, model in zip(optimizer.param_groups, both.values(), strict=True):
        assert group["lr"] == 0.1
        assert all(a is b for a, b in zip(group["params"], model.parameters(), strict=True))


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
        # what only a step says, or a learning rate that is to be scheduled
        ("torch.optim.LBFGS", {}, "optimizer.init_args: torch.optim.LBFGS refuses .*closure"),
        ("torch.optim.SparseAdam", {}, "optimizer.init_args: torch.optim.SparseAdam refuses .* dense gradients"),
        ("torch.optim.AdamW", {"betas": [0.9]}, "optimizer.init_args: torch.optim.AdamW refuses "),
        ("torch.optim.AdamW", {"betas": [0.9, 0.9, 0.9]}, "optimizer.init_args: torch.optim.AdamW refuses "),
        ("torch.optim.Optimizer", {"defaults": {}}, "optimizer.init_args: torch.optim.Optimizer refuses "),
        (
            "transformers.optimization.Adafactor",
            {},
            "optimizer.init_args: transformers.*Adafactor refuses ",
        ),
        ("..x.AdamW", {}, "optimizer.class_path: cannot import '..x.AdamW'"),
    ],
)
def test_what_cannot_be_built_is_refused(class_path, init_args, message):
    with pytest.raises(InputError, match=message):
        build_optimizer(OptimizerConfig(class_path, init_args), models())


def test_patterns_give_parameters_arguments_of_their_own():
    """Later ones win; a model stays one for clipping, and its first group is the one without."""
    both = {
        "denoiser": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)),
        "uncertainty": torch.nn.Linear(2, 1),
    }
    groups = {
        "uncertainty.*": {"lr": 0.01, "weight_decay": 0.0},
        "*.bias": {"weight_decay": 0.0},
        "denoiser.1.*": {"lr": 0.5},
    }
    optimizer = build_optimizer(OptimizerConfig("torch.optim.AdamW", {"lr": 0.1}, groups), both)
    found = [
        (group["name"], group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups
    ]
    assert found == [
        ("denoiser", 0.1, 0.01, 1), ("denoiser", 0.1, 0.0, 1), ("denoiser", 0.5, 0.01, 1), ("denoiser", 0.5, 0.0, 1),
        ("uncertainty", 0.01, 0.0, 2),
    ]  # fmt: skip
    for model in both.values():
        model(torch.ones(3, 2)).sum().backward()
    expected = torch.nn.utils.get_total_norm([parameter.grad for parameter in both["denoiser"].parameters()])
    norm = clip_gradients(Accelerator(cpu=True), optimizer, {"denoiser": None})
    assert norm == pytest.approx(expected.item())


def test_a_pattern_of_no_parameter_is_refused():
    """It would have no effect, and nobody would notice."""
    message = r"^optimizer.groups: 'denoiser.norm\*' is of no parameter; there is denoiser.weight, denoiser.bias$"
    with pytest.raises(InputError, match=message):
        build_optimizer(OptimizerConfig(groups={"denoiser.norm*": {"weight_decay": 0.0}}), models())


def test_an_option_that_the_optimizer_does_not_have_is_refused():
    """It would be ignored."""
    message = r"^optimizer.groups: 'denoiser.bias': torch.optim.AdamW has no 'weight_decya' for a group; it has lr, "
    with pytest.raises(InputError, match=message):
        build_optimizer(OptimizerConfig(groups={"denoiser.bias": {"weight_decya": 0.0}}), models())


@pytest.mark.parametrize("options", [{"lr": "x"}, {"lr": -1.0}, {"betas": 5}, {"weight_decay": "a"}])
@pytest.mark.parametrize("class_path", ["torch.optim.AdamW", "torch.optim.Muon"])
def test_what_the_optimizer_refuses_for_a_group_is_refused(class_path, options):
    message = rf"^optimizer.groups: '\*.bias': {class_path} refuses {{'{next(iter(options))}': "
    with pytest.raises(InputError, match=message):
        build_optimizer(OptimizerConfig(class_path, groups={"*.bias": options}), models())


def test_a_group_of_muon_may_have_arguments_of_both():
    groups = {"*": {"betas": [0.5, 0.9], "momentum": 0.8}}
    both = models()
    optimizer = build_optimizer(OptimizerConfig("torch.optim.Muon", {}, groups), both)
    assert [group.get("momentum") or group["betas"] for group in optimizer.param_groups] == [0.8, (0.5, 0.9)]
    both["denoiser"](torch.ones(3, 2)).sum().backward()
    before = [parameter.detach().clone() for parameter in both["denoiser"].parameters()]
    optimizer.step()
    assert not any(a.equal(b) for a, b in zip(before, both["denoiser"].parameters(), strict=True))


def test_muon_takes_the_matrices_and_adamw_the_rest():
    """To the bit like the two by themselves, also after both have been saved and loaded."""
    ours, theirs = (
        torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.Flatten(), torch.nn.Linear(3, 2)) for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())
    config = OptimizerConfig("torch.optim.Muon", {"lr": 0.1, "momentum": 0.5}, {"denoiser.2.bias": {"lr": 0.3}})
    optimizer = build_optimizer(config, {"denoiser": ours})
    assert [(g["name"], g["lr"], len(g["params"])) for g in optimizer.param_groups] == [
        ("denoiser", 0.1, 1), ("denoiser", 0.1, 2), ("denoiser", 0.3, 1)
    ]  # fmt: skip
    rest = [{"params": [*theirs[0].parameters()]}, {"params": [theirs[2].bias], "lr": 0.3}]
    separate = (
        torch.optim.Muon([theirs[2].weight], lr=0.1, momentum=0.5),
        torch.optim.AdamW(rest, lr=0.1, weight_decay=0.1),
    )
    for step in range(4):
        if step == 2:
            state, optimizer = optimizer.state_dict(), build_optimizer(config, {"denoiser": ours})
            optimizer.load_state_dict(state)
        for model, optimizers in ((ours, [optimizer]), (theirs, separate)):
            model.zero_grad()
            model(torch.arange(8.0).view(4, 2, 1, 1)).square().mean().backward()
            for each in optimizers:
                each.step()
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, dict(theirs.named_parameters())[name]), (step, name)


def test_the_uncertainty_has_its_own_rate():
    both = models() | {"uncertainty": torch.nn.Linear(3, 1, bias=False)}
    optimizer = build_optimizer(OptimizerConfig(), both)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-4, 0.01), (1e-2, 0.0)]


def test_a_learning_rate_below_the_end_of_a_polynomial_schedule_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1e-8)
    with pytest.raises(InputError, match=r"^lr_scheduler.name: polynomial: .*1e-07.*1e-08"):
        build_lr_scheduler(LrSchedulerConfig(name="polynomial"), optimizer, 10)


def test_the_rates_of_the_docs_for_a_wider_dit_are_those_of_what_reads_its_width():
    text = (ROOT / "docs/training.md").read_text()
    (block,) = [b for b in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "timestep_embedder" in b]
    fields = yaml.safe_load(block)["optimizer"]
    narrow, wide = (
        DiTTransformer2DModel(heads, 12, num_layers=2, sample_size=4, num_embeds_ada_norm=8) for heads in (2, 8)
    )
    optimizer = build_optimizer(
        OptimizerConfig(init_args=fields["init_args"], groups=fields["groups"]), {"denoiser": wide}
    )
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    others = dict(narrow.named_parameters())
    for name, weight in wide.named_parameters():
        is_table = name.endswith("embedding_table.weight")  # of which one row is read
        reads_width = weight.ndim > 1 and not is_table and weight[0].numel() == 4 * others[name][0].numel()
        assert rates[id(weight)] == (2.5e-4 if reads_width else 1e-3), name
