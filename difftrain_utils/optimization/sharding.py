"""Training with FSDP2, torch's `fully_shard` (Zhao et al. 2023, arXiv:2304.11277): each process keeps a share of the
weights, their gradients, the optimizer's state and the averages, and gathers the weights of a block for as long as it
computes.

Shares are DTensors. What is done with them in place, such as an average's step, is done by each process with its own;
what needs a whole tensor (`whole`) needs all processes."""

import copy
import dataclasses
import inspect
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.modeling_utils import _CAN_RECORD_REGISTRY

from difftrain_utils.config.training import OptimizerConfig, TrainConfig
from difftrain_utils.devices import weight_dtype
from difftrain_utils.errors import blame

# blocks of which a part is called from outside, when they are not gathered: its embedding of the time, once more
CALLED_FROM_OUTSIDE = {"DiTTransformer2DModel": "transformer_blocks.0."}
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
    """Leave each process its share of the models, in place, and give it to the optimizer, which has made no step yet.
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
        dtype = torch.float32 if name == "uncertainty" else weight_dtype(accelerator.mixed_precision)
        with blame(f"train.shard: not for this {name}, a {type(model).__name__}", *ERRORS):
            shard_module(model, mesh, config, dtype)
    after = chain.from_iterable(model.parameters() for model in models.values())
    share_of_whole = dict(zip(chain.from_iterable(before), after, strict=True))
    for group in optimizer.param_groups:
        group["params"] = [share_of_whole[parameter] for parameter in group["params"]]
    for parameter in list(optimizer.state):  # of those that begin with one
        share, state = share_of_whole[parameter], optimizer.state.pop(parameter)
        is_tensor = {name: isinstance(value, torch.Tensor) for name, value in state.items()}
        optimizer.state[share] = {n: like_share(v, share) if is_tensor[n] else v for n, v in state.items()}
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
    for module in part.modules():  # transformers knows by the class which hidden states there are, and it is new
        if hasattr(module, "_can_record_outputs"):
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(module)), module._can_record_outputs)


def shard_module(module: torch.nn.Module, mesh: DeviceMesh, config: TrainConfig, dtype: torch.dtype) -> None:
    """Leave each process its share of a module, in place: gathered by blocks, in `dtype`, and what is in no block as
    one. Gradients are summed in float32."""
    # the inputs stay as they are: some, such as timesteps, would not survive being rounded
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": config.reshard_after_forward}
    if dtype != torch.float32:
        options["mp_policy"] = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    if config.shard_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    # SD3's, DiT's and others' last operation is a view, of which nothing is changed in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for block in reversed(blocks_of(module)):  # what is within another before it
        fully_shard(block, **options)
    fully_shard(module, **options)


def blocks_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules within one whose class diffusers or transformers name as not to be split or as repeated, those that
    are within others after these; where they name none, the items of its outermost lists of modules. None has a weight
    that is tied to one outside, as of embeddings and of what makes logits: both have to be gathered together."""
    held = Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))
    tied = {parameter for parameter, times in held.items() if times > 1}
    names = {*(getattr(module, "_no_split_modules", None) or ()), *(getattr(module, "_repeated_blocks", None) or ())}
    blocks: dict[str, torch.nn.Module] = {}
    for name, part in module.named_modules():
        is_item = name.rpartition(".")[2].isdecimal() and not any(name.startswith(f"{block}.") for block in blocks)
        is_block = type(part).__name__ in names if names else is_item
        is_apart = f"{name}.".startswith(CALLED_FROM_OUTSIDE.get(type(module).__name__, "."))
        own = set(part.parameters())
        if name and is_block and not is_apart and own and tied.isdisjoint(own):
            blocks[name] = part
    return list(blocks.values())


def units_of(module: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """The parameters that are gathered at a time: of each block without those within it, and last what is in none."""
    seen, units = set(), []
    for part in (*reversed(blocks_of(module)), module):
        units.append([parameter for parameter in part.parameters() if parameter not in seen])
        seen.update(units[-1])
    return units


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
    """Of tensors, of those that are shared out of this process's shares."""
    return sum(share_of(tensor, True).values.nbytes for tensor in tensors)


# ── The optimizer ────────────────────────────────────────────────────────────────────────────────────────────
def _try_optimizer(cls: type[torch.optim.Optimizer], init_args: dict[str, Any], mesh: DeviceMesh) -> None:
    """Raise ValueError unless two steps with the shares of a matrix, of a size at which optimizers with 8-bit states
    have them, and of a bias are those with the wholes, but for rounding, which may be that of bf16."""
    generator, names, steps = torch.Generator().manual_seed(0), inspect.signature(cls).parameters, []
    arguments = init_args if "lr" not in names else init_args | {"lr": init_args.get("lr") or 1e-3}
    scales = torch.linspace(0.1, 1, 64)  # so that what one share says of the whole is wrong
    starts = [torch.randn(64, 128, generator=generator) * scales[:, None], scales]
    gradients = [torch.randn(64, 128, generator=generator) * scales.flip(0)[:, None], scales.flip(0)]
    for is_shared in (False, True):

        def place(values: torch.Tensor, is_shared: bool = is_shared) -> torch.Tensor:
            values = values.to(mesh.device_type, copy=True)
            return distribute_tensor(values, mesh, _placements(mesh), src_data_rank=None) if is_shared else values

        parameters = [torch.nn.Parameter(place(values)) for values in starts]
        optimizer = cls([{"name": "denoiser", "params": parameters}], **arguments)
        if hasattr(optimizer, "train"):
            optimizer.train()
        for _ in range(2):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = place(gradient)
            optimizer.step()
        for parameter in parameters if is_shared else ():
            for name, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                    raise ValueError(f"its {name} has another shape, {tuple(value.shape)}, than a weight")
        steps.append([whole(p).cpu() - start for p, start in zip(parameters, starts, strict=True)])
    for expected, found in zip(*steps, strict=True):
        if not (found - expected).norm() <= 0.02 * expected.norm():
            raise ValueError("two steps with the shares of a weight are not those with the whole")


def _placements(mesh: DeviceMesh) -> list[Shard | Replicate]:
    return [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)]
