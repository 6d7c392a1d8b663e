"""Networks whose parameters are spread over processes by FSDP2, ``torch.distributed.fsdp.fully_shard``.

A unit of FSDP gathers its parameters when it is called, and its hooks divide the gradients among the processes. So what
is made a unit has to be what is called: of a network that is split, the encoder and each head, and not the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtl_lightning.split_network import SplitNetwork

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy


def shard_network(
    network: nn.Module,
    mesh: DeviceMesh,
    blocks: tuple[type[nn.Module], ...] = (),
    mp_policy: MixedPrecisionPolicy | None = None,
) -> None:
    """Spread the parameters of a network over the processes of a mesh, in place.

    The units are the encoder and each head of a network that :class:`~mtl_lightning.split_network.SplitNetwork` splits,
    and any other network as a whole; within them, every module of the classes ``blocks``. To be called before the
    optimiser is made. What is sharded already is left alone.

    Args:
        network: The network; its parameters become ``DTensor``.
        mesh: The devices of data parallelism, one-dimensional.
        blocks: Classes of modules inside, such as the block of a transformer, that are to be units of their own: only
            one of them at a time is then gathered.
        mp_policy: What FSDP computes and reduces in; in the dtype of the parameters by default.

    Raises:
        ValueError: If two units share a parameter, which FSDP2 cannot divide between them.

    Example:
        Called in ``configure_model`` of a module that is trained with Lightning's ``ModelParallelStrategy``:

        >>> from mtl_lightning.modules import TaskGroupModule
        >>> class Sharded(TaskGroupModule):
        ...     def configure_model(self) -> None:
        ...         shard_network(self.network, self.device_mesh["data_parallel"], blocks=(nn.TransformerEncoderLayer,))
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    called = called_modules(network)
    _check_sharing(called)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy() if mp_policy is None else mp_policy}
    for module in called.values():
        # A unit takes the parameters that those inside it have left.
        for inner in reversed([inner for inner in module.modules() if inner is not module]):
            if isinstance(inner, blocks) and not _is_unit(inner):
                fully_shard(inner, **options)
        if not _is_unit(module) and any(True for _ in module.parameters()):
            fully_shard(module, **options)


def called_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that are called in training, by their names in the network: those that may be sharded.

    Example:
        >>> from mtl_lightning.networks import MultiHeadNetwork
        >>> list(called_modules(MultiHeadNetwork(nn.Linear(8, 4), {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})))
        ['encoder', 'heads.a', 'heads.b']
        >>> list(called_modules(nn.Linear(8, 4)))
        ['']
    """
    heads = dict(network.named_children()).get("heads")
    split = SplitNetwork(network, list(heads) if isinstance(heads, nn.ModuleDict) else [])
    if not split.is_split or not isinstance(heads, nn.ModuleDict):
        return {"": network}
    return {"encoder": network.get_submodule("encoder")} | {f"heads.{name}": head for name, head in heads.items()}


def misplaced_units(module: nn.Module, network: nn.Module) -> list[str]:
    """Return the units of FSDP in ``module`` that no training step calls, by name: they would never be gathered."""
    reached = {id(inner) for called in called_modules(network).values() for inner in called.modules()}
    return [name for name, inner in module.named_modules() if _is_unit(inner) and id(inner) not in reached]


def reshard(network: nn.Module) -> None:
    """Give up the gathered parameters of all units: they are out of date after a step.

    A unit keeps them after a pass without a backward pass, and would go on with them.
    """
    for unit in units(network):
        unit.reshard()


def units(module: nn.Module) -> Iterator[FSDPModule]:
    """Return the units of FSDP in ``module``."""
    from torch.distributed.fsdp import FSDPModule

    return (inner for inner in module.modules() if isinstance(inner, FSDPModule))


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a process holds a part of ``tensor`` only, a ``DTensor``."""
    return hasattr(tensor, "full_tensor")  # its class is not imported where nothing is sharded


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of ``tensor`` on every process, all of which have to take part; itself if it is not sharded."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def spread_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return ``tensor``, whole and equal on all processes, spread as ``parameter`` is."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements)


def clip_gradient_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale the gradients to a norm, over all of them and all processes, of at most ``max_norm``.

    Unlike ``torch.nn.utils.clip_grad_norm_`` it takes parameters that are sharded and ones that are not together.

    Example:
        >>> parameter = nn.Parameter(torch.zeros(2))
        >>> parameter.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradient_norm([parameter], max_norm=1.0)
        >>> parameter.grad
        tensor([0.6000, 0.8000])
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    whole = [parameter for parameter in with_gradient if not is_sharded(parameter)]
    sharded = [parameter for parameter in with_gradient if is_sharded(parameter)]
    if not sharded:
        torch.nn.utils.clip_grad_norm_(whole, max_norm)
        return
    parts = [[p.grad for p in some if p.grad is not None] for some in (whole, sharded)]
    norms = [gathered(torch.nn.utils.get_total_norm(gradients)) for gradients in parts]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[-1]) for norm in norms]))
    for some in (whole, sharded):
        torch.nn.utils.clip_grads_with_norm_(some, max_norm, total)


def _is_unit(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _check_sharing(called: dict[str, nn.Module]) -> None:
    owners: dict[int, str] = {}
    for name, module in called.items():
        for inner, parameter in module.named_parameters():
            if owners.setdefault(id(parameter), name) != name:
                raise ValueError(
                    "The encoder and the heads of a network that is sharded should share no parameters. Found "
                    f"`{inner}` of `{name}` in `{owners[id(parameter)]}` as well. Move the layer into the encoder."
                )
