from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mtl_lightning.datamodules.overlap import Glyphs, OverlappingPairs


def _glyphs(num_glyphs: int = 6, height: int = 3, width: int = 4, seed: int = 0) -> Glyphs:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (num_glyphs, height, width), generator=generator, dtype=torch.uint8)
    return Glyphs(images, torch.arange(num_glyphs) % 10)


def _pairs(num_pairs: int = 40, seed: int = 0, **options: Any) -> OverlappingPairs:
    arguments: dict[str, Any] = {"image_size": 8, "left_offsets": (0, 2), "right_offsets": (1, 4)}
    generator = torch.Generator().manual_seed(seed)
    return OverlappingPairs(_glyphs(), _glyphs(seed=1), num_pairs, generator=generator, **(arguments | options))


def _reference_image(pairs: OverlappingPairs, index: int) -> list[list[float]]:
    """The image of one pair, pixel by pixel."""
    size = pairs.image_size
    image = [[0.0] * size for _ in range(size)]
    for side, glyphs in enumerate((pairs.left, pairs.right)):
        glyph = glyphs.images[pairs.indices[index, side]].tolist()
        top, left = pairs.offsets[index, side].tolist()
        for row, values in enumerate(glyph):
            for column, value in enumerate(values):
                image[top + row][left + column] = max(image[top + row][left + column], value / pairs.max_value)
    return image


# Composition


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_size": 4, "left_offsets": (0, 0), "right_offsets": (0, 0)},
        {"image_size": 12, "left_offsets": (0, 8), "right_offsets": (0, 8)},
        {"image_size": 9, "left_offsets": (5, 5), "right_offsets": (0, 5)},
        {"max_value": 16.0},
    ],
    ids=["shifted", "on top of each other", "anywhere", "at the edge", "another scale"],
)
def test_images_equal_the_reference(options: dict[str, Any]) -> None:
    pairs = _pairs(**options)
    inputs, _ = pairs.__getitems__(list(range(len(pairs))))
    expected = torch.tensor([_reference_image(pairs, index) for index in range(len(pairs))])
    torch.testing.assert_close(inputs.squeeze(1), expected)


def test_targets_are_the_labels_of_the_glyphs() -> None:
    pairs = _pairs()
    _, targets = pairs.__getitems__([7, 3])
    assert targets["left"].tolist() == [pairs.left.labels[pairs.indices[i, 0]].item() for i in (7, 3)]
    assert targets["right"].tolist() == [pairs.right.labels[pairs.indices[i, 1]].item() for i in (7, 3)]


def test_pixels_lie_between_zero_and_one() -> None:
    white = Glyphs(torch.full((1, 2, 2), 255, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    pairs = OverlappingPairs(white, white, 3, image_size=4, generator=torch.Generator())
    assert set(pairs[0][0].flatten().tolist()) == {0.0, 1.0}


def test_a_batch_equals_its_items() -> None:
    pairs = _pairs()
    indices = [5, 0, 39, 5]
    inputs, targets = pairs.__getitems__(indices)
    for position, index in enumerate(indices):
        image, labels = pairs[index]
        assert torch.equal(inputs[position], image)
        assert {name: target[position] for name, target in targets.items()} == labels


def test_items_and_batches_have_the_documented_form() -> None:
    pairs = _pairs()
    image, labels = pairs[-1]
    assert (image.dtype, image.shape) == (torch.float32, (1, 8, 8))
    assert {name: (label.dtype, label.shape) for name, label in labels.items()} == {
        name: (torch.int64, torch.Size([])) for name in ("left", "right")
    }
    inputs, targets = next(iter(DataLoader(pairs, 16, collate_fn=OverlappingPairs.collate)))
    assert inputs.shape == (16, 1, 8, 8)
    assert {name: target.shape for name, target in targets.items()} == {"left": (16,), "right": (16,)}


def test_reading_all_items_ends() -> None:
    # A data set has no `__iter__`: iterating reads items until one raises an IndexError.
    assert len(list(iter(_pairs()))) == 40


# Draws


def test_offsets_take_every_value_of_their_range() -> None:
    pairs = _pairs(2000)
    for side, expected in enumerate(({0, 1, 2}, {1, 2, 3, 4})):
        for axis in (0, 1):
            assert set(pairs.offsets[:, side, axis].tolist()) == expected


def test_rows_columns_and_sides_are_drawn_independently() -> None:
    offsets = _pairs(4000, left_offsets=(0, 3), right_offsets=(1, 4)).offsets.flatten(1).float()
    correlation = torch.corrcoef(offsets.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / 4000**0.5  # five standard errors


def test_every_glyph_is_drawn_on_either_side() -> None:
    assert [set(side.tolist()) for side in _pairs(2000).indices.T] == [set(range(6))] * 2


def test_the_generator_decides() -> None:
    first, same, other = _pairs(seed=3), _pairs(seed=3), _pairs(seed=4)
    assert torch.equal(first.indices, same.indices)
    assert torch.equal(first.offsets, same.offsets)
    assert not torch.equal(first.indices, other.indices)
    assert not torch.equal(first.offsets, other.offsets)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    _pairs()[0]
    assert torch.equal(torch.get_rng_state(), before)


# Holding out


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_the_parts_share_no_glyph_and_lose_none(fraction: float) -> None:
    images = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1)
    kept, held = Glyphs(images, images.flatten().long()).hold_out(fraction, torch.Generator())
    assert held is not None
    assert len(held.labels) == 100 * fraction
    assert sorted(kept.labels.tolist() + held.labels.tolist()) == list(range(100))
    assert torch.equal(held.images.flatten().long(), held.labels)
    assert torch.equal(kept.images.flatten().long(), kept.labels)


def test_nothing_is_held_out_with_fraction_zero() -> None:
    kept, held = _glyphs().hold_out(0, torch.Generator())
    assert len(kept.labels) == 6
    assert held is None


# Bad input


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_an_empty_part_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"at least one glyph in each part\. Found {fraction} of 6"):
        _glyphs().hold_out(fraction, torch.Generator())


def test_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`num_pairs` should be at least 1\. Found 0"):
        _pairs(0)


@pytest.mark.parametrize("offsets", [(-1, 2), (3, 2), (0, 5)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_offset_beyond_the_image_is_refused(side: str, offsets: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"`{side}_offsets` should be .* in \[0, 4\].* 3 x 4 .* 8 x 8 pixels\. Found"):
        _pairs(40, 0, **{f"{side}_offsets": offsets})


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 3, 3), torch.zeros(2)),
        (torch.zeros(2, 9, dtype=torch.uint8), torch.zeros(2)),
        (torch.zeros(0, 3, 3, dtype=torch.uint8), torch.zeros(0)),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.zeros(3)),
    ],
    ids=["float", "flat", "none", "labels"],
)
def test_glyphs_of_another_form_are_refused(images: Tensor, labels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"`right` should hold uint8 images, shape \(N, h, w\).* Found torch\."):
        OverlappingPairs(_glyphs(), Glyphs(images, labels), 3, image_size=8, generator=torch.Generator())


@pytest.mark.parametrize("index", [40, -41])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=rf"should be in \[-40, 40\)\. Found {index}"):
        _pairs()[index]
