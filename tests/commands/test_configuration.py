from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mtl_lightning.commands.configuration import Run, Select, load_comparison
from mtl_lightning.commands.parsing import FitConfiguration
from tests.commands.cases import FRONT, JOINT, content, write


def _run(folder: Path, name: str, seed: int = 0, **changes: Any) -> Run:
    return next(run for run in load_comparison(write(folder, **changes)).methods[name] if run.seed == seed)


def test_a_method_takes_the_shared_arguments_that_its_constructor_has(tmp_path: Path) -> None:
    shared = {**content(tmp_path)["shared"], "weighting": "mtl_lightning.weighting.Uncertainty", "transfer_every": 2}
    comparison = load_comparison(write(tmp_path, shared=shared))
    joint, front = (comparison.methods[name][0].content["model"]["init_args"] for name in ("joint", "front"))
    assert set(joint) == {"network", "tasks", "optimizer", "weighting"}
    assert set(front) == {"network", "tasks", "optimizer", "transfer_every", "preferences", "backend"}


def test_a_method_overrides_a_part_or_with_a_class_of_its_own_the_whole(tmp_path: Path) -> None:
    part = {
        "model": {"class_path": JOINT["model"]["class_path"], "init_args": {"optimizer": {"init_args": {"lr": 0.5}}}},
        "data": {"init_args": {"batch_size": 8}},
        "trainer": {"max_epochs": 7},
    }
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
    whole = {"model": {"class_path": JOINT["model"]["class_path"], "init_args": {"optimizer": sgd}}}
    runs = load_comparison(write(tmp_path, methods={"part": part, "whole": whole})).methods
    changed = runs["part"][0].content
    assert changed["model"]["init_args"]["optimizer"] == {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.5}}
    assert changed["data"]["init_args"]["batch_size"] == 8
    assert changed["data"]["init_args"]["num_train"] == 256
    assert changed["trainer"] == {"max_epochs": 7, "accelerator": "cpu", "devices": 1}
    assert runs["whole"][0].content["model"]["init_args"]["optimizer"] == sgd
    assert runs["whole"][0].content["trainer"]["max_epochs"] == 2


def test_a_part_that_repeats_the_class_is_merged_with_the_shared_one(tmp_path: Path) -> None:
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"weight_decay": 0.1}}
    method = {"model": {**JOINT["model"], "init_args": {"optimizer": optimizer}}}
    run = _run(tmp_path, "joint", methods={"joint": method})
    expected = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01, "weight_decay": 0.1}}
    assert run.content["model"]["init_args"]["optimizer"] == expected


def test_a_name_that_yaml_reads_as_a_number_is_a_name(tmp_path: Path) -> None:
    comparison = load_comparison(write(tmp_path, methods={1: JOINT, 0.5: JOINT}))
    assert list(comparison.methods) == ["1", "0.5"]
    assert [run.name for run in comparison.runs("compare")] == ["1", "0.5"]


def test_seeds_go_where_they_are_told_to(tmp_path: Path) -> None:
    weighting = {"class_path": "mtl_lightning.weighting.RandomWeights"}
    method = {
        "model": {**JOINT["model"], "init_args": {"weighting": weighting}},
        "seed_arguments": ["model.init_args.weighting.init_args.seed"],
    }
    methods = {"random": method, "joint": JOINT}
    path = write(tmp_path, seeds=[3, 5], seed_arguments=["data.init_args.seed"], methods=methods)
    comparison = load_comparison(path)
    for seed, run in zip([3, 5], comparison.methods["random"], strict=True):
        assert run.content["seed_everything"] == seed
        assert run.content["data"]["init_args"]["seed"] == seed
        assert run.content["model"]["init_args"]["weighting"]["init_args"]["seed"] == seed
    assert [run.label for run in comparison.runs("compare")] == [
        f"{name}, seed {seed}" for seed in (3, 5) for name in ("random", "joint")
    ]


def test_a_population_is_selected_by_hypervolume_and_a_single_model_by_its_loss(tmp_path: Path) -> None:
    own = {**JOINT, "select": {"monitor": "val_accuracy/left", "mode": "max"}}
    methods = load_comparison(write(tmp_path, methods={"joint": JOINT, "front": FRONT, "own": own})).methods
    assert methods["joint"][0].select == Select("val_loss", "min")
    assert methods["front"][0].select == Select("hypervolume", "max")
    assert methods["own"][0].select == Select("val_accuracy/left", "max")


def test_a_function_that_makes_a_model_is_read_by_its_signature(tmp_path: Path) -> None:
    official = {"model": {"class_path": "mtl_lightning.modules.TaskGroupModule.official"}}
    shared = {**content(tmp_path)["shared"], "affinity_decay": 0.5}
    run = load_comparison(write(tmp_path, shared=shared, methods={"official": official})).methods["official"][0]
    assert set(run.content["model"]["init_args"]) == {"network", "tasks", "optimizer", "affinity_decay"}
    assert run.select == Select("val_loss", "min")


