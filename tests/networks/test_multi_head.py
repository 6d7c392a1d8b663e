import pytest
import torch
from torch import nn

from mtl_lightning.networks import MultiHeadNetwork


def _network() -> MultiHeadNetwork:
    return MultiHeadNetwork(nn.Linear(6, 4), {"left": nn.Linear(4, 3), "right": nn.Linear(4, 1)})


def test_predicts_each_task_from_the_shared_features() -> None:
    network, inputs = _network(), torch.randn(5, 6)
    features = network.encoder(inputs)
    expected = {"left": network.heads["left"](features), "right": network.heads["right"](features)}
    torch.testing.assert_close(network(inputs), expected)


def test_keeps_the_order_of_the_heads() -> None:
    heads: dict[str, nn.Module] = {name: nn.Linear(4, 1) for name in ("zebra", "ant", "mole")}
    assert list(MultiHeadNetwork(nn.Linear(6, 4), heads)(torch.randn(2, 6))) == ["zebra", "ant", "mole"]


def test_a_head_gets_no_gradient_from_another_task() -> None:
    network = _network()
    network(torch.randn(5, 6))["left"].sum().backward()
    assert network.heads["right"].weight.grad is None


def test_names_its_parameters_by_task() -> None:
    assert set(_network().state_dict()) == {
        f"{module}.{kind}" for module in ("encoder", "heads.left", "heads.right") for kind in ("weight", "bias")
    }


def test_refuses_no_heads() -> None:
    with pytest.raises(ValueError, match="`heads` should hold one head per task"):
        MultiHeadNetwork(nn.Linear(6, 4), {})


@pytest.mark.parametrize("name", ["", "left.digit", "keys", "type", "training"])
def test_refuses_names_that_a_module_dict_cannot_take(name: str) -> None:
    with pytest.raises(ValueError, match=f"The keys of `heads` should be non-empty.*Found {name!r}"):
        MultiHeadNetwork(nn.Linear(6, 4), {name: nn.Linear(4, 1)})
