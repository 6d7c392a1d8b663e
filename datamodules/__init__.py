"""LightningDataModules for multi-task data sets."""

from mtl_lightning.datamodules.multi_digits import MultiDigitsDataModule as MultiDigitsDataModule
from mtl_lightning.datamodules.multi_mnist import MultiMNISTDataModule as MultiMNISTDataModule
from mtl_lightning.datamodules.scene_tasks import scene_tasks as scene_tasks
from mtl_lightning.datamodules.scenes import ScenesDataModule as ScenesDataModule
