"""Lightning strategies of this library."""

from mtl_lightning.strategies.population_parallel import PopulationParallelStrategy as PopulationParallelStrategy
