"""Which parameters of a model are pruned: by parameter, never by module class.

A weight is pruned if it has two dimensions or more, is floating point, is no embedding and no norm,
is tied to nothing else and is not excluded. Whatever is left out is listed with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from resu_compile.config import DEFAULT_EXCLUDE, Names, Predicate, SparsityConfig
from resu_compile.errors import ArgumentError, WeightError

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class NamedWeight:
    """A parameter, the module that owns it and every name it goes by."""

    name: str
    owner: nn.Module
    attribute: str
    parameter: nn.Parameter
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """The weights to prune, and the reason of every parameter that is not."""

    chosen: tuple[NamedWeight, ...]
    skipped: Mapping[str, str]


def named_weights(model: nn.Module) -> list[NamedWeight]:
    """Every parameter once, under its first name, with the other names as aliases.

    Two parameters are one if they are the same object or the same elements of one storage.
    """
    found: dict[object, NamedWeight] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{attribute}" if path else attribute
            key = _identity(parameter)
            first = found.get(key)
            if first is None:
                found[key] = NamedWeight(name, module, attribute, parameter)
            elif name != first.name:
                found[key] = NamedWeight(
                    first.name,
                    first.owner,
                    first.attribute,
                    first.parameter,
                    (*first.aliases, name),
                )
    return list(found.values())


def _identity(parameter: Tensor) -> object:
    if parameter.device.type == "meta" or isinstance(
        parameter, nn.parameter.UninitializedTensorMixin
    ):
        return id(parameter)
    try:
        address = parameter.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # wrapper subclasses have no storage
        return id(parameter)
    if not address:
        return id(parameter)
    return (parameter.device, address, parameter.storage_offset(), parameter.numel())


def select(
    model: nn.Module,
    config: SparsityConfig,
    captured: Mapping[int, str | None] | None = None,
) -> Selection:
    """Choose the weights of ``model`` that ``config`` asks to prune.

    Args:
        model: any module.
        config: ``targets``, ``exclude`` and ``tied`` are used.
        captured: ``id(parameter)`` -> op that multiplies by it in a captured graph, None if none
            does. Parameters that no graph was captured with go by dimensions and owners.

    Raises:
        ArgumentError: a pattern of ``targets``, ``exclude`` or ``overrides`` matches no parameter,
            or nothing is left to prune.
        WeightError: a target is an integer, quantised or uninitialised parameter.
    """
    weights = named_weights(model)
    names = [alias for weight in weights for alias in (weight.name, *weight.aliases)]
    wanted = _matcher(config.targets, names, "targets")
    left_out = _matcher(
        config.exclude, names, "exclude", must_match=config.exclude != DEFAULT_EXCLUDE
    )
    _matcher(tuple(config.overrides) or None, names, "overrides")
    embedded = _embedding_identities(model)

    chosen: list[NamedWeight] = []
    skipped: dict[str, str] = {}
    for weight in weights:
        aliases = (weight.name, *weight.aliases)
        targeted = config.targets is not None and any(wanted(a, weight.parameter) for a in aliases)
        reason = _reason_to_skip(weight, config, embedded, captured, targeted)
        if config.targets is not None and not targeted:
            reason = "not among targets"
        elif config.exclude is not None and any(left_out(a, weight.parameter) for a in aliases):
            reason = f"excluded by {config.exclude!r}"
        if reason is None:
            chosen.append(weight)
        else:
            skipped[weight.name] = reason
    if not chosen:
        raise ArgumentError(_nothing_left(model, config, skipped))
    return Selection(tuple(chosen), skipped)


def _reason_to_skip(
    weight: NamedWeight,
    config: SparsityConfig,
    embedded: set[object],
    captured: Mapping[int, str | None] | None,
    targeted: bool,
) -> str | None:
    parameter = weight.parameter
    if isinstance(parameter, nn.parameter.UninitializedTensorMixin):
        if targeted:
            raise WeightError(
                f"{weight.name}: expected an initialised parameter, got a lazy one; "
                "run the model once before sparsify"
            )
        return "lazy parameter without a shape; run the model once first"
    if not parameter.is_floating_point() or parameter.is_quantized:
        if targeted:
            raise WeightError(
                f"{weight.name}: expected a floating-point weight, got {parameter.dtype}; "
                "quantised and integer weights cannot be pruned, prune before quantising"
            )
        return f"{parameter.dtype} is not floating point"
    if parameter.numel() == 0:
        return "no elements"
    if weight.aliases and config.tied == "skip":
        return f"tied to {', '.join(weight.aliases)} (tied='skip')"
    if targeted:
        return None
    if _identity(parameter) in embedded:
        return "embedding, or tied to one"
    if parameter.dim() < 2:
        return "bias, norm or other vector"
    if captured is not None and id(parameter) in captured:
        return None if captured[id(parameter)] else "no matmul multiplies by it"
    return _reason_from_owner(weight)


def _reason_from_owner(weight: NamedWeight) -> str | None:
    """Without a captured graph: the owner tells embeddings and norms, the shape additive tables."""
    if isinstance(weight.owner, _NORMS):
        return "norm"
    if weight.parameter.dim() >= 3 and weight.parameter.shape[0] == 1 and _is_bare(weight.owner):
        return "shape [1, ...] is that of an additive table; pass example_inputs to decide by graph"
    return None


def _is_bare(owner: nn.Module) -> bool:
    """A module outside torch.nn: its parameters may be anything."""
    return not type(owner).__module__.startswith("torch.nn.")


def _embedding_identities(model: nn.Module) -> set[object]:
    return {
        _identity(module.weight) for module in model.modules() if isinstance(module, _EMBEDDINGS)
    }


def _matcher(
    selector: Names | Predicate | None, names: Iterable[str], argument: str, must_match: bool = True
) -> Callable[[str, Tensor], bool]:
    if selector is None:
        return lambda name, parameter: False
    if not isinstance(selector, (str, tuple)):
        return selector
    patterns = (selector,) if isinstance(selector, str) else selector
    known = list(names)
    for pattern in patterns:
        if must_match and not any(matches(pattern, name) for name in known):
            raise ArgumentError(
                f"{argument}: expected a name or glob of a parameter, but {pattern!r} matches "
                f"none; parameters: {_some(known)}"
            )
    return lambda name, parameter: any(matches(pattern, name) for pattern in patterns)


def matches(pattern: str, name: str) -> bool:
    """True if ``pattern`` is ``name``, the name of a module that holds it, or a glob of either."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _some(names: list[str], limit: int = 12) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > limit else shown or "none"


def _nothing_left(model: nn.Module, config: SparsityConfig, skipped: Mapping[str, str]) -> str:
    asked = "targets" if config.targets is not None else "model"
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:8])
    return (
        f"{asked}: expected at least one floating-point matmul or convolution weight in "
        f"{type(model).__name__}, found none. Left out: {reasons or 'no parameters at all'}"
    )


def check_values(weights: Iterable[NamedWeight]) -> None:
    """Raise a ``WeightError`` that names the first weight on meta, or with a NaN or infinity."""
    for weight in weights:
        parameter = weight.parameter
        if parameter.device.type == "meta":
            raise WeightError(
                f"{weight.name}: expected a weight with values, got one on the meta device; "
                "materialise the model first (to_empty, then load_state_dict), then sparsify, "
                "or sparsify(from_zeros=True) for a checkpoint that is sparse already"
            )
        with torch.no_grad():
            if not bool(torch.isfinite(parameter).all()):
                raise WeightError(
                    f"{weight.name}: expected finite values, got NaN or infinity; "
                    "repair the checkpoint before pruning"
                )
