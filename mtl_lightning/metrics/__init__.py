"""Metrics of multi-objective learning, on torchmetrics."""

from mtl_lightning.metrics.hypervolume import Hypervolume as Hypervolume
