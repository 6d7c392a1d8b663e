import time
from collections.abc import Callable
from datetime import timedelta
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

from mtl_lightning.losses import CosineNormalLoss, MaskedL1Loss
from mtl_lightning.metrics import (
    DepthAbsoluteError,
    DepthRelativeError,
    DepthRMSE,
    EdgeF1,
    MaskedMeanAbsoluteError,
    MaskedMeanSquaredError,
    NormalMeanAngle,
    NormalMedianAngle,
    NormalWithin,
    OptimalEdgeF1,
)
from mtl_lightning.modules import MT2OModule
from mtl_lightning.task import Task

METRICS: dict[str, Callable[[], Metric]] = {
    "mae": lambda: MaskedMeanAbsoluteError(ignore_value=0.0),
    "mse": lambda: MaskedMeanSquaredError(ignore_value=0.0),
    "rmse": lambda: MaskedMeanSquaredError(ignore_value=0.0, squared=False),
    "depth_absolute": lambda: DepthAbsoluteError(ignore_value=0.0),
    "depth_relative": lambda: DepthRelativeError(ignore_value=0.0),
    "depth_rmse": lambda: DepthRMSE(ignore_value=0.0),
    "normal_mean": NormalMeanAngle,
    "normal_median": NormalMedianAngle,
    "normal_within": lambda: NormalWithin(60),
    "edge_f1": lambda: EdgeF1(logits=True),
    "optimal_edge_f1": lambda: OptimalEdgeF1(logits=True),
}


def _data(count: int = 9) -> tuple[Tensor, Tensor]:
    """Predictions and targets that every metric takes, with missing pixels of unequal number per sample."""
    target = torch.rand(count, 3, 5, 4) + 0.1
    missing = torch.rand(count, 1, 5, 4) < torch.linspace(0, 1, count).reshape(-1, 1, 1, 1)
    target = target.masked_fill(missing, nan)
    return torch.randn(count, 3, 5, 4), target.masked_fill(torch.rand(count, 1, 5, 4) < 0.2, 0.0)


def _states(metric: Metric) -> list[Tensor]:
    return [state for state in metric.metric_state.values() if isinstance(state, Tensor)]


@pytest.mark.parametrize("name", METRICS)
def test_batches_of_any_size_give_the_value_of_the_whole(name: str) -> None:
    preds, target = _data()
    whole, parts = METRICS[name](), METRICS[name]()
    whole.update(preds, target)
    for start, stop in ((0, 4), (4, 5), (5, 5), (5, 9)):
        parts.update(preds[start:stop], target[start:stop])
    torch.testing.assert_close(parts.compute(), whole.compute(), rtol=1e-6, atol=0)
    assert whole.compute().isfinite()


