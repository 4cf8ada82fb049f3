"""The one-liner: prune a model, mask it and compile it, in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from resu_compile.config import DEFAULT_EXCLUDE, CompileConfig, SparsityConfig
from resu_compile.errors import ArgumentTypeError, PhaseError, check_known_keys
from resu_compile.methods import AnyMethod
from resu_compile.runtime.allocation import check_calibration, new_generator, new_masks
from resu_compile.runtime.controller import Controller, find_controller
from resu_compile.selection import select
from resu_compile.state import masked_weight_of

if TYPE_CHECKING:
    from resu_compile.calibration import Calibration

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Selector = str | Sequence[str] | Callable[[str, Tensor], bool]

COMPILE_OPTIONS = ("mode", "fullgraph", "dynamic", "options")


def sparsify(
    model: ModuleT,
    sparsity: float | None = None,
    *,
    method: str | AnyMethod = "magnitude",
    calibration: Calibration | None = None,
    pattern: str | None = None,
    scope: Literal["layer", "global"] = "layer",
    distribution: Literal["uniform", "er", "erk"] = "uniform",
    targets: Selector | None = None,
    exclude: Selector | None = DEFAULT_EXCLUDE,
    overrides: Mapping[str, float] | None = None,
    min_density: float = 0.01,
    tied: Literal["skip", "mask_all"] = "skip",
    from_zeros: bool = False,
    seed: int = 0,
    example_inputs: Sequence[Any] | None = None,
    sparse_threshold: float | Literal["auto"] = "auto",
    release_dense: bool = False,
    compile: bool = True,
    **compile_options: Any,
) -> ModuleT:
    """Prune ``model``, keep its pruned weights at exactly 0 from here on, and compile its call.

    Everything happens in place: class, parameter names and ``state_dict()`` keys stay the model's
    own, and a training loop needs no further call. ``controller(model)`` reaches the rest.

    Args:
        model: any module with floating-point matmul or convolution weights.
        sparsity: share of pruned entries, in [0, 1); None is 0.7, or what ``pattern`` asks for.
            Each weight keeps int((1 - s) N) entries; calibrated methods round in each row.
        method: ``"magnitude"``, ``"random"``, the calibrated ``"wanda"``, ``"wanda++"`` and
            ``"dsnot"``, or an object of ``resu_compile.methods`` or of your own.
        calibration: data for a calibrated method: a function ``forward_loop(model)`` that runs the
            model, or batches. A batch is a tensor, a tuple or list of positional inputs, of which
            forward gets as many as it takes (labels fall off), or a dict of keyword inputs.
        pattern: ``"N:M"``, ``"2:4"`` say: the best N of each M consecutive inputs stay.
        scope: rank inside each ``"layer"``, or all weights together (``"global"``).
        distribution: ``"uniform"``, or ``"erk"`` or ``"er"`` (denser small layers), with
            ``scope="layer"``.
        targets: names, globs, module names or a predicate (name, parameter) -> bool that choose
            among the matmul and convolution weights; None means all of them. A parameter's own
            full name also takes what is left dense by default (an embedding, a norm, a bias).
        exclude: the same, of weights to leave dense; heads named ``lm_head`` by default.
        overrides: name or glob -> sparsity of those weights.
        min_density: least density that global ranking and ERK leave a weight, up to 1 - sparsity.
        tied: ``"skip"`` leaves parameters with several names dense; ``"mask_all"`` masks them once.
        from_zeros: adopt the zeros that the weights have; no value changes.
        seed: seed of the controller's random generator.
        example_inputs: positional inputs of one call. With them the captured graph decides which
            parameters are weights; without them their dimensions and owners do.
        sparse_threshold: ``"auto"`` takes the sparse kernel for inference where it measured faster;
            a number takes it from that sparsity on; 1.0 never.
        release_dense: free the dense storage of weights that only sparse kernels read, at the first
            compiled call without gradients, as ``controller(model).release_dense()`` does.
        compile: False leaves the model eager; masks and phases work the same. A model that
            ``torch.compile`` has wrapped keeps its own compiler.
        **compile_options: ``mode``, ``fullgraph``, ``dynamic`` and ``options`` as in
            ``torch.compile``; ``options`` are Inductor's.

    Returns:
        The same module.

    Raises:
        ArgumentError: an argument has a wrong value, a pattern matches nothing, or there is nothing
            to prune.
        ArgumentTypeError: an argument has a wrong type.
        WeightError: a weight holds NaN or infinity, lies on meta, or cannot be pruned.
        PhaseError: the model, or a part of it, has a controller already.

    On an error, the model is untouched.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ArgumentTypeError(f"model: expected a plain nn.Module, got {type(model).__name__}")
    check_known_keys(compile_options, COMPILE_OPTIONS, what="compile option")
    config = SparsityConfig(
        sparsity=cast("float", sparsity),
        method=method,
        pattern=pattern,
        scope=scope,
        distribution=distribution,
        targets=targets,  # type: ignore[arg-type]
        exclude=exclude,  # type: ignore[arg-type]
        overrides={} if overrides is None else overrides,
        min_density=min_density,
        tied=tied,
        from_zeros=from_zeros,
        seed=seed,
    )
    options = {} if (given := compile_options.get("options")) is None else given
    if not isinstance(options, Mapping):
        raise ArgumentTypeError(f"options: expected a mapping of Inductor settings, got {given!r}")
    check_calibration(config, calibration)
    compiling = CompileConfig(
        sparse_threshold, compile_options.get("mode"), dict(options), release_dense
    )
    root = getattr(model, "_orig_mod", model)
    check_plain(root)
    if compile:
        from resu_compile.backend import inductor_patches

        inductor_patches(compiling)
    captured = None
    if example_inputs is not None:
        from resu_compile.capture import capture, captured_parameters

        captured = captured_parameters(capture(root, *_as_tuple(example_inputs)))
    made = attach_controller(root, config, compiling, captured, calibration)
    if compile and root is model:
        made.compile(
            fullgraph=bool(compile_options.get("fullgraph", False)),
            dynamic=compile_options.get("dynamic"),
        )
    return model


