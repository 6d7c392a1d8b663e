"""Problems whose Pareto front is known, as tiny networks whose outputs are the objectives.

Train them like any network, with inputs whose values do not matter, and compare what comes out with the truth.

On a concave front (``Fonseca``, ``DTLZ2``) the weighted sum finds only the ends: its level lines are straight, the
front bulges away from them in between, and so the lowest one that touches the attainable set touches it at an end.
Where the sum is stationary in between, it is largest along the front. On ``Fonseca`` the two ends together have
hypervolume 0.04, the front 0.342. Use ``Chebyshev`` or ``SmoothChebyshev`` there.

References:
    - Fonseca, Fleming: Multiobjective Genetic Algorithms Made Easy: Selection, Sharing and Mating Restriction (1995),
      GALESIA.
    - Van Veldhuizen, Lamont: Multiobjective Evolutionary Algorithm Test Suites (1999), ACM SAC.
    - Deb, Thiele, Laumanns, Zitzler: Scalable Test Problems for Evolutionary Multiobjective Optimization (2005), in
      Evolutionary Multiobjective Optimization, Springer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mtl_lightning.task import Task


class MeanPrediction(nn.Module):
    """The loss of a task whose prediction is already what is to be minimised: its mean. The target is ignored.

    Example:
        >>> MeanPrediction()(torch.tensor([1.0, 2.0]), torch.zeros(2))
        tensor(1.5000)
    """

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean of ``prediction``, shape ``()``."""
        return prediction.mean()


class Problem(nn.Module):
    """A problem of ``n`` variables and ``T`` objectives, all minimised: the base of the others.

    The variables are the one parameter ``x``, shape ``(n,)``. A subclass names its tasks, and overrides
    ``reset_parameters``, ``objectives`` and ``front``.

    Args:
        num_variables: The number of variables ``n``.

    Attributes:
        task_names: The names of the objectives, the keys of the output.
        reference_point: A point that is worse than the whole front, for hypervolumes, shape ``(T,)``.
        hypervolume: The exact hypervolume of the whole front for ``reference_point``.
    """

    task_names: tuple[str, ...] = ("f1", "f2")
    reference_point: tuple[float, ...]
    hypervolume: float
    min_variables: int = 1

    def __init__(self, num_variables: int) -> None:
        super().__init__()
        if num_variables < self.min_variables:
            raise ValueError(f"`num_variables` should be at least {self.min_variables}. Found {num_variables}.")
        self.x = nn.Parameter(torch.empty(num_variables))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``x`` from torch's global generator."""
        raise NotImplementedError

    def objectives(self, x: Tensor) -> Tensor:
        """Return the objectives, shape ``(..., T)``, of the variables ``x``, shape ``(..., n)``."""
        raise NotImplementedError

    def front(self, num_points: int) -> Tensor:
        """Return points of the Pareto front, spread over all of it, shape ``(num_points, T)``."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return each objective of ``x``, shape ``(B,)``, for inputs of shape ``(B, ...)`` whose values are ignored."""
        values = self.objectives(self.x)
        return {name: values[index].expand(inputs.shape[0]) for index, name in enumerate(self.task_names)}

    def tasks(self) -> list[Task]:
        """Return one task per objective; its loss is the mean of the prediction, whatever the target."""
        return [Task(name, MeanPrediction()) for name in self.task_names]


class Fonseca(Problem):
    """Two objectives with a concave front (Fonseca and Fleming, 1995), also known as VLMOP2.

    ``f1 = 1 - exp(-|x - a|^2)`` and ``f2 = 1 - exp(-|x + a|^2)`` with ``a = (1, ..., 1) / sqrt(n)``. The front is
    ``x = u a`` for ``-1 <= u <= 1``. ``x`` starts uniform on ``[-0.5, 0.5]^n``; gradients vanish far from the front.

    Args:
        num_variables: The number of variables ``n``, at least 1. The front does not depend on it.

    Example:
        >>> problem = Fonseca(num_variables=20)
        >>> problem.front(3)
        tensor([[0.0000, 0.9817],
                [0.6321, 0.6321],
                [0.9817, 0.0000]])
        >>> round(problem.hypervolume, 6)
        0.342116
    """

    reference_point = (1.0, 1.0)
    # The integral of (1 - f2) df1 along the front, and the strip beyond its end.
    hypervolume = math.exp(-2) * math.sqrt(2 * math.pi) * math.erf(math.sqrt(2)) + math.exp(-4)

    def __init__(self, num_variables: int = 20) -> None:
        super().__init__(num_variables)

    def reset_parameters(self) -> None:
        """Draw ``x`` uniformly from ``[-0.5, 0.5]^n``."""
        nn.init.uniform_(self.x, -0.5, 0.5)

    def objectives(self, x: Tensor) -> Tensor:
        """Return the objectives, shape ``(..., 2)``, of the variables ``x``, shape ``(..., n)``."""
        anchor = 1 / math.sqrt(x.shape[-1])
        squares = torch.stack([(x - anchor).square().sum(dim=-1), (x + anchor).square().sum(dim=-1)], dim=-1)
        return -torch.expm1(-squares)

    def front(self, num_points: int) -> Tensor:
        """Return points of the front, evenly spaced in ``u``, first objective ascending, shape ``(num_points, 2)``."""
        return self.objectives(torch.linspace(1, -1, num_points)[:, None])

    def chebyshev_front(self, preferences: Tensor) -> Tensor:
        """Return the points of the front that ``Chebyshev`` finds for ``preferences``, both of shape ``(P, 2)``.

        There the weighted objectives are equal, ``w_1 f_1 = w_2 f_2``.
        """
        weights = preferences.double()
        low, high = -torch.ones(len(weights), 1).to(weights), torch.ones(len(weights), 1).to(weights)
        for _ in range(60):  # w_1 f_1 - w_2 f_2 falls with u
            middle = (low + high) / 2
            weighted = weights * self.objectives(middle)
            above = weighted[:, :1] > weighted[:, 1:]
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return self.objectives((low + high) / 2).to(preferences.dtype)