@pytest.mark.parametrize("name", METRICS)
def test_merged_states_give_the_value_of_the_whole(name: str) -> None:
    preds, target = _data()
    whole, one, other, idle = (METRICS[name]() for _ in range(4))
    whole.update(preds, target)
    one.update(preds[:2], target[:2])
    other.update(preds[2:], target[2:])
    one.merge_state(other)
    one.merge_state(idle)
    torch.testing.assert_close(one.compute(), whole.compute(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", METRICS)
def test_a_scalar_in_float32_that_is_nan_without_labels(name: str) -> None:
    metric = METRICS[name]()
    preds, target = _data()
    metric.update(preds, torch.full_like(target, nan))
    value = metric.compute()
    assert (value.shape, value.dtype) == ((), torch.float32)
    assert value.isnan()


@pytest.mark.parametrize("name", METRICS)
def test_a_batch_without_labels_changes_nothing(name: str) -> None:
    metric = METRICS[name]()
    preds, target = _data()
    metric.update(preds, target)
    before = metric.compute()
    metric.update(preds, torch.full_like(target, nan))
    assert metric.compute() == before


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("junk", [nan, float("inf")])
def test_what_predictions_hold_at_missing_labels_changes_nothing(name: str, junk: float) -> None:
    preds, target = _data()
    clean, dirty = METRICS[name](), METRICS[name]()
    clean.update(preds, target)
    dirty.update(preds.masked_fill(target.isnan(), junk), target)
    assert clean.compute() == dirty.compute()


@pytest.mark.parametrize("name", METRICS)
def test_a_prediction_that_is_nan_makes_the_value_nan(name: str) -> None:
    metric = METRICS[name]()
    preds, target = _data()
    preds[0, :, 0, 0], target[0, :, 0, 0] = nan, 1.0
    metric.update(preds, target)
    assert metric.compute().isnan()


@pytest.mark.parametrize("name", METRICS)
def test_reset_forgets(name: str) -> None:
    metric, fresh = METRICS[name](), METRICS[name]()
    metric.update(*_data())
    metric.reset()
    preds, target = _data(3)
    metric.update(preds, target)
    fresh.update(preds, target)
    assert metric.compute() == fresh.compute()


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    "convert",
    [
        lambda metric: metric.set_dtype(torch.half),
        lambda metric: metric.half(),
        lambda metric: metric.to(torch.half),
        lambda metric: nn.ModuleList([metric]).to(torch.bfloat16)[0],
        lambda metric: MetricCollection([metric]).set_dtype(torch.half)[type(metric).__name__],
    ],
    ids=["set_dtype", "half", "to", "in_a_module", "in_a_collection"],
)
def test_conversion_loses_no_count(name: str, convert: Callable[[Metric], Metric]) -> None:
    preds, target = _data(400)  # counts of 10,000, of which half precision keeps three digits
    plain, metric = METRICS[name](), METRICS[name]()
    for one in (plain, metric):
        one.update(preds, target)
    metric = convert(metric)
    for one in (plain, metric):
        one.update(preds[:1], target[:1])
    assert metric.compute() == plain.compute()
    metric.reset()
    assert {state.dtype for state in _states(metric)} <= {torch.float64, torch.int64}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_measured_in_float32(name: str, dtype: torch.dtype) -> None:
    preds, target = _data()
    preds = preds.to(dtype)
    metric, expected = METRICS[name](), METRICS[name]()
    metric.update(preds, target)
    expected.update(preds.float(), target)
    assert metric.compute() == expected.compute()


@pytest.mark.parametrize("name", METRICS)
def test_moving_moves_the_states(name: str) -> None:
    metric = METRICS[name]().to("meta")
    assert {state.device.type for state in _states(metric)} == {"meta"}


@pytest.mark.parametrize("name", METRICS)
def test_other_shapes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="should have the same shape"):
        METRICS[name]().update(torch.rand(2, 3, 4, 4), torch.rand(2, 4, 4))


@pytest.mark.parametrize("make", [MaskedMeanAbsoluteError, DepthRMSE, NormalMeanAngle])
def test_ignoring_nan_is_no_setting(make: Callable[..., Metric]) -> None:
    with pytest.raises(ValueError, match="`ignore_value` should be a number or None"):
        make(ignore_value=nan)


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        (["mae", "mse", "rmse"], 1),
        (["depth_absolute", "depth_relative", "depth_rmse"], 1),
        (["normal_mean", "normal_median", "normal_within"], 1),
        (["edge_f1", "optimal_edge_f1"], 2),
        (list(METRICS), 5),
    ],
)
def test_a_collection_shares_the_states_of_a_family(family: list[str], groups: int) -> None:
    collection = MetricCollection({name: METRICS[name]() for name in family})
    single = {name: METRICS[name]() for name in family}
    preds, target = _data()
    for part in (slice(0, 3), slice(3, 9)):
        collection.update(preds[part], target[part])
        for metric in single.values():
            metric.update(preds[part], target[part])
    assert len(collection.compute_groups) == groups
    assert {name: value.item() for name, value in collection.compute().items()} == {
        name: metric.compute().item() for name, metric in single.items()
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (DepthAbsoluteError(ignore_value=0.0), DepthRMSE()),
        (NormalMeanAngle(), NormalMedianAngle(ignore_value=1.0)),
        (EdgeF1(0.5, logits=True), EdgeF1(0.9, logits=True)),
        (EdgeF1(0.5, logits=True), EdgeF1(0.5, logits=False)),
        (MaskedMeanAbsoluteError(), NormalMeanAngle()),
    ],
)
def test_metrics_that_count_differently_share_no_state(one: Metric, other: Metric) -> None:
    collection = MetricCollection({"one": one.clone(), "other": other.clone()})
    first, second = torch.full((1, 3, 2), nan), torch.tensor([[[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]])
    # The first batch has no label: the states agree after it.
    for target in (first, second):
        collection.update(torch.full((1, 3, 2), 0.7), target)
        one.update(torch.full((1, 3, 2), 0.7), target)
        other.update(torch.full((1, 3, 2), 0.7), target)
    values = collection.compute()
    torch.testing.assert_close(values["one"], one.compute(), equal_nan=True)
    torch.testing.assert_close(values["other"], other.compute(), equal_nan=True)


def test_a_metric_that_ignores_infinity_shares_no_state_with_one_that_does_not() -> None:
    collection = MetricCollection({"ignores": DepthAbsoluteError(ignore_value=inf), "counts": DepthAbsoluteError()})
    for target in ([1.0, 1.0], [inf, 1.0]):
        collection.update(torch.zeros(2), torch.tensor(target))
    assert {name: value.item() for name, value in collection.compute().items()} == {"ignores": 1.0, "counts": inf}


def _worker(rank: int, folder: str) -> None:
    # A file, not a port: the store must not end with the first process that does.
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timeout=timedelta(seconds=60), rank=rank, world_size=3
    )
    torch.manual_seed(0)
    preds, target = _data()
    part = (slice(0, 2), slice(2, 9), slice(9, 9))[rank]
    values = {}
    for name, make in METRICS.items():
        metric = make().to(torch.bfloat16)
        if rank < 2:  # the last has seen no batch at all
            metric.update(preds[part], target[part])
        values[name] = metric.compute()
    torch.save(values, Path(folder, str(rank)))
    torch.distributed.barrier()  # nobody leaves while another still reads
    torch.distributed.destroy_process_group()


