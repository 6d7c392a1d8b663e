"""Images of two overlapping glyphs, one task per glyph."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Glyphs(NamedTuple):
    """Labelled grey images of one size: ``images`` uint8, shape ``(N, h, w)``, and ``labels`` int64, shape ``(N,)``."""

    images: Tensor
    labels: Tensor

    def select(self, indices: Tensor) -> Glyphs:
        """Return the glyphs at ``indices``."""
        return Glyphs(self.images[indices], self.labels[indices])

    def hold_out(self, fraction: float, generator: torch.Generator) -> tuple[Glyphs, Glyphs | None]:
        """Return the glyphs in two disjoint parts; the second, drawn by ``generator``, is ``fraction`` of them.

        The second is None if ``fraction`` is 0.

        Raises:
            ValueError: If ``fraction`` is not 0 and one of the parts would be empty.
        """
        if fraction == 0:
            return self, None
        total = len(self.labels)
        held = round(total * fraction)
        if not 0 < held < total:
            raise ValueError(
                f"The held-out fraction should leave at least one glyph in each part. Found {fraction} of {total}."
            )
        order = torch.randperm(total, generator=generator)
        return self.select(order[held:]), self.select(order[:held])


class OverlappingPairs(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Square images of a left and a right glyph, the brighter pixel where they overlap.

    The pairs are drawn once, as indices and offsets, and the images composed when they are read. An item is
    ``(image, {"left": label, "right": label})`` with a float32 image in ``[0, 1]``, shape ``(1, H, H)``, and int64
    labels, shape ``()``. Loaders read a whole batch in a few tensor operations, and therefore need
    ``collate_fn=OverlappingPairs.collate``.

    Args:
        left: The glyphs that the left ones are drawn from, uniformly and with replacement.
        right: The glyphs of the right ones.
        num_pairs: The number of images.
        image_size: The height and width ``H`` of the images.
        left_offsets: The least and the greatest distance, in pixels, of a left glyph from the top, drawn uniformly;
            likewise, and independently, from the left edge.
        right_offsets: Those of a right glyph.
        max_value: The glyphs' value that becomes 1.
        generator: The source of all draws.

    Attributes:
        indices: The index of the left and of the right glyph, shape ``(num_pairs, 2)``.
        offsets: The distances from the top and the left edge, of the left and of the right glyph, shape
            ``(num_pairs, 2, 2)``.

    Raises:
        ValueError: If there is no pair or no glyph, or a glyph does not fit into the image at some offset.

    References:
        - Sabour, Frosst, Hinton: Dynamic Routing Between Capsules. 2017. arXiv:1710.09829.
    """

    def __init__(
        self,
        left: Glyphs,
        right: Glyphs,
        num_pairs: int,
        *,
        image_size: int,
        left_offsets: tuple[int, int] = (0, 0),
        right_offsets: tuple[int, int] = (0, 0),
        max_value: float = 255.0,
        generator: torch.Generator,
    ) -> None:
        if num_pairs < 1:
            raise ValueError(f"`num_pairs` should be at least 1. Found {num_pairs}.")
        _check_side("left", left, left_offsets, image_size)
        _check_side("right", right, right_offsets, image_size)
        self.left = left
        self.right = right
        self.image_size = image_size
        self.max_value = max_value
        sides = ((left, left_offsets), (right, right_offsets))
        self.indices = torch.stack(
            [torch.randint(len(glyphs.labels), (num_pairs,), generator=generator) for glyphs, _ in sides], dim=1
        )
        self.offsets = torch.stack(
            [torch.randint(low, high + 1, (num_pairs, 2), generator=generator) for _, (low, high) in sides], dim=1
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"The index should be in [{-len(self)}, {len(self)}). Found {index}.")
        inputs, targets = self.__getitems__([index % len(self)])
        return inputs[0], {name: target[0] for name, target in targets.items()}

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the batch ``(inputs, targets)`` of the pairs at ``indices``: shapes ``(B, 1, H, H)`` and ``(B,)``."""
        batch = torch.tensor(indices)
        # `index_select` copies whole rows and is several times faster than indexing by a tensor.
        left, right = self.indices.index_select(0, batch).unbind(1)
        left_offsets, right_offsets = self.offsets.index_select(0, batch).unbind(1)
        images = torch.maximum(
            _place(self.left.images.index_select(0, left), left_offsets, self.image_size),
            _place(self.right.images.index_select(0, right), right_offsets, self.image_size),
        )
        return images.unsqueeze(1).float().div_(self.max_value), {
            "left": self.left.labels.index_select(0, left),
            "right": self.right.labels.index_select(0, right),
        }

    @staticmethod
    def collate(batch: Any) -> Any:
        """Return ``batch``: ``__getitems__`` has already made one of its samples."""
        return batch


def _check_side(name: str, glyphs: Glyphs, offsets: tuple[int, int], image_size: int) -> None:
    images, labels = glyphs
    if images.ndim != 3 or images.dtype != torch.uint8 or len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"`{name}` should hold uint8 images, shape (N, h, w), and labels, shape (N,), N at least 1. "
            f"Found {images.dtype} images, shape {tuple(images.shape)}, and labels, shape {tuple(labels.shape)}."
        )
    low, high = offsets
    largest = image_size - max(images.shape[1:])
    if not 0 <= low <= high <= largest:
        raise ValueError(
            f"`{name}_offsets` should be a least and a greatest offset in [0, {largest}], so that glyphs of "
            f"{images.shape[1]} x {images.shape[2]} fit into {image_size} x {image_size} pixels. Found {offsets}."
        )


def _place(glyphs: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Return black images, shape ``(B, size, size)``, with ``glyphs``, shape ``(B, h, w)``, at ``offsets`` ``(B, 2)``.

    In a flat image, moving a glyph by ``(row, column)`` is one shift by ``row * size + column``, since it fits in at
    either place. So each glyph is laid at the corner of an image that follows ``lead`` zeros, and the image is then cut
    out beginning that many pixels earlier: one copy per sample, whatever the offsets are.
    """
    num_glyphs, height, width = glyphs.shape
    pixels = size * size
    shifts = offsets[:, 0] * size + offsets[:, 1]
    lead = (size - height) * size + size - width
    padded = glyphs.new_zeros(num_glyphs, lead + pixels)
    padded[:, lead:].view(num_glyphs, size, size)[:, :height, :width] = glyphs
    starts = torch.arange(num_glyphs) * (lead + pixels) + lead - shifts
    return padded.flatten().unfold(0, pixels, 1).index_select(0, starts).view(num_glyphs, size, size)