def attach_controller(
    model: nn.Module,
    config: SparsityConfig,
    compiling: CompileConfig,
    captured: Mapping[int, str | None] | None,
    calibration: Calibration | None = None,
) -> Controller:
    """Select, prune and mask; nothing is changed before everything is checked."""
    check_plain(model)
    with torch.inference_mode(False):  # masks are for training too
        selection = select(model, config, captured)
        generator = new_generator(config.seed)
        masks = new_masks(selection.chosen, config, generator, calibration=calibration, model=model)
        if config.from_zeros:
            active = sum(int(mask.sum()) for mask in masks.values())
            total = sum(mask.numel() for mask in masks.values())
            found = min(1.0 - active / total, math.nextafter(1.0, 0.0))
            config = replace(config, from_zeros=False, sparsity=found)
        made = Controller(
            model,
            ((named, masks.take(named.name)) for named in selection.chosen),  # held once
            config,
            selection.skipped,
            compiling,
            generator=generator,
        )
        if compiling.release_dense:
            made.release_dense()
        return made


def check_plain(model: nn.Module) -> None:
    """Raise a ``PhaseError`` if the model, a part of it, or a model around it has a controller."""
    for name, module in model.named_modules():
        if find_controller(module) is not None:
            raise PhaseError(
                f"model: expected one without a controller, but {name or 'it'} has one; "
                "controller(...).prune(sparsity) prunes again, .release() makes it plain first"
            )
    for name, parameter in model.named_parameters():
        if masked_weight_of(parameter) is not None:
            raise PhaseError(
                f"model: expected one without a controller, but {name} belongs to the controller "
                "of a model around this one; sparsify that one with targets=..., or release it"
            )


def _as_tuple(example_inputs: Any) -> tuple[Any, ...]:
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    raise ArgumentTypeError(
        f"example_inputs: expected a tuple of the positional inputs of one call, "
        f"got {type(example_inputs).__name__}"
    )
