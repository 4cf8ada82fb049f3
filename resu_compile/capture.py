"""Run a model once and keep the graphs that Dynamo captures, with the weight sites in them."""

from __future__ import annotations

import copy
import inspect
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from resu_compile.passes.find_weights import WeightSite, find_weights
from resu_compile.passes.fx_utils import copy_graph_module
from resu_compile.passes.released_values import use_released_weights_themselves


@dataclass(frozen=True)
class CapturedGraph:
    """One graph, the parameters among its inputs, and its weight sites."""

    gm: fx.GraphModule
    parameters: dict[int, nn.Parameter]
    sites: list[WeightSite]


def capture(model: nn.Module, *inputs: Any, **kwargs: Any) -> list[CapturedGraph]:
    """The graphs of one call of ``model``; the call itself runs eagerly and without gradients.

    The model's mode, parameters, buffers and compiled graphs stay as they are, and so does the
    random state. What else its ``forward`` changes in Python stays changed.

    Args:
        model: the module.
        *inputs: positional inputs of the call.
        **kwargs: keyword inputs of the call.
    """
    graphs: list[CapturedGraph] = []

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        parameters = {i: p for i, p in enumerate(example_inputs) if isinstance(p, nn.Parameter)}
        seen = copy_graph_module(gm)
        use_released_weights_themselves(seen)
        sites, _ = find_weights(seen, list(parameters))
        graphs.append(CapturedGraph(seen, parameters, sites))
        return gm.forward

    def call(*args: Any, **kw: Any) -> Any:
        return model._call_impl(*args, **kw)  # compiled or not, what the model's own call does

    with ExitStack() as stack:
        stack.enter_context(_kept_buffers(model))
        stack.enter_context(torch.random.fork_rng(_cuda_devices(model)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_unnoticed_by_dynamo())
        torch.compile(call, backend=record, dynamic=False, **_isolation())(*inputs, **kwargs)
    return graphs


def captured_parameters(graphs: Sequence[CapturedGraph]) -> dict[int, str | None]:
    """``id(parameter)`` -> op that multiplies by it, None if no captured graph does."""
    found: dict[int, str | None] = {}
    for graph in graphs:
        for parameter in graph.parameters.values():
            found.setdefault(id(parameter), None)
        for site in graph.sites:
            found[id(graph.parameters[site.index])] = site.op
    return found


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put buffers back afterwards: batch norm counts every call."""
    kept: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
    contents: dict[Tensor, Tensor] = {}
    for module in model.modules():
        kept.append((module, dict(module._buffers)))
        for buffer in module._buffers.values():
            if buffer is not None and not buffer.is_meta:
                contents[buffer] = buffer.detach().clone()
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, content in contents.items():
                if not torch.equal(buffer, content):
                    buffer.copy_(content)
        for module, buffers in kept:
            module._buffers.clear()
            module._buffers.update(buffers)


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    tensors = itertools.chain(model.parameters(), model.buffers())
    return list({tensor.device for tensor in tensors if tensor.is_cuda})


@contextmanager
def _unnoticed_by_dynamo() -> Iterator[None]:
    """Leave nothing of the capture with the code of the model's own modules.

    After a graph break they are traced frame by frame. Dynamo limits how many graphs it keeps of
    one piece of code, of which it can forget all or none, and makes a size dynamic that differs
    from the one it saw first.
    """
    from torch._dynamo import convert_frame, pgo
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list, remove_from_cache

    made: dict[types.CodeType, list[types.CodeType]] = {}
    handle = convert_frame.register_bytecode_hook(
        lambda code, compiled: made.setdefault(code, []).append(compiled)
    )
    sizes = pgo.get_code_state()
    sizes_before = copy.deepcopy(sizes)
    try:
        with torch._dynamo.config.patch(
            recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16
        ):
            yield
    finally:
        handle.remove()
        sizes.clear()
        sizes.update(sizes_before)
        for code, compiled in made.items():
            if all(entry.code in compiled for entry in _debug_get_cache_entry_list(code)):
                remove_from_cache(code)


def _isolation() -> dict[str, Any]:
    """Newer releases can count the graphs of one ``torch.compile`` for themselves."""
    known = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if known else {}
