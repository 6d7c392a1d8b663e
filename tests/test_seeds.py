from __future__ import annotations

import torch

from mtl_lightning.seeds import mix_seed, seed_generators


def test_neighbours_differ() -> None:
    assert len({mix_seed(seed, index) for seed in range(50) for index in range(50)}) == 2500


def test_seeds_are_in_the_range_of_torch() -> None:
    for seed, index in ((0, 0), (2**31, 10**9), (-1, 3)):
        assert 0 <= mix_seed(seed, index) < 2**63
        torch.manual_seed(mix_seed(seed, index))


def test_streams_of_neighbours_are_uncorrelated() -> None:
    generators = [torch.Generator().manual_seed(mix_seed(0, index)) for index in range(200)]
    draws = [torch.rand(200, generator=generator) for generator in generators]
    correlations = torch.corrcoef(torch.stack(draws)).triu(diagonal=1)
    assert correlations.abs().max() < 0.4
    assert abs(correlations.sum()) / (200 * 199 / 2) < 0.01


def test_generators_are_those_of_manual_seed() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3), torch.initial_seed()
    seed_generators(6, torch.device("cpu"))
    seed_generators(5, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected[0])
    assert torch.initial_seed() == expected[1]
