"""Callbacks that track multi-objective training; they observe and never change it."""

from mtl_lightning.callbacks.affinity import AffinityCallback as AffinityCallback
from mtl_lightning.callbacks.cost import CostCallback as CostCallback
from mtl_lightning.callbacks.gradient_conflict import GradientConflictCallback as GradientConflictCallback
from mtl_lightning.callbacks.hypervolume import HypervolumeCallback as HypervolumeCallback
from mtl_lightning.callbacks.pareto_front import ParetoFrontCallback as ParetoFrontCallback
from mtl_lightning.callbacks.relative_improvement import RelativeImprovementCallback as RelativeImprovementCallback
from mtl_lightning.callbacks.task_groups import TaskGroupCallback as TaskGroupCallback
