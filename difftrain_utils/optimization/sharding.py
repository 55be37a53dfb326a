"""Training with FSDP2, torch's `fully_shard` (Zhao et al. 2023, arXiv:2304.11277): each process keeps a share of the
weights, their gradients, the optimizer's state and the averages, and gathers the weights of a block for as long as it
computes.

Shares are DTensors. What is done with them in place, such as an average's step, is done by each process with its own;
what needs a whole tensor (`whole`) needs all processes."""

import copy
import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from difftrain_utils.config.training import OptimizerConfig, TrainConfig
from difftrain_utils.devices import weight_dtype
from difftrain_utils.errors import blame

ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, IndexError, AssertionError)


def is_sharded(config: TrainConfig, num_processes: int) -> bool:
    """Whether there is anything to share."""
    return config.shard == "full" and num_processes > 1


def mesh_of(accelerator: Accelerator, config: TrainConfig) -> DeviceMesh:
    """The processes in a row, each with a share; with `train.shard_size` in rows of so many, which hold the same."""
    device, num_processes = accelerator.device.type, accelerator.num_processes
    if config.shard_size in (None, num_processes):
        return init_device_mesh(device, (num_processes,), mesh_dim_names=("shard",))
    shape = num_processes // config.shard_size, config.shard_size
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def shard_models(
    accelerator: Accelerator,
    models: Mapping[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    optimizer_config: OptimizerConfig,
) -> dict[str, torch.nn.Module]:
    """Leave each process its share of the models, in place, and give it to the optimizer, which has no state yet.
    Nothing happens unless `train.shard` asks for it, or with one process.

    Returns the models as plain modules: themselves, or if they are shared out, modules without weights (`outline`).

    Raises:
        InputError: a model cannot be shared out, or the optimizer does something else with a share than with a whole.
    """
    if not is_sharded(config, accelerator.num_processes):
        return dict(models)
    mesh = mesh_of(accelerator, config)
    with blame(f"train.shard: {optimizer_config.class_path} does not work on shares of weights", *ERRORS):
        _try_optimizer(type(optimizer), optimizer_config.init_args, mesh)
    outlines = {name: outline(model) for name, model in models.items()}
    before = [list(model.parameters()) for model in models.values()]
    for name, model in models.items():
        with blame(f"train.shard: not for this {name}, a {type(model).__name__}", *ERRORS):
            shard_module(model, mesh, config, weight_dtype(accelerator.mixed_precision))
    after = chain.from_iterable(model.parameters() for model in models.values())
    share_of_whole = dict(zip(chain.from_iterable(before), after, strict=True))
    for group in optimizer.param_groups:
        group["params"] = [share_of_whole[parameter] for parameter in group["params"]]
    return outlines


def outline(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module whose parameters have no values; its buffers have."""
    shapes = {id(p): torch.nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, shapes)


def fill_outline(accelerator: Accelerator, outlined: torch.nn.Module, module: torch.nn.Module) -> None:
    """Give an outline the values of the module that it is of, in main memory on the main process. All processes call
    it; where a module is its own outline, nothing happens."""
    if outlined is not module:
        state = wholes(accelerator, module.state_dict())
        if accelerator.is_main_process:
            outlined.load_state_dict(state, assign=True)


def shard_encoder(part: torch.nn.Module, accelerator: Accelerator, config: TrainConfig) -> None:
    """Leave each process its share of a frozen part, in place, whose weights are in the type that they are to have."""
    config = dataclasses.replace(config, reshard_after_forward=True)  # no backward pass would let go of them
    shard_module(part, mesh_of(accelerator, config), config, torch.float32)


def shard_module(module: torch.nn.Module, mesh: DeviceMesh, config: TrainConfig, dtype: torch.dtype) -> None:
    """Leave each process its share of a module, in place: gathered by blocks, in `dtype`, and what is in no block as
    one. Gradients are summed in float32."""
    # the inputs stay as they are: some, such as timesteps, would not survive being rounded
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": config.reshard_after_forward}
    if dtype != torch.float32:
        options["mp_policy"] = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    if config.shard_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for block in blocks_of(module):
        fully_shard(block, **options)
    fully_shard(module, **options)


def blocks_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The outermost modules within one whose class diffusers or transformers name as not to be split or as repeated;
    where they name none, the items of its lists of modules."""
    names = {*(getattr(module, "_no_split_modules", None) or ()), *(getattr(module, "_repeated_blocks", None) or ())}
    blocks: dict[str, torch.nn.Module] = {}
    for name, part in module.named_modules():
        is_block = type(part).__name__ in names if names else name.rpartition(".")[2].isdecimal()
        within = any(name.startswith(f"{block}.") for block in blocks)
        if name and is_block and not within and any(True for _ in part.parameters()):
            blocks[name] = part
    return list(blocks.values())


def reshard(*models: torch.nn.Module) -> None:
    """Let go of what is gathered, so that `parameters()` are the shares."""
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


# ── Tensors ──────────────────────────────────────────────────────────────────────────────────────────────────
class Share(NamedTuple):
    """What this process holds of a tensor."""

    offset: tuple[int, ...]  # in the whole
    values: torch.Tensor
    is_first: bool  # of the processes that hold the same


def share_of(tensor: torch.Tensor, is_main_process: bool) -> Share:
    """A process's own share; of a tensor that all have, the whole."""
    if not isinstance(tensor, DTensor):
        return Share((0,) * tensor.ndim, tensor.detach(), is_main_process)
    (chunk,) = tensor.__create_chunk_list__()  # torch's own protocol for checkpoints
    places = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
    is_first = all(place == 0 for place, placement in places if placement.is_replicate())
    return Share(tuple(chunk.offsets), tensor.detach().to_local(), is_first)


def like_share(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor, the share that this process has of `like`; the whole where the two differ in shape or `like`
    is no DTensor."""
    if not isinstance(like, DTensor) or like.shape != tensor.shape:
        return tensor
    offset, held, _ = share_of(like, True)
    values = tensor[tuple(slice(o, o + n) for o, n in zip(offset, held.shape, strict=True))].to(held.device)
    return as_share(values, like)


def as_share(values: torch.Tensor, like: DTensor) -> DTensor:
    """The DTensor laid out as `like` of which this process holds `values`."""
    layout = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(values, like.device_mesh, like.placements, **layout)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, wherever its shares lie. All processes call it."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()


def wholes(accelerator: Accelerator, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The wholes on the main process, those of shares in main memory; none on the others. All processes call it."""
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)  # one after the other: the others need no room for all of them
        if accelerator.is_main_process:
            found[name] = gathered.cpu() if isinstance(tensor, DTensor) else gathered
    return found


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of this process's shares."""
    return sum(share_of(tensor, True).values.nbytes for tensor in tensors)


# ── The optimizer ────────────────────────────────────────────────────────────────────────────────────────────
def _try_optimizer(cls: type[torch.optim.Optimizer], init_args: dict[str, Any], mesh: DeviceMesh) -> None:
    """Raise ValueError unless two steps with the shares of a small matrix and a bias are those with the wholes."""
    results = []
    for is_shared in (False, True):
        parameters = []
        for shape in ((8, 4), (8,)):
            values = torch.linspace(-1, 1, 8).view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
            values = values.to(mesh.device_type)
            if is_shared:
                values = distribute_tensor(values, mesh, _placements(mesh), src_data_rank=None)
            parameters.append(torch.nn.Parameter(values))
        names = inspect.signature(cls).parameters
        arguments = init_args if "lr" not in names else init_args | {"lr": init_args.get("lr") or 1e-3}
        optimizer = cls([{"name": "denoiser", "params": parameters}], **arguments)
        if hasattr(optimizer, "train"):
            optimizer.train()
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = parameter.detach().square() + 0.5
            optimizer.step()
        for parameter in parameters if is_shared else ():
            for name, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                    raise ValueError(f"its {name} has another shape, {tuple(value.shape)}, than a weight")
        results.append([whole(parameter) for parameter in parameters])
    for expected, found in zip(*results, strict=True):
        if not torch.allclose(expected, found, rtol=1e-4, atol=1e-6):
            raise ValueError("two steps with the shares of a weight are not those with the whole")


def _placements(mesh: DeviceMesh) -> list[Shard | Replicate]:
    return [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)]
