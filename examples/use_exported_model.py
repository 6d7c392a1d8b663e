"""Use what `export_model.py` has left, with PyTorch or ONNX Runtime alone: this library need not be installed.

    python examples/use_exported_model.py

Every way is a function of its own; a program of yours takes one of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn


def from_state_dict(folder: Path, images: Tensor) -> dict[str, Tensor]:
    """Build the network again, from layers of PyTorch, and load its parameters."""

    class TwoDigits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(100, 64), nn.ReLU())
            self.left = nn.Linear(64, 10)
            self.right = nn.Linear(64, 10)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            features = self.encoder(images)
            return {"left": self.left(features), "right": self.right(features)}

    model = TwoDigits()
    model.load_state_dict(torch.load(folder / "state_dict.pt", weights_only=True))
    return model.eval()(images)


def from_export(folder: Path, images: Tensor) -> dict[str, Tensor]:
    """Load the program, which holds the code of the network."""
    return torch.export.load(folder / "exported.pt2").module()(images)


def from_torchscript(folder: Path, images: Tensor) -> dict[str, Tensor]:
    """Load it as a C++ program would."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.load(folder / "torchscript.pt")(images)


def from_onnx(folder: Path, images: Tensor) -> dict[str, Tensor]:
    """Run it without PyTorch; only the pictures come from there."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {"images": images.numpy()})
    return {name: torch.from_numpy(logits) for name, logits in zip(names, found, strict=True)}


def main() -> None:
    """Predict with every file, and compare with the predictions of the model that was exported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/export_model"))
    folder = parser.parse_args().folder

    samples = torch.load(folder / "samples.pt", weights_only=True)
    ways = {"state_dict": from_state_dict, "torch.export": from_export, "TorchScript": from_torchscript}
    if (folder / "model.onnx").exists() and importlib.util.find_spec("onnxruntime") is not None:
        ways["ONNX"] = from_onnx
    for way, predict in ways.items():
        with torch.no_grad():
            found = {name: logits.argmax(dim=1) for name, logits in predict(folder, samples["images"]).items()}
        same = all(torch.equal(found[name], wanted) for name, wanted in samples["predictions"].items())
        accuracy = {name: (found[name] == labels).float().mean() for name, labels in samples["labels"].items()}
        shown = ", ".join(f"{value:.1%} {name}" for name, value in accuracy.items())
        print(f"{way}: {'the same predictions' if same else 'OTHER PREDICTIONS'}, {shown}")


if __name__ == "__main__":
    main()
