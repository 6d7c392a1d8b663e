"""How fast a population gets to a hypervolume, in gradient evaluations and in seconds, beside independent runs.

MT2O with each transfer rule, growth, both, and independent batches, on overlapping digits and garments, on rendered
rooms and on small overlapping digits. The independent runs are subproblems of one population without transfer, which
equal networks trained one by one bit for bit but read each batch once for all of them: an advantage in seconds that
separate programs do not have.

    python benchmarks/hypervolume_convergence.py --data FOLDER
    python benchmarks/hypervolume_convergence.py --data FOLDER --problems mnist --seeds 1 --output mnist.json

``FOLDER`` holds the files of MNIST and Fashion-MNIST; without them ``--problems rooms digits``. Runs that the output
holds are not made again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from curves import reach, run
from lightning.pytorch import LightningDataModule
from record import machine, save, summary
from torch import Tensor, nn

from mtl_lightning.datamodules import MultiDigitsDataModule, MultiMNISTDataModule, ScenesDataModule
from mtl_lightning.datamodules.scene_tasks import scene_tasks
from mtl_lightning.datamodules.scenes import SCENE_TASKS
from mtl_lightning.growth import Doubling
from mtl_lightning.modules import MT2OModule
from mtl_lightning.networks import MLP, DenseHead, EncoderDecoder, LeNetEncoder, MultiHeadNetwork
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.task import Task
from mtl_lightning.transfer import (
    AdvantageTransfer,
    DistanceTransfer,
    NeighborTransfer,
    NoTransfer,
    ProportionalTransfer,
)

OUTPUT = Path(__file__).parent / "results" / "hypervolume_convergence.json"
BASELINE = "independent runs"
ROOMS = ("semseg", "depth_zbuffer", "normal")

Backend = Literal["loop", "vmap"]


@dataclass(frozen=True)
class Problem:
    """Data, a network and the size of a run.

    Attributes:
        title: For the table.
        network: Makes the network.
        tasks: Makes the tasks.
        preferences: One row per subproblem, shape ``(P, T)``.
        reference: The reference point of the hypervolume, one loss per task.
        data: From the folder of the files, the seed and the size of a batch to the data.
        batch_size: Samples of a batch.
        batches: How many batches a run has.
        lr: The learning rate of Adam.
        backend: The faster one on a CPU.
    """

    title: str
    network: Callable[[], nn.Module]
    tasks: Callable[[], list[Task]]
    preferences: Tensor
    reference: tuple[float, ...]
    data: Callable[[Path, int, int], LightningDataModule]
    batch_size: int
    batches: int
    lr: float
    backend: Backend

    def module(self, arguments: dict[str, Any]) -> MT2OModule:
        """Return the module of a run."""
        return MT2OModule(
            network=self.network(),
            tasks=self.tasks(),
            preferences=self.preferences,
            optimizer=partial(torch.optim.Adam, lr=self.lr, fused=True),
            backend=self.backend,
            **arguments,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return {
            "size": len(self.preferences),
            "batch_size": self.batch_size,
            "batches": self.batches,
            "lr": self.lr,
            "reference": list(self.reference),
            "backend": self.backend,
        }


def multimnist(variant: str, title: str) -> Problem:
    """LeNet on two overlapping pictures of MNIST or Fashion-MNIST."""

    def data(folder: Path, seed: int, batch_size: int) -> LightningDataModule:
        return MultiMNISTDataModule(variant, root=folder, num_val=1000, num_test=4000, batch_size=batch_size, seed=seed)

    return Problem(
        title,
        network=lambda: MultiHeadNetwork(LeNetEncoder(), {name: nn.Linear(50, 10) for name in ("left", "right")}),
        tasks=lambda: [Task(name, nn.CrossEntropyLoss()) for name in ("left", "right")],
        preferences=simplex_lattice(num_tasks=2, num_divisions=7),
        reference=(2.0, 2.0),
        data=data,
        batch_size=32,
        batches=600,
        lr=2e-3,
        backend="loop",
    )


def rooms() -> Problem:
    """An encoder-decoder on three tasks of rendered rooms."""

    def network() -> nn.Module:
        heads: dict[str, nn.Module] = {name: DenseHead(8, SCENE_TASKS[name].channels or 1) for name in ROOMS}
        return MultiHeadNetwork(EncoderDecoder([8, 16, 32]), heads)

    def data(_: Path, seed: int, batch_size: int) -> LightningDataModule:
        return ScenesDataModule(
            tasks=list(ROOMS), size=32, num_train=1600, num_val=128, num_test=256, batch_size=batch_size, seed=seed
        )

    return Problem(
        "Rendered rooms: classes, depth, normals",
        network=network,
        tasks=lambda: scene_tasks(list(ROOMS)),
        preferences=simplex_lattice(num_tasks=3, num_divisions=3),
        reference=(2.0, 2.0, 1.0),
        data=data,
        batch_size=8,
        batches=400,
        lr=2e-3,
        backend="loop",
    )


def digits() -> Problem:
    """A small perceptron on two overlapping digits of 8 x 8 points."""
    return Problem(
        "Small digits, a perceptron",
        network=lambda: MultiHeadNetwork(MLP(100, [32]), {name: nn.Linear(32, 10) for name in ("left", "right")}),
        tasks=lambda: [Task(name, nn.CrossEntropyLoss()) for name in ("left", "right")],
        preferences=simplex_lattice(num_tasks=2, num_divisions=7),
        reference=(2.0, 2.0),
        data=lambda _, seed, batch_size: MultiDigitsDataModule(batch_size=batch_size, seed=seed),
        batch_size=128,
        batches=1500,
        lr=2e-3,
        backend="vmap",
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mnist": partial(multimnist, "mnist", "MNIST"),
    "fashion": partial(multimnist, "fashion", "Fashion-MNIST"),
    "fashion+mnist": partial(multimnist, "fashion+mnist", "MNIST left, Fashion-MNIST right"),
    "rooms": rooms,
    "digits": digits,
}


def doubling(share: float, problem: Problem) -> Doubling:
    """Return growth after which all subproblems are live for this share of the batches."""
    stages = math.ceil(math.log2(len(problem.preferences)))
    return Doubling(every_n_batches=max(1, round((1 - share) * problem.batches / stages)))


def neighbor(problem: Problem) -> NeighborTransfer:
    """Return mixing whose mass falls to a hundredth of the first in half of the run."""
    return NeighborTransfer(decay=0.01 ** (2 / problem.batches))


METHODS: dict[str, Callable[[Problem], dict[str, Any]]] = {
    BASELINE: lambda problem: {"transfer": NoTransfer()},
    "neighbour": lambda problem: {"transfer": neighbor(problem)},
    "proportional": lambda problem: {"transfer": ProportionalTransfer(rate=10.0)},
    "distance": lambda problem: {"transfer": DistanceTransfer(decay=0.01 ** (2 / problem.batches))},
    "advantage": lambda problem: {"transfer": AdvantageTransfer()},
    "growth, all for the last half": lambda problem: {"transfer": NoTransfer(), "growth": doubling(0.5, problem)},
    "growth, all for the last quarter": lambda problem: {"transfer": NoTransfer(), "growth": doubling(0.25, problem)},
    "growth, last quarter, and neighbour": lambda problem: {
        "transfer": neighbor(problem),
        "growth": doubling(0.25, problem),
    },
    "independent batches, and neighbour": lambda problem: {"transfer": neighbor(problem), "batches": "independent"},
}


def cost(own: Mapping[str, Any], base: Mapping[str, Any], what: str, share: float = 0.95) -> float | None:
    """Return what a run needed to get to the level, over what independent runs needed; ``None`` if it never did.

    The level is a share of the final hypervolume of the better of the two on the validation set, so that neither is
    measured at a quality that the other does not have. Independent runs that never get there are counted with all they
    spent, which is less than they would need.
    """
    level = share * max(curve["curve"][-1]["hypervolume"] for curve in (own, base))
    needed, usual = reach(own["curve"], level, what), reach(base["curve"], level, what)
    return None if needed is None else needed / (base["curve"][-1][what] if usual is None else usual)


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown tables of all problems: means over seeds with 95 % confidence intervals (Student's t)."""
    of = {(one["problem"], one["method"], one["seed"]): one for one in runs}
    parts = []
    for problem in dict.fromkeys(one["problem"] for one in runs):
        methods = list(dict.fromkeys(one["method"] for one in runs if one["problem"] == problem))
        seeds = sorted({one["seed"] for one in runs if one["problem"] == problem})
        seeds = [seed for seed in seeds if all((problem, method, seed) in of for method in methods)]
        lines = [
            f"**{PROBLEMS[problem]().title}** ({len(seeds)} seeds)",
            "",
            "| method | test hypervolume | difference | evaluations to 95% | seconds to 95% | all seconds |",
            "|---|---|---|---|---|---|",
        ]
        for method in methods:
            pairs = [(of[problem, method, seed], of[problem, BASELINE, seed]) for seed in seeds]
            values = [own["test_hypervolume"] for own, _ in pairs]
            difference = summary([own["test_hypervolume"] - base["test_hypervolume"] for own, base in pairs])
            ratios = [_ratio([cost(own, base, what) for own, base in pairs]) for what in ("evaluations", "seconds")]
            seconds = statistics.fmean(own["seconds"] for own, _ in pairs)
            cells = (method, summary(values), *((difference, *ratios) if method != BASELINE else ("", "1", "1")))
            lines.append(f"| {' | '.join(cells)} | {seconds:.1f} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _ratio(costs: Sequence[float | None]) -> str:
    reached = [cost for cost in costs if cost is not None]
    if not reached:
        return "not reached"
    return f"x {summary(reached, digits=2)}" + (
        f" ({len(reached)} of {len(costs)})" if len(reached) < len(costs) else ""
    )


def main() -> None:
    """Run all methods on all problems and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the MNIST and Fashion-MNIST files")
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batches", type=int, help="of a run; as in the committed numbers by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    chosen = {name: PROBLEMS[name]() for name in options.problems}
    if options.batches is not None:
        chosen = {name: replace(problem, batches=options.batches) for name, problem in chosen.items()}
    result: dict[str, Any] = {"machine": machine() | {"device_type": options.device}, "settings": {}, "runs": []}
    if options.output.exists():
        result = json.loads(options.output.read_text(encoding="utf-8"))
    for name, problem in chosen.items():
        if result["settings"].setdefault(name, problem.settings) != problem.settings:
            raise ValueError(
                f"{options.output} should hold runs with the settings of now. Found {result['settings'][name]} for "
                f"{name}. Name another file."
            )
    done = {(one["problem"], one["method"], one["seed"]) for one in result["runs"]}
    # The methods of one seed run one after another: where the speed of the machine drifts, it does so for all of them.
    for seed in range(options.seeds):
        for name, problem in chosen.items():
            for method in options.methods:
                if (name, method, seed) in done:
                    continue
                arguments = METHODS[method](problem)
                factor = len(problem.preferences) if arguments.get("batches") == "independent" else 1
                outcome = run(
                    partial(problem.module, arguments),
                    problem.data(options.data, seed, problem.batch_size * factor),
                    batches=problem.batches,
                    reference=torch.tensor(problem.reference),
                    seed=seed,
                    accelerator=options.device,
                )
                result["runs"].append({"problem": name, "method": method, "seed": seed, **outcome})
                save(options.output, result)
                print(f"{name}, seed {seed}, {method}: {outcome['test_hypervolume']:.3f}", flush=True)
    print(table(result["runs"]))


if __name__ == "__main__":
    main()
