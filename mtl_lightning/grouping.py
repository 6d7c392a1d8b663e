"""Grouping rules: which tasks are updated together.

Selective task group updates partition the ``T`` tasks before a batch and give each group a step of its own. A rule
reads the affinity ``E``, shape ``(T, T)``, where ``E_sk`` says by how much updating task ``s`` (the row) improves task
``k`` (the column), and returns the partition. Each group is ascending, and groups are ordered by their least task. The
order in which groups are updated is drawn elsewhere.

References:
    W. Jeong, K.-J. Yoon, "Selective Task Group Updates for Multi-Task Optimization", ICLR 2025, arXiv 2502.11986. The
    text of the paper was not at hand: what is called published here is what its official code does
    (https://github.com/wooseong97/sel-update-mtl/tree/53a8ba2).

    B. J. Frey, D. Dueck, "Clustering by passing messages between data points", Science 315, 2007, for affinity
    propagation.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl_lightning.exemplars import MOST_TASKS, best_exemplars, median_preference, normalized_affinity, sorted_tasks


class GroupingRule(nn.Module):
    """Base of the rules. A rule says in :meth:`groups` which tasks belong together, in any order.

    A call takes the affinity, shape ``(T, T)``, and returns a partition of ``range(T)``. State that changes belongs
    into buffers or into ``get_extra_state``, so that it is in checkpoints.

    Attributes:
        reads_affinity: Whether the groups depend on the affinity, so that it has to be measured before the first call.
    """

    reads_affinity = True

    def groups(self, affinity: Tensor) -> Iterable[Iterable[int]]:
        """Return the groups of ``affinity``, shape ``(T, T)``."""
        raise NotImplementedError(f"{type(self).__name__} should implement `groups`.")

    def forward(self, affinity: Tensor) -> list[list[int]]:
        """Return the partition: each group ascending, groups ordered by their least task.

        Args:
            affinity: The affinity from row to column, shape ``(T, T)``; of any dtype and on any device.

        Raises:
            ValueError: If the shape is not ``(T, T)``, or an entry that the rule reads is not finite.
        """
        if affinity.ndim != 2 or affinity.shape[0] != affinity.shape[1] or len(affinity) == 0:
            raise ValueError(
                f"`affinity` should have shape (T, T), with T tasks, at least one. Found {tuple(affinity.shape)}."
            )
        return _canonical(self.groups(affinity.detach()))

    def resolve(self, task_names: Sequence[str]) -> None:
        """Look up what the rule says of tasks by name; modules call it once, before the first call of the rule.

        Args:
            task_names: The names of the tasks, in the order of the rows of the affinity.

        Raises:
            ValueError: If the rule does not fit these tasks.
        """

    def reset(self) -> None:
        """Forget the partitions returned so far."""


class OneByOne(GroupingRule):
    """Every task alone: ``T`` steps a batch.

    Example:
        >>> import torch
        >>> OneByOne()(torch.zeros(3, 3))
        [[0], [1], [2]]
    """

    reads_affinity = False

    def groups(self, affinity: Tensor) -> list[list[int]]:
        """Return a group for each task."""
        return _singletons(len(affinity))


class AllTogether(GroupingRule):
    """All tasks in one group: the usual joint step.

    Example:
        >>> import torch
        >>> AllTogether()(torch.zeros(3, 3))
        [[0, 1, 2]]
    """

    reads_affinity = False

    def groups(self, affinity: Tensor) -> list[list[int]]:
        """Return one group."""
        return [list(range(len(affinity)))]


class Fixed(GroupingRule):
    """Groups known beforehand.

    Args:
        groups: A partition of the tasks, all by name or all by index. Names have to be looked up with :meth:`resolve`,
            which modules do.

    Raises:
        TypeError: If a group is no sequence, or the tasks are neither all names nor all indices.
        ValueError: If there is no group, a group is empty, or a task is in more than one place.

    Example:
        >>> import torch
        >>> rule = Fixed([["normals", "depth"], ["edges"]])
        >>> rule.resolve(["depth", "edges", "normals"])
        >>> rule(torch.zeros(3, 3))
        [[0, 2], [1]]
    """

    reads_affinity = False

    def __init__(self, groups: Sequence[Sequence[str]] | Sequence[Sequence[int]]) -> None:
        super().__init__()
        for group in groups:
            if isinstance(group, str) or not isinstance(group, Sequence):
                raise TypeError(f"`groups` should hold sequences of tasks. Found {group!r}.")
            if not group:
                raise ValueError("Every group should hold a task. Found an empty group.")
        self._tasks: list[list[str | int]] = [list(group) for group in groups]
        flat = [task for group in self._tasks for task in group]
        if not flat:
            raise ValueError("`groups` should hold a group at least. Found none.")
        if not any(all(isinstance(task, kind) for task in flat) for kind in (str, int)):
            raise TypeError(f"`groups` should name all tasks by name, or all by index. Found {flat}.")
        repeated = [task for task, count in Counter(flat).items() if count > 1]
        if repeated:
            raise ValueError(f"A task should be in one group only. Found {_listed(repeated)} more than once.")
        self._partition: list[list[int]] | None = None
        if all(isinstance(task, int) for task in flat):
            self._partition = [[int(task) for task in group] for group in self._tasks]

    def resolve(self, task_names: Sequence[str]) -> None:
        """Look up the names of the groups.

        Args:
            task_names: The names of the tasks, in the order of the rows of the affinity.

        Raises:
            ValueError: If the groups are no partition of these tasks.
        """
        index: dict[str | int, int] = {name: place for place, name in enumerate(task_names)}
        if any(isinstance(task, int) for group in self._tasks for task in group):
            index = {place: place for place in range(len(task_names))}
        flat = [task for group in self._tasks for task in group]
        unknown = [task for task in flat if task not in index]
        missing = [task for task in index if task not in flat]
        if unknown or missing:
            raise ValueError(
                f"The groups of `Fixed` should hold each of the tasks {_listed(index)} once. "
                f"Found {_listed(unknown)} unknown and {_listed(missing)} missing."
            )
        self._partition = [[index[task] for task in group] for group in self._tasks]

    def groups(self, affinity: Tensor) -> list[list[int]]:
        """Return the groups given.

        Raises:
            ValueError: If names have not been looked up, or the groups are no partition of ``range(T)``.
        """
        if self._partition is None:
            raise ValueError(
                f"`Fixed` should be given the names of the tasks with `resolve` before it is called. "
                f"Found groups by name, {self._tasks}, and no `resolve`."
            )
        check_partition(self._partition, len(affinity), self)
        return self._partition


class Threshold(GroupingRule):
    """Tasks that help each other: in a group, every pair has an affinity of at least ``threshold`` in both directions.

    The relation is not transitive, so that it needs a rule of closure. Here groups are cliques, made greedily: pairs
    are visited from the greatest mutual affinity ``min(E_ij, E_ji)`` to the least, equal ones in the order of their
    indices, and the groups of a pair are merged if all pairs across them pass the threshold. The diagonal is not read.
    A matrix of zeros passes a threshold of zero: all tasks are together.

    The rule "same group if both affinities are at least zero" is told of the paper, but it is not in its official
    code.

    Args:
        threshold: The least mutual affinity. The default separates those that harm from those that do not.

    Raises:
        ValueError: If the threshold is NaN.

    Example:
        >>> import torch
        >>> affinity = torch.tensor([[0.3, 0.2, -0.1], [0.1, 0.3, 0.1], [0.2, 0.0, 0.3]])
        >>> Threshold()(affinity)  # task 0 harms task 2
        [[0, 1], [2]]
        >>> Threshold(threshold=0.15)(affinity)
        [[0], [1], [2]]
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        if threshold != threshold:
            raise ValueError(f"`threshold` should be a number. Found {threshold}.")
        self.threshold = threshold

    def groups(self, affinity: Tensor) -> list[list[int]]:
        """Return greedy cliques of the mutual relation."""
        values = _values(affinity)
        mutual = torch.minimum(values, values.T).tolist()
        size = len(mutual)
        owner = {task: [task] for task in range(size)}
        pairs = [(i, j) for i in range(size) for j in range(i + 1, size) if mutual[i][j] >= self.threshold]
        for i, j in sorted(pairs, key=lambda pair: -mutual[pair[0]][pair[1]]):
            first, second = owner[i], owner[j]
            if first is not second and all(mutual[a][b] >= self.threshold for a in first for b in second):
                merged = first + second
                owner.update(dict.fromkeys(merged, merged))
        return [group for task, group in owner.items() if task == min(group)]


