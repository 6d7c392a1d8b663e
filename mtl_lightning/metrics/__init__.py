"""Metrics of multi-objective learning and of dense prediction, on torchmetrics."""

from mtl_lightning.metrics.depth import DepthAbsoluteError as DepthAbsoluteError
from mtl_lightning.metrics.depth import DepthRelativeError as DepthRelativeError
from mtl_lightning.metrics.depth import DepthRMSE as DepthRMSE
from mtl_lightning.metrics.edges import EdgeF1 as EdgeF1
from mtl_lightning.metrics.edges import OptimalEdgeF1 as OptimalEdgeF1
from mtl_lightning.metrics.hypervolume import Hypervolume as Hypervolume
from mtl_lightning.metrics.normals import NormalMeanAngle as NormalMeanAngle
from mtl_lightning.metrics.normals import NormalMedianAngle as NormalMedianAngle
from mtl_lightning.metrics.normals import NormalWithin as NormalWithin
from mtl_lightning.metrics.regression import MaskedMeanAbsoluteError as MaskedMeanAbsoluteError
from mtl_lightning.metrics.regression import MaskedMeanSquaredError as MaskedMeanSquaredError
from mtl_lightning.metrics.relative_improvement import Baseline as Baseline
from mtl_lightning.metrics.relative_improvement import RelativeImprovement as RelativeImprovement
from mtl_lightning.metrics.relative_improvement import load_baselines as load_baselines
from mtl_lightning.metrics.relative_improvement import relative_improvement as relative_improvement
from mtl_lightning.metrics.relative_improvement import save_baselines as save_baselines
