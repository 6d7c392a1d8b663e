"""All methods beside one another: overlapping digits and garments, river flow and concrete, rendered rooms.

Writes a configuration for ``mtl-lightning compare`` for each problem, runs it, and keeps the tables. Runs that are done
are skipped, so that it can be stopped and started again.

    python benchmarks/comparison.py --data data --workers 2
    python benchmarks/comparison.py --data data --workers 2 --scale full    # the published budgets, for a GPU
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from record import machine

from mtl_lightning.commands.compare import compare, single_tasks
from mtl_lightning.commands.configuration import load_comparison
from mtl_lightning.datamodules.scenes import SCENE_TASKS
from mtl_lightning.preferences import simplex_sample

OWN = "mtl_lightning"
RESULTS = Path(__file__).parent / "results" / "comparison"
PROBLEMS = ("enb", "rf1", "scenes4", "scenes9", "mnist", "fashion", "fashion+mnist")

# What all runs need is imported once, before they are forked.
IMPORTED = (
    *(
        "matplotlib.figure",
        "moocore",
        "sklearn.datasets",
        "torchvision",
        "torchjd.aggregation",
        "lightning.pytorch.cli",
    ),
    *(f"{OWN}.{part}" for part in ("modules", "networks", "callbacks", "datamodules", "torchjd", "commands.training")),
)

Part = dict[str, Any]


def weighted(name: str, **arguments: Any) -> Part:
    """Return the configuration of a loss weighting."""
    module = "adaptive_weighting" if name in ("FAMO", "GradNorm", "DynamicTaskPrioritization") else "weighting"
    rule = {"class_path": f"{OWN}.{module}.{name}", "init_args": arguments}
    return {"model": {"class_path": f"{OWN}.modules.WeightedModule", "init_args": {"weighting": rule}}}


def gradient(path: str, **arguments: Any) -> Part:
    """Return the configuration of an aggregation of gradients."""
    rule: Part = {"class_path": f"{OWN}.{path}", "init_args": arguments}
    if path.startswith("torchjd."):
        rule = {
            "class_path": f"{OWN}.torchjd.TorchJD",
            "init_args": {"aggregator": {"class_path": path, "init_args": arguments}},
        }
    return {"model": {"class_path": f"{OWN}.modules.GradientModule", "init_args": {"aggregator": rule}}}


def population(kind: str, preferences: Any, **arguments: Any) -> Part:
    """Return the configuration of a population of networks."""
    return {"model": {"class_path": f"{OWN}.modules.{kind}", "init_args": {"preferences": preferences, **arguments}}}


def rule(path: str, **arguments: Any) -> Part:
    """Return a class and its arguments."""
    return {"class_path": f"{OWN}.{path}", "init_args": arguments}


def single_network_methods(few: bool = False) -> dict[str, Part]:
    """Return the methods that end with one network; ``few`` leaves out those that resemble others."""
    methods = {
        "equal weights": weighted("Equal"),
        "scale-invariant": weighted("ScaleInvariant"),
        "uncertainty": weighted("Uncertainty"),
        "DWA": weighted("DynamicWeightAverage"),
        "RLW": weighted("RandomWeights"),
        "GLS": weighted("GeometricMean"),
        "IMTL-L": weighted("IMTLLoss"),
        "FAMO": weighted("FAMO"),
        "GradNorm": weighted("GradNorm"),
        "smooth Chebyshev": weighted("Scalarized"),
        "MGDA": gradient("aggregation.MGDA"),
        "PCGrad": gradient("aggregation.PCGrad"),
        "CAGrad": gradient("cagrad.CAGrad"),
        "IMTL-G": gradient("aggregation.IMTLG"),
        "Nash-MTL": gradient("nash.NashMTL"),
        "Aligned-MTL": gradient("aggregation.AlignedMTL"),
        "UPGrad": gradient("aggregation.UPGrad"),
        "GradDrop": gradient("torchjd.aggregation.GradDrop"),
        "GradVac": gradient("torchjd.aggregation.GradVac"),
        "ConFIG": gradient("torchjd.aggregation.ConFIG"),
    }
    if few:
        left_out = (
            "GLS",
            "IMTL-L",
            "GradNorm",
            "smooth Chebyshev",
            "IMTL-G",
            "Aligned-MTL",
            "GradDrop",
            "GradVac",
            "ConFIG",
        )
        methods = {name: part for name, part in methods.items() if name not in left_out}
    methods["RLW"]["seed_arguments"] = ["model.init_args.weighting.init_args.seed"]
    return methods


def group_methods(batches: int) -> dict[str, Part]:
    """Return the ways to update tasks in groups; the affinity of the whole run counts about alike."""

    def groups(**arguments: Any) -> Part:
        return {"model": {"class_path": f"{OWN}.modules.TaskGroupModule", "init_args": arguments}}

    common = {"affinity_decay": 0.01, "warmup_batches": max(1, batches // 20)}
    return {
        "task groups": groups(**common),
        "task groups, one by one": groups(grouping=rule("grouping.OneByOne"), track_every=0),
    }


def set_methods(
    members: Any, rays: Any, num_tasks: int, network: Part, wider: Part, optimizer_steps: int, penalty: float
) -> dict[str, Part]:
    """Return the methods that end with a set of models.

    Args:
        members: The preferences of the populations.
        rays: Those at which conditioned networks are evaluated.
        num_tasks: The number of tasks.
        network: The network.
        wider: The network that takes the preference beside its inputs.
        optimizer_steps: Of a run.
        penalty: Of COSMOS.
    """
    backend = {"backend": "loop" if "LeNet" in json.dumps(network) else "vmap"}

    def on(network: Part, **arguments: Any) -> Part:
        return population("ParetoSetModule", rays, network=network, **arguments)

    hypernetwork = rule("networks.ParetoHypernetwork", target=network, num_tasks=num_tasks)
    manifold = rule("networks.ParetoManifold", network=network, num_tasks=num_tasks)
    return {
        "MT2O": population(
            "MT2OModule",
            members,
            transfer=rule("transfer.NeighborTransfer"),
            growth=rule("growth.Doubling", every_n_batches=max(1, optimizer_steps // 8)),
            **backend,
        ),
        "MT2O, without growth": population(
            "MT2OModule", members, transfer=rule("transfer.NeighborTransfer"), **backend
        ),
        "independent runs": population("MT2OModule", members, transfer=rule("transfer.NoTransfer"), **backend),
        "MGDA, many starts": population("GradientPopulationModule", members, weighting=rule("mgda.MGDA"), **backend),
        "Pareto MTL": population(
            "GradientPopulationModule",
            members,
            weighting=rule("pareto_mtl.ParetoMTL", initial_steps=max(1, optimizer_steps // 50)),
            **backend,
        ),
        "EPO": population("GradientPopulationModule", members, weighting=rule("exact_pareto.EPO"), **backend),
        "COSMOS": on(wider, objective=rule("cosmos.COSMOS", penalty=penalty), concentration=1.2),
        "PHN-LS": on(hypernetwork, concentration=0.2),
        "PHN-EPO": on(hypernetwork, objective=rule("exact_pareto.EPO"), concentration=0.2),
        "PaMaL": on(manifold, preferences_per_batch=2, penalty=rule("ordering.OrderingPenalty")),
    }


def multimnist(variant: str, scale: str, data: str) -> Part:
    """LeNet on two overlapping glyphs, 25 rays for conditioned networks."""
    size, epochs, batch, count = (3840, 6, 64, 6) if scale == "small" else (108_000, 100, 256, 25)

    def lenet(channels: int = 1) -> Part:
        head = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 50, "out_features": 10}}
        encoder = rule("networks.LeNetEncoder", in_channels=channels)
        return rule("networks.MultiHeadNetwork", encoder=encoder, heads={"left": head, "right": head})

    embedding = rule("networks.PreferenceUpsampling", num_tasks=2, image_size=36)
    wider = rule("networks.PreferenceConcatenation", network=lenet(3), embedding=embedding)
    members = rule("preferences.simplex_lattice", num_tasks=2, num_divisions=count - 1)
    rays = rule("preferences.simplex_lattice", num_tasks=2, num_divisions=24)
    steps = size // batch * epochs
    methods = single_network_methods(few=scale == "small" and variant != "mnist")
    methods |= set_methods(members, rays, 2, lenet(), wider, steps, 8.0 if variant == "fashion+mnist" else 2.0)
    metric = {
        "class_path": "torchmetrics.classification.MulticlassAccuracy",
        "init_args": {"num_classes": 10, "average": "micro"},
    }
    return {
        "title": f"Multi-{variant}: {size:,} pairs, {epochs} epochs",
        "seeds": [0, 1, 2],
        "seed_arguments": ["data.init_args.seed"],
        "trainer": trainer(scale, epochs),
        "data": rule(
            "datamodules.MultiMNISTDataModule",
            variant=variant,
            root=data,
            num_train=size,
            num_val=512 if scale == "small" else 12_000,
            num_test=2000 if scale == "small" else 20_000,
            batch_size=batch,
        ),
        "shared": {
            "network": lenet(),
            "tasks": [
                {"name": name, "loss": "torch.nn.CrossEntropyLoss", "metrics": metric} for name in ("left", "right")
            ],
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 2e-3 if scale == "small" else 1e-3}},
        },
        "methods": methods,
        "metrics": {"accuracy/left": True, "accuracy/right": True},
        "reference_point": [2.0, 2.0],
        "single_tasks": True,
    }


TARGETS = {
    "rf1": [f"{name}_48H__0" for name in ("CHSI2", "NASI2", "EADM7", "SCLM7", "CLKM7", "VALI2", "NAPM7", "DLDI4")],
    "enb": ["Y1", "Y2"],
}


def table(name: str, scale: str, data: str) -> Part:
    """An MLP on a table with several targets; losses are in units of the variance of the training targets."""
    features = {"rf1": 64, "enb": 8}[name]
    targets = TARGETS[name]
    rows = {"rf1": 4000, "enb": 460}[name]
    epochs = {"rf1": 12, "enb": 60}[name] * (1 if scale == "small" else 8)
    batch = {"rf1": 256, "enb": 64}[name]
    count = 8 if scale == "small" else 25

    def mlp(more: int = 0) -> Part:
        encoder = rule("networks.MLP", in_features=features + more, hidden_features=[64, 64])
        head = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 64, "out_features": 1}}
        return rule("networks.MultiHeadNetwork", encoder=encoder, heads=dict.fromkeys(targets, head))

    def spread(size: int) -> Any:
        if len(targets) == 2:
            return rule("preferences.simplex_lattice", num_tasks=2, num_divisions=size - 1)
        # The same for all seeds; corners and lattices of many tasks leave the middle empty.
        drawn = simplex_sample(len(targets), size, generator=torch.Generator().manual_seed(0))
        return drawn.double().div(drawn.double().sum(dim=1, keepdim=True)).tolist()

    methods = single_network_methods()
    methods |= group_methods(rows // batch * epochs)
    wider = rule("networks.PreferenceConcatenation", network=mlp(len(targets)))
    methods |= set_methods(spread(count), spread(25), len(targets), mlp(), wider, rows // batch * epochs, 2.0)
    return {
        "title": f"{name}: {len(targets)} targets, {epochs} epochs",
        "seeds": [0, 1, 2],
        "seed_arguments": ["data.init_args.seed"],
        "trainer": trainer(scale, epochs),
        "data": rule(
            "datamodules.MultiTargetDataModule",
            name=name,
            root=None if name == "enb" else f"{data}/mulan-mtr",
            batch_size=batch,
        ),
        "shared": {
            "network": mlp(),
            "tasks": [
                {"name": target, "loss": f"{OWN}.losses.MaskedMSELoss", "metrics": "torchmetrics.MeanAbsoluteError"}
                for target in targets
            ],
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
        },
        "methods": methods,
        "metrics": {f"mean_absolute_error/{target}": False for target in targets},
        "reference_point": [1.0] * len(targets),
        "single_tasks": True,
    }


SCENES = {
    "scenes4": ["semseg", "depth_zbuffer", "normal", "edge_texture"],
    "scenes9": [
        *("semseg", "depth_zbuffer", "depth_euclidean", "normal", "reshading", "edge_occlusion"),
        *("edge_texture", "keypoints2d", "albedo"),
    ],
}


def trainer(scale: str, epochs: int) -> Part:
    """Return the arguments of the trainer."""
    return {
        "accelerator": "cpu" if scale == "small" else "auto",
        "devices": 1,
        "max_epochs": epochs,
        "log_every_n_steps": 50,
        "num_sanity_val_steps": 0,
    }


def _scene_task(name: str) -> tuple[Part, str]:
    """Return the configuration of a task of rendered rooms, and the name of its metric."""
    loss: Any = f"{OWN}.losses.MaskedL1Loss"
    metric: Any = f"{OWN}.metrics.MaskedMeanAbsoluteError"
    logged = "masked_mean_absolute_error"
    if name == "semseg":
        loss = rule("losses.MaskedCrossEntropyLoss", ignore_index=-1)
        arguments = {"num_classes": SCENE_TASKS[name].channels, "ignore_index": -1}
        metric = {"class_path": "torchmetrics.classification.MulticlassJaccardIndex", "init_args": arguments}
        logged = "jaccard_index"
    elif name == "normal":
        loss, metric, logged = f"{OWN}.losses.CosineNormalLoss", f"{OWN}.metrics.NormalMeanAngle", "normal_mean_angle"
    elif name == "edge_occlusion":
        loss, metric, logged = f"{OWN}.losses.BalancedBCELoss", rule("metrics.EdgeF1", logits=True), "edge_f1"
    elif name.startswith("depth"):
        metric, logged = f"{OWN}.metrics.DepthAbsoluteError", "depth_absolute_error"
    return {"name": name, "loss": loss, "metrics": metric}, logged


def scenes(name: str, scale: str) -> Part:
    """An encoder-decoder on rendered rooms."""
    names = SCENES[name]
    size, epochs = (768, 3) if scale == "small" else (20_000, 20)
    encoder = rule("networks.EncoderDecoder", channels=[16, 32, 64])
    heads = {
        task: rule("networks.DenseHead", in_channels=16, out_channels=SCENE_TASKS[task].channels or 1) for task in names
    }
    measured = {task: _scene_task(task) for task in names}
    metrics = {f"{metric}/{task}": metric in ("jaccard_index", "edge_f1") for task, (_, metric) in measured.items()}
    return {
        "title": f"Rendered rooms, {len(names)} tasks: {size:,} images, {epochs} epochs",
        "seeds": [0, 1, 2],
        "seed_arguments": ["data.init_args.seed"],
        "trainer": trainer(scale, epochs),
        "data": rule(
            "datamodules.ScenesDataModule",
            tasks=names,
            size=32 if scale == "small" else 128,
            num_train=size,
            num_val=128,
            num_test=256,
            batch_size=16,
        ),
        "shared": {
            "network": rule("networks.MultiHeadNetwork", encoder=encoder, heads=heads),
            "tasks": [content for content, _ in measured.values()],
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
        },
        "methods": single_network_methods(few=True) | group_methods(size // 16 * epochs),
        "metrics": metrics,
        "single_tasks": True,
    }


def configuration(problem: str, scale: str, data: str, folder: Path) -> Part:
    """Return the configuration of a problem."""
    if problem in TARGETS:
        content = table(problem, scale, data)
    elif problem in SCENES:
        content = scenes(problem, scale)
    else:
        content = multimnist(problem, scale, data)
    return content | {"output": str(folder / problem)}


def run(path: Path, workers: int) -> bool:
    """Run a comparison, each run in a forked process of its own; return whether all of them have a result.

    That is what ``mtl-lightning compare`` does, without importing everything anew for each run.
    """
    for module in IMPORTED:
        importlib.import_module(module)
    comparison = load_comparison(path)
    runs = [*comparison.runs("single-tasks"), *comparison.runs("compare")]
    calls = [(path, one.command, one.name, one.seed) for one in runs]
    (path.parent / "logs").mkdir(exist_ok=True)
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=1) as pool:
        done = []
        for (_, _, name, seed), seconds in zip(calls, pool.imap(_run_one, calls, chunksize=1), strict=True):
            done.append(seconds is not None)
            print(
                f"{path.stem}: {name}, seed {seed}: {'failed' if seconds is None else f'{seconds:.0f} s'}", flush=True
            )
    return all(done)


def _run_one(call: tuple[Path, str, str, int]) -> float | None:
    path, command, name, seed = call
    began = time.perf_counter()
    log = (path.parent / "logs" / f"{path.stem}-{name.replace(' ', '_')}-{seed}.log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    try:
        {"compare": compare, "single-tasks": single_tasks}[command](
            ["--config", str(path), "--only", name, "--seed", str(seed)]
        )
    except BaseException:
        traceback.print_exc()
        return None
    return time.perf_counter() - began


def keep(problem: str, folder: Path, scale: str) -> None:
    """Keep the numbers and the table of a problem among the results."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    content: Mapping[str, Any] = json.loads((folder / problem / "comparison.json").read_text())
    kept = {
        "command": f"python benchmarks/comparison.py --data DATA --problems {problem}"
        + ("" if scale == "small" else f" --scale {scale}"),
        "machine": machine(),
        "scale": scale,
        **content,
    }
    (RESULTS / f"{problem}.json").write_text(json.dumps(kept, indent=1) + "\n")
    (RESULTS / f"{problem}.md").write_text((folder / problem / "comparison.md").read_text())


def main() -> None:
    """Run the problems one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="Folder with mnist, fashion-mnist and mulan-mtr.")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "comparison")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--scale", choices=("small", "full"), default="small")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only-configurations", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    lacking = []
    for problem in arguments.problems:
        path = arguments.folder / f"{problem}.yaml"
        content = configuration(problem, arguments.scale, arguments.data, arguments.folder)
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        if arguments.only_configurations:
            continue
        if not run(path, arguments.workers):
            lacking.append(problem)
        compare(["--config", str(path), "--report"])
        keep(problem, arguments.folder, arguments.scale)
        print((RESULTS / f"{problem}.md").read_text())
    if lacking:
        sys.exit(f"some runs have no result: {', '.join(lacking)}")


if __name__ == "__main__":
    main()