class AffinityPropagation(GroupingRule):
    """Affinity propagation on the normalised, symmetrised affinity: the rule of selective task group updates.

    ``X_sk = E_sk / E_kk``, ``X <- (X + X^T) / 2``, with a unit diagonal. Tasks choose exemplars ``S`` so that
    ``|S| p + sum_{i not in S} max_{j in S} X_ij`` is great, with the preference ``p`` the median of ``X``; those with
    the same exemplar are a group. Signs play no role in it: a constant added to all off-diagonal entries changes
    nothing, as long as they stay below one. With two tasks, they are together if ``X_01 > 1``.

    Ties are not rare. With an odd number of tasks ``p`` is itself an entry of ``X``, and with three tasks the best pair
    *always* ties with three single tasks. A tie in the objective goes to more groups (to fewer if ``merge_ties``), and
    then to the exemplars that come first when the tasks are sorted by their similarities: a relative ``1e-9`` on the
    preferences says so, far above the noise that scikit-learn adds, whose seed is fixed. Tasks are sorted before the
    messages are passed, so that the partition does not depend on their order. Messages are a heuristic: for some
    matrices, more often with many tasks, they settle below the optimum or on the other side of a tie, always the same.
    :class:`Exemplars` finds the optimum of up to 16 tasks, and of up to a dozen in a fraction of the time.

    If the messages have not converged, the partition of the call before is returned; before any, every task alone. The
    same holds for a matrix of zeros, in which nothing is measured yet. Convergence is told from the number of
    iterations, which all versions of scikit-learn report alike; what they return without it differs.

    Departures from the official code: ``E_kk`` is clamped from below, where a task without an effect on itself divides
    by zero there; the noise is seeded; there are no further tries with a greater ``convergence_iter``, because with the
    same noise a stricter test cannot pass where a weaker has failed.

    Args:
        damping: The share of the old messages in the new, in [0.5, 1). The default is that of the official code. A
            greater one converges more often, and later: give it more iterations.
        include_diagonal: Whether the unit diagonal counts in the median, as in the official code. Without it, two tasks
            always tie, and three tie between the best pair and all together.
        merge_ties: Whether a tie goes to fewer groups. With three tasks and the diagonal included it decides between
            the best pair (true) and single tasks (false).
        max_iter: The most iterations.
        convergence_iter: For how many iterations the exemplars have to stay the same.
        floor: The least self-affinity, as a share of the greatest absolute entry of ``E``; above 0, at most 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> affinity = torch.tensor(
        ...     [[0.20, 0.18, 0.08, 0.10], [0.18, 0.20, 0.09, 0.10], [0.08, 0.09, 0.20, 0.18], [0.10, 0.10, 0.18, 0.20]]
        ... )
        >>> AffinityPropagation()(affinity)
        [[0, 1], [2, 3]]
    """

    def __init__(
        self,
        damping: float = 0.5,
        *,
        include_diagonal: bool = True,
        merge_ties: bool = False,
        max_iter: int = 200,
        convergence_iter: int = 50,
        floor: float = 1e-6,
    ) -> None:
        super().__init__()
        if not 0.5 <= damping < 1.0:
            raise ValueError(f"`damping` should lie in [0.5, 1). Found {damping}.")
        if not 1 <= convergence_iter < max_iter:
            raise ValueError(
                f"`convergence_iter` should be at least 1 and less than `max_iter`, or nothing ever converges. "
                f"Found {convergence_iter} and {max_iter}."
            )
        if not 0.0 < floor <= 1.0:
            raise ValueError(f"`floor` should lie in (0, 1]. Found {floor}.")
        self.damping = damping
        self.include_diagonal = include_diagonal
        self.merge_ties = merge_ties
        self.max_iter = max_iter
        self.convergence_iter = convergence_iter
        self.floor = floor
        self._kept = _Kept()

    @property
    def previous(self) -> list[list[int]] | None:
        """The partition of the last call."""
        return self._kept.groups

    @property
    def converged(self) -> bool:
        """Whether the last call returned a new partition."""
        return self._kept.renewed

    def similarity(self, affinity: Tensor) -> Tensor:
        """Return ``X``, shape ``(T, T)``, float64: symmetric, with a unit diagonal.

        Args:
            affinity: The affinity from row to column, shape ``(T, T)``.
        """
        return normalized_affinity(_values(affinity), self.floor)

    def groups(self, affinity: Tensor) -> list[list[int]]:
        """Return the clusters, or the groups of the call before.

        Raises:
            ValueError: If the groups to be kept are of another number of tasks.
        """
        found = None
        if _values(affinity).any():
            similarity = self.similarity(affinity)
            found = self._clusters(similarity, median_preference(similarity, self.include_diagonal))
        return self._kept(found, len(affinity))

    def reset(self) -> None:
        """Forget the groups of the call before."""
        self._kept.reset()

    def _clusters(self, similarity: Tensor, preference: float) -> list[list[int]] | None:
        """Return the clusters, or ``None`` if the messages have not converged."""
        from sklearn.cluster import affinity_propagation  # slow to import, and only this rule needs it

        size = len(similarity)
        if size == 1:
            return [[0]]
        if size == 2:  # the optimum in closed form, where ties are exact
            value = similarity[0, 1].item()
            return [[0, 1]] if value > preference or (self.merge_ties and value == preference) else [[0], [1]]
        order = sorted_tasks(similarity)
        matrix = similarity[order][:, order].numpy()
        # The count of groups decides first: the ranks of all exemplars together weigh less than one group.
        ranks = torch.arange(size, dtype=torch.float64) / size**2
        bonus = -1.0 - ranks if self.merge_ties else 2.0 - ranks
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not converged
            _, labels, iterations = affinity_propagation(
                matrix,
                preference=(preference + 1e-9 * max(1.0, abs(preference)) * bonus).numpy(),
                damping=self.damping,
                max_iter=self.max_iter,
                convergence_iter=self.convergence_iter,
                random_state=0,
                return_n_iter=True,
            )
        if iterations >= self.max_iter or (labels < 0).any():
            return None
        clusters: dict[int, list[int]] = {}
        for task, label in zip(order, labels.tolist(), strict=True):
            clusters.setdefault(label, []).append(task)
        return list(clusters.values())


