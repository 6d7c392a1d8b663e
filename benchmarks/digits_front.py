"""The front of the shipped configuration on the test set: the numbers and the picture of the README.

python benchmarks/digits_front.py --output benchmarks/results/digits_front.json --picture docs/images/digits_front.png
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
from record import machine, save

from mtl_lightning.cli import run
from mtl_lightning.pareto import hypervolume

CONFIG = Path(__file__).parents[1] / "configs" / "mt2o_multi_digits.yaml"


def main() -> None:
    """Train, test the best checkpoint, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/digits_front.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/digits_front.png"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        logger = f"--trainer.logger.init_args.save_dir={folder}"
        start = time.perf_counter()
        run(["fit", f"--config={CONFIG}", logger, "--trainer.enable_progress_bar=false"])
        seconds = time.perf_counter() - start
        output = Path(folder) / "mt2o_multi_digits" / "version_0"
        tested = run(["test", f"--config={CONFIG}", logger, f"--ckpt_path={output / 'checkpoints' / 'best.ckpt'}"])
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(output / "pareto_front" / "front.png", options.picture)

    module = tested.model
    columns = {
        "preference": module.preferences[:, 0],
        "loss left": module.objective_values[:, 0],
        "loss right": module.objective_values[:, 1],
        "accuracy left": module.metric_values["accuracy/left"],
        "accuracy right": module.metric_values["accuracy/right"],
    }
    value = hypervolume(module.objective_values, torch.tensor([2.0, 2.0]))
    rows = {name: column.tolist() for name, column in columns.items()}
    save(options.output, {"machine": machine(), "seconds": seconds, "test_hypervolume": value, "rows": rows})
    print(f"test hypervolume at (2, 2): {value:.3f}; {seconds:.0f} s\n")
    print("| preference for left | loss left | loss right | accuracy left | accuracy right |\n|---|---|---|---|---|")
    for preference, *losses_and_accuracies in zip(*rows.values(), strict=True):
        losses, accuracies = losses_and_accuracies[:2], losses_and_accuracies[2:]
        cells = [f"{preference:.2f}", *(f"{x:.3f}" for x in losses), *(f"{100 * x:.1f} %" for x in accuracies)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
