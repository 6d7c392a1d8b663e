"""One encoder, one head per task."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mtl_lightning.stacked_layers import Call


class MultiHeadNetwork(nn.Module):
    """Hard parameter sharing: the tasks share an encoder, and each has a head of its own.

    Args:
        encoder: Maps inputs to features.
        heads: From task name to the module that maps features to the prediction of this task.

    Raises:
        ValueError: If there is no head, or a task name cannot name a submodule.

    Example:
        >>> import torch
        >>> network = MultiHeadNetwork(nn.Linear(8, 4), {"left": nn.Linear(4, 10), "right": nn.Linear(4, 1)})
        >>> predictions = network(torch.zeros(2, 8))
        >>> {task: tuple(prediction.shape) for task, prediction in predictions.items()}
        {'left': (2, 10), 'right': (2, 1)}
    """

    def __init__(self, encoder: nn.Module, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        if not heads:
            raise ValueError("`heads` should hold one head per task. Found none.")
        self.encoder = encoder
        self.heads = nn.ModuleDict()
        for task, head in heads.items():
            # Names with a dot, empty names and those of ModuleDict's own attributes.
            if not task or "." in task or hasattr(self.heads, task):
                raise ValueError(
                    "The keys of `heads` should be non-empty names without '.', and not names of attributes of "
                    f"`torch.nn.ModuleDict`. Found {task!r}."
                )
            self.heads[task] = head

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the prediction of each task, by name."""
        features = self.encoder(inputs)
        return {task: head(features) for task, head in self.heads.items()}

    def compose(self, call: Call, inputs: Any) -> Any:
        """Return what ``forward`` does, every part evaluated by ``call``; for populations."""
        return call(self.heads, call(self.encoder, inputs))