class Heterogeneous(AffinityPropagation):
    """The opposite of :class:`AffinityPropagation`, for comparison: groups of tasks that do not help each other.

    The reviews of the paper mention heterogeneous grouping without a definition, and the official code has none. Here
    it is affinity propagation on ``-X``, with the preference the median of ``-X``. The diagonal, ``-1``, is then mostly
    the least entry, so that with two tasks they are together if ``X_01 < 1``. It converges less often than
    :class:`AffinityPropagation`; a damping of 0.9 with 1000 iterations helps, and ``Exemplars(dissimilar=True)`` finds
    the optimum of up to 16 tasks without messages.

    Args:
        damping: See :class:`AffinityPropagation`, also for the other arguments.

    Example:
        >>> import torch
        >>> affinity = torch.tensor(
        ...     [[0.2, 0.18, -0.1, 0.08], [0.18, 0.2, 0.07, -0.09], [-0.1, 0.07, 0.2, 0.18], [0.08, -0.09, 0.18, 0.2]]
        ... )
        >>> Heterogeneous()(affinity)
        [[0, 2], [1, 3]]
    """

    def similarity(self, affinity: Tensor) -> Tensor:
        """Return ``-X``, shape ``(T, T)``, float64."""
        return -super().similarity(affinity)


class Exemplars(GroupingRule):
    """The best exemplars of all, for up to 16 tasks: what :class:`AffinityPropagation` looks for with messages.

    Similarity, preference and objective are the same; the optimum is found by comparison of all sets of exemplars, so
    that it always exists, and a tie always follows the rule: to more groups (to fewer if ``merge_ties``), then to the
    exemplars that come first when the tasks are sorted by their similarities. Values that differ by less than a
    relative ``1e-9`` tie. Of one task and of two the groups are those of :class:`AffinityPropagation`. A matrix of
    zeros, in which nothing is measured yet, keeps the partition of the call before; before any, every task is alone.

    Args:
        dissimilar: Whether ``-X`` takes the place of ``X``, as in :class:`Heterogeneous`: groups of tasks that do not
            help each other.
        include_diagonal: Whether the diagonal counts in the median; see :class:`AffinityPropagation`.
        merge_ties: Whether a tie goes to fewer groups.
        floor: The least self-affinity, as a share of the greatest absolute entry of ``E``; above 0, at most 1.

    Raises:
        ValueError: If ``floor`` is out of range, or, in a call, there are more than 16 tasks.

    Example:
        >>> import torch
        >>> affinity = torch.tensor(
        ...     [[0.20, 0.18, 0.08, 0.10], [0.18, 0.20, 0.09, 0.10], [0.08, 0.09, 0.20, 0.18], [0.10, 0.10, 0.18, 0.20]]
        ... )
        >>> Exemplars()(affinity)
        [[0, 1], [2, 3]]
    """

    def __init__(
        self,
        *,
        dissimilar: bool = False,
        include_diagonal: bool = True,
        merge_ties: bool = False,
        floor: float = 1e-6,
    ) -> None:
        super().__init__()
        if not 0.0 < floor <= 1.0:
            raise ValueError(f"`floor` should lie in (0, 1]. Found {floor}.")
        self.dissimilar = dissimilar
        self.include_diagonal = include_diagonal
        self.merge_ties = merge_ties
        self.floor = floor
        self._kept = _Kept()

    def resolve(self, task_names: Sequence[str]) -> None:
        """Check that there are not too many tasks."""
        self._check(len(task_names))

    def groups(self, affinity: Tensor) -> list[list[int]]:
        """Return the clusters of the best exemplars, or the groups of the call before.

        Raises:
            ValueError: If there are too many tasks, or the groups to be kept are of another number of tasks.
        """
        self._check(len(affinity))
        values = _values(affinity)
        found = None
        if values.any():
            similarity = normalized_affinity(values, self.floor)
            similarity = -similarity if self.dissimilar else similarity
            preference = median_preference(similarity, self.include_diagonal)
            found = best_exemplars(similarity, preference, merge_ties=self.merge_ties)
        return self._kept(found, len(affinity))

    def reset(self) -> None:
        """Forget the groups of the call before."""
        self._kept.reset()

    def _check(self, num_tasks: int) -> None:
        if num_tasks > MOST_TASKS:
            raise ValueError(
                f"`Exemplars` should be given at most {MOST_TASKS} tasks, as it compares all sets of them. "
                f"Found {num_tasks}: use `AffinityPropagation`."
            )


