"""Write ``docs/datasets.md`` from the docstrings of the data modules, so that there is one text to keep right.

python docs/generate_datasets.py
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

from mtl_lightning.datamodules.celeba import CelebADataModule, celeba_tasks
from mtl_lightning.datamodules.cifar100 import CIFAR100DataModule, cifar100_tasks
from mtl_lightning.datamodules.cityscapes import CityscapesDataModule, cityscapes_tasks
from mtl_lightning.datamodules.multi_digits import MultiDigitsDataModule
from mtl_lightning.datamodules.multi_mnist import MultiMNISTDataModule
from mtl_lightning.datamodules.multi_target import MultiTargetDataModule, multi_target_tasks
from mtl_lightning.datamodules.nyud import NYUDDataModule, nyud_tasks
from mtl_lightning.datamodules.nyuv2 import NYUv2DataModule, nyuv2_tasks
from mtl_lightning.datamodules.office import OfficeDataModule, office_tasks
from mtl_lightning.datamodules.pascal_context import PASCALContextDataModule, pascal_context_tasks
from mtl_lightning.datamodules.sarcos import SarcosDataModule
from mtl_lightning.datamodules.scene_tasks import scene_tasks
from mtl_lightning.datamodules.scenes import ScenesDataModule
from mtl_lightning.datamodules.taskonomy import TaskonomyDataModule, taskonomy_tasks

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it sees its own folder only

from docs.rest import as_markdown

PATH = Path(__file__).parent / "datasets.md"
SETS: tuple[tuple[str, Any, Any], ...] = (
    ("Rendered scenes", ScenesDataModule, scene_tasks),
    ("NYUv2, MTAN form", NYUv2DataModule, nyuv2_tasks),
    ("NYUD-v2", NYUDDataModule, nyud_tasks),
    ("Cityscapes", CityscapesDataModule, cityscapes_tasks),
    ("PASCAL-Context", PASCALContextDataModule, pascal_context_tasks),
    ("Taskonomy", TaskonomyDataModule, taskonomy_tasks),
    ("CelebA", CelebADataModule, celeba_tasks),
    ("CIFAR-100 as twenty tasks", CIFAR100DataModule, cifar100_tasks),
    ("Office-31 and Office-Home", OfficeDataModule, office_tasks),
    ("Multi-target tables", MultiTargetDataModule, multi_target_tasks),
    ("SARCOS", SarcosDataModule, multi_target_tasks),
    ("Two digits of scikit-learn", MultiDigitsDataModule, None),
    ("MultiMNIST", MultiMNISTDataModule, None),
)
INTRODUCTION = """# Data sets

Every set is a LightningDataModule. A batch is `(inputs, {task: target})`: float32 inputs and labels, int64 classes. A
missing label is NaN, and -1 among classes; losses and metrics of classes have `ignore_index=-1`. `<set>_tasks(names)`
gives tasks with their losses and metrics, ready for a module:

```python
from mtl_lightning.datamodules import ScenesDataModule, scene_tasks

names = ["semseg", "depth_zbuffer", "normal"]
data = ScenesDataModule(tasks=names, size=32, num_train=16, num_val=8, num_test=8, augment=True, cache_dir=None)
tasks = scene_tasks(names)
data.prepare_data()
data.setup("fit")
print(data.summary())  # sizes, shapes, ranges, missing values, class shares
```

`mtl-lightning preview --data mtl_lightning.datamodules.NYUv2DataModule --data.root data/nyuv2` draws a contact sheet.

Training orders are shuffled by seed and epoch, and augmentation depends on seed, epoch and sample alone: runs repeat
with any number of workers and resume in the middle of an epoch. Files of different tasks are matched by their key,
never by position. Nothing is downloaded unless you ask for it; where files are missing the error names them, the tree,
the address and the licence. NumPy files with pickles are refused, cut-off files are named, and `on_broken="skip"`
leaves such samples out. Sets whose tasks have samples of their own (CIFAR-100, Office) mix them in every batch in equal
parts; with loaders of your own in a `CombinedLoader`, let `unpack_batch` return `combine_batches(batch)`.

Throughput of the dense sets, milliseconds per sample, with where they go; each column is the difference of two timings:

THROUGHPUT
"""


def section(title: str, module: Any, tasks: Any) -> str:
    """Return the section of one set: its docstring without arguments, with the sources at the end."""
    text = inspect.getdoc(module) or ""
    body = re.split(r"\n(?:Args|Raises|Example|Attributes):\n", text)[0].rstrip()
    references = re.search(r"\nReferences:\n(.*)\Z", text, re.DOTALL)
    lines = [f"## {title}", "", f"`{module.__name__}`" + (f", tasks by `{tasks.__name__}`" if tasks else ""), ""]
    lines += [as_markdown(body)]
    if references:
        lines += ["", "References:", "", inspect.cleandoc("\n" + references.group(1)).rstrip()]
    return "\n".join(lines)


def throughput() -> str:
    """Return the table of ``benchmarks/dataloaders.py``."""
    result = json.loads((PATH.parents[1] / "benchmarks" / "results" / "dataloaders.json").read_text())
    stages = list(result["rows"][0]["milliseconds"])
    lines = [f"| layout | size | tasks | {' | '.join(stages)} | samples a second |", "|---" * (len(stages) + 4) + "|"]
    for row in result["rows"]:
        cells = " | ".join(f"{row['milliseconds'][stage]:.1f}" for stage in stages)
        size = " x ".join(map(str, row["size"]))
        lines.append(f"| {row['layout']} | {size} | {row['tasks']} | {cells} | {row['per_second']:.0f} |")
    device, release = result["machine"]["device"], result["machine"]["torch"].partition("+")[0]
    lines += [
        "",
        f"`python benchmarks/dataloaders.py` ({device}, one thread and no other process, torch {release}; files in the",
        "system's memory; `benchmarks/results/dataloaders.json`).",
    ]
    return "\n".join(lines)


def page() -> str:
    """Return the whole page."""
    sections = [section(*entry) for entry in SETS]
    return "\n\n".join([INTRODUCTION.replace("THROUGHPUT", throughput()).rstrip(), *sections]) + "\n"


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