def test_processes_agree_on_the_value_of_the_whole(tmp_path: Path) -> None:
    launch: Any = start_processes
    context = launch(_worker, (str(tmp_path),), 3, join=False, start_method="fork")
    deadline = time.monotonic() + 60
    while not context.join(timeout=1):  # true once all have ended; raises what a process raised
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes did not finish")
    torch.manual_seed(0)
    preds, target = _data()
    for name, make in METRICS.items():
        metric = make()
        metric.update(preds, target)
        for rank in range(3):
            value = torch.load(Path(tmp_path, str(rank)), weights_only=True)[name]
            torch.testing.assert_close(value, metric.compute(), rtol=1e-6, atol=0)


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        maps = self.layer(inputs)
        return {"depth": maps[:, :1], "normal": maps[:, 1:]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_population_logs_the_metrics_of_its_tasks(precision: Any) -> None:
    tasks = [
        Task(
            "depth",
            MaskedL1Loss(ignore_value=0.0),
            MetricCollection({"absolute": METRICS["depth_absolute"](), "rmse": METRICS["depth_rmse"]()}),
        ),
        Task("normal", CosineNormalLoss(), NormalMeanAngle()),
    ]
    module = MT2OModule(
        _Network(), tasks, preferences=torch.tensor([[0.3, 0.7], [0.6, 0.4]]), optimizer=torch.optim.Adam
    )
    inputs, target = torch.rand(8, 3, 5, 4), _data(8)[1]
    samples = [(one, {"depth": labels[:1], "normal": labels}) for one, labels in zip(inputs, target, strict=True)]
    loader: DataLoader[Any] = DataLoader(samples, batch_size=3)  # type: ignore[arg-type]  # the last samples lack most labels
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, loader)
    # What is logged while fitting is the mean over the subproblems.
    rmse, angle = [], []
    for index in range(2):
        model = module.subproblem(index)
        outputs = model(inputs.to(next(model.parameters()).dtype))
        metrics = DepthRMSE(ignore_value=0.0), NormalMeanAngle()
        metrics[0].update(outputs["depth"], target[:, :1])
        metrics[1].update(outputs["normal"], target)
        rmse.append(metrics[0].compute())
        angle.append(metrics[1].compute())
    logged = trainer.callback_metrics
    torch.testing.assert_close(logged["val_rmse/depth"], torch.stack(rmse).mean(), rtol=1e-3, atol=0)
    torch.testing.assert_close(logged["val_normal_mean_angle/normal"], torch.stack(angle).mean(), rtol=1e-3, atol=0)
