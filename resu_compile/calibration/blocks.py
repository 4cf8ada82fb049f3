"""Sequential blocks of a model, from its module tree or named by the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from resu_compile.errors import ArgumentError
from resu_compile.selection import NamedWeight

CONTAINERS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class BlockSpec:
    """A part of the model that is pruned in one go.

    Attributes:
        name: name of the module in the model; "" for the model.
        module: the module.
        weights: the chosen weights in it, maybe none.
    """

    name: str
    module: nn.Module
    weights: tuple[NamedWeight, ...]


def find_blocks(
    model: nn.Module, weights: Sequence[NamedWeight], blocks: str | Sequence[str] | None
) -> list[BlockSpec]:
    """The parts of ``model`` in the order in which they are pruned; each weight is in one.

    Blocks without chosen weights are in the list as well, up to the last that has some. Weights
    outside of all blocks make up to two parts more, with the whole model as their module:
    those whose names come before the first block's in the model, and all others, which come last.

    Args:
        model: the root.
        weights: the chosen weights.
        blocks: name of an ``nn.ModuleList`` or ``nn.Sequential`` whose children are the blocks;
            or names of the blocks. None takes the container whose children are of one class and
            hold most of what is pruned, of several the longest (the layers of a transformer, not
            the experts of one layer), and the whole model if there is none.

    Raises:
        ArgumentError: ``blocks`` names no module, or none that holds a chosen weight.
    """
    modules = _automatic(model, weights) if blocks is None else _named(model, blocks)
    owner_block: dict[nn.Module, int] = {}
    for index, (_, module) in enumerate(modules):
        for part in module.modules():
            owner_block.setdefault(part, index)
    inside: list[list[NamedWeight]] = [[] for _ in modules]
    outside: list[tuple[int, NamedWeight]] = []
    for position, weight in enumerate(weights):
        home = owner_block.get(weight.owner)
        if home is None:
            outside.append((position, weight))
        else:
            inside[home].append(weight)
    if blocks is not None and not any(inside):
        raise ArgumentError(
            f"blocks: expected modules that hold weights to prune, but {blocks!r} hold none of "
            f"{', '.join(weight.name for weight in weights[:8])}"
        )
    place = {weight.name: position for position, weight in enumerate(weights)}
    first = min((place[w.name] for found in inside for w in found), default=len(weights))
    before = tuple(weight for position, weight in outside if position < first)
    after = tuple(weight for position, weight in outside if position >= first)
    specs = [
        BlockSpec(name, module, tuple(found))
        for (name, module), found in zip(modules, inside, strict=True)
    ]
    last = max((i for i, spec in enumerate(specs) if spec.weights), default=-1)
    around = [BlockSpec("", model, part) for part in (before, after)]
    return [
        *(spec for spec in around[:1] if spec.weights),
        *specs[: last + 1],
        *(spec for spec in around[1:] if spec.weights),
    ]


def _automatic(model: nn.Module, weights: Sequence[NamedWeight]) -> list[tuple[str, nn.Module]]:
    best: list[tuple[str, nn.Module]] = []
    most = (0, 1)
    for path, module in model.named_modules():
        if not isinstance(module, CONTAINERS):
            continue
        children = [(f"{path}.{name}" if path else name, c) for name, c in module.named_children()]
        one_class = len({type(child) for _, child in children}) == 1
        if not one_class or isinstance(children[0][1], nn.ModuleList):
            continue
        inside = [set(child.modules()) for _, child in children]
        held = [sum(w.parameter.numel() for w in weights if w.owner in part) for part in inside]
        size = (sum(held), sum(count > 0 for count in held))
        if size > most and size[1] > 1:
            best, most = children, size
    return best


def _named(model: nn.Module, blocks: str | Sequence[str]) -> list[tuple[str, nn.Module]]:
    known = dict(model.named_modules())
    found: list[tuple[str, nn.Module]] = []
    for name in (blocks,) if isinstance(blocks, str) else blocks:
        if name not in known:
            containers = [path for path, m in known.items() if isinstance(m, CONTAINERS)]
            raise ArgumentError(
                f"blocks: expected names of modules, but {name!r} is none; containers of modules: "
                f"{', '.join(containers) or 'none'}"
            )
        module = known[name]
        if isinstance(module, nn.ModuleList) or (
            isinstance(blocks, str) and isinstance(module, nn.Sequential)
        ):
            found += [(f"{name}.{child}", m) for child, m in module.named_children()]
        else:
            found.append((name, module))
    return found