class Fisher(GroupingRule):
    """Tasks that use the same shared parameters, by their Fisher information: a comparison with the affinity.

    The similarity of two tasks is the cosine of ``sqrt F_i`` and ``sqrt F_j``, where ``F_i`` is the diagonal Fisher
    information of task ``i`` in the shared parameters. It lies in [0, 1] and knows no direction: tasks that conflict in
    every parameter are as similar as can be. Another rule makes the groups, with the similarity in place of the
    affinity; its unit diagonal leaves it unchanged in the normalisation of :class:`Exemplars`. ``Fisher()`` groups
    similar tasks and ``Fisher(Exemplars(dissimilar=True))`` dissimilar ones. These two settle two tasks beforehand,
    since a cosine is at most one: alone and together, unless it is one.

    The reviews of selective task group updates mention the criterion; the official code has none.

    The rule sees no gradients. Whoever trains calls :meth:`update` every ``refresh_every`` batches, which takes a
    backward pass per task, and :func:`~mtl_lightning.fisher.root_fisher_gramian` on the gradients. Before the first
    update every task is alone. Values of the affinity are not read.

    Args:
        rule: Makes the groups from the similarity; it is called, and keeps its own state. :class:`Exemplars` by
            default, for up to 16 tasks; :class:`AffinityPropagation` takes more.
        refresh_every: After how many batches the similarity should be measured again.

    Raises:
        ValueError: If ``refresh_every`` is less than 1.

    Example:
        >>> import torch
        >>> rule = Fisher(refresh_every=50)
        >>> rule(torch.zeros(4, 4))
        [[0], [1], [2], [3]]
        >>> rule.update(torch.tensor([[4.0, 3, 0, 1], [3, 4, 1, 0], [0, 1, 4, 3], [1, 0, 3, 4]]))
        >>> rule(torch.zeros(4, 4))
        [[0, 1], [2, 3]]
    """

    reads_affinity = False

    def __init__(self, rule: GroupingRule | None = None, *, refresh_every: int = 100) -> None:
        super().__init__()
        if refresh_every < 1:
            raise ValueError(f"`refresh_every` should be at least 1 batch. Found {refresh_every}.")
        self.rule = Exemplars() if rule is None else rule
        self.refresh_every = refresh_every
        self.similarity: Tensor | None = None  # shape (T, T), float64 on the CPU

    def resolve(self, task_names: Sequence[str]) -> None:
        """Hand the names to the rule that makes the groups."""
        self.rule.resolve(task_names)

    def reset(self) -> None:
        """Forget the partitions of the rule that makes the groups, and the similarity."""
        self.rule.reset()
        self.similarity = None

    def update(self, gramian: Tensor) -> None:
        """Take up a new measurement, in place of the one before.

        A task without any gradient resembles none. In a distributed run the Gramian has to be the same in all
        processes: that of the averaged gradients, or the mean of the processes' Gramians.

        Args:
            gramian: ``<sqrt F_i, sqrt F_j>``, shape ``(T, T)``, of any dtype and on any device.

        Raises:
            ValueError: If the shape is not ``(T, T)``, or an entry is negative or not finite.
        """
        if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or len(gramian) == 0:
            raise ValueError(
                f"`gramian` should have shape (T, T), with T tasks, at least one. Found {tuple(gramian.shape)}."
            )
        values = gramian.detach().to("cpu", torch.float64)
        wrong = values[~(torch.isfinite(values) & (values >= 0))].tolist()
        if wrong:
            raise ValueError(f"`gramian` should hold finite products of roots, at least 0. Found {wrong[0]}.")
        norms = values.diagonal().sqrt()
        # Rounding of the Gramian may lift a cosine above one.
        cosines = (values / norms.clamp(min=1e-300) / norms.clamp(min=1e-300)[:, None]).clamp(max=1.0)
        self.similarity = ((cosines + cosines.T) / 2).fill_diagonal_(1.0)

    def groups(self, affinity: Tensor) -> list[list[int]]:
        """Return the groups of the last similarity; of the affinity only the shape is read.

        Raises:
            ValueError: If the similarity is of another number of tasks.
        """
        if self.similarity is None:
            return _singletons(len(affinity))
        if len(self.similarity) != len(affinity):
            raise ValueError(
                f"`affinity` should have shape {tuple(self.similarity.shape)}, as the Gramian of the last `update`. "
                f"Found {tuple(affinity.shape)}."
            )
        return self.rule(self.similarity)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the last similarity."""
        return {"similarity": self.similarity}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the similarity of a checkpoint."""
        similarity: Tensor | None = state["similarity"]
        self.similarity = None if similarity is None else similarity.cpu()


