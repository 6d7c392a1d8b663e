from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd import aggregation as jd

from mtl_lightning.aggregation import UPGrad
from mtl_lightning.torchjd import ActiveSetProjector, TorchJD

NAMES = ("a", "b", "c")
PREFERENCE = torch.tensor([0.5, 2.0, 1.0])
# All of TorchJD that runs without a solver under the GPL.
FAMILY: dict[str, Callable[[], Any]] = {
    "AlignedMTL": jd.AlignedMTL,
    "AlignedMTL, preference": lambda: jd.AlignedMTL(PREFERENCE, scale_mode="median"),
    "ConFIG": lambda: jd.ConFIG(PREFERENCE),
    "Constant": lambda: jd.Constant(PREFERENCE),
    "CRMOGM": lambda: jd.GramianWeightedAggregator(jd.CRMOGMWeighting(jd.PCGradWeighting(), alpha=0.5)),
    "CRMOGM of random weights": lambda: jd.WeightedAggregator(jd.CRMOGMWeighting(jd.RandomWeighting())),
    "DualProj": lambda: jd.DualProj(projector=ActiveSetProjector()),
    "ExcessMTL": jd.ExcessMTL,
    "FairGrad": lambda: jd.FairGrad(alpha=2.0),
    "GradDrop": lambda: jd.GradDrop(leak=torch.tensor([0.1, 0.0, 0.2])),
    "GradVac": jd.GradVac,
    "IMTLG": jd.IMTLG,
    "Krum": lambda: jd.Krum(n_byzantine=0),
    "Mean": jd.Mean,
    "MGDA": jd.MGDA,
    "PCD": jd.PCD,
    "PCGrad": jd.PCGrad,
    "Random": jd.Random,
    "Sum": jd.Sum,
    "TrimmedMean": lambda: jd.TrimmedMean(trim_number=0),
    "UPGrad": lambda: jd.UPGrad(PREFERENCE, projector=ActiveSetProjector()),
    "GradVacWeighting": jd.GradVacWeighting,
    "MoDoWeighting": lambda: jd.MoDoWeighting(gamma=0.1, rho=0.1),
    "SDMGradWeighting": lambda: jd.SDMGradWeighting(lr=0.5),
    "SDMGradWeighting, preference": lambda: jd.SDMGradWeighting(lr=0.5, pref_vector=PREFERENCE),
}
OF_THE_GRADIENTS = {"ConFIG", "ExcessMTL", "GradDrop", "TrimmedMean"}
RANDOM = {"CRMOGM", "CRMOGM of random weights", "GradDrop", "GradVac", "PCGrad", "Random", "GradVacWeighting"}
STATEFUL = {"CRMOGM", "ExcessMTL", "GradVac", "PCD", "MoDoWeighting", "SDMGradWeighting"}
family = pytest.mark.parametrize("name", FAMILY)


def resolved(name: str, seed: int = 0) -> TorchJD:
    aggregator = TorchJD(FAMILY[name](), seed)
    aggregator.resolve(NAMES)
    return aggregator


def steps(count: int, rows: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 7, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("name", sorted(set(FAMILY) - RANDOM))
def test_the_result_is_that_of_torchjd(name: str) -> None:
    plain, aggregator = FAMILY[name](), resolved(name)
    for rows in steps(3):
        if isinstance(plain, jd.Weighting):
            expected = plain(rows.double() @ rows.double().T).float() @ rows
        else:
            expected = plain(rows)
        torch.testing.assert_close(aggregator(rows), expected, rtol=1e-3, atol=1e-4)


@family
def test_it_is_known_what_needs_the_gradients_themselves(name: str) -> None:
    aggregator = resolved(name)
    assert aggregator.needs_jacobian == (name in OF_THE_GRADIENTS)
    if not aggregator.needs_jacobian:
        (rows,) = steps(1)
        weights = resolved(name).weights(rows.double() @ rows.double().T)
        assert weights.dtype == torch.float64
        torch.testing.assert_close(weights.float() @ rows, aggregator(rows))


@family
def test_random_numbers_are_those_of_the_seed_and_the_step(name: str) -> None:
    one, other = resolved(name), resolved(name)
    for rows in steps(3):
        before = torch.get_rng_state()
        found = one(rows)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)  # another rank has drawn other numbers
        assert torch.equal(other(rows), found)


