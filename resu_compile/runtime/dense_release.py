"""Freeing the dense storage of weights that only sparse kernels read; for inference.

    request -> the first compiled inference call packs -> storage freed -> captured again -> fast

Which weights can go is known once a graph was captured: those whose every use in it is a sparse
product that needs no dense weight. The others stay dense and are listed with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resu_compile.errors import PhaseError
from resu_compile.kernels.packed_linear import PackedLinear
from resu_compile.phase import Phase
from resu_compile.runtime.packed_cache import keep_packed
from resu_compile.runtime.released import RESTORE
from resu_compile.state import MaskedWeight

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from resu_compile.runtime.controller import Controller

NOT_YET = "no compiled inference call has used it yet"


@dataclass
class ReleaseReport:
    """What ``release_dense`` freed so far; it goes on with each graph that is captured.

    Attributes:
        released: weight name -> bytes of dense storage that were freed.
        kept: weight name -> why it keeps its dense storage.
    """

    released: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    _packed: dict[str, PackedLinear] = field(default_factory=dict, repr=False)
    _handle: RemovableHandle | None = field(default=None, repr=False)

    @property
    def freed_bytes(self) -> int:
        """Bytes of dense storage freed so far."""
        return sum(self.released.values())

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed forms that stand for them."""
        each = {id(packed.tensors()[0]): packed for packed in self._packed.values()}
        return sum(packed.size_bytes for packed in each.values())

    def again_dense(self, name: str) -> None:
        """Note that a weight is dense again, until a call frees it."""
        self.released.pop(name, None)
        self._packed.pop(name, None)
        self.kept[name] = NOT_YET

    def __str__(self) -> str:
        """One line of totals, then one line for each weight that stays dense."""
        head = (
            f"release_dense: {len(self.released)} weights, {self.freed_bytes / 2**20:.1f} MiB "
            f"freed, {self.packed_bytes / 2**20:.1f} MiB packed; {len(self.kept)} stay dense"
        )
        return "\n".join([head, *(f"  {name}: {why}" for name, why in self.kept.items())])


def request(controller: Controller) -> ReleaseReport:
    """Let graphs of ``controller`` free dense storage from now on."""
    if controller.phase is not Phase.SPARSE:
        raise PhaseError(
            f"release_dense: expected phase sparse, got {controller.phase}; "
            + ("commit() first" if controller.phase is Phase.RESU else "set_phase('sparse') first")
        )
    report = ReleaseReport(kept=dict.fromkeys(controller.weights, NOT_YET))
    report._handle = controller.model.register_load_state_dict_pre_hook(_refuse_loading)
    return report


def _refuse_loading(*_: Any) -> None:
    raise PhaseError(
        "load_state_dict: expected the dense weights to write to, but release_dense() freed them; "
        f"{RESTORE}, then load and release again"
    )


def check_dense(controller: Controller, what: str) -> None:
    """Raise a ``PhaseError`` if the weights were released, naming the call ``what``."""
    if controller.released is not None:
        raise PhaseError(
            f"{what}: expected the dense weights, but release_dense() freed them for inference; "
            f"{RESTORE}"
        )


def restore(controller: Controller) -> None:
    """Store every weight densely again."""
    report = controller.released
    assert report is not None
    with torch.inference_mode(False), torch.no_grad():
        for weight in controller.weights.values():
            weight.restore_value()
    if report._handle is not None:
        report._handle.remove()


def release(
    weight: MaskedWeight, report: ReleaseReport, packed: PackedLinear, start: int, transposed: bool
) -> None:
    """Free the dense storage of ``weight``.

    Args:
        weight: a weight that is dense.
        report: where it is noted.
        packed: the packed form of it, or of several as one, that stands for it.
        start: first row of ``packed`` that is of this weight.
        transposed: whether the transpose is packed.
    """
    parameter = weight.parameter
    if why := _why_not(parameter):
        report.kept[weight.name] = why
        return
    read = _Reader(packed, start, weight.shape, transposed)
    keep_packed(weight)
    controller, name = weight.controller, weight.name

    def converted() -> None:  # the model was moved or cast: the next call frees it again
        report.again_dense(name)
        controller._choose_again()

    report.released[name] = weight.release_value(read, converted)
    report.kept.pop(name, None)
    report._packed[name] = packed


def _why_not(parameter: nn.Parameter) -> str:
    size = parameter.numel() * parameter.element_size()
    if parameter.untyped_storage().nbytes() != size:
        return "its storage is shared with other tensors"
    if parameter.device.type == "meta":
        return "it has no storage"
    return ""


@dataclass(frozen=True)
class _Reader:
    """The dense value of a released weight."""

    packed: PackedLinear
    start: int
    shape: torch.Size
    transposed: bool

    def __call__(self) -> Tensor:
        rows = self.shape[1] if self.transposed else self.shape[0]
        with torch.no_grad():
            value = self.packed.unpack()[self.start : self.start + rows]
            if self.transposed:
                value = value.t()
            # a storage of its own, without the rows of other weights
            return value.clone(memory_format=torch.contiguous_format)
