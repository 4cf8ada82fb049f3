"""Which parameters of a model are pruned: by parameter, never by module class.

A weight is pruned if it has two dimensions or more, is floating point, is no embedding and no norm,
is tied to nothing else and is not excluded. Whatever is left out is listed with its reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from resu_compile.config import DEFAULT_EXCLUDE, Names, Predicate, SparsityConfig
from resu_compile.errors import ArgumentError, WeightError

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

# Words in the name of a bare parameter that is added, scaled by or looked up, not multiplied by:
# relative_position_bias_table (Swin), pos_embed and cls_token (ViT), A_log (Mamba).
_NO_WEIGHTS = frozenset(
    [
        "bias",
        "embed",
        "embeds",
        "embedding",
        "embeddings",
        "pos",
        "position",
        "positional",
        "positions",
        "token",
        "tokens",
        "cls",
        "table",
        "log",
        "scale",
        "scales",
        "gamma",
        "beta",
        "freq",
        "freqs",
        "state",
        "states",
        "prompt",
        "prompts",
        "codebook",
    ]
)


@dataclass(frozen=True)
class NamedWeight:
    """A parameter, the module that owns it and every name it goes by.

    Attributes:
        name: the first name.
        owner: module that holds the parameter under ``name``.
        attribute: the parameter's name in ``owner``.
        parameter: the parameter.
        aliases: its other names.
        one_tensor: False if an alias is another tensor over the same memory.
    """

    name: str
    owner: nn.Module
    attribute: str
    parameter: nn.Parameter
    aliases: tuple[str, ...] = ()
    one_tensor: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the first one first."""
        return (self.name, *self.aliases)


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
            elif name not in first.names:
                found[key] = NamedWeight(
                    first.name,
                    first.owner,
                    first.attribute,
                    first.parameter,
                    (*first.aliases, name),
                    first.one_tensor and parameter is first.parameter,
                )
    return list(found.values())


def _identity(parameter: Tensor) -> object:
    if parameter.device.type == "meta" or is_lazy(parameter):
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

    A glob, a module name or a predicate in ``targets`` chooses among matmul and convolution
    weights. A parameter's own full name also takes what is left dense by default: an embedding, a
    norm, a bias, or a head that the default ``exclude`` names.

    Args:
        model: any module.
        config: ``targets``, ``exclude``, ``overrides`` and ``tied`` are used.
        captured: ``id(parameter)`` -> op that multiplies by it in a captured graph, None if none
            does. Parameters that no graph was captured with go by dimensions and owners.

    Raises:
        ArgumentError: a pattern of ``targets`` or ``overrides`` matches no weight that is pruned,
            one of ``exclude`` no parameter, or nothing is left to prune.
        WeightError: a parameter that ``targets`` names in full cannot be pruned.
    """
    weights = named_weights(model)
    names = [name for weight in weights for name in weight.names]
    wanted = _matcher(config.targets)
    left_out = _matcher(config.exclude)
    in_full = set(_patterns(config.targets)) & set(names)
    for argument, patterns in (
        ("targets", _patterns(config.targets)),
        ("exclude", () if config.exclude == DEFAULT_EXCLUDE else _patterns(config.exclude)),
        ("overrides", tuple(config.overrides)),
    ):
        _check_patterns(argument, patterns, names)
    embedded = _embedding_identities(model)

    chosen: list[NamedWeight] = []
    skipped: dict[str, str] = {}
    for weight in weights:
        named = not in_full.isdisjoint(weight.names)
        if config.targets is not None and not any(
            wanted(n, weight.parameter) for n in weight.names
        ):
            reason: str | None = "not among targets"
        elif not (named and config.exclude == DEFAULT_EXCLUDE) and any(
            left_out(name, weight.parameter) for name in weight.names
        ):
            reason = f"excluded by {config.exclude!r}"
        else:
            reason = _unusable(weight)
            if reason is not None and named:
                raise WeightError(f"{weight.name}: expected a weight that can be pruned, {reason}")
            if reason is None:
                reason = _tied(weight, config)
            if reason is None and not named:
                reason = _no_matmul_weight(weight, embedded, captured)
        if reason is None:
            chosen.append(weight)
        else:
            skipped[weight.name] = reason
    if not chosen:
        raise ArgumentError(_nothing_left(model, config, skipped))
    _check_chosen("targets", _patterns(config.targets), weights, skipped)
    _check_chosen("overrides", tuple(config.overrides), weights, skipped)
    return Selection(tuple(chosen), skipped)


# -- reasons -----------------------------------------------------------------------------------
def _unusable(weight: NamedWeight) -> str | None:
    """Why no mask can be put on this parameter at all."""
    parameter = weight.parameter
    if is_lazy(parameter):
        return "lazy parameter without a shape; run the model once first"
    if not parameter.is_floating_point() or parameter.is_quantized or parameter.itemsize == 1:
        return f"{parameter.dtype} is no floating point to train in; prune before quantising"
    if is_traceable_wrapper_subclass(parameter) or is_traceable_wrapper_subclass(parameter.data):
        return f"{type(parameter.data).__name__} is no plain tensor; prune before converting it"
    if parameter.layout is not torch.strided:
        return f"layout {parameter.layout} is not strided"
    if isinstance(weight.owner, _EMBEDDINGS) and weight.owner.sparse:
        return "its embedding makes sparse gradients (sparse=True)"
    if parameter.numel() == 0 or parameter.dim() == 0:
        return "no elements" if parameter.dim() else "a single number"
    return None


def _tied(weight: NamedWeight, config: SparsityConfig) -> str | None:
    if not weight.aliases:
        return None
    if config.tied == "skip":
        return f"tied to {', '.join(weight.aliases)} (tied='skip')"
    if not weight.one_tensor:
        return (
            f"shares memory with {', '.join(weight.aliases)} as another tensor; tie them as one "
            "nn.Parameter"
        )
    return None


def _no_matmul_weight(
    weight: NamedWeight, embedded: Collection[object], captured: Mapping[int, str | None] | None
) -> str | None:
    """Without a captured graph, owner and shape tell what is multiplied from what is added."""
    parameter = weight.parameter
    if _identity(parameter) in embedded:
        return "embedding, or tied to one"
    if parameter.dim() < 2:
        return "bias, norm or other vector"
    if captured is not None and id(parameter) in captured:
        return None if captured[id(parameter)] else "no matmul multiplies by it"
    if isinstance(weight.owner, _NORMS):
        return "norm"
    if weight.attribute.split("_")[0] == "bias":
        return "bias"
    if _is_bare(weight.owner):
        if parameter.dim() >= 3 and parameter.shape[0] == 1:
            return "shape [1, ...] is that of an additive table; pass example_inputs to be sure"
        word = next((w for w in _words(weight.attribute) if w in _NO_WEIGHTS), None)
        if word is not None:
            return f"named like a table or scale ({word!r}); pass example_inputs to be sure"
    return None


def _words(attribute: str) -> list[str]:
    return attribute.lower().replace(".", "_").split("_")


def _is_bare(owner: nn.Module) -> bool:
    """A module of the user's, or a mere container: its parameters may be anything."""
    containers = (nn.Module, nn.ParameterList, nn.ParameterDict)
    return type(owner) in containers or not type(owner).__module__.startswith("torch.nn.")


