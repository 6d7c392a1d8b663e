"""LightningDataModules for multi-task data sets."""

from mtl_lightning.datamodules.celeba import CelebADataModule as CelebADataModule
from mtl_lightning.datamodules.celeba import celeba_tasks as celeba_tasks
from mtl_lightning.datamodules.cifar100 import CIFAR100DataModule as CIFAR100DataModule
from mtl_lightning.datamodules.cifar100 import cifar100_tasks as cifar100_tasks
from mtl_lightning.datamodules.combined import PerTaskDataModule as PerTaskDataModule
from mtl_lightning.datamodules.combined import PerTaskDataset as PerTaskDataset
from mtl_lightning.datamodules.combined import combine_batches as combine_batches
from mtl_lightning.datamodules.multi_digits import MultiDigitsDataModule as MultiDigitsDataModule
from mtl_lightning.datamodules.multi_mnist import MultiMNISTDataModule as MultiMNISTDataModule
from mtl_lightning.datamodules.multi_target import MultiTargetDataModule as MultiTargetDataModule
from mtl_lightning.datamodules.multi_target import multi_target_tasks as multi_target_tasks
from mtl_lightning.datamodules.office import OfficeDataModule as OfficeDataModule
from mtl_lightning.datamodules.office import office_tasks as office_tasks
from mtl_lightning.datamodules.sarcos import SarcosDataModule as SarcosDataModule
from mtl_lightning.datamodules.scene_tasks import scene_tasks as scene_tasks
from mtl_lightning.datamodules.scenes import ScenesDataModule as ScenesDataModule
