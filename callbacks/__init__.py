"""Callbacks that track multi-objective training; they observe and never change it."""

from mtl_lightning.callbacks.hypervolume import HypervolumeCallback as HypervolumeCallback
from mtl_lightning.callbacks.pareto_front import ParetoFrontCallback as ParetoFrontCallback
