from __future__ import annotations

import subprocess
import sys


def test_importing_the_package_loads_no_data_library() -> None:
    # Lightning may load torchvision itself, through torchmetrics; what counts is what the package adds.
    code = (
        "import sys, lightning; before = set(sys.modules); import mtl_lightning.datamodules as package;"
        "added = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(package.MultiDigitsDataModule.__name__, *sorted(added & {'sklearn', 'torchvision'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["MultiDigitsDataModule"]