def _embedding_identities(model: nn.Module) -> set[object]:
    return {
        _identity(module.weight) for module in model.modules() if isinstance(module, _EMBEDDINGS)
    }


# -- patterns ----------------------------------------------------------------------------------
def matches(pattern: str, name: str) -> bool:
    """True if ``pattern`` is ``name``, the name of a module that holds it, or a glob of either."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _patterns(selector: Names | Predicate | None) -> tuple[str, ...]:
    if isinstance(selector, str):
        return (selector,)
    return selector if isinstance(selector, tuple) else ()


def _matcher(selector: Names | Predicate | None) -> Predicate:
    if selector is None or isinstance(selector, (str, tuple)):
        patterns = _patterns(selector)
        return lambda name, _parameter: any(matches(pattern, name) for pattern in patterns)
    return selector


def _check_patterns(argument: str, patterns: Iterable[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise ArgumentError(
                f"{argument}: expected a name or glob of a parameter, but {pattern!r} matches "
                f"none; parameters: {_some(names)}"
            )


def _check_chosen(
    argument: str,
    patterns: Iterable[str],
    weights: Iterable[NamedWeight],
    skipped: Mapping[str, str],
) -> None:
    """Each pattern reaches a weight that is pruned; the error says why those it names are not."""
    for pattern in patterns:
        found = [w.name for w in weights if any(matches(pattern, name) for name in w.names)]
        if all(name in skipped for name in found):
            reasons = "; ".join(f"{name}: {skipped[name]}" for name in found[:8])
            raise ArgumentError(
                f"{argument}: expected {pattern!r} to match a weight that is pruned, but it "
                f"matches only parameters that are left out. {reasons}"
            )


def check_overrides(overrides: Iterable[str], weights: Iterable[NamedWeight]) -> None:
    """Raise an ``ArgumentError`` for the first pattern that matches none of ``weights``."""
    _check_patterns("overrides", overrides, [name for weight in weights for name in weight.names])


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


# -- values ------------------------------------------------------------------------------------
def check_values(weights: Iterable[NamedWeight]) -> None:
    """Raise a ``WeightError`` that names the first weight without finite values."""
    for weight in weights:
        parameter = weight.parameter
        if parameter.device.type == "meta":
            raise WeightError(
                f"{weight.name}: expected a weight with values, got one on the meta device; "
                "materialise the model first (to_empty, then load_state_dict)"
            )
        if parameter.is_inference():
            raise WeightError(
                f"{weight.name}: expected a parameter that can be trained, got one made under "
                "torch.inference_mode(); build the model outside of it"
            )
        with torch.no_grad():
            if not bool(torch.isfinite(parameter).all()):
                raise WeightError(
                    f"{weight.name}: expected finite values, got NaN or infinity; "
                    "repair the checkpoint before pruning"
                )