class RandomGroups(GroupingRule):
    """A given number of groups of almost equal size, drawn anew in each call.

    Tasks are shuffled and dealt to the groups in turn, so that sizes differ by one at most.

    Args:
        num_groups: How many groups.
        seed: Of the rule's own generator. It is the same in all processes of a distributed run, which have to agree on
            the groups.

    Raises:
        ValueError: If there is less than one group, or, in a call, more groups than tasks.

    Example:
        >>> import torch
        >>> [len(group) for group in RandomGroups(num_groups=2)(torch.zeros(4, 4))]
        [2, 2]
    """

    reads_affinity = False

    def __init__(self, num_groups: int, *, seed: int = 0) -> None:
        super().__init__()
        if num_groups < 1:
            raise ValueError(f"`num_groups` should be at least 1. Found {num_groups}.")
        self.num_groups = num_groups
        self._shuffle = _Shuffle(seed)

    def resolve(self, task_names: Sequence[str]) -> None:
        """Check that there are enough tasks."""
        self._check(len(task_names))

    def groups(self, affinity: Tensor) -> list[list[int]]:
        """Return random groups; values of the affinity are not read."""
        self._check(len(affinity))
        order = self._shuffle(len(affinity))
        return [order[group :: self.num_groups] for group in range(self.num_groups)]

    def _check(self, num_tasks: int) -> None:
        if self.num_groups > num_tasks:
            raise ValueError(
                f"`num_groups` should be at most the number of tasks, {num_tasks}. Found {self.num_groups}."
            )


