from __future__ import annotations

from collections import Counter

import pytest
import torch

from mtl_lightning.datamodules.scale_choice import ScaleChoice


def test_scales_are_drawn_alike() -> None:
    transform = ScaleChoice({}, scales=(1.0, 1.2, 1.5))
    generator = torch.Generator().manual_seed(0)
    crops = [transform.draw(generator, 60, 120).crop for _ in range(3000)]
    sizes = Counter((60, 120) if crop is None else (crop.height, crop.width) for crop in crops)
    assert set(sizes) == {(60, 120), (50, 100), (40, 80)}
    assert all(count / 3000 == pytest.approx(1 / 3, abs=0.04) for count in sizes.values())


def test_every_place_of_the_window_inside_the_picture_is_drawn() -> None:
    transform = ScaleChoice({}, scales=(1.5,))
    generator = torch.Generator().manual_seed(0)
    crops = [crop for crop in (transform.draw(generator, 12, 6).crop for _ in range(500)) if crop is not None]
    assert {(crop.top, crop.left) for crop in crops} == {(top, left) for top in range(5) for left in range(3)}


def test_half_of_the_pictures_are_mirrored() -> None:
    transform = ScaleChoice({})
    generator = torch.Generator().manual_seed(0)
    assert sum(transform.draw(generator, 8, 8).flip for _ in range(2000)) / 2000 == pytest.approx(0.5, abs=0.04)


def test_depth_is_divided_and_disparity_multiplied() -> None:
    transform = ScaleChoice({"depth": "depth", "disparity": "disparity"}, scales=(1.5,))
    labels = {"depth": torch.full((1, 30, 60), 3.0), "disparity": torch.full((1, 30, 60), 0.2)}
    _, after = transform(torch.zeros(3, 30, 60), labels, torch.Generator().manual_seed(0))
    torch.testing.assert_close(after["depth"], torch.full((1, 30, 60), 2.0))
    torch.testing.assert_close(after["disparity"], torch.full((1, 30, 60), 0.3))


@pytest.mark.parametrize("scales", [(), (0.5, 1.0)])
def test_scales_under_one_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="`scales` should hold at least one number, none under 1"):
        ScaleChoice({}, scales=scales)
