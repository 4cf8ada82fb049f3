"""The one-liner: prune a model, mask it and compile it, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from resu_compile.config import DEFAULT_EXCLUDE, CompileConfig, SparsityConfig
from resu_compile.errors import ArgumentError, ArgumentTypeError, PhaseError, check_known_keys
from resu_compile.methods import Method
from resu_compile.runtime.allocation import new_masks
from resu_compile.runtime.controller import Controller, find_controller
from resu_compile.selection import select

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Selector = str | Sequence[str] | Callable[[str, Tensor], bool]

COMPILE_OPTIONS = ("mode", "fullgraph", "dynamic", "options")


def sparsify(
    model: ModuleT,
    sparsity: float = 0.7,
    *,
    method: str | Method = "magnitude",
    scope: Literal["layer", "global"] = "layer",
    distribution: Literal["uniform", "erk"] = "uniform",
    targets: Selector | None = None,
    exclude: Selector | None = DEFAULT_EXCLUDE,
    overrides: Mapping[str, float] | None = None,
    min_density: float = 0.01,
    tied: Literal["skip", "mask_all"] = "skip",
    from_zeros: bool = False,
    seed: int = 0,
    example_inputs: Sequence[Any] | None = None,
    sparse_threshold: float | Literal["auto"] = "auto",
    compile: bool = True,  # noqa: A002 - the word that users know
    **compile_options: Any,
) -> ModuleT:
    """Prune ``model``, keep its pruned weights at exactly 0 from here on, and compile its call.

    Everything happens in place: class, parameter names and ``state_dict()`` keys stay the model's
    own, and a training loop needs no further call. ``controller(model)`` reaches the rest.

    Args:
        model: any module with floating-point matmul or convolution weights.
        sparsity: share of pruned entries, in [0, 1). Each weight keeps int((1 - s) N) entries.
        method: ``"magnitude"``, ``"random"``, or an object with ``score(weight, generator)``.
        scope: rank inside each ``"layer"``, or all weights together (``"global"``).
        distribution: ``"uniform"``, or ``"erk"`` (denser small layers), with ``scope="layer"``.
        targets: names, globs, module names or a predicate (name, parameter) -> bool of the weights
            to prune; None means every matmul and convolution weight but embeddings.
        exclude: the same, of weights to leave dense.
        overrides: name or glob -> sparsity of those weights.
        min_density: least density that global ranking and ERK leave a weight.
        tied: ``"skip"`` leaves parameters with several names dense; ``"mask_all"`` masks them once.
        from_zeros: adopt the zeros that the weights have; no value changes.
        seed: seed of the controller's random generator.
        example_inputs: positional inputs of one call. With them the captured graph decides which
            parameters are weights; without them their dimensions and owners do.
        sparse_threshold: ``"auto"`` takes the sparse kernel for inference where it measured faster;
            a number takes it from that sparsity on; 1.0 never.
        compile: False leaves the model eager; masks and phases work the same.
        **compile_options: ``mode``, ``fullgraph``, ``dynamic`` and ``options`` as in
            ``torch.compile``; ``options`` are Inductor's.

    Returns:
        The same module.

    Raises:
        ArgumentError: an argument has a wrong value, a pattern matches nothing, or there is nothing
            to prune.
        ArgumentTypeError: an argument has a wrong type.
        WeightError: a weight holds NaN or infinity, lies on meta, or cannot be pruned.
        PhaseError: the model has a controller already.

    On an error, the model is untouched.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    check_known_keys(compile_options, COMPILE_OPTIONS, what="compile option")
    if find_controller(model) is not None:
        raise PhaseError(
            "sparsify: expected a model without a controller, but this one has one; "
            "controller(model).prune(sparsity) prunes again, .release() makes it plain first"
        )
    model = getattr(model, "_orig_mod", model)
    config = SparsityConfig(
        sparsity=sparsity,
        method=method,
        scope=scope,
        distribution=distribution,
        targets=targets,  # type: ignore[arg-type]
        exclude=exclude,  # type: ignore[arg-type]
        overrides=dict(overrides) if isinstance(overrides, Mapping) else overrides or {},  # type: ignore[arg-type]
        min_density=min_density,
        tied=tied,
        from_zeros=from_zeros,
        seed=seed,
    )
    compiling = CompileConfig(
        sparse_threshold, compile_options.get("mode"), dict(compile_options.get("options") or {})
    )
    if compile:
        from resu_compile.backend import inductor_patches

        inductor_patches(compiling)
    captured = None
    if example_inputs is not None:
        from resu_compile.capture import capture, captured_parameters

        captured = captured_parameters(capture(model, *_as_tuple(example_inputs)))
    made = attach_controller(model, config, compiling, captured)
    if compile:
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
) -> Controller:
    """Select, prune and mask; nothing is changed before everything is checked."""
    selection = select(model, config, captured)
    generator = torch.Generator().manual_seed(config.seed)
    masks = new_masks(selection.chosen, config, generator)
    made = Controller(
        model,
        [(named, masks[named.name]) for named in selection.chosen],
        config,
        selection.skipped,
        compiling,
    )
    made.generator.set_state(generator.get_state())
    return made


def _as_tuple(example_inputs: Any) -> tuple[Any, ...]:
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    raise ArgumentError(
        f"example_inputs: expected a tuple of the positional inputs of one call, "
        f"got {type(example_inputs).__name__}"
    )


