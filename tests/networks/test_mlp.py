import pytest
import torch
from torch import nn

from mtl_lightning.networks import MLP


def test_applies_the_activation_after_every_hidden_layer() -> None:
    network, inputs = MLP(6, (5, 4), out_features=3), torch.randn(2, 6)
    first, second, last = (module for module in network.modules() if isinstance(module, nn.Linear))
    torch.testing.assert_close(network(inputs), last(second(first(inputs).relu()).relu()))


def test_without_a_last_layer_ends_with_the_activation() -> None:
    assert bool((MLP(6, (50,))(torch.randn(8, 6)) >= 0).all())


def test_takes_another_activation() -> None:
    network, inputs = MLP(6, (4,), activation=nn.Tanh), torch.randn(2, 6)
    (layer,) = (module for module in network.modules() if isinstance(module, nn.Linear))
    torch.testing.assert_close(network(inputs), layer(inputs).tanh())


def test_flattens_its_inputs() -> None:
    network, images = MLP(16, (4,)), torch.randn(3, 1, 4, 4)
    torch.testing.assert_close(network(images), network(images.reshape(3, 16)))


@pytest.mark.parametrize(("out_features", "expected"), [(None, 4), (3, 3)])
def test_tells_its_width(out_features: int | None, expected: int) -> None:
    assert MLP(6, (5, 4), out_features).out_features == expected


def test_without_hidden_layers_is_linear() -> None:
    network, inputs = MLP(6, (), out_features=3), torch.randn(2, 6)
    torch.testing.assert_close(network(-inputs) + network(inputs), 2 * network(torch.zeros(2, 6)))


def test_refuses_no_layers() -> None:
    with pytest.raises(ValueError, match="`hidden_features` should hold at least one width"):
        MLP(6, ())


def test_refuses_a_width_of_zero() -> None:
    with pytest.raises(ValueError, match=r"All widths should be positive. Found \[6, 0, 3\]"):
        MLP(6, (0,), out_features=3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # `instantiate` is newer than the oldest version we allow
def test_survives_a_printed_configuration() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--encoder", type=nn.Module)
    arguments = {"in_features": 6, "hidden_features": [5, 4]}
    printed = parser.dump(
        parser.parse_object({"encoder": {"class_path": "mtl_lightning.networks.MLP", "init_args": arguments}})
    )
    encoder = parser.instantiate_classes(parser.parse_string(printed)).encoder
    assert any(isinstance(module, nn.ReLU) for module in encoder.modules())
