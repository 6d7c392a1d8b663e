"""LightningModules for multi-task learning."""

from mtl_lightning.modules.base import MultiTaskModule as MultiTaskModule
from mtl_lightning.modules.gradient import GradientModule as GradientModule
from mtl_lightning.modules.gradient_population import GradientPopulationModule as GradientPopulationModule
from mtl_lightning.modules.mt2o import MT2OModule as MT2OModule
from mtl_lightning.modules.pareto_set import ParetoSetModule as ParetoSetModule
from mtl_lightning.modules.population import PopulationModule as PopulationModule
from mtl_lightning.modules.single_network import SingleNetworkModule as SingleNetworkModule
from mtl_lightning.modules.task_groups import TaskGroupModule as TaskGroupModule
from mtl_lightning.modules.weighted import WeightedModule as WeightedModule
