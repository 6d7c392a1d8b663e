import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_lightning.networks import DenseHead, MultiHeadNetwork, TimmViTEncoder

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm, an extra, is not installed")


def _encoder(**arguments: Any) -> TimmViTEncoder:
    torch.manual_seed(0)
    return TimmViTEncoder(**{"image_size": 32, "layers": (0, 2), **arguments})


def _images(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


@needs_timm
@pytest.mark.parametrize(("out_channels", "expected"), [(None, 2 * 192), (24, 24)])
@pytest.mark.parametrize("image_size", [32, (32, 48)])
def test_gives_a_map_of_patches(image_size: int | tuple[int, int], out_channels: int | None, expected: int) -> None:
    encoder = _encoder(image_size=image_size, out_channels=out_channels)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    assert encoder(_images(2, 3, height, width)).shape == (2, expected, height // 16, width // 16)
    assert (encoder.out_features, encoder.stride) == (expected, 16)


@needs_timm
def test_the_network_of_the_experiments_predicts_every_pixel() -> None:
    encoder = TimmViTEncoder(image_size=(32, 48))
    heads: dict[str, nn.Module] = {
        name: DenseHead(encoder.out_features, channels, scale_factor=encoder.stride)
        for name, channels in {"classes": 5, "depth": 1}.items()
    }
    predictions = MultiHeadNetwork(encoder, heads)(_images(2, 3, 32, 48))
    assert encoder.out_features == 4 * 192
    assert predictions["classes"].shape == (2, 5, 32, 48)
    assert predictions["depth"].shape == (2, 1, 32, 48)


@needs_timm
def test_the_depths_are_those_of_the_blocks() -> None:
    encoder, images = _encoder().eval(), _images(2, 3, 32, 32)
    states: list[Tensor] = []
    for block in encoder.vit.blocks:
        block.register_forward_hook(lambda module, inputs, output: states.append(output))
    features = encoder(images)
    expected = [encoder.vit.norm(states[layer])[:, 1:].transpose(1, 2).reshape(2, 192, 2, 2) for layer in (0, 2)]
    torch.testing.assert_close(features, torch.cat(expected, dim=1))


@needs_timm
def test_blocks_after_the_last_depth_are_left_out() -> None:
    assert len(_encoder().vit.blocks) == 3


@needs_timm
@pytest.mark.parametrize("out_channels", [None, 8])
def test_gradients_reach_every_parameter(out_channels: int | None) -> None:
    encoder = _encoder(drop_path_rate=0.0, out_channels=out_channels)
    # Normalised features have a constant sum of squares, so that another function of them is needed.
    encoder(_images(2, 3, 32, 32)).pow(3).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


@needs_timm
def test_drops_paths_in_training_only() -> None:
    encoder, images = _encoder(drop_path_rate=0.9, layers=(0, 11)), _images(2, 3, 32, 32)
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images))


@needs_timm
def test_the_state_of_the_generator_gives_the_same_paths() -> None:
    encoder, images = _encoder(drop_path_rate=0.9, layers=(0, 11)), _images(2, 3, 32, 32)
    outputs = []
    for _ in range(2):
        torch.manual_seed(5)
        outputs.append(encoder(images))
    assert torch.equal(*outputs)


@needs_timm
def test_images_of_a_batch_do_not_meet() -> None:
    encoder, images = _encoder(out_channels=8).eval(), _images(3, 3, 32, 32)
    alone = torch.cat([encoder(image[None]) for image in images])
    torch.testing.assert_close(encoder(images), alone, atol=1e-5, rtol=1e-4)


@needs_timm
def test_survives_a_state_dict() -> None:
    source, copy, images = _encoder(out_channels=8).eval(), _encoder(out_channels=8).eval(), _images(2, 3, 32, 32)
    for parameter in copy.parameters():
        nn.init.normal_(parameter)
    copy.load_state_dict(source.state_dict())
    assert torch.equal(copy(images), source(images))


@needs_timm
def test_takes_images_of_other_channels() -> None:
    assert _encoder(in_channels=1)(_images(1, 1, 32, 32)).shape == (1, 384, 2, 2)


@needs_timm
@pytest.mark.parametrize("layers", [(), (2, 0), (1, 1), (-1, 3), (3, 12)])
def test_refuses_depths_that_are_not_there(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`layers` should be ascending indices of the 12 blocks, from 0. Found"):
        _encoder(layers=layers)


@needs_timm
@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_refuses_networks_that_are_no_vision_transformers(name: str) -> None:
    with pytest.raises(ValueError, match=f"`name` should be that of a vision transformer of timm. Found '{name}'"):
        _encoder(name=name)


@needs_timm
@pytest.mark.parametrize("image_size", [40, (32, 24), (8, 32)])
def test_refuses_images_that_patches_do_not_tile(image_size: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="`image_size` should be a multiple of the patch size, 16"):
        _encoder(image_size=image_size)


@needs_timm
def test_refuses_images_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"should be \(32, 32\), the encoder's `image_size`. Found \(32, 48\)"):
        _encoder()(_images(1, 3, 32, 48))


def test_names_the_extra_if_timm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as an import sees a package that is not installed
    with pytest.raises(ImportError, match=r'needs timm.*`pip install "mtl-lightning\[timm\]"`'):
        TimmViTEncoder()


def test_timm_is_not_loaded_with_the_package() -> None:
    code = "import sys, mtl_lightning.networks; print('timm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