class VLMOP1(Problem):
    """Two objectives with a convex front (Van Veldhuizen and Lamont, 1999), ``f1 = mean x^2``, ``f2 = mean (x - 2)^2``.

    The front is ``x = (s, ..., s)`` for ``0 <= s <= 2``, that is ``sqrt(f1) + sqrt(f2) = 2``. ``x`` starts uniform on
    ``[-2, 4]^n``, which is centred on it.

    Args:
        num_variables: The number of variables ``n``, at least 1. The front does not depend on it.

    Example:
        >>> problem = VLMOP1(num_variables=2)
        >>> problem.front(3).tolist()
        [[0.0, 4.0], [1.0, 1.0], [4.0, 0.0]]
        >>> problem.linear_front(torch.tensor([[0.5, 0.5]])).tolist()
        [[1.0, 1.0]]
    """

    reference_point = (4.0, 4.0)
    hypervolume = 40 / 3

    def __init__(self, num_variables: int = 1) -> None:
        super().__init__(num_variables)

    def reset_parameters(self) -> None:
        """Draw ``x`` uniformly from ``[-2, 4]^n``."""
        nn.init.uniform_(self.x, -2.0, 4.0)

    def objectives(self, x: Tensor) -> Tensor:
        """Return the objectives, shape ``(..., 2)``, of the variables ``x``, shape ``(..., n)``."""
        return torch.stack([x.square().mean(dim=-1), (x - 2).square().mean(dim=-1)], dim=-1)

    def front(self, num_points: int) -> Tensor:
        """Return points of the front, evenly spaced in ``s``, first objective ascending, shape ``(num_points, 2)``."""
        return self.objectives(torch.linspace(0, 2, num_points)[:, None])

    def linear_front(self, preferences: Tensor) -> Tensor:
        """Return the points that ``Linear`` finds for ``preferences``, both shape ``(P, 2)``: there ``s = 2 w_2``."""
        return self.objectives(2 * preferences[:, 1:])

    def chebyshev_front(self, preferences: Tensor) -> Tensor:
        """Return the points of the front that ``Chebyshev`` finds for ``preferences``, both of shape ``(P, 2)``.

        There ``w_1 f_1 = w_2 f_2``, so that ``s = 2 sqrt(w_2) / (sqrt(w_1) + sqrt(w_2))``.
        """
        roots = preferences.sqrt()
        return self.objectives(2 * roots[:, 1:] / roots.sum(dim=-1, keepdim=True))


class DTLZ2(Problem):
    """Three objectives with a concave front, the positive octant of the unit sphere (Deb et al., 2005).

    ``f = (1 + g) (cos a cos b, cos a sin b, sin a)`` with ``a = z_1 pi / 2``, ``b = z_2 pi / 2`` and ``g`` the sum of
    ``(z_i - 1/2)^2`` over the other variables. The box ``0 <= z <= 1`` is ``z = sin(x pi / 2)^2`` for any real ``x``:
    smooth, with both ends reached, at which the gradient in ``x`` vanishes. ``x`` starts uniform on ``[0, 1]^n``.

    Args:
        num_variables: The number of variables ``n``, at least 3. The front does not depend on it. The default is the
            one of the paper.

    Example:
        >>> problem = DTLZ2(num_variables=3)
        >>> problem.objectives(torch.tensor([0.0, 1.0, 0.5])).round(decimals=3).abs()
        tensor([0., 1., 0.])
        >>> round(problem.hypervolume, 6)
        0.807401
    """

    task_names = ("f1", "f2", "f3")
    reference_point = (1.1, 1.1, 1.1)
    hypervolume = 1.1**3 - math.pi / 6  # the box without the octant of the ball
    min_variables = 3

    def __init__(self, num_variables: int = 12) -> None:
        super().__init__(num_variables)

    def reset_parameters(self) -> None:
        """Draw ``x`` uniformly from ``[0, 1]^n``."""
        nn.init.uniform_(self.x, 0.0, 1.0)

    def objectives(self, x: Tensor) -> Tensor:
        """Return the objectives, shape ``(..., 3)``, of the variables ``x``, shape ``(..., n)``."""
        z = (x * (math.pi / 2)).sin().square()
        a, b = z[..., 0] * (math.pi / 2), z[..., 1] * (math.pi / 2)
        radius = 1 + (z[..., 2:] - 0.5).square().sum(dim=-1, keepdim=True)
        return radius * torch.stack([a.cos() * b.cos(), a.cos() * b.sin(), a.sin()], dim=-1)

    def front(self, num_points: int) -> Tensor:
        """Return points of the front on a Fibonacci spiral, each for an equal area, shape ``(num_points, 3)``."""
        index = torch.arange(num_points, dtype=torch.float64)
        height = (index + 0.5) / num_points
        angle = (index * ((math.sqrt(5) - 1) / 2)).frac() * (math.pi / 2)
        radius = (1 - height.square()).sqrt()
        return torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=-1).to(torch.get_default_dtype())
