"""Choose a model from the front and export it, to be used without this library.

    python examples/export_model.py
    python examples/use_exported_model.py

The task is to read two overlapping digits. The network is plain PyTorch, so that nothing of this library is in what is
chosen: `select` returns an object of the user's own class, with the keys of its `state_dict`.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from mtl_lightning.datamodules import MultiDigitsDataModule
from mtl_lightning.modules import MT2OModule
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.task import Task


class TwoDigits(nn.Module):
    """Reads the left and the right digit of a picture: images `(B, 1, 10, 10)` to logits `(B, 10)` of both."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(100, 64), nn.ReLU())
        self.left = nn.Linear(64, 10)
        self.right = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits, task name to tensor."""
        features = self.encoder(images)
        return {"left": self.left(features), "right": self.right(features)}


def train(epochs: int) -> tuple[MT2OModule, MultiDigitsDataModule]:
    """Return five models of one run, validated."""
    datamodule = MultiDigitsDataModule(num_train=4000, num_val=1000)
    accuracy = MulticlassAccuracy(10, average="micro")
    module = MT2OModule(
        network=TwoDigits(),
        tasks=[Task("left", nn.CrossEntropyLoss(), accuracy), Task("right", nn.CrossEntropyLoss(), accuracy)],
        preferences=simplex_lattice(num_tasks=2, num_divisions=4),
        optimizer=partial(torch.optim.Adam, lr=3e-3),
    )
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=datamodule)
    return module, datamodule


def export(model: nn.Module, images: Tensor, folder: Path) -> list[str]:
    """Write the model in every form that can be had here; return the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    batch = ({0: torch.export.Dim("batch")},)  # any number of pictures

    torch.save(model.state_dict(), folder / "state_dict.pt")

    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=batch), folder / "exported.pt2")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch prefers `torch.export` by now
        torch.jit.script(model).save(folder / "torchscript.pt")

    if importlib.util.find_spec("onnxscript") is not None:
        names = list(model(images))
        torch.onnx.export(
            model, (images,), folder / "model.onnx", dynamo=True, dynamic_shapes=batch, external_data=False,
            input_names=["images"], output_names=names, verbose=False,
        )  # fmt: skip
    else:
        print("no ONNX file: `pip install onnx onnxscript` for it")
    return sorted(path.name for path in folder.iterdir())


def main() -> None:
    """Train, choose, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/export_model"))
    options = parser.parse_args()
    seed_everything(0, verbose=False)
    module, datamodule = train(options.epochs)

    # By preference it would be `module.select((0.5, 0.5))`. Here: the best left accuracy among those with at least 99 %
    # of the best right accuracy.
    left, right = (module.metric_values[f"accuracy/{name}"] for name in ("left", "right"))
    chosen = int(torch.where(right >= 0.99 * right.max(), left, 0.0).argmax())
    model = module.subproblem(chosen).eval()
    preference = module.preferences[chosen].tolist()
    print(f"chosen: preference {preference}, {left[chosen]:.1%} left, {right[chosen]:.1%} right")

    images, labels = next(iter(datamodule.test_dataloader()))
    print("files:", ", ".join(export(model, images[:2], options.output)))
    with torch.no_grad():
        predictions = {name: logits.argmax(dim=1) for name, logits in model(images).items()}
    # What `use_exported_model.py` reads, and what it should find.
    torch.save({"images": images, "predictions": predictions, "labels": labels}, options.output / "samples.pt")


if __name__ == "__main__":
    main()