class SizeMatchedRandom(GroupingRule):
    """Groups as many and as large as those of another rule, with random tasks, drawn anew in each call.

    What this control does not lose against the rule is owed to the number of steps, not to who is with whom.

    Args:
        rule: The rule to be matched; it is called, and keeps its own state.
        seed: Of this rule's own generator, the same in all processes; see :class:`RandomGroups`.

    Example:
        >>> import torch
        >>> rule = SizeMatchedRandom(Fixed([[0, 1, 2], [3]]))
        >>> sorted(len(group) for group in rule(torch.zeros(4, 4)))
        [1, 3]
    """

    def __init__(self, rule: GroupingRule, *, seed: int = 0) -> None:
        super().__init__()
        self.rule = rule
        self._shuffle = _Shuffle(seed)
        self.reads_affinity = rule.reads_affinity

    def resolve(self, task_names: Sequence[str]) -> None:
        """Hand the names to the rule that is matched."""
        self.rule.resolve(task_names)

    def reset(self) -> None:
        """Forget the partitions of the rule that is matched."""
        self.rule.reset()

    def groups(self, affinity: Tensor) -> list[list[int]]:
        """Return random groups of the sizes that the rule gives."""
        order = iter(self._shuffle(len(affinity)))
        return [[next(order) for _ in group] for group in self.rule(affinity)]


