from __future__ import annotations

import pytest
import torch

from mtl_lightning.datamodules.scene_tasks import scene_tasks
from mtl_lightning.datamodules.scenes import SCENE_TASKS, ScenesDataModule

NAMES = [name for name in SCENE_TASKS if name != "instance"]


@pytest.mark.parametrize("missing", [0.0, 0.5])
def test_every_task_trains_and_is_measured(missing: float) -> None:
    data = ScenesDataModule(
        tasks=NAMES, size=32, num_train=8, batch_size=8, cache_dir=None, missing=dict.fromkeys(NAMES, missing)
    )
    data.setup("fit")
    _, targets = next(iter(data.train_dataloader()))
    for task in scene_tasks(NAMES):
        channels = SCENE_TASKS[task.name].channels
        assert channels is not None
        preds = torch.randn(8, channels, 32, 32, requires_grad=True)
        loss = task.loss(preds, targets[task.name])
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss.isfinite()
        assert preds.grad is not None
        assert preds.grad.isfinite().all()
        assert preds.grad.any()
        assert (
            preds.grad[targets[task.name].float().mean(dim=(1, 2) if task.name == "semseg" else (1, 2, 3)).isnan()]
            .eq(0)
            .all()
        )
        assert task.metrics is not None
        task.metrics.update(preds.detach(), targets[task.name])
        for name, value in task.metrics.compute().items():
            assert value.isfinite(), (task.name, name)


def test_a_label_that_is_predicted_has_no_error() -> None:
    data = ScenesDataModule(tasks=NAMES, size=32, num_train=2, batch_size=2, cache_dir=None)
    data.setup("fit")
    _, targets = next(iter(data.train_dataloader()))
    best = {"miou": 1.0, "accuracy": 1.0, "f1": 1.0, "within_30": 1.0}
    for task in scene_tasks(NAMES):
        target = targets[task.name]
        preds = target
        if task.name == "semseg":
            preds = 100.0 * torch.nn.functional.one_hot(target, 10).movedim(-1, 1).float()
        if task.name == "edge_occlusion":
            preds = 100.0 * (2.0 * target - 1.0)
        assert float(task.loss(preds, target)) == pytest.approx(0.0, abs=1e-6)
        assert task.metrics is not None
        task.metrics.update(preds, target)
        for name, value in task.metrics.compute().items():
            assert float(value) == pytest.approx(best.get(name, 0.0), abs=2e-2), (task.name, name)


@pytest.mark.parametrize("name", ["instance", "depth"])
def test_names_that_are_no_tasks_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"Found '{name}'"):
        scene_tasks(["semseg", name])
