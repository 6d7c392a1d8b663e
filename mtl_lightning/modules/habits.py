"""What in Lightning means something else, or nothing at all, in manual optimisation: refused, or told once."""

from __future__ import annotations

import warnings

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from torch.nn.modules.batchnorm import _BatchNorm

_told: set[str] = set()


def check_callbacks(module: LightningModule) -> None:
    """Refuse callbacks of Lightning that would do something else than they say; tell of what they do not do.

    To be called with the trainer at hand and before it sets anything up.

    Raises:
        MisconfigurationException: With ``GradientAccumulationScheduler``; with ``StochasticWeightAveraging`` of a
            network with batch normalisation; with averages of the weights of a population that grows.
    """
    callbacks: list[Callback] = module.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    for callback in callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            raise MisconfigurationException(
                f"Gradients are accumulated by `{type(module).__name__}(accumulate_batches=...)`. "
                "Found a `GradientAccumulationScheduler`; remove it."
            )
        if isinstance(callback, StochasticWeightAveraging):
            _check_statistics(module)
        if isinstance(callback, _averages()) and getattr(module, "growth", None) is not None:
            raise MisconfigurationException(
                f"`{type(callback).__name__}` averages parameters of one shape, and a population that grows has "
                "others in every stage. Found `growth`; leave one of them out."
            )
        # Lightning 2.6 looks at this argument in automatic optimisation only.
        if isinstance(callback, ModelCheckpoint) and getattr(callback, "_train_time_interval", None) is not None:
            tell_once(
                "`ModelCheckpoint(train_time_interval=...)` saves nothing in manual optimisation. Take "
                "`every_n_train_steps` instead, which counts batches after which the optimiser has stepped."
            )
    if getattr(module, "accumulate_batches", 1) > 1:
        tell_once(
            "With `accumulate_batches`, `global_step`, and with it `max_steps` and `every_n_train_steps`, counts steps "
            "of the optimiser. `Trainer.estimated_stepping_batches`, `log_every_n_steps` and the steps of loggers "
            "count batches."
        )
    # Lightning 2.6 says of each checkpoint by `every_n_train_steps` that it holds the state after the step, as it does
    # in automatic optimisation as well, and to save another one. Nobody has to act on it.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")


def tell_once(text: str) -> None:
    """Write ``text`` to the log of rank zero, once in the life of the process.

    Example:
        >>> tell_once("That is how it is.")
    """
    if text not in _told:
        _told.add(text)
        rank_zero_info(text)


def _check_statistics(module: LightningModule) -> None:
    has_statistics = any(isinstance(part, _BatchNorm) for part in module.modules())
    if has_statistics and module.trainer.max_epochs != -1:
        raise MisconfigurationException(
            "`StochasticWeightAveraging` computes the statistics of batch normalisation in one more epoch without a "
            "step, which manual optimisation does not know: it would go on training. Found a network with batch "
            "normalisation. Take `WeightAveraging` (from Lightning 2.6 on), which averages them with the weights."
        )


def _averages() -> tuple[type[Callback], ...]:
    found = getattr(lightning_callbacks, "WeightAveraging", None)
    return (StochasticWeightAveraging,) if found is None else (StochasticWeightAveraging, found)