def check_partition(groups: Sequence[Sequence[int]], num_tasks: int, rule: GroupingRule) -> None:
    """Raise an error unless ``groups`` are a partition of ``range(num_tasks)``: for rules of one's own.

    Raises:
        ValueError: If a group is empty, or a task is missing, repeated or unknown.
    """
    if not all(groups) or sorted(task for group in groups for task in group) != list(range(num_tasks)):
        raise ValueError(
            f"{type(rule).__name__} should return groups that hold each of the tasks 0 to {num_tasks - 1} once. "
            f"Found {[list(group) for group in groups]}."
        )


class _Kept(nn.Module):
    """The partition of the last call, for those rules that do not always find one; in checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[list[int]] | None = None
        self.renewed = False

    def forward(self, found: list[list[int]] | None, num_tasks: int) -> list[list[int]]:
        """Return ``found``, or, if that is ``None``, the groups of the call before; before any, every task alone."""
        self.renewed = found is not None
        if found is None:
            found = _singletons(num_tasks) if self.groups is None else self.groups
            kept = sum(map(len, found))
            if kept != num_tasks:
                raise ValueError(
                    f"`affinity` should have shape ({kept}, {kept}), as in the calls before, or `reset` should be "
                    f"called between. Found {(num_tasks, num_tasks)}."
                )
        self.groups = _canonical(found)
        return self.groups

    def reset(self) -> None:
        """Forget the groups."""
        self.groups = None
        self.renewed = False

    def get_extra_state(self) -> dict[str, Any]:
        """Return the groups of the last call."""
        return {"previous": self.groups, "converged": self.renewed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the groups of a checkpoint."""
        self.groups, self.renewed = state["previous"], state["converged"]


class _Shuffle(nn.Module):
    """Permutations from a generator whose state is in checkpoints."""

    # The state is kept, not the generator, which can be neither copied nor pickled in all versions of torch.
    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random_state = torch.Generator().manual_seed(seed).get_state()

    def forward(self, size: int) -> list[int]:
        """Return a permutation of ``range(size)``."""
        generator = torch.Generator()
        generator.set_state(self._random_state)
        permutation: list[int] = torch.randperm(size, generator=generator).tolist()
        self._random_state = generator.get_state()
        return permutation

    def get_extra_state(self) -> Tensor:
        """Return the state of the generator."""
        return self._random_state

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the generator of a checkpoint."""
        self._random_state = state.cpu()


def _values(affinity: Tensor) -> Tensor:
    values = affinity.detach().to("cpu", torch.float64)
    if not torch.isfinite(values).all():
        row, column = torch.nonzero(~torch.isfinite(values))[0].tolist()
        raise ValueError(
            f"`affinity` should be finite: losses that are not should be kept out of it. "
            f"Found {values[row, column].item()} from task {row} to task {column}."
        )
    return values


def _canonical(groups: Iterable[Iterable[int]]) -> list[list[int]]:
    return sorted(sorted(group) for group in groups)


def _singletons(num_tasks: int) -> list[list[int]]:
    return [[task] for task in range(num_tasks)]


def _listed(tasks: Iterable[str | int]) -> str:
    return ", ".join(map(repr, tasks)) or "none"
