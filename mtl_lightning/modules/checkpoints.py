"""What a checkpoint says of the module that wrote it, and how another module compares itself with that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import mtl_lightning
from mtl_lightning.population import Population

# Raised by one whenever the state of a module is no longer what an earlier release would load.
FORMAT = 1
_RECORD = "record"
_STATE = "_extra_state"
# What `torch.compile` puts into the names of what it has compiled.
_COMPILED = "_orig_mod."


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that is not one of this module."""


def make_record(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``facts`` as an entry of the extra state, with the format and the release that wrote it."""
    return {_RECORD: {"format": FORMAT, "release": mtl_lightning.__version__, "facts": dict(facts)}}


def population_facts(module: nn.Module) -> dict[str, Any]:
    """Return the names and the number of the parameters inside populations, which a ``state_dict`` shows as one matrix.

    The number of subproblems is none of them, since it may grow during a run.

    Example:
        >>> population_facts(nn.Sequential(Population(nn.Linear(3, 2), size=4)))
        {'parameters of `0`': ['weight', 'bias'], 'number of parameters of `0`': 8}
    """
    facts: dict[str, Any] = {}
    for name, part in module.named_modules():
        if isinstance(part, Population):
            names = [parameter.replace(_COMPILED, "") for parameter in part.parameter_names]
            facts |= {f"parameters of `{name}`": names, f"number of parameters of `{name}`": part.num_parameters}
    return facts


def check_record(state_dict: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Compare what a checkpoint says of its module with ``facts``.

    Raises:
        CheckpointError: If something differs; all of it is named.
    """
    state = state_dict.get(_STATE)
    record = state.get(_RECORD) if isinstance(state, Mapping) else None
    if not isinstance(record, Mapping):
        raise CheckpointError(
            "The checkpoint should be one of a multi-task module. Found a `state_dict` without its record: "
            f"{_listed(state_dict)}. Load the weights of another module into the network, before the module is made "
            "of it."
        )
    if record["format"] != FORMAT:
        raise CheckpointError(
            f"The checkpoint should be of format {FORMAT}, that of mtl_lightning {mtl_lightning.__version__}. Found "
            f"format {record['format']}, written by mtl_lightning {record['release']}. Load it with that release."
        )
    written: Mapping[str, Any] = record["facts"]
    differences = [
        f"{name} {_shown(facts.get(name))}, found {_shown(written.get(name))}"
        for name in (*facts, *(name for name in written if name not in facts))
        if facts.get(name) != written.get(name)
    ]
    if differences:
        raise CheckpointError(_differing(differences))


def shape_differences(module: nn.Module, state_dict: Mapping[str, Any], strict: bool) -> list[str]:
    """Return how names and shapes in ``state_dict`` differ from those of ``module``, one text each."""
    own = module.state_dict()
    shapes = {name: tuple(value.shape) for name, value in own.items() if isinstance(value, torch.Tensor)}
    found = {name: tuple(value.shape) for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
    differences = [
        f"`{name}` of shape {shape}, found {found[name]}"
        for name, shape in shapes.items()
        if name in found and found[name] != shape
    ]
    if strict:
        missing = [name for name in own if name not in state_dict]
        unknown = [name for name in state_dict if name not in own]
        differences += [f"with {_listed(missing)}, found without"] if missing else []
        differences += [f"without {_listed(unknown)}, found with"] if unknown else []
    return differences


def check_shapes(module: nn.Module, state_dict: Mapping[str, Any], strict: bool, error: RuntimeError) -> None:
    """Say of a ``state_dict`` that torch has refused with ``error`` what differs.

    Raises:
        CheckpointError: If a name or a shape does.
    """
    differences = shape_differences(module, state_dict, strict)
    if differences:
        raise CheckpointError(_differing(differences)) from error


def _differing(differences: list[str]) -> str:
    shown = "; ".join(differences[:20]) + ("; ..." if len(differences) > 20 else "")
    return (
        f"The checkpoint should be of the module that loads it. Found differences; it should be: {shown}. Make the "
        "module as it was in the run that wrote the checkpoint."
    )


def _listed(names: Any) -> str:
    names = [f"`{name}`" for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") if names else "nothing"


def _shown(value: Any) -> str:
    text = "none" if value is None else repr(value)
    return text if len(text) <= 300 else text[:297] + "..."
