"""A vision transformer of timm whose features come from several depths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mtl_lightning.networks.encoder_decoder import group_norm


class TimmViTEncoder(nn.Module):
    """A vision transformer of the package ``timm`` as a trunk for dense heads.

    The patch tokens after several blocks pass the last normalisation of the transformer, and are joined along the
    channels, at the resolution of the patches. With heads of one 1x1 convolution and upsampling, such as
    ``DenseHead(encoder.out_features, out_channels, scale_factor=encoder.stride)``, it comes close to the network of the
    published experiments on selective task group updates: ViT-Tiny with patches of 16 pixels and a stochastic depth of
    0.15. Which depths were joined there, and how, is not known here. Blocks after the last depth are left out.

    timm's attention may use fused kernels, and some of its parameters have no ``reset_parameters`` of their own: for a
    population of models prefer :class:`~mtl_lightning.networks.VisionTransformerEncoder`.

    Args:
        name: A vision transformer of timm. The published experiments started from
            ``"vit_tiny_patch16_384.augreg_in21k_ft_in1k"``.
        image_size: The height and width of the images in pixels, one number if they are equal; multiples of the size
            of a patch. Positions of pretrained weights are interpolated.
        in_channels: The number of channels of the images.
        pretrained: Whether timm downloads weights; they have licences of their own.
        drop_path_rate: The probability with which the last block is skipped in training; it grows linearly from zero
            in the first. In [0, 1).
        layers: The indices of the blocks, ascending, from zero.
        out_channels: The channels of a 1x1 convolution, with group normalisation and ReLU, that mixes the depths for
            all tasks. None by default: the channels of all depths.

    Attributes:
        out_features: The number of channels of the features.
        stride: The size of a patch in pixels, by which heads upsample.

    Raises:
        ImportError: If timm is not installed.
        ValueError: If ``name`` is not a vision transformer, ``layers`` are not those of its blocks, or patches do not
            tile the images; in a call, if the images have another size.

    References:
        - Dosovitskiy et al.: An Image is Worth 16x16 Words (2021), arXiv:2010.11929.
        - Huang et al.: Deep Networks with Stochastic Depth (2016), arXiv:1603.09382.
    """

    def __init__(
        self,
        name: str = "vit_tiny_patch16_224",
        *,
        image_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        pretrained: bool = False,
        drop_path_rate: float = 0.15,
        layers: Sequence[int] = (2, 5, 8, 11),
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        try:
            import timm
            from timm.models import VisionTransformer
        except ImportError as error:
            raise ImportError(
                "`TimmViTEncoder` needs timm, which is not installed. Install it with "
                '`pip install "mtl-lightning[timm]"`.'
            ) from error

        try:
            vit = timm.create_model(
                name,
                pretrained=pretrained,
                num_classes=0,
                img_size=image_size,
                in_chans=in_channels,
                drop_path_rate=drop_path_rate,
            )
        except TypeError as error:  # that of a constructor without such arguments
            raise ValueError(
                f"`name` should be that of a vision transformer of timm. Found {name!r}: {error}."
            ) from error
        if not isinstance(vit, VisionTransformer):
            raise ValueError(
                f"`name` should be that of a vision transformer of timm. Found {name!r}, a {type(vit).__name__}."
            )
        depth = len(vit.blocks)
        self.layers = list(layers)
        if (
            not self.layers
            or self.layers != sorted(set(self.layers))
            or not 0 <= self.layers[0] <= self.layers[-1] < depth
        ):
            raise ValueError(
                f"`layers` should be ascending indices of the {depth} blocks, from 0. Found {self.layers}."
            )
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.stride: int = vit.patch_embed.patch_size[0]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"`image_size` should be a multiple of the patch size, {self.stride}, in both directions. "
                f"Found {image_size}."
            )
        vit.prune_intermediate_layers(self.layers)
        self.vit = vit
        self.image_size = (height, width)
        self.out_features = len(self.layers) * vit.embed_dim
        self.mixing: nn.Module = nn.Identity()
        if out_channels is not None:
            # Normalisation has a bias of its own.
            convolution = nn.Conv2d(self.out_features, out_channels, 1, bias=False)
            self.mixing = nn.Sequential(convolution, group_norm(out_channels), nn.ReLU())
            self.out_features = out_channels

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images.

        Args:
            images: Shape ``(B, in_channels, height, width)``.

        Returns:
            Shape ``(B, out_features, height / stride, width / stride)``.

        Raises:
            ValueError: If the images are not of ``image_size``.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(
                f"The height and width of `images` should be {self.image_size}, the encoder's `image_size`. "
                f"Found {tuple(images.shape[-2:])}."
            )
        # The residual stream grows with depth; the last normalisation brings all depths to one scale.
        maps = self.vit.forward_intermediates(images, indices=self.layers, norm=True, intermediates_only=True)
        return self.mixing(torch.cat(cast("list[Tensor]", maps), dim=1))
