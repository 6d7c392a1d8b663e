"""How much better one network for all tasks is than one network for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from mtl_lightning.callbacks.measuring import publish
from mtl_lightning.callbacks.output import logged_step
from mtl_lightning.metrics.relative_improvement import Baseline, RelativeImprovement


class RelativeImprovementCallback(Callback):
    """Logs the relative improvement over single-task baselines, delta m, of each validation, on any LightningModule.

    Logged after each validation but the sanity check: ``val_delta_m`` in percent, positive is better, so that
    ``ModelCheckpoint(monitor="val_delta_m", mode="max")`` keeps the best model. It is NaN if one of the metrics is.

    If the module logs a metric of the baselines in its own ``on_validation_epoch_end``, the value is published in
    ``on_validation_end``: an ``EarlyStopping`` that acts there (that is, with ``val_check_interval`` or
    ``check_val_every_n_epoch`` other than 1) has to stand behind this callback in the trainer's list. A validation that
    does not log all metrics of the baselines anew has no value; the first one must log them.

    Args:
        baselines: A JSON file ``{"val_rmse/depth": {"value": 0.47, "higher_is_better": false}, ...}``, as
            :func:`~mtl_lightning.metrics.save_baselines` writes it, or the mapping itself. The names are those under
            which the module logs.
        per: Whether tasks or metrics count alike: see :mod:`mtl_lightning.metrics.relative_improvement`.
        name: The key under which it is logged, so that several instances can be attached.

    Raises:
        OSError: If there is no such file.
        ValueError: If the baselines are not usable; after the first validation, if the module does not log them.

    Example:
        >>> from mtl_lightning.metrics import Baseline
        >>> callback = RelativeImprovementCallback({"val_rmse/depth": Baseline(0.47, higher_is_better=False)})
        >>> callback.improvement
        RelativeImprovement(val_rmse/depth, per='task')
    """

    def __init__(
        self,
        baselines: str | Path | Mapping[str, Baseline],
        per: Literal["task", "metric"] = "task",
        *,
        name: str = "val_delta_m",
    ) -> None:
        self.name = name
        self.improvement = RelativeImprovement(baselines, per=per)
        self._before: dict[str, Any] = {}
        self._observed = False
        self._warned = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember what was logged before, so that an old value is never taken for a new one."""
        self._observed = False
        self._before = dict(trainer.callback_metrics)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish the improvement if all metrics are there."""
        if not trainer.sanity_checking:
            self._observe(trainer, pl_module, final=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish the improvement unless that has been done."""
        if not trainer.sanity_checking and not self._observed:
            self._observe(trainer, pl_module, final=True)

    def _observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, final: bool) -> None:
        metrics, names = trainer.callback_metrics, self.improvement.baselines
        missing = [name for name in names if name not in metrics]
        # A value that is logged again is another object, even if it is equal.
        stale = [name for name in names if name in metrics and metrics[name] is self._before.get(name)]
        # Rank zero decides, and its values count where the module has not reduced them.
        missing, stale = trainer.strategy.broadcast((missing, stale))
        if missing and not final:
            return
        if stale and not missing:
            if final and not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"This validation did not log {', '.join(map(repr, stale))}, so it has no {self.name!r}. Further "
                    "cases are not reported."
                )
            return
        value = trainer.strategy.broadcast(self.improvement(metrics))
        publish(trainer, pl_module, {self.name: value}, logged_step(trainer))
        self._observed = True
