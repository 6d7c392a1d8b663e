"""Two overlapping scikit-learn digits: a data set for two tasks that needs no download."""

from __future__ import annotations

import torch

from mtl_lightning.datamodules.base import SplitDataModule, check_at_least, check_fraction
from mtl_lightning.datamodules.loading import derive_seed
from mtl_lightning.datamodules.overlap import Glyphs, OverlappingPairs


class MultiDigitsDataModule(SplitDataModule):
    """Pairs of overlapping 8 x 8 digits from scikit-learn, with the tasks ``left`` and ``right``, ten classes each.

    A batch is ``(inputs, {"left": labels, "right": labels})``: float32 images in ``[0, 1]``, shape
    ``(B, 1, 8 + offset, 8 + offset)``, and int64 labels, shape ``(B,)``. The left digit lies in the top left corner and
    the right one ``offset`` pixels below and to the right of it; where they overlap, the brighter pixel is seen.

    Of the 1,797 digits, 450 are kept for the test split, the same ones for every seed, and ``val_fraction`` of the
    others for validation. Pairs are drawn within each split, so that no digit is in two of them.

    The digits are the test part of the Optical Recognition of Handwritten Digits data (UCI, CC BY 4.0), installed with
    scikit-learn.

    Args:
        offset: The distance of the two digits in rows and in columns. The smaller, the harder the tasks, and the more
            they conflict.
        num_train: The number of training pairs.
        num_val: The number of validation pairs.
        num_test: The number of test pairs.
        val_fraction: The fraction of the 1,347 training digits that is held out for validation. With 0 there is no
            validation split.
        batch_size: The number of pairs per batch and rank.
        num_workers: The number of processes that read ahead, for each loader.
        seed: The seed of the validation digits, the pairs and the order of the training pairs.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> datamodule = MultiDigitsDataModule(num_train=256)
        >>> datamodule.setup("fit")
        >>> inputs, targets = next(iter(datamodule.train_dataloader()))
        >>> inputs.shape, targets["left"].shape, targets["right"].shape
        (torch.Size([128, 1, 10, 10]), torch.Size([128]), torch.Size([128]))

    References:
        - Alpaydin, Kaynak: Optical Recognition of Handwritten Digits. 1998. UCI Machine Learning Repository,
          doi:10.24432/C50P49.
        - Sabour, Frosst, Hinton: Dynamic Routing Between Capsules. 2017. arXiv:1710.09829.
    """

    GLYPH_SIZE = 8
    MAX_VALUE = 16
    NUM_TEST_GLYPHS = 450

    def __init__(
        self,
        offset: int = 2,
        num_train: int = 12_000,
        num_val: int = 3_000,
        num_test: int = 3_000,
        val_fraction: float = 0.2,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, collate_fn=OverlappingPairs.collate)
        check_at_least("offset", offset, 0)
        check_at_least("num_train", num_train, 1)
        check_at_least("num_val", num_val, 1)
        check_at_least("num_test", num_test, 1)
        check_fraction("val_fraction", val_fraction)
        self.offset = offset
        self.num_train = num_train
        self.num_val = num_val
        self.num_test = num_test
        self.val_fraction = val_fraction

    def setup(self, stage: str | None = None) -> None:
        """Split the digits and draw the pairs."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        glyphs = Glyphs(torch.from_numpy(digits.images).to(torch.uint8), torch.from_numpy(digits.target).long())
        fixed = torch.Generator().manual_seed(derive_seed("digits", "test"))
        rest, test = glyphs.hold_out(self.NUM_TEST_GLYPHS / len(glyphs.labels), fixed)
        assert test is not None
        train, val = rest.hold_out(self.val_fraction, self.generator("digits", "val"))
        self.datasets["train"] = self._pairs(train, self.num_train, "train")
        self.datasets["val"] = None if val is None else self._pairs(val, self.num_val, "val")
        self.datasets["test"] = self._pairs(test, self.num_test, "test")

    def _pairs(self, glyphs: Glyphs, num_pairs: int, split: str) -> OverlappingPairs:
        return OverlappingPairs(
            glyphs,
            glyphs,
            num_pairs,
            image_size=self.GLYPH_SIZE + self.offset,
            right_offsets=(self.offset, self.offset),
            max_value=self.MAX_VALUE,
            generator=self.generator("pairs", split),
        )
