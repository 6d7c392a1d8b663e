import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mtl_lightning.networks import VisionTransformerEncoder
from mtl_lightning.networks.vit import SelfAttention


@pytest.mark.parametrize("num_heads", [1, 4])
def test_attention_equals_the_fused_kernel(num_heads: int) -> None:
    attention, tokens = SelfAttention(16, num_heads), torch.randn(2, 9, 16)
    queries, keys, values = (
        part.reshape(2, 9, num_heads, -1).transpose(1, 2)
        for part in attention.queries_keys_values(tokens).chunk(3, dim=-1)
    )
    fused = functional.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).reshape(2, 9, 16)
    torch.testing.assert_close(attention(tokens), attention.projection(fused))


def test_tells_its_width() -> None:
    encoder = VisionTransformerEncoder(image_size=12, patch_size=4, in_channels=3, width=24, depth=1)
    assert encoder(torch.zeros(2, 3, 12, 12)).shape == (2, encoder.out_features) == (2, 24)


def _with_patches_exchanged(images: Tensor) -> Tensor:
    return torch.cat([images[..., 4:, :], images[..., :4, :]], dim=-2)


def test_depends_on_the_positions_of_patches() -> None:
    encoder, images = VisionTransformerEncoder(8, 4, width=16, depth=1), torch.randn(2, 1, 8, 8)
    assert not torch.allclose(encoder(images), encoder(_with_patches_exchanged(images)), atol=1e-5)


def test_without_positions_is_invariant_to_their_order() -> None:
    encoder, images = VisionTransformerEncoder(8, 4, width=16, depth=1), torch.randn(2, 1, 8, 8)
    torch.nn.init.zeros_(encoder.positions.weight)
    torch.testing.assert_close(encoder(images), encoder(_with_patches_exchanged(images)))


def test_drops_in_training() -> None:
    encoder, images = VisionTransformerEncoder(8, 4, width=16, depth=1, dropout=0.5), torch.randn(2, 1, 8, 8)
    assert not torch.equal(encoder(images), encoder(images))


def test_drops_nothing_in_evaluation() -> None:
    encoder, images = VisionTransformerEncoder(8, 4, width=16, depth=1, dropout=0.5).eval(), torch.randn(2, 1, 8, 8)
    assert torch.equal(encoder(images), encoder(images))


@pytest.mark.parametrize("image_size", [10, 2])
def test_refuses_images_that_patches_do_not_tile(image_size: int) -> None:
    with pytest.raises(ValueError, match=f"`image_size` should be a multiple of `patch_size`=4. Found {image_size}"):
        VisionTransformerEncoder(image_size, 4)


def test_refuses_a_width_that_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"`width` should be a multiple of `num_heads`=4\. Found 18"):
        VisionTransformerEncoder(8, 4, width=18)
