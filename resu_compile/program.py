"""Load an exported file: the checks, the kernels for a device, and the module that comes of it."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from resu_compile.artifact import Metadata, check_artifact, check_weights
from resu_compile.errors import ArgumentError, ArtifactError, PhaseError, check_number, check_path
from resu_compile.passes.base import PassReport
from resu_compile.passes.choose_kernels import choose_kernels
from resu_compile.passes.move_device import move_device
from resu_compile.passes.packed_sites import Held
from resu_compile.passes.unpack_weights import unpack_weights

_LOADED = "resu_compile_loaded"


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    sparse_threshold: float | Literal["auto"] = "auto",
    *,
    release_dense: bool = False,
) -> SparseModule:
    """The program of a file that ``export`` wrote, ready to call on ``device``.

    Packed weights are unpacked once, here, one after the other. A matmul by a masked weight goes
    through the sparse kernels where they are faster on this device, the rest is dense: ``.report``
    of the result says which. The dense weight stays beside the packed one for the batch sizes at
    which it is faster; ``release_dense=True`` keeps the packed one alone. On CUDA, faster is meant
    as time on the device: at small batches, put the program in a CUDA graph, or launching the
    sparse kernels takes longer than they run.

    Before ``torch.export.load`` sees the file, its checksums, its metadata and the shapes of its
    packed weights are checked, and a file that holds pickled tensors, custom objects or compiled
    libraries is refused. Nothing is unpickled but the sample inputs, by ``torch.load`` with
    ``weights_only=True``. What is left is torch's own reading of the graph, which evaluates
    expressions that the file contains: **load only files that you trust**.

    Args:
        path: file that ``export`` wrote, of either mode.
        device: where the program is to run, whatever the device it was exported on.
        sparse_threshold: ``"auto"`` takes the sparse kernel where it was measured faster; a number
            in [0, 1] forces it from that sparsity on, 1.0 turns it off.
        release_dense: keep no dense copy of a weight that matmuls alone read, if its packed form is
            smaller. Where no sparse kernel is fast it is expanded for the call. Such weights are
            no parameters of the result any more, and those that share their input are packed and
            multiplied as one.

    Returns:
        Module with the parameter names of the exported model, for inference.

    Raises:
        ArtifactError: the file is damaged, foreign, of a newer format, refused, or stored for a
            device that this machine does not have.
        ArgumentError: ``sparse_threshold`` is out of range.
        ArgumentTypeError: ``sparse_threshold`` is neither a number nor ``"auto"``, or ``path`` no
            path.
        OSError: the file cannot be read.
    """
    if sparse_threshold != "auto":
        sparse_threshold = check_number(
            sparse_threshold, name="sparse_threshold", minimum=0, maximum=1
        )
    name = check_path(path, name="path")
    with open(name, "rb") as file:  # one handle: what is loaded is what was checked
        metadata = check_artifact(file, name)
        _check_environment(metadata, name)
        file.seek(0)
        try:
            program = torch.export.load(file)
        except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
            raise ArtifactError(
                f"{name}: torch {torch.__version__} could not read this file, which torch "
                f"{metadata.torch_version} wrote: {error}; load it with that version or export the "
                "model again"
            ) from error
    check_weights(name, metadata, program.state_dict)
    plain = program.module()
    module = SparseModule(plain, plain.graph, "SparseModule")
    return module._set_up(metadata, torch.device(device), sparse_threshold, release_dense, name)


def _check_environment(metadata: Metadata, path: str) -> None:
    """The modules and the device that the file needs are there."""
    for module in metadata.modules:
        if module not in sys.modules:
            raise ArtifactError(
                f"{path}: expected module {module!r}, which defines a type that the model takes or "
                f"returns, to be imported; run `import {module}` and load again"
            )
    kind = torch.device(metadata.device).type
    if kind != "cpu" and not getattr(torch, kind).is_available():
        raise ArtifactError(
            f"{path}: expected a machine with {kind}, which this dense file is stored for; export "
            'it in mode "sparse", or export the model from the CPU'
        )


def _made(make: Callable[[], Tensor], path: str) -> Tensor:
    try:
        return make()
    except ArgumentError as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{path}: expected bitmaps that fit their values, got: {error}; the file is damaged or was "
        "changed, copy it again or export the model again"
    )


@dataclass
class _Loaded:
    """What a loaded module knows of itself; kept in ``GraphModule.meta``, which copies carry."""

    metadata: Metadata
    device: torch.device
    threshold: float | Literal["auto"]
    release_dense: bool
    report: PassReport


class SparseModule(fx.GraphModule):
    """A committed program: call it with the positional inputs that the model was exported with.

    For inference: parameters take no gradient and ``train()`` raises. Parameter names are the
    exported model's; a weight that runs sparse is packed in buffers beside it, so changing such a
    weight in place has no effect on them, and with ``release_dense`` only they are there.
    ``.to(device)`` moves the program and chooses kernels anew.
    """

    def _set_up(
        self,
        metadata: Metadata,
        device: torch.device,
        threshold: float | Literal["auto"],
        release_dense: bool,
        path: str,
    ) -> SparseModule:
        try:
            packed = {w.values: w.name for w in metadata.weights if w.packed}
            held, _ = unpack_weights(self, packed, device)
        except (ArgumentError, KeyError, AttributeError) as error:
            raise _damaged(path, error) from error
        self.to(device)  # all but the weights that are held
        report = PassReport("choose_kernels")
        self.meta[_LOADED] = _Loaded(metadata, device, threshold, release_dense, report)
        self._settle(
            device, {name: functools.partial(_made, make, path) for name, make in held.items()}
        )
        self.requires_grad_(False)
        return self

    def _settle(self, device: torch.device, held: Held | None = None) -> None:
        """Make the graph fit for ``device``; ``held`` makes the weights that it does not have."""
        loaded: _Loaded = self.meta[_LOADED]
        move_device(self, device)
        sparsities = {w.name: 1 - w.nnz / max(w.numel, 1) for w in loaded.metadata.weights}
        loaded.device = device
        loaded.report = choose_kernels(
            self,
            sparsities,
            device,
            1.0 if device.type == "meta" else loaded.threshold,  # nothing to pack there
            release_dense=loaded.release_dense and device.type != "meta",
            held=held,
        )

    @property
    def metadata(self) -> Metadata:
        """What the file says of itself."""
        loaded: _Loaded = self.meta[_LOADED]
        return loaded.metadata

    @property
    def report(self) -> PassReport:
        """The kernel of every masked weight on the present device."""
        loaded: _Loaded = self.meta[_LOADED]
        return loaded.report

    def train(self, mode: bool = True) -> SparseModule:
        """Nothing for ``mode=False``; a loaded program cannot be trained.

        Raises:
            PhaseError: ``mode`` is true.
        """
        if mode:
            raise PhaseError(
                "train: expected eval mode, the only one of an exported program; train the model "
                "that it was exported from"
            )
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        loaded: _Loaded | None = self.meta.get(_LOADED)
        first = next(itertools.chain(self.parameters(), self.buffers()), None)
        if loaded is not None and first is not None and first.device != loaded.device:
            self._settle(first.device)
        return self
