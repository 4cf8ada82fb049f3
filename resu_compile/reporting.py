"""What a model is made of, without running it.

Every parameter is shown; those that have no mask with the reason.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from resu_compile.errors import ArgumentTypeError
from resu_compile.runtime.controller import Controller, find_controller
from resu_compile.selection import named_weights


@dataclass(frozen=True)
class ParameterRow:
    """One parameter.

    Attributes:
        name: first name of the parameter.
        shape: its shape.
        dtype: its dtype, without the ``torch.`` prefix.
        elements: number of entries.
        zeros: entries that are exactly 0 now.
        pruned: entries that its mask prunes; 0 without a mask.
        bytes_dense: bytes of the plain tensor.
        bytes_packed: bytes of the active values and one bit a weight; the dense bytes without a
            mask or where packing would not be smaller.
        note: why it has no mask; empty if it has one.
        ever_active: entries that were active in any mask so far; None without a mask.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    zeros: int
    pruned: int
    bytes_dense: int
    bytes_packed: int
    note: str = ""
    ever_active: int | None = None

    @property
    def sparsity(self) -> float:
        """Share of pruned entries."""
        return self.pruned / self.elements if self.elements else 0.0

    @property
    def ever_share(self) -> float | None:
        """Rs, the share of the entries that were active in any mask so far; None without a mask."""
        return _share(self.ever_active, self.elements)


@dataclass(frozen=True)
class Report:
    """Every parameter of a model, and the totals."""

    rows: tuple[ParameterRow, ...]
    phase: str

    @property
    def elements(self) -> int:
        """Entries of all parameters."""
        return sum(row.elements for row in self.rows)

    @property
    def zeros(self) -> int:
        """Entries that are exactly 0."""
        return sum(row.zeros for row in self.rows)

    @property
    def pruned(self) -> int:
        """Entries that masks prune."""
        return sum(row.pruned for row in self.rows)

    @property
    def ever_share(self) -> float | None:
        """Rs over the masked parameters; None if there are none.

        Source: Liu et al. 2021 (In-Time Over-Parameterization), https://arxiv.org/abs/2102.02887
        """
        masked = [row for row in self.rows if row.ever_active is not None]
        if not masked:
            return None
        ever = sum(row.ever_active for row in masked if row.ever_active is not None)
        return _share(ever, sum(row.elements for row in masked))

    @property
    def bytes_dense(self) -> int:
        """Bytes of all parameters as plain tensors."""
        return sum(row.bytes_dense for row in self.rows)

    @property
    def bytes_packed(self) -> int:
        """Bytes of all parameters with masked weights packed."""
        return sum(row.bytes_packed for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: rows and totals."""
        return {
            "phase": self.phase,
            "parameters": [
                {**asdict(row), "sparsity": row.sparsity, "ever_share": row.ever_share}
                for row in self.rows
            ],
            "total": {
                "elements": self.elements,
                "zeros": self.zeros,
                "pruned": self.pruned,
                "ever_share": self.ever_share,
                "bytes_dense": self.bytes_dense,
                "bytes_packed": self.bytes_packed,
            },
        }

    def table(self) -> str:
        """The report as a text table."""
        body: list[list[Any]] = [
            [
                row.name,
                shape_text(row.shape),
                row.dtype,
                row.elements,
                row.zeros,
                f"{row.sparsity:.2%}",
                _percent(row.ever_share),
                row.bytes_dense,
                row.bytes_packed,
                row.note,
            ]
            for row in self.rows
        ]
        share = self.pruned / self.elements if self.elements else 0.0
        body.append(
            [
                "total",
                "",
                "",
                self.elements,
                self.zeros,
                f"{share:.2%}",
                _percent(self.ever_share),
                self.bytes_dense,
                self.bytes_packed,
                f"phase {self.phase}",
            ]
        )
        head = ["parameter", "shape", "dtype", "entries", "zeros", "pruned", "ever active"]
        head += ["bytes dense", "bytes packed", "left dense because"]
        return str(tabulate(body, headers=head))

    def __str__(self) -> str:
        return self.table()


def report(model: nn.Module) -> Report:
    """Parameters, zeros and bytes of ``model``, without running it.

    Args:
        model: any module, sparsified or not.

    Raises:
        ArgumentTypeError: ``model`` is no ``nn.Module``.
    """
    controller = checked_controller(model)
    masked = controller.weights if controller else {}
    skipped = controller.skipped if controller else {}
    if controller:
        controller.refresh()
    unknown = "new since the model was sparsified" if controller else "model is not sparsified"
    rows = []
    for weight in named_weights(getattr(model, "_orig_mod", model)):
        parameter = weight.parameter
        if is_lazy(parameter):
            continue  # lazy: neither shape nor bytes yet
        mask = masked.get(weight.name)
        dense = parameter.numel() * parameter.element_size()
        packed = packed_bytes(parameter, mask.nnz) if mask else dense
        zeros = 0
        if not parameter.is_meta:
            zeros = parameter.numel() - int(torch.count_nonzero(parameter.detach()))
        rows.append(
            ParameterRow(
                name=weight.name,
                shape=tuple(parameter.shape),
                dtype=_dtype(parameter.dtype),
                elements=parameter.numel(),
                zeros=zeros,
                pruned=parameter.numel() - mask.nnz if mask else 0,
                bytes_dense=dense,
                bytes_packed=min(packed, dense),
                note="" if mask else skipped.get(weight.name, unknown),
                ever_active=controller.history.ever_active(mask) if controller and mask else None,
            )
        )
    return Report(tuple(rows), str(controller.phase) if controller else "none")


def _share(part: int | None, whole: int) -> float | None:
    if part is None:
        return None
    return part / whole if whole else 0.0


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def packed_bytes(parameter: Tensor, nnz: int) -> int:
    """Bytes of ``nnz`` active values and one bit a weight."""
    return nnz * parameter.element_size() + -(-parameter.numel() // 8)


def checked_controller(model: nn.Module) -> Controller | None:
    """The controller of ``model``, or None; an ``ArgumentTypeError`` if that is no module."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    return find_controller(model)


def shape_text(shape: tuple[int, ...]) -> str:
    """``2x3`` for ``(2, 3)``."""
    return "x".join(str(size) for size in shape)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
