"""A small vision transformer whose attention is written out, so that a population of them can be stacked."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VisionTransformerEncoder(nn.Module):
    """A vision transformer with learned positions, pre-norm blocks and mean pooling (Dosovitskiy et al., 2021).

    It departs from the paper in two ways: features are the mean over patches, as in Beyer et al. (2022), instead of a
    class token, and attention is two matrix products and a softmax. The fused kernels of PyTorch lack a batching rule
    on some devices, and ``torch.vmap`` then falls back to one model at a time.

    With dropout, ``torch.vmap`` needs ``randomness="different"``.

    Args:
        image_size: The height and width of the images in pixels, a multiple of ``patch_size``.
        patch_size: The height and width of a patch in pixels.
        in_channels: The number of channels of the images.
        width: The number of features, a multiple of ``num_heads``.
        depth: The number of blocks.
        num_heads: The number of attention heads.
        mlp_ratio: The hidden width of a block's perceptron over ``width``.
        dropout: The probability of dropping an element after attention weights, projections and positions.

    Raises:
        ValueError: If ``image_size`` is no multiple of ``patch_size``, or ``width`` of ``num_heads``.

    References:
        - Dosovitskiy et al.: An Image is Worth 16x16 Words (2021), arXiv:2010.11929.
        - Beyer, Zhai, Kolesnikov: Better plain ViT baselines for ImageNet-1k (2022), arXiv:2205.01580.

    Example:
        >>> encoder = VisionTransformerEncoder(image_size=16, patch_size=4, width=32, depth=2)
        >>> encoder(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        in_channels: int = 1,
        width: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if image_size < patch_size or image_size % patch_size:
            raise ValueError(f"`image_size` should be a multiple of `patch_size`={patch_size}. Found {image_size}.")
        self.patches = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)
        self.positions = LearnedPositions((image_size // patch_size) ** 2, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(_Block(width, num_heads, int(width * mlp_ratio), dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.out_features = width

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, shape ``(B, width)``, of images, shape ``(B, in_channels, height, width)``."""
        tokens = self.patches(images).flatten(start_dim=2).transpose(1, 2)
        tokens = self.blocks(self.dropout(self.positions(tokens)))
        return self.norm(tokens).mean(dim=1)


class LearnedPositions(nn.Module):
    """Adds a learned vector to each of ``num_tokens`` tokens.

    It is a module of its own, so that ``reset_parameters`` draws it anew like any layer's parameters.
    """

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vectors from a truncated normal distribution of standard deviation 0.02."""
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens with positions, shape ``(B, num_tokens, width)``."""
        return tokens + self.weight


class SelfAttention(nn.Module):
    """Multi-head self-attention, written out as two matrix products and a softmax.

    Args:
        width: The width of a token, a multiple of ``num_heads``.
        num_heads: The number of heads.
        dropout: The probability of dropping an attention weight.
    """

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"`width` should be a multiple of `num_heads`={num_heads}. Found {width}.")
        self.num_heads = num_heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the attended tokens, shape ``(B, N, width)``, of tokens of the same shape."""
        heads = self.queries_keys_values(tokens).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, width/heads)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind(0)
        scores = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5
        attended = self.dropout(scores.softmax(dim=-1)) @ values
        return self.projection(attended.transpose(1, 2).flatten(start_dim=2))


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens after the block, shape ``(B, N, width)``."""
        tokens = tokens + self.dropout(self.attention(self.norm1(tokens)))
        return tokens + self.dropout(self.mlp(self.norm2(tokens)))