@pytest.mark.parametrize("name", sorted(RANDOM - {"GradVac", "GradVacWeighting", "CRMOGM"}))
def test_every_step_and_every_seed_draws_others(name: str) -> None:
    rows = 10 * torch.ones(3, 7) * torch.tensor([[1.0], [-1.5], [0.6]]) + steps(1)[0]
    aggregator = resolved(name)
    found = [aggregator(rows) for _ in range(4)]
    assert any(not torch.equal(found[0], other) for other in found[1:])
    others = [resolved(name, seed)(rows) for seed in range(1, 5)]
    assert any(not torch.equal(found[0], other) for other in others)


@family
def test_a_checkpoint_holds_what_it_has_learned(name: str, tmp_path: Path) -> None:
    data = steps(8)
    first = resolved(name)
    for rows in data[:4]:
        first(rows)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = resolved(name)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again = resolved(name)
    again.load_state_dict(resumed.state_dict())  # saved once more before it is used
    for rows in data[4:]:
        expected = first(rows)
        assert torch.equal(resumed(rows), expected)
        assert torch.equal(again(rows), expected)


@pytest.mark.parametrize("name", sorted(STATEFUL))
def test_there_is_something_to_hold(name: str) -> None:
    data = steps(5)
    first = resolved(name)
    for rows in data[:4]:
        first(rows)
    fresh = resolved(name)
    fresh.set_extra_state(fresh.get_extra_state() | {"draws": 4})  # random numbers are not what is looked at
    assert not torch.equal(first(data[4]), fresh(data[4]))


@pytest.mark.parametrize("name", sorted(STATEFUL))
def test_names_begin_a_run_anew(name: str) -> None:
    data = steps(2)
    aggregator = resolved(name)
    found = [aggregator(rows) for rows in data]
    aggregator.resolve(NAMES)
    assert all(torch.equal(aggregator(rows), expected) for rows, expected in zip(data, found, strict=True))


@pytest.mark.parametrize("name", sorted(set(FAMILY) - {"Krum"}))  # which needs three
def test_a_step_without_a_task_is_one_of_the_others_and_leaves_no_trace(name: str) -> None:
    data = steps(3)
    found, expected = resolved(name), resolved(name)
    found(data[0])
    expected(data[0])
    without = found(data[1][[0, 2]], [0, 2])
    assert without.isfinite().all()
    expected.set_extra_state(expected.get_extra_state() | {"draws": 2})
    assert torch.equal(found(data[2]), expected(data[2]))


@pytest.mark.parametrize("name", ["Constant", "UPGrad", "ConFIG", "AlignedMTL, preference"])
def test_preferences_are_those_of_the_tasks_that_are_there(name: str) -> None:
    (rows,) = steps(1)
    make: dict[str, Callable[[Tensor], Any]] = {
        "Constant": jd.Constant,
        "UPGrad": lambda vector: jd.UPGrad(vector, projector=ActiveSetProjector()),
        "ConFIG": jd.ConFIG,
        "AlignedMTL, preference": lambda vector: jd.AlignedMTL(vector, scale_mode="median"),
    }
    expected = make[name](PREFERENCE[[0, 2]])(rows[[0, 2]])
    torch.testing.assert_close(resolved(name)(rows[[0, 2]], [0, 2]), expected)


def test_upgrad_with_the_projector_is_ours() -> None:
    ours = UPGrad()
    ours.resolve([str(task) for task in range(11)])
    for rows in steps(5, rows=11):
        theirs = jd.UPGrad(projector=ActiveSetProjector())(rows.double())
        torch.testing.assert_close(ours(rows.double()), theirs)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: "UPGrad", "should be an object of `torchjd.aggregation.Aggregator`"),
        (lambda: jd.UPGrad, "should be an object of `torchjd.aggregation.Aggregator`"),
        (jd.ExcessMTLWeighting, "should be a weighting that takes the Gramian"),
        (lambda: jd.CRMOGMWeighting(jd.ExcessMTLWeighting()), "should be a weighting that takes the Gramian"),
    ],
    ids=["string", "class", "weighting", "inner weighting"],
)
def test_other_kinds_are_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        TorchJD(make())


def test_without_torchjd_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['torchjd'] = None\n"
        "from mtl_lightning.torchjd import TorchJD\n"
        "try:\n    TorchJD(None)\nexcept ImportError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install mtl-lightning[torchjd]" in result.stdout


def test_torchjd_is_not_loaded_before_it_is_needed() -> None:
    code = "import sys, mtl_lightning.torchjd; print('torchjd' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
