"""Real runs, as small as they can be, and a real browser where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from mtl_lightning.callbacks import (
    AffinityCallback,
    CostCallback,
    HypervolumeCallback,
    ParetoFrontCallback,
    TaskGroupCallback,
)
from mtl_lightning.cli import run as run_cli
from mtl_lightning.grouping import Threshold
from mtl_lightning.modules import MT2OModule, TaskGroupModule, WeightedModule
from mtl_lightning.modules.base import MultiTaskModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.task import Task

# As hostile as the name of a task may be; the tests of the page go further.
NAMES = ("depth&amp;<b>", "<!--<script>alert(1)", '"quoted\\${x}')
CONFIG = Path(__file__).parents[2] / "configs" / "mt2o_multi_digits.yaml"


def loader() -> Any:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(24, 4, generator=generator)
    targets = torch.randn(24, len(NAMES), generator=generator)
    rows = list(zip(inputs, targets, strict=True))

    def collate(batch: list[Any]) -> Any:
        columns = torch.stack([target for _, target in batch])
        return torch.stack([features for features, _ in batch]), {
            name: columns[:, index : index + 1] for index, name in enumerate(NAMES)
        }

    return DataLoader(rows, batch_size=8, collate_fn=collate)  # type: ignore[arg-type]


def network() -> MultiHeadNetwork:
    return MultiHeadNetwork(MLP(4, [5]), {name: nn.Linear(5, 1) for name in NAMES})


def tasks() -> list[Task]:
    return [Task(name, nn.MSELoss()) for name in NAMES]


def population() -> MT2OModule:
    return MT2OModule(
        network(),
        tasks(),
        preferences=simplex_lattice(len(NAMES), 3),
        optimizer=partial(torch.optim.Adam, lr=0.05),
    )


def fit(folder: Path, module: MultiTaskModule, *callbacks: pl.Callback, epochs: int = 3) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[ModelCheckpoint(filename="last", save_on_train_epoch_end=True), *callbacks],
        logger=CSVLogger(folder, name="run"),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    trainer.fit(module, loader(), loader())
    return trainer


@pytest.fixture(scope="session")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the shipped configuration, cut short."""
    folder = tmp_path_factory.mktemp("configured")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_cli(
            [
                "fit",
                f"--config={CONFIG}",
                "--model.init_args.growth.init_args.every_n_batches=1",
                "--trainer.max_epochs=3",
                "--trainer.limit_train_batches=4",
                "--trainer.enable_progress_bar=false",
                "--trainer.accelerator=cpu",
                "--data.init_args.num_train=512",
                "--data.init_args.num_val=256",
                "--data.init_args.num_test=256",
            ]
        )
    return folder / "runs" / "mt2o_multi_digits" / "version_0"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder of a population of three tasks, fitted without a configuration, and its callbacks."""
    folder = tmp_path_factory.mktemp("trained")
    callbacks = [ParetoFrontCallback(figure_every=0), HypervolumeCallback((4.0, 4.0, 4.0))]
    fit(folder, population(), *callbacks)
    return folder / "run" / "version_0", callbacks


@pytest.fixture(scope="session")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder of a run with task groups, and its callbacks."""
    folder = tmp_path_factory.mktemp("grouped")
    module = TaskGroupModule(
        network(),
        tasks(),
        grouping=Threshold(),
        affinity_decay=0.5,
        warmup_batches=2,
        optimizer=partial(torch.optim.Adam, lr=0.05),
    )
    callbacks = [
        AffinityCallback(every_n_batches=1, figure_every=0),
        TaskGroupCallback(figure_every=0),
        CostCallback(),
    ]
    fit(folder, module, *callbacks)
    return folder / "run" / "version_0", callbacks


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one model, with two of its losses as objectives."""
    folder = tmp_path_factory.mktemp("single")
    names: Any = {f"val_loss/{name}": "min" for name in NAMES[:2]}
    module = WeightedModule(network(), tasks(), optimizer=partial(torch.optim.Adam, lr=0.05))
    fit(
        folder,
        module,
        ParetoFrontCallback(names, figure_every=0),
        ModelCheckpoint(filename="{step}", save_top_k=-1, monitor="val_loss"),
    )
    return folder / "run" / "version_0"


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser without a window."""
    webdriver = pytest.importorskip("selenium.webdriver")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip(f"needs Chromium and chromedriver; found {program} and {driver}")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1280,1000"),
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """Return a function that copies the folder of a run, to be spoilt."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))