def test_the_tasks_alone_are_those_that_the_metrics_name(tmp_path: Path) -> None:
    comparison = load_comparison(write(tmp_path, single_tasks={"trainer": {"max_epochs": 1}}))
    assert list(comparison.single_tasks) == ["left", "right"]
    run = comparison.single_tasks["right"][0]
    assert run.content["model"]["init_args"]["task"] == "right"
    assert run.content["trainer"]["max_epochs"] == 1
    assert run.folder == tmp_path / "runs" / "single_tasks" / "right" / "seed_0"
    alone = load_comparison(write(tmp_path, methods=None), command="single-tasks")
    assert list(alone.single_tasks) == ["left", "right"]


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"title": "other", "metrics": {"accuracy/left": True}, "member": "loss"}, True),
        ({"seeds": [0, 1, 2]}, True),
        ({"reference_point": [4.0, 4.0]}, True),  # a single model is not selected by it
        ({"trainer": {"max_epochs": 3, "accelerator": "cpu", "devices": 1}}, False),
        ({"select": {"single": {"monitor": "val_loss/left", "mode": "min"}}}, False),
        ({"seed_arguments": ["data.init_args.seed"]}, False),
    ],
)
def test_the_digest_tells_what_changes_a_run(changes: dict[str, Any], same: bool, tmp_path: Path) -> None:
    assert (_run(tmp_path, "joint").digest == _run(tmp_path, "joint", **changes).digest) is same


def test_the_reference_point_decides_on_a_population() -> None:
    point = {"command": "compare", "name": "x", "seed": 0, "output": Path(), "content": {}}
    runs = [Run(**point, select=Select("hypervolume", "max"), reference_point=at) for at in ((1.0, 1.0), (2.0, 2.0))]  # type: ignore[arg-type]
    assert runs[0].digest != runs[1].digest


def test_reading_a_configuration_leaves_it_and_its_digest_alone(tmp_path: Path) -> None:
    run, twin = _run(tmp_path, "joint"), _run(tmp_path, "joint")
    FitConfiguration(run.content).resolved()
    assert run.content == twin.content
    assert run.digest == twin.digest


def test_the_resolved_configuration_is_one_for_fit(tmp_path: Path) -> None:
    run = _run(tmp_path, "front")
    text = FitConfiguration(run.content).resolved()
    resolved = yaml.safe_load(text)
    assert resolved["model"]["init_args"]["on_nonfinite"] == "reseed"
    assert FitConfiguration(resolved).resolved() == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": None}, r"`seeds` should be a list of different integers of at least 0. Found None"),
        ({"seeds": [1, 1]}, r"different integers .* Found \[1, 1\]"),
        ({"method": {}}, r"Found 'method'"),
        ({"methods": {}}, r"at least one method"),
        ({"methods": {1: JOINT, "1": JOINT}}, r"name of its own. Found '1' twice"),
        ({"output": 3}, r"`output` should be the path of a folder. Found 3"),
        ({"methods": {"a/b": JOINT}}, r"that of a folder.*Found 'a/b'"),
        ({"methods": {"logs": JOINT}}, r"Found 'logs'"),
        ({"methods": {"joint": {**JOINT, "epochs": 3}}}, r"Method 'joint' should hold .*Found 'epochs'"),
        ({"methods": {"joint": {"model": {"class_path": "mtl_lightning.modules.Nope"}}}}, r"importable.*'Nope'"),
        ({"methods": {"joint": {"model": {"class_path": "nope.Nope"}}}}, r"no module 'nope'"),
        ({"methods": {"joint": {"model": {}}}}, r"should have a `class_path`"),
        ({"shared": {"optimiser": 1}}, r"\['optimiser'\], which none of them takes"),
        ({"metrics": {"test_accuracy/left": True}}, r"without the split"),
        ({"metrics": {"accuracy/left": "max"}}, r"Found 'accuracy/left': 'max'"),
        ({"metrics": None}, r"`metrics` should be a mapping"),
        ({"reference_point": None}, r"`reference_point` should be given.*'front'"),
        ({"reference_point": [1.0, "inf"]}, r"a finite number for each"),
        ({"select": {"single": {"monitor": "test_loss", "mode": "min"}}}, r"of the validation.*Found 'test_loss'"),
        ({"select": {"single": {"monitor": "val_loss"}}}, r"one of 'min', 'max'. Found None"),
        ({"member": "best"}, r"one of 'loss', 'delta_m'. Found 'best'"),
        ({"member": "delta_m"}, r"needs `single_tasks: true`"),
        ({"baselines": "file.json", "single_tasks": True}, r"Found both"),
        ({"trainer": {"fast_dev_run": True}}, r"should not hold `fast_dev_run`"),
        (
            {"trainer": {"callbacks": [{"class_path": "mtl_lightning.callbacks.CostCallback"}]}},
            r"should not hold `CostCallback`: each run has one",
        ),
        (
            {"trainer": {"callbacks": {"class_path": "mtl_lightning.callbacks.HypervolumeCallback"}}},
            r"should not hold `HypervolumeCallback`: `reference_point`",
        ),
        ({"seed_arguments": ["seed"]}, r"Found 'seed'"),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"(?s)digits\.yaml: .*{message}"):
        load_comparison(write(tmp_path, **changes))
