"""One block during calibration: what a calibrated method may ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from resu_compile.calibration.blocks import BlockSpec
from resu_compile.calibration.context import Journal
from resu_compile.calibration.data import kept_leaf
from resu_compile.calibration.observer import Observer
from resu_compile.calibration.statistics import InputStatistics, count_samples
from resu_compile.comparison import Pattern, RowLayout, check_divisible, pattern_mask, row_mask
from resu_compile.errors import ArgumentError

Run = Callable[[], None]


@dataclass(frozen=True)
class Call:
    """One call of a block, as the model made it."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    samples: int


@dataclass(frozen=True)
class PruneRequest:
    """How much to prune, and where.

    Attributes:
        sparsity: parameter name -> share of each row.
        pattern: N:M instead, or None.
        active: parameter name -> bool mask of the places that come first; may be empty.
        generator: CPU generator, the only source of randomness.
    """

    sparsity: Mapping[str, float]
    pattern: Pattern | None
    active: Mapping[str, Tensor]
    generator: torch.Generator


class Block:
    """A block of the model, its weights and the calibration data that reach it.

    Earlier blocks are pruned already, so that the data are those of the pruned model.

    Args:
        spec: module and weights.
        request: what to prune.
        run: runs the data through the block (and maybe through the rest of the model).
        journal: notes what is written over weights.
    """

    def __init__(self, spec: BlockSpec, request: PruneRequest, run: Run, journal: Journal) -> None:
        self.name = spec.name
        self.module = spec.module
        self.weights = {weight.name: weight.parameter for weight in spec.weights}
        self.aliases = {weight.name: weight.names for weight in spec.weights}
        self.request = request
        self._spec = spec
        self._run = run
        self._journal = journal

    # -- what the data say -----------------------------------------------------------------------
    def statistics(self, *, moments: bool = False) -> dict[str, InputStatistics]:
        """Parameter name -> statistics of its inputs over all calibration data.

        Args:
            moments: also mean and variance.

        Raises:
            ArgumentError: the data do not reach a weight, or its input cannot be told.
        """
        observer = Observer(self.weights, moments)
        with observer.counting(self.module):
            self._run()
        return observer.statistics()

    def calls(self) -> list[Call]:
        """All calls of the block on the calibration data, with copies of their inputs.

        Raises:
            ArgumentError: the block was not called.
        """
        found: list[Call] = []

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(Call(_kept(args), _kept(kwargs), count_samples(args, kwargs)))

        handle = self.module.register_forward_pre_hook(before, with_kwargs=True)
        try:
            self._run()
        finally:
            handle.remove()
        if not found:
            raise ArgumentError(
                f"calibration: expected the data to reach the block {self.name!r}, but it was "
                "never called; name the blocks with blocks=..., or give data that reach it"
            )
        return found

    def forward(self, call: Call, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """First floating-point output of the block, with ``values`` in place of its weights.

        Gradients flow to ``values``; the module's own parameters are not touched.
        """
        if values is None:
            output = self.module(*_kept(call.args), **_kept(call.kwargs))
        else:
            local = {self._paths[name]: value for name, value in values.items()}
            output = torch.func.functional_call(
                self.module, local, _kept(call.args), _kept(dict(call.kwargs))
            )
        return first_floating(output, self.name)

    @property
    def _paths(self) -> dict[str, str]:
        """Parameter name -> its name inside the block."""
        prefixes = {module: path for path, module in self.module.named_modules()}
        paths = {}
        for weight in self._spec.weights:
            prefix = prefixes[weight.owner]
            paths[weight.name] = f"{prefix}.{weight.attribute}" if prefix else weight.attribute
        return paths

    # -- masks -----------------------------------------------------------------------------------
    def lowest_masks(
        self, scores: Mapping[str, Tensor], layouts: Mapping[str, RowLayout]
    ) -> dict[str, Tensor]:
        """Masks that prune the lowest scores of each row, or of each M inputs of a pattern.

        Args:
            scores: parameter name -> score of the weight's shape; of equal ones the lower index
                is pruned first.
            layouts: parameter name -> which dimensions run along the input.

        Raises:
            ArgumentError: M of the pattern does not divide the inputs of a weight.
        """
        masks, request = {}, self.request
        for name, score in scores.items():
            active = request.active.get(name)
            if request.pattern is None:
                masks[name] = row_mask(score, layouts[name], request.sparsity[name], active)
            else:
                check_divisible(name, layouts[name], request.pattern)
                masks[name] = pattern_mask(score, layouts[name], request.pattern, active)
        return masks

    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Put ``values`` into the weights; an error in this block or a later one undoes it."""
        for name, value in values.items():
            parameter = self.weights[name]
            self._journal.save(parameter)
            with torch.no_grad():
                parameter.copy_(value)


def first_floating(output: Any, name: str) -> Tensor:
    """The first floating-point tensor in what a block returned."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    if hasattr(output, "values"):  # an output class that pytree does not open
        for leaf in output.values():
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return leaf
    raise ArgumentError(
        f"blocks: expected the block {name!r} to return a floating-point tensor, got "
        f"{type(output).__name__}; name other blocks with blocks=..."
    )


def _kept(value: Any) -> Any:
    """``value`` with its tensors and objects copied, since a block may write into its inputs."""
    return tree_map(kept_leaf, value)
