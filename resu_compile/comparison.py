"""Comparison groups of a weight: rows that share an output, groups of M consecutive inputs.

    row        the entries that make one output; n of a row go, whatever the other rows hold
    N:M        of each M consecutive inputs of a row, N stay

A weight of any shape is looked at as a matrix with one row an output and one column an input.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from resu_compile.errors import ArgumentError, check_integer
from resu_compile.kernels.row_select import row_select


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: ``keep`` of every ``group`` consecutive inputs stay.

    Attributes:
        keep: N, in [1, ``group``).
        group: M, >= 2.

    Source: Zhou et al. 2021, https://arxiv.org/abs/2102.04010
    """

    keep: int
    group: int

    def __post_init__(self) -> None:
        """Check both numbers."""
        check_integer(self.group, name="pattern", minimum=2)
        check_integer(self.keep, name="pattern", minimum=1)
        if self.keep >= self.group:
            raise ArgumentError(
                f"pattern: expected N < M in 'N:M', N the number kept of each M, got '{self}'"
            )

    @property
    def sparsity(self) -> float:
        """Share of pruned entries: 1 - N/M."""
        return 1.0 - self.keep / self.group

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"


def parse_pattern(text: object) -> Pattern:
    """The pattern that ``"N:M"`` names.

    Raises:
        ArgumentError: no such text, or not 0 < N < M.
    """
    parts = text.split(":") if isinstance(text, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ArgumentError(f"pattern: expected 'N:M' such as '2:4', or None; got {text!r}")
    return Pattern(int(parts[0]), int(parts[1]))


@dataclass(frozen=True)
class RowLayout:
    """Which dimensions of a weight run along its input.

    Attributes:
        shape: shape of the weight.
        input_dims: dimensions that the product sums over, in ascending order; the others make rows.
        kernel: True for a convolution: the first of ``input_dims`` counts channels, the others
            places of the kernel.
    """

    shape: tuple[int, ...]
    input_dims: tuple[int, ...]
    kernel: bool = False

    @property
    def in_features(self) -> int:
        """Number of columns."""
        return _product(self.shape[dim] for dim in self.input_dims)

    @property
    def group_length(self) -> int:
        """How many inputs lie next to each other for N:M: all, or the channels of a kernel."""
        return self.shape[self.input_dims[0]] if self.kernel else self.in_features

    def to_rows(self, tensor: Tensor, *, channels_last: bool = False) -> Tensor:
        """``tensor`` of the weight's shape as a matrix (rows, columns).

        Args:
            tensor: any tensor that broadcasts to the weight's shape.
            channels_last: order the columns of a kernel by place, then channel; the columns are
                else in the weight's own order.
        """
        order = self._order(channels_last)
        return tensor.expand(self.shape).permute(order).reshape(-1, self.in_features)

    def from_rows(self, rows: Tensor, *, channels_last: bool = False) -> Tensor:
        """The inverse of ``to_rows``: (rows, columns) -> the weight's shape, contiguous."""
        order = self._order(channels_last)
        moved = rows.reshape([self.shape[dim] for dim in order])
        return moved.permute([order.index(dim) for dim in range(len(order))]).contiguous()

    def _order(self, channels_last: bool) -> list[int]:
        inputs = list(self.input_dims)
        if channels_last and self.kernel:
            inputs = [*inputs[1:], inputs[0]]
        return [dim for dim in range(len(self.shape)) if dim not in inputs] + inputs


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


# -- masks -------------------------------------------------------------------------------------
def lowest_pruned(score: Tensor, count: int, active: Tensor | None = None) -> Tensor:
    """False at the ``count`` lowest of each row; ties: the lower index is pruned first.

    Args:
        score: (..., columns), free of NaN.
        count: entries to prune in each row, in [0, columns].
        active: bool, shape of ``score``; other places are pruned before these.

    Returns:
        bool mask of the shape of ``score``, True = kept.
    """
    others = None if active is None else ~active
    return row_select(score, count, highest=False, first=others).logical_not_()


def highest_kept(score: Tensor, count: int, active: Tensor | None = None) -> Tensor:
    """True at the ``count`` highest of each row; ties: the lower index is kept first.

    Args:
        score: (..., columns), free of NaN.
        count: entries to keep in each row, in [0, columns].
        active: bool, shape of ``score``; other places are kept after these.

    Returns:
        bool mask of the shape of ``score``, True = kept.
    """
    return row_select(score, count, highest=True, first=active)


def row_mask(
    score: Tensor, layout: RowLayout, sparsity: float, active: Tensor | None = None
) -> Tensor:
    """Prune ``int(in_features * sparsity)`` entries of each row, the lowest scores first.

    Args:
        score: shape of the weight, free of NaN.
        layout: which dimensions run along the input.
        sparsity: share of each row that is pruned, in [0, 1).
        active: bool, shape of the weight; other places are pruned before these.

    Returns:
        bool mask of the shape of the weight, True = kept.
    """
    first = None if active is None else layout.to_rows(active.to(score.device))
    count = int(layout.in_features * sparsity)
    return layout.from_rows(lowest_pruned(layout.to_rows(score), count, first))


def pattern_mask(
    score: Tensor,
    layout: RowLayout,
    pattern: Pattern,
    active: Tensor | None = None,
    *,
    keep_lower: bool = False,
) -> Tensor:
    """Keep the N highest scores of each M consecutive inputs of a row.

    For a convolution the M inputs are consecutive channels at one place of the kernel.

    Args:
        score: shape of the weight, free of NaN.
        layout: which dimensions run along the input; M divides ``layout.group_length``.
        pattern: N:M.
        active: bool, shape of the weight; other places are pruned before these.
        keep_lower: of equal scores the lower index is kept first; else it is pruned first.

    Returns:
        bool mask of the shape of the weight, True = kept.
    """

    def grouped(tensor: Tensor) -> Tensor:
        return layout.to_rows(tensor, channels_last=True).reshape(-1, pattern.group)

    groups = grouped(score)
    first = None if active is None else grouped(active.to(score.device))
    if keep_lower:
        kept = highest_kept(groups, pattern.keep, first)
    else:
        kept = lowest_pruned(groups, pattern.group - pattern.keep, first)
    return layout.from_rows(kept.reshape(-1, layout.in_features), channels_last=True)


def check_divisible(name: str, layout: RowLayout, pattern: Pattern) -> None:
    """Raise an ``ArgumentError`` unless M divides the inputs of the weight ``name``."""
    if layout.group_length % pattern.group:
        what = "input channels" if layout.kernel else "inputs"
        raise ArgumentError(
            f"pattern: expected {what} divisible by {pattern.group} for '{pattern}', but {name} of "
            f"shape {layout.shape} has {layout.group_length}; leave it out with exclude={name!r}"
        )
