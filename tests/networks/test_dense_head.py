from typing import Any

import pytest
import torch
from torch import nn

from mtl_lightning.networks import DenseHead


@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("scale_factor", [1, 2, 16])
def test_predicts_at_the_size_of_the_images(hidden: int | None, scale_factor: int) -> None:
    head = DenseHead(4, 3, hidden, scale_factor=scale_factor)
    assert head(torch.zeros(2, 4, 3, 2)).shape == (2, 3, 3 * scale_factor, 2 * scale_factor)


def test_is_linear_in_each_pixel_without_a_hidden_layer() -> None:
    head, features = DenseHead(4, 3), torch.randn(2, 4, 5, 6)
    (layer,) = (module for module in head.modules() if isinstance(module, nn.Conv2d))
    assert layer.bias is not None
    expected = torch.einsum("bihw,oi->bohw", features, layer.weight[..., 0, 0]) + layer.bias[:, None, None]
    torch.testing.assert_close(head(features), expected)


def test_upsampling_keeps_a_constant_and_the_mean() -> None:
    head = DenseHead(4, 3, scale_factor=4)
    constant = torch.randn(2, 4, 1, 1).expand(2, 4, 3, 3)
    plain = DenseHead(4, 3)
    plain.load_state_dict(head.state_dict())
    torch.testing.assert_close(head(constant), plain(constant).mean((-2, -1), keepdim=True).expand(2, 3, 12, 12))


@pytest.mark.parametrize("hidden", [None, 5])
def test_gradients_reach_every_parameter(hidden: int | None) -> None:
    head = DenseHead(4, 3, hidden, scale_factor=2)
    head(torch.randn(2, 4, 4, 4)).square().sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


def test_images_of_a_batch_do_not_meet() -> None:
    head, features = DenseHead(4, 3, 8, scale_factor=2).double(), torch.randn(3, 4, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(head(features), torch.cat([head(feature[None]) for feature in features]))


def test_another_normalisation_takes_its_place() -> None:
    head = DenseHead(4, 3, 8, norm=nn.BatchNorm2d)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in head.modules()) == 1


def test_refuses_to_shrink() -> None:
    with pytest.raises(ValueError, match=r"`scale_factor` should be at least 1. Found 0"):
        DenseHead(4, 3, scale_factor=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # `instantiate` is newer than the oldest version we allow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("DenseHead", {"in_channels": 4, "out_channels": 3, "hidden": 8}), ("EncoderDecoder", {"channels": [8, 16]})],
)
def test_the_normalisation_survives_a_printed_configuration(name: str, arguments: dict[str, Any]) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=nn.Module)
    given = {"class_path": f"mtl_lightning.networks.{name}", "init_args": arguments}
    printed = parser.dump(parser.parse_object({"part": given}))
    part = parser.instantiate_classes(parser.parse_string(printed)).part
    assert any(isinstance(module, nn.GroupNorm) for module in part.modules())
