"""LightningModules for multi-task learning."""

from mtl_lightning.modules.base import MultiTaskModule as MultiTaskModule
from mtl_lightning.modules.mt2o import MT2OModule as MT2OModule
from mtl_lightning.modules.single_network import SingleNetworkModule as SingleNetworkModule
from mtl_lightning.modules.task_groups import TaskGroupModule as TaskGroupModule
from mtl_lightning.modules.weighted import WeightedModule as WeightedModule
