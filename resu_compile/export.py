"""Export a committed sparse model to a ``.pt2`` file; ``program.py`` loads it again.

    resu_compile.export(model, (example,), "sparse.pt2")
    program = resu_compile.load("sparse.pt2", device="cuda")

``"sparse"`` files hold packed weights and need this package to load; ``"dense"`` files are plain
ATen, and ``torch.export.load`` reads them without it. docs/export.md describes both.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from resu_compile.artifact import METADATA_ENTRY, MODES, Metadata, WeightRecord, check_artifact
from resu_compile.errors import (
    ArgumentError,
    ArgumentTypeError,
    PhaseError,
    WeightError,
    check_choice,
    check_path,
)
from resu_compile.passes.base import PassReport
from resu_compile.passes.fold_commit import PACKED, fold_commit
from resu_compile.phase import Phase
from resu_compile.program import SparseModule, load
from resu_compile.runtime.released import ReleasedParameter, hollow_as_plain

if TYPE_CHECKING:
    from resu_compile.runtime.controller import Controller

__all__ = ["SparseModule", "export", "export_masked", "load"]


def export(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    mode: Literal["sparse", "dense"] = "sparse",
    dynamic_shapes: Any = None,
) -> PassReport:
    """Write the committed model to a ``.pt2`` file.

    The model is traced in eval mode, without its compiled call and without any training operator;
    afterwards it is as it was, training flags included. The file appears complete or not at all.
    Of ``example_inputs`` the file keeps shapes and dtypes, not the values.

    Args:
        model: sparsified model in phase SPARSE, or a module around one or several: a model whose
            calls take keywords, or return more than is wanted, goes into a module that calls it.
        example_inputs: positional arguments of one call; tensors on the model's device.
        path: file to write, ending in ``.pt2``; an existing file is replaced.
        mode: ``"sparse"`` stores each masked weight packed, one bit a position and the active
            values, unless that would be larger; such a file is for ``resu_compile.load``.
            ``"dense"`` stores zeros as they are, in plain ATen that ``torch.export.load`` reads
            without this package, and keeps the model's device.
        dynamic_shapes: as ``torch.export.export`` takes it, for example
            ``({0: torch.export.Dim("batch")},)``; None fixes every size.

    Returns:
        The report: which weights were packed, which were left dense and why.

    Raises:
        NotSparsifiedError: neither the model nor a module in it has a controller.
        PhaseError: the model is in phase DENSE or RESU.
        ArgumentError: ``mode`` or ``path`` cannot be used.
        ArgumentTypeError: ``example_inputs`` is no tuple, or ``path`` no path.
        WeightError: a parameter or buffer is a tensor subclass, which a file could only pickle.
        Exception: whatever ``torch.export.export`` raises if it cannot trace the model.
    """
    plain = getattr(model, "_orig_mod", model)  # what torch.compile(model) wrapped
    masks: dict[str, Tensor] = {}
    for prefix, control in _controllers(plain).items():
        next_step = {
            Phase.RESU: "commit() or abandon() the resurrection first",
            Phase.DENSE: 'call controller(model).set_phase("sparse") first',
        }.get(control.phase)
        if next_step is not None:
            raise PhaseError(f"export: expected phase sparse, got {control.phase}; {next_step}")
        control.refresh()
        masks |= {f"{prefix}{name}": mask for name, mask in control.masks.items()}
    return export_masked(
        plain, masks, example_inputs, path, mode=mode, dynamic_shapes=dynamic_shapes
    )


def _controllers(model: nn.Module) -> dict[str, Controller]:
    """What stands before the names of its weights -> controller, of ``model`` or what it wraps."""
    from resu_compile.runtime.controller import controller, find_controller

    found = {
        f"{name}." if name else "": control
        for name, module in model.named_modules()
        if not hasattr(module, "_orig_mod") and (control := find_controller(module))
    }
    return found or {"": controller(model)}  # which says what is missing


def export_masked(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    mode: Literal["sparse", "dense"] = "sparse",
    dynamic_shapes: Any = None,
) -> PassReport:
    """``export`` for a model without a controller, from masks alone.

    Args:
        model: any module.
        masks: parameter name -> bool mask of its shape, True = active; pruned places are written as
            0 whatever the model holds there.
        example_inputs: as ``export``.
        path: as ``export``.
        mode: as ``export``.
        dynamic_shapes: as ``export``.

    Returns:
        As ``export``.

    Raises:
        ArgumentError: as ``export``, or a mask names no parameter of the model.
        ArgumentTypeError: as ``export``.
        WeightError: as ``export``, or a mask does not have the shape of its parameter.
    """
    check_choice(mode, MODES, name="mode")
    target = _check_path(path)
    if not isinstance(example_inputs, tuple):
        raise ArgumentTypeError(
            "example_inputs: expected a tuple of positional arguments, got "
            f"{type(example_inputs).__name__}; write (example,) for a single one"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in masks:
        if name not in parameters:
            raise ArgumentError(f"masks: expected names of parameters of the model, got {name!r}")
    values = {name: p.read for name, p in parameters.items() if isinstance(p, ReleasedParameter)}
    with _plain_eval(model), hollow_as_plain(parameters.values()):
        traced = torch.export.export(
            model, example_inputs, dynamic_shapes=dynamic_shapes, strict=False
        )
        plain = traced.module()
    committed, report = fold_commit(plain, masks, pack=mode == "sparse", values=values)
    # Traced again, so that the signature lists what is stored, and example values stay out of it.
    blank = pytree.tree_map_only(Tensor, torch.zeros_like, example_inputs)
    program = torch.export.export(committed, blank, dynamic_shapes=dynamic_shapes, strict=False)
    devices = {str(tensor.device) for _, tensor in _tensors(program)} or {"cpu"}
    if mode == "sparse" and devices != {"cpu"}:
        program = move_to_device_pass(program, "cpu")
        devices = {"cpu"}
    for name, tensor in _tensors(program):
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise WeightError(
                f"{name}: expected a plain tensor, got {type(tensor).__name__}, which a file could "
                "only hold pickled; turn it into a plain tensor before exporting"
            )
    records = _weight_records(committed, masks, parameters)
    metadata = Metadata(
        mode=mode,
        weights=records,
        device=min(devices),
        torch_version=torch.__version__,
        package_version=_package_version(),
        modules=_foreign_modules(program),
    )
    _write(program, metadata, target)
    return report


@contextlib.contextmanager
def _plain_eval(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode and called eagerly; afterwards exactly as before.

    The flags are set one by one: ``model.train()`` may be overridden with effects of its own.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    compiled = [module._compiled_call_impl for module in modules]
    try:
        for module in modules:
            module.training = False
            if module._compiled_call_impl is not None:
                module._compiled_call_impl = None
        yield
    finally:
        for module, was_training, call in zip(modules, training, compiled, strict=True):
            module.training = was_training
            if call is not None:
                module._compiled_call_impl = call


def _check_path(path: str | os.PathLike[str]) -> str:
    target = check_path(path, name="path")
    if not target.endswith(".pt2"):  # torch.export.load expects it
        raise ArgumentError(f"path: expected a name that ends in .pt2, got {target!r}")
    if not os.path.isdir(os.path.dirname(os.path.abspath(target))):
        raise ArgumentError(f"path: expected a file in an existing folder, got {target!r}")
    return target


def _tensors(program: ExportedProgram) -> list[tuple[str, Tensor]]:
    named = [*program.state_dict.items(), *program.constants.items()]
    return [(name, value) for name, value in named if isinstance(value, Tensor)]


def _weight_records(
    committed: fx.GraphModule, masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> tuple[WeightRecord, ...]:
    """One record for each masked weight that the committed graph reads."""
    packed: Mapping[str, tuple[str, str]] = committed.meta[PACKED]
    dense = {name for name, _ in committed.named_parameters(remove_duplicate=False)}
    records = []
    for name, mask in masks.items():
        if name not in packed and name not in dense:
            continue
        values, bits = packed.get(name, ("", ""))
        records.append(
            WeightRecord(
                name=name,
                shape=tuple(mask.shape),
                dtype=str(parameters[name].dtype).removeprefix("torch."),
                nnz=int(mask.count_nonzero()),
                packed=name in packed,
                values=values,
                bits=bits,
            )
        )
    return tuple(records)


def _foreign_modules(program: ExportedProgram) -> tuple[str, ...]:
    """Modules outside of torch that define the containers the model takes and returns."""
    found: set[str] = set()
    stack = [program.call_spec.in_spec, program.call_spec.out_spec]
    while stack:
        spec = stack.pop()
        if spec is None:
            continue
        if spec.type is not None:
            found.add(spec.type.__module__)
        stack += spec.children()
    own = ("builtins", "collections", "torch")
    return tuple(sorted(name for name in found if name.partition(".")[0] not in own))


def _package_version() -> str:
    try:
        return importlib.metadata.version("resu-compile")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def _write(program: ExportedProgram, metadata: Metadata, path: str) -> None:
    """Save beside ``path``, check what was written, then put it in place in one step."""
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "x+b") as file:
            torch.export.save(program, file, extra_files={METADATA_ENTRY: metadata.to_json()})
            file.flush()
            os.fsync(file.fileno())
            check_artifact(file, path)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
