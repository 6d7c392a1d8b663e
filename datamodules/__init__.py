"""LightningDataModules for multi-task data sets."""

from mtl_lightning.datamodules.multi_digits import MultiDigitsDataModule as MultiDigitsDataModule
from mtl_lightning.datamodules.multi_mnist import MultiMNISTDataModule as MultiMNISTDataModule
