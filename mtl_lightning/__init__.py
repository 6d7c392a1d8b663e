"""Multi-task optimisation for PyTorch Lightning.

Importing this package loads nothing heavy: members are imported from the module that defines them, for example
``from mtl_lightning.modules import MT2OModule``.
"""

__version__ = "0.1.0"
