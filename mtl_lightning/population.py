"""P copies of one network as the rows of one parameter matrix.

The trainable parameters of all subproblems form ``theta``, shape ``(P, D)``: row ``i`` is the flattened network of
subproblem ``i``. One optimiser then steps all of them at once, a transfer is one matrix product, and clipping is one
norm along a dimension. What is not trained is not multiplied: parameters with ``requires_grad=False`` are held once.
Buffers (batch-norm statistics, counters) are stacked, shape ``(P, ...)``.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mtl_lightning.backends import Backend, fastest_backend
from mtl_lightning.stacked_layers import is_composed, stacked_outputs

# Rows and their parameters start at multiples of 64 bytes (float32), as separately allocated tensors do: kernels may
# sum in another order on unaligned data, and then a subproblem would not equal the same network trained alone.
_ALIGNMENT = 16

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Slot(NamedTuple):
    """Where one trainable parameter lives: in its modules (several if tied) and in a row of ``theta``."""

    owners: tuple[tuple[nn.Module, str], ...]
    name: str
    shape: torch.Size
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel()


class Population(nn.Module):
    """``P`` copies of a network, trained at once.

    Args:
        network: Any module; its state is copied, the object itself stays as it is.
        size: The number of subproblems ``P``.
        init: ``"common"``: all start from the network's parameters. ``"independent"``: each draws its own through the
            ``reset_parameters`` methods of the network's modules, from torch's global generator.
        backend: ``"vmap"`` evaluates all subproblems in batched kernels: linear layers and what is composed of them by
            hand (:mod:`~mtl_lightning.stacked_layers`), everything else under ``torch.vmap``. ``"loop"`` evaluates them
            one after another, with a backward pass each, so that only one graph is alive. ``"auto"`` leaves the choice
            to :meth:`choose_backend`; until it is made the loop is used. Both give the same numbers, except for random
            numbers drawn inside the network (dropout): these are independent across subproblems in both, but not the
            same.
        chunk_size: With ``"vmap"``, how many subproblems share one graph and one backward pass. All by default; a
            smaller number bounds the memory of activations.
        compiler: Compiles the evaluation of the network, such as ``torch.compile`` or ``functools.partial(
            torch.compile, mode="reduce-overhead")``: that of all subproblems at once under vmap, that of one, used for
            all of them, in the loop. Nothing is compiled by default.

    Attributes:
        theta: The trainable parameters, shape ``(P, D)``, zero-padded so that each parameter is aligned.
        network: The structure, the frozen parameters and the stacked buffers. Without its trainable parameters it
            cannot be called; use :meth:`member`.

    Raises:
        ValueError: If ``size`` or ``chunk_size`` is less than one, if nothing is trainable, if ``network`` is compiled
            already, or if ``init="independent"`` cannot reach every trainable parameter.
        TypeError: If the trainable parameters differ in dtype or are not floating-point.

    Note:
        Limits: the trainable parameters share one dtype, and one set of hyper-parameters in the optimiser. Tensors
        that a network keeps as plain attributes are shared by all subproblems. ``torch.utils.checkpoint`` inside the
        network is not supported: it calls layers again when their parameters are no longer in place. With a
        ``compiler`` buffers have to be updated in place, and random numbers in the network are those of the compiler.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> population = Population(nn.Linear(3, 2), size=4, backend="vmap")
        >>> population(torch.ones(5, 3)).shape
        torch.Size([4, 5, 2])
        >>> population.member(0).weight.shape
        torch.Size([2, 3])
    """

    theta: nn.Parameter

    def __init__(
        self,
        network: nn.Module,
        size: int,
        init: Literal["common", "independent"] = "common",
        backend: Literal["vmap", "loop", "auto"] = "auto",
        chunk_size: int | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"`size` should be at least 1. Found {size}.")
        if chunk_size is not None and not isinstance(chunk_size, int):
            raise TypeError(f"`chunk_size` should be an integer, or None. Found {chunk_size!r}.")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"`chunk_size` should be at least 1, or None. Found {chunk_size}.")
        if init not in ("common", "independent"):
            raise ValueError(f"`init` should be 'common' or 'independent'. Found {init!r}.")
        if backend not in ("vmap", "loop", "auto"):
            raise ValueError(f"`backend` should be 'vmap', 'loop' or 'auto'. Found {backend!r}.")
        if hasattr(network, "_orig_mod"):
            raise ValueError(
                "`network` should be a plain module; the population compiles it (`compiler=torch.compile`). Found the "
                "result of `torch.compile`, which would not be compiled under vmap."
            )
        self.backend: Literal["vmap", "loop", "auto"] = backend
        self.chunk_size = chunk_size
        self.compiler = compiler
        self._is_of_parts = True  # as far as one knows
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._gradient: Tensor | None = None
        self._made: tuple[Any, list[Chunk]] | None = None
        self._chosen: Backend = "loop" if backend == "auto" else backend

        self.network = copy.deepcopy(network)
        self._layers = tuple(self.network.modules())  # to go through them takes longer than a small layer
        self._slots, self._num_columns = _find_slots(self.network)
        self._trainable: dict[nn.Module, list[str]] = {}
        for slot in self._slots:
            for owner, name in slot.owners:
                self._trainable.setdefault(owner, []).append(name)
        copies = [self.network] * size
        if init == "independent":
            copies = [_reinitialized(network) for _ in range(size)]
        theta = torch.stack([self._flatten(member) for member in copies])
        self._vacate()
        self._stack_buffers(copies)
        self.theta = nn.Parameter(theta)
        self._split_sizes = [
            width
            for slot, stop in zip(self._slots, self._row_stops(), strict=True)
            for width in (slot.shape.numel(), stop - slot.stop)
        ]

    # ------------------------------------------------------------------------------------------------ description

    @property
    def size(self) -> int:
        """The number of subproblems ``P``."""
        return self.theta.shape[0]

    @property
    def active_backend(self) -> Backend:
        """The backend in use: the one given, or the one chosen by :meth:`choose_backend`."""
        return self._chosen

    @active_backend.setter
    def active_backend(self, backend: Backend) -> None:
        self._chosen = backend

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The names of the trainable parameters in the network's own ``state_dict``."""
        return tuple(slot.name for slot in self._slots)

    @property
    def num_parameters(self) -> int:
        """The number of trainable parameters of one subproblem, padding left out."""
        return sum(slot.shape.numel() for slot in self._slots)

    def extra_repr(self) -> str:
        """Return the size, the parameters of one subproblem, and the backend."""
        return f"size={self.size}, num_parameters={self.num_parameters}, backend={self.backend!r}"

    def member(self, index: int) -> nn.Module:
        """Return a copy of subproblem ``index`` as the network it was made of, with the same ``state_dict`` keys.

        Raises:
            IndexError: If there is no such subproblem.
        """
        if not -self.size <= index < self.size:
            raise IndexError(f"`index` should lie in [0, {self.size}). Found {index}.")
        return self.member_of(lambda rows: rows[index])

    def member_of(self, pick: Callable[[Tensor], Tensor]) -> nn.Module:
        """Return a copy of the network with the row that ``pick`` returns of every tensor of rows, ``(P, ...)``."""
        memo: dict[int, Any] = {}
        member = copy.deepcopy(self.network, memo)
        row = pick(self.theta.detach())
        for slot in self._slots:
            value = row[slot.start : slot.stop].view(slot.shape).clone()
            parameter = nn.Parameter(value)
            for owner, name in slot.owners:
                memo[id(owner)]._parameters[name] = parameter
        own: dict[int, Tensor] = {}
        for module in member.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    if id(buffer) not in own:
                        own[id(buffer)] = pick(buffer).clone()
                    module._buffers[name] = own[id(buffer)]
        _refresh_recurrent(member.modules())
        return member

    # ------------------------------------------------------------------------------------------------- evaluation

    def forward(self, inputs: Any) -> Any:
        """Return the outputs of all subproblems on shared ``inputs``, each tensor with a leading dimension ``P``."""
        return self.evaluate(_identity, inputs, None)

    def evaluate(
        self, function: Callable[[Any, Any], Any], inputs: Any, targets: Any, per_subproblem: bool = False
    ) -> Any:
        """Return ``function(network(inputs), targets)`` of every subproblem, stacked along a new first dimension.

        Args:
            function: From one subproblem's outputs and the targets to a tensor, or a structure of tensors.
            inputs: What the network is called with; shared by all subproblems.
            targets: Anything ``function`` understands.
            per_subproblem: Inputs and targets carry a leading dimension ``P``, one slice for each subproblem.

        Raises:
            RuntimeError: If vmap is the backend and cannot run the network or ``function``.
        """
        return self._run(self._pieces(self.theta), slice(None), function, inputs, targets, per_subproblem)

    def chunks(self) -> Generator[Chunk, None, None]:
        """Yield the subproblems in parts that share one backward pass: one at a time, or ``chunk_size`` under vmap.

        Gradients are added to ``theta.grad``. Where that is ``None`` it is made, and is whole once the loop over the
        chunks has ended: until then rows of chunks to come hold anything, and so do parameters of this chunk that no
        backward pass has reached, unless its ``complete`` is called. Setting it to ``None`` after a step is faster than
        to zeros, which would be written, read and added to.
        """
        is_fresh = self.theta.grad is None
        gradient = self._memory_of_gradient() if self.theta.grad is None else self.theta.grad
        self.theta.grad = gradient
        done = 0
        try:
            for chunk in self._chunks_of(gradient):
                chunk.begin(is_fresh)
                done = chunk.members.stop
                yield chunk
                chunk.complete()
        finally:
            if is_fresh and done:  # the loop may have been left early, in its last round too
                chunk.complete()
                gradient[done:].zero_()

    def choose_backend(
        self, function: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, per_subproblem: bool = False
    ) -> Backend:
        """Time both backends on one batch and keep the faster; return its name.

        Nothing changes but the choice: gradients, buffers and random state are put back. Does nothing unless
        ``backend`` is ``"auto"``. A network that vmap cannot run falls to the loop, with a line in the log. Another
        line tells the choice, the times and the memory that the graph of a backward pass holds. What it costs is
        measured in ``benchmarks/population_step.py``.
        """
        self._chosen = "loop" if self.backend == "auto" else self.backend
        if self.backend == "auto" and self.size > 1:

            def losses_of(chunk: Chunk) -> Tensor:
                losses: Tensor = chunk.evaluate(function, inputs, targets, per_subproblem)
                return losses

            self._chosen = fastest_backend(self, losses_of, (inputs, targets))
        return self._chosen

    @contextmanager
    def rehearsed(self) -> Iterator[None]:
        """Put back gradients, buffers, random state and active backend in the end."""
        devices, chosen = [self.theta.device] if self.theta.device.type == "cuda" else [], self._chosen
        gradient, memory, buffers = self.theta.grad, self._gradient, [b.clone() for b in self.network.buffers()]
        self.theta.grad = self._gradient = self._made = None
        try:
            with torch.random.fork_rng(devices=devices), torch.enable_grad():
                yield
        finally:
            self.theta.grad, self._gradient, self._made = gradient, memory, None
            self._chosen = chosen
            for buffer, saved in zip(self.network.buffers(), buffers, strict=True):
                buffer.copy_(saved)

    # ------------------------------------------------------------------------------------------- operations on rows

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale rows of ``theta.grad`` to at most the norm ``max_norm``; return the norms before, shape ``(P,)``."""
        if self.theta.grad is None:
            return self.theta.new_zeros(self.size)
        norms = self.theta.grad.norm(dim=1)
        self.theta.grad.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0).unsqueeze(1))
        return norms

    def floating_buffers(self, patterns: Sequence[str] | None = None) -> list[Tensor]:
        """Return the stacked floating-point buffers whose names match one of the patterns, each ``(P, ...)``, once."""
        if not self._has_buffers():  # to go through the names takes longer than a transfer
            return []
        return [
            buffer
            for name, buffer in self.network.named_buffers()
            if buffer.is_floating_point() and (patterns is None or _matches(name, patterns))
        ]

    def columns(self, patterns: Sequence[str] | None = None) -> list[slice]:
        """Return the columns of ``theta`` whose parameter names match one of the shell patterns; all for ``None``.

        A tied parameter goes by its first name. Parameters that follow one another are one slice, with the padding
        between them.

        Raises:
            ValueError: If a pattern matches no parameter and no buffer.
        """
        if patterns is None:
            return [slice(0, self._num_columns)]
        names = [*self.parameter_names, *(name for name, _ in self.network.named_buffers())]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"Each pattern should match the name of a parameter. Found {pattern!r}, and the names "
                    f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}."
                )
        columns: list[slice] = []
        for slot in self._slots:
            if not _matches(slot.name, patterns):
                continue
            follows = columns and slot.start - columns[-1].stop < _ALIGNMENT
            start = columns.pop().start if follows else slot.start
            columns.append(slice(start, slot.stop))
        return columns

    def check_structure(self) -> None:
        """Raise an error if a layer of the network was replaced since: its parameters are not those of ``theta``.

        Raises:
            RuntimeError: With the name of the first such parameter.
        """
        present = set(self.network.modules())
        for slot in self._slots:
            if any(owner not in present for owner, _ in slot.owners):
                raise RuntimeError(
                    "The layers of the network should stay those that the population was made of. Found another one "
                    f"for {slot.name!r}. Convert layers before, and leave `Trainer(sync_batchnorm=True)` out."
                )

    @torch.no_grad()
    def rearrange_(self, move: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor of rows, shape ``(P, ...)``, by ``move`` of it; the number of rows may change."""
        # `.data` keeps the parameter object, which the optimiser and wrappers refer to.
        self.theta.data = move(self.theta.data)
        self.theta.grad = self._made = None
        for buffer in self.network.buffers():
            buffer.data = move(buffer.data)

    def select_(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in the given order; a row named twice is copied. The number of rows may change."""
        index = torch.as_tensor(rows, device=self.theta.device)
        self.rearrange_(lambda tensor: tensor.index_select(0, index))

    @property
    def stacked_names(self) -> tuple[str, ...]:
        """The keys of the ``state_dict`` whose values have one row per subproblem."""
        persistent = self.state_dict().keys()
        names = ("theta", *(f"network.{name}" for name, _ in self.network.named_buffers(remove_duplicate=False)))
        return tuple(name for name in names if name in persistent)

    # ------------------------------------------------------------------------------------------------- internals

    def _vacate(self) -> None:
        # None is torch's own mark of a parameter that a module does without: it is not listed, saved or moved.
        for slot in self._slots:
            for owner, name in slot.owners:
                owner._parameters[name] = None
        _refresh_recurrent(self._layers)

    def _occupy(self, values: Sequence[Tensor]) -> None:
        for slot, value in zip(self._slots, values, strict=True):
            for owner, name in slot.owners:
                owner._parameters[name] = value  # type: ignore[assignment]  # as in torch.func
        _refresh_recurrent(self._layers)

    def _row_stops(self) -> list[int]:
        return [*(slot.start for slot in self._slots[1:]), self._num_columns]

    def _flatten(self, network: nn.Module) -> Tensor:
        parameters = dict(network.named_parameters(remove_duplicate=False))
        first = parameters[self._slots[0].name]
        row = torch.zeros(self._num_columns, dtype=first.dtype, device=first.device)
        for slot in self._slots:
            row[slot.start : slot.stop] = parameters[slot.name].detach().flatten()
        return row

    def _stack_buffers(self, copies: Sequence[nn.Module]) -> None:
        values = [dict(member.named_buffers(remove_duplicate=False)) for member in copies]
        stacked: dict[int, tuple[Tensor, Tensor]] = {}
        for path, module in self.network.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    key = f"{path}.{name}" if path else name
                    if id(buffer) not in stacked:  # several modules may hold one buffer
                        stacked[id(buffer)] = (buffer, torch.stack([member[key] for member in values]))
                    module._buffers[name] = stacked[id(buffer)][1]

    def _pieces(self, rows: Tensor) -> list[Tensor]:
        """Return the parameters that ``rows``, shape ``(p, D)``, consist of, each ``(p, ...)``."""
        pieces = torch.split(rows, self._split_sizes, dim=1)[::2]  # every second piece is padding
        return [piece.view(len(rows), *slot.shape) for slot, piece in zip(self._slots, pieces, strict=True)]

    def _memory_of_gradient(self) -> Tensor:
        """Return memory for the gradient, that of the last step where it fits."""
        memory, theta = self._gradient, self.theta
        place = (theta.shape, theta.dtype, theta.device, torch.is_inference_mode_enabled())
        if memory is None or (memory.shape, memory.dtype, memory.device, memory.is_inference()) != place:
            memory = torch.zeros_like(theta)  # padding stays zero
        self._gradient = memory
        return memory

    def _chunks_of(self, gradient: Tensor) -> list[Chunk]:
        """Return the chunks, those of the last step where nothing has moved: to make them takes a while."""
        size = 1 if self._chosen == "loop" else self.chunk_size or max(self.size, 1)  # there may be no row here
        # They keep the memory that they refer to, so that an address stands for it.
        places = [(t.data_ptr(), t.shape, t.dtype, t.device) for t in (self.theta, gradient)]
        key = (size, *places, torch.is_inference_mode_enabled())
        if self._made is None or self._made[0] != key:
            starts = range(0, self.size, size)
            chunks = [Chunk(self, slice(start, min(start + size, self.size)), gradient) for start in starts]
            self._made = (key, chunks)
        return self._made[1]

    def _buffer_slots(self) -> list[tuple[nn.Module, str, Tensor]]:
        return [
            (module, name, buffer)
            for module in self._layers
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def _call(self, values: Sequence[Tensor], buffers: Sequence[Tensor], inputs: Any) -> tuple[Any, list[Tensor]]:
        """Return the output of the network with these parameters of one subproblem, and its buffers afterwards."""
        slots, absent = self._buffer_slots(), self._absent_buffers()
        try:
            self._occupy(values)
            for (module, name, _), buffer in zip(slots, buffers, strict=True):
                module._buffers[name] = buffer
            outputs = self.network(inputs)
            # A buffer may have been updated in place, or rebound by `self.buffer = ...`.
            return outputs, [module._buffers[name] for module, name, _ in slots]  # type: ignore[misc]
        finally:
            self._vacate()
            for module, name, stacked in slots:
                module._buffers[name] = stacked
            for module, name in absent:  # what a forward pass caches there belongs to one subproblem
                module._buffers[name] = None

    def _absent_buffers(self) -> list[tuple[nn.Module, str]]:
        return [(module, name) for module in self._layers for name, buffer in module._buffers.items() if buffer is None]

    def _run(
        self,
        values: list[Tensor],
        members: slice,
        function: Callable[[Any, Any], Any],
        inputs: Any,
        targets: Any,
        per_subproblem: bool,
    ) -> Any:
        slots = self._buffer_slots()
        buffers = [buffer[members] for _, _, buffer in slots]

        if self._chosen == "vmap":
            try:
                results, updated = self._run_stacked(values, buffers, function, inputs, targets, per_subproblem)
            except UserInputError:
                raise
            except (RuntimeError, ValueError, NotImplementedError) as error:
                self._explain_vmap(error)
                raise
            for (module, name, _), buffer, new in zip(slots, buffers, updated, strict=True):
                if new.data_ptr() != buffer.data_ptr():
                    _replace_rows(module, name, members, new)
            return results

        collected = []
        for index, row in enumerate(zip(*map(_rows, values), strict=True)):
            own = [buffer[index] for buffer in buffers]
            mine, target = inputs, targets
            if per_subproblem:
                mine, target = _sliced((inputs, targets), index)
            outputs, updated = self._compiled_or_not("loop", self._call)(row, own, mine)
            result = function(outputs, target)
            for (module, name, _), buffer, new in zip(slots, own, updated, strict=True):
                if new is not buffer:
                    _replace_rows(module, name, range(self.size)[members][index], new)
            collected.append(result)
        return pytree.tree_map(lambda *results: torch.stack(results), *collected)

    def _run_stacked(
        self,
        values: list[Tensor],
        buffers: list[Tensor],
        function: Callable[[Any, Any], Any],
        inputs: Any,
        targets: Any,
        per_subproblem: bool,
    ) -> tuple[Any, list[Tensor]]:
        dims = _dimensions((inputs, targets)) if per_subproblem else (None, None)
        updated: list[Tensor] = []
        if self._is_composed(inputs):
            try:
                outputs = self._compiled_or_not("parts", self._outputs_by_parts)(values, inputs, per_subproblem)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                # What goes from part to part may be no tensors. If all at once fails as well, it was something else.
                self._is_of_parts = False
                try:
                    return self._run_stacked(values, buffers, function, inputs, targets, per_subproblem)
                except Exception:
                    self._is_of_parts = True
                    raise
        elif self.compiler is None:

            def one(
                row: Sequence[Tensor], own: Sequence[Tensor], inputs: Any, targets: Any
            ) -> tuple[Any, list[Tensor]]:
                outputs, updated = self._call(row, own, inputs)
                return function(outputs, targets), updated

            in_dims = (0, 0 if buffers else None, *dims)
            return torch.vmap(one, in_dims=in_dims, randomness="different")(values, buffers, inputs, targets)
        else:
            # Losses are the user's, who may do in them what a compiler cannot follow.
            outputs, updated = self._compiled_or_not("vmap", self._outputs_at_once)(
                values, buffers, inputs, per_subproblem
            )
        if function is not _identity:
            outputs = torch.vmap(function, in_dims=(0, dims[1]), randomness="different")(outputs, targets)
        return outputs, updated

    def _is_composed(self, inputs: Any) -> bool:
        """Return whether the network is evaluated part by part."""
        is_plain = isinstance(inputs, Tensor) and not self._has_buffers()
        return is_plain and self._is_of_parts and is_composed(self.network)

    def _has_buffers(self) -> bool:
        return any(module._buffers for module in self._layers)

    def _outputs_by_parts(self, values: list[Tensor], inputs: Tensor, per_subproblem: bool) -> Any:
        """Return the outputs of several networks with these parameters, stacked."""
        try:
            self._occupy(values)
            return stacked_outputs(self.network, inputs, per_subproblem, len(values[0]), self._trainable)
        finally:
            self._vacate()

    def _outputs_at_once(
        self, values: list[Tensor], buffers: list[Tensor], inputs: Any, per_subproblem: bool
    ) -> tuple[Any, list[Tensor]]:
        """Return the same, and their buffers afterwards."""
        dims = (0, 0 if buffers else None, _dimensions(inputs) if per_subproblem else None)
        return torch.vmap(self._call, in_dims=dims, randomness="different")(values, buffers, inputs)

    def _compiled_or_not(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.compiler is None:
            return function
        if name not in self._compiled:
            self._compiled[name] = self.compiler(function)
        return self._compiled[name]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Where parameters go to another device, none of their old memory should stay behind.
        self._gradient = self._made = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        # What was compiled refers to this object, not to a copy of it.
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return state | {"_compiled": {}, "_gradient": None, "_made": None}

    def _explain_vmap(self, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            return
        raise UnsupportedByVmapError(
            "The network, the losses and the batch should be computable under torch.vmap. Use `backend='loop'`, or "
            f"`backend='auto'`, which falls to it. Found: {str(error).splitlines()[0]}"
        ) from error


class Chunk:
    """Some subproblems of a population, with leaves of the autograd graph of their own.

    ``backward`` on anything computed from :meth:`evaluate` adds to these rows of ``theta.grad``.
    """

    def __init__(self, population: Population, members: slice, gradient: Tensor) -> None:
        self.members = members
        self._population = weakref.ref(population)  # which keeps its chunks
        # Leaves: slices of `theta` would each send back a gradient of the full size, zero but for the slice.
        self._values = population._pieces(population.theta.detach()[members])
        self._receivers = [_Receiver(piece) for piece in population._pieces(gradient[members])]
        for leaf, receiver in zip(self._values, self._receivers, strict=True):
            leaf.requires_grad_()
            leaf.register_post_accumulate_grad_hook(receiver)  # type: ignore[no-untyped-call]

    def begin(self, is_fresh: bool) -> None:
        """Be ready for backward passes; ``is_fresh`` tells whether the first one is written over what is there."""
        for receiver in self._receivers:
            receiver.is_fresh = is_fresh

    def complete(self) -> None:
        """Let the gradient be zero where no backward pass has come."""
        for receiver in self._receivers:
            receiver.complete()

    def evaluate(
        self, function: Callable[[Any, Any], Any], inputs: Any, targets: Any, per_subproblem: bool = False
    ) -> Any:
        """Return ``function(network(inputs), targets)`` of these subproblems, stacked; see ``Population.evaluate``."""
        if per_subproblem:
            inputs, targets = _sliced((inputs, targets), self.members)
        population = self._population()
        assert population is not None, "A chunk is of use as long as its population."
        return population._run(self._values, self.members, function, inputs, targets, per_subproblem)


class UserInputError(ValueError):
    """What the user handed in is wrong, whatever the backend: it is not blamed on vmap."""


class UnsupportedByVmapError(RuntimeError):
    """The network does something that ``torch.vmap`` cannot batch."""


def _replace_rows(module: nn.Module, name: str, rows: int | slice, new: Tensor) -> None:
    # The old tensor is not written to: the graph may need it.
    buffer = module._buffers[name]
    assert buffer is not None
    buffer = buffer.clone()
    buffer[rows] = new.detach()
    module._buffers[name] = buffer


class _Receiver:
    """Takes the gradient of a leaf to where it belongs; the first one is written over what is there, if that is old."""

    def __init__(self, gradient: Tensor) -> None:
        self._gradient = gradient
        self.is_fresh = False

    def __call__(self, leaf: Tensor) -> None:
        assert leaf.grad is not None
        if self.is_fresh:
            self._gradient.copy_(leaf.grad)
        else:
            self._gradient.add_(leaf.grad)
        self.is_fresh, leaf.grad = False, None

    def complete(self) -> None:
        if self.is_fresh:
            self._gradient.zero_()
        self.is_fresh = False


def _rows(value: Tensor) -> tuple[Tensor, ...]:
    # The gradient of a single row is a view; `unbind` would copy it.
    return (value.squeeze(0),) if len(value) == 1 else value.unbind(0)


def _identity(outputs: Any, _: Any) -> Any:
    return outputs


def _sliced(tree: Any, index: int | slice) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[index], tree)


def _dimensions(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, tree)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _find_slots(network: nn.Module) -> tuple[tuple[_Slot, ...], int]:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    trainable = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("`network` should have a trainable parameter. Found none with `requires_grad=True`.")
    dtypes = sorted({str(parameter.dtype) for _, parameter in trainable})
    if len(dtypes) > 1 or not trainable[0][1].is_floating_point():
        raise TypeError(
            f"The trainable parameters of `network` should share one floating-point dtype. Found {', '.join(dtypes)}."
        )
    widths = [-(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT for _, parameter in trainable]
    starts = [0, *itertools.accumulate(widths)]
    slots = tuple(
        _Slot(tuple(owners[id(parameter)]), name, parameter.shape, start)
        for (name, parameter), start in zip(trainable, starts[:-1], strict=True)
    )
    return slots, starts[-1]


def _refresh_recurrent(layers: Iterable[nn.Module]) -> None:
    # Recurrent layers hold their weights a second time, in a list that does not notice new ones.
    for module in layers:
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def _reinitialized(network: nn.Module) -> nn.Module:
    member = copy.deepcopy(network)
    reached: set[int] = set()
    for module in reversed(list(member.modules())):  # children first: a parent has the last word on them
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset) and any(parameter.requires_grad for parameter in module.parameters()):
            reset()
            reached.update(id(parameter) for parameter in module.parameters(recurse=False))
    missed = [
        name
        for name, parameter in member.named_parameters()
        if parameter.requires_grad and id(parameter) not in reached
    ]
    if missed:
        raise ValueError(
            "With `init='independent'` every trainable parameter should belong to a module with `reset_parameters`. "
            f"Found none for {', '.join(missed)}. Add the method there, or use `init='common'`."
        )
    return member
