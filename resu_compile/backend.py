"""The ``torch.compile`` backend: passes first, then Inductor, one variant per phase.

``sparsify`` uses it with masks that exist already. ``torch.compile(model, backend="resu",
options={...})`` prunes and masks at the first compile.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn
from torch.nn.modules.module import _has_any_global_hook

from resu_compile.config import CompileConfig, SparsityConfig, inductor_option_names, split_options
from resu_compile.errors import ArgumentError, check_choice, check_known_keys
from resu_compile.kernels.effective_weight import register_lowerings
from resu_compile.passes.effective_weight import use_weights_themselves
from resu_compile.passes.find_weights import find_weights
from resu_compile.runtime.graph_runs import Compiled
from resu_compile.runtime.variants import GraphVariants, know
from resu_compile.state import masked_weight_of

if TYPE_CHECKING:
    from resu_compile.runtime.controller import Controller


def resu(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The backend registered as ``"resu"``.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs, parameters among them.
        mode: a ``torch.compile`` mode, passed on to Inductor.
        options: arguments of ``sparsify`` by name, and settings of Inductor.

    Returns:
        What Dynamo calls in place of the graph.

    Raises:
        ArgumentError: an option is unknown or has a wrong value.
    """
    sparsity, compiling = split_options(options or {})
    if mode is not None:
        compiling = replace(compiling, mode=mode)
    return compile_graph(
        gm, example_inputs, compiling, functools.partial(_adopt, sparsity, compiling)
    )


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: CompileConfig,
    adopt: Callable[[fx.GraphModule, Sequence[Any]], None] | None = None,
) -> Compiled:
    """Variants of ``gm``, compiled by Inductor with ``config``."""
    register_lowerings()
    patches = inductor_patches(config)

    def inner(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        from torch._inductor.compile_fx import compile_fx

        compiled: Any = compile_fx(graph, list(inputs), config_patches=dict(patches))
        return cast("Compiled", compiled)

    return GraphVariants(gm, example_inputs, config, inner, adopt)


# -- sparsify's way in -------------------------------------------------------------------------
@functools.cache
def backend_for(config_key: tuple[Any, ...]) -> Callable[..., Compiled]:
    """One backend object for each set of options, so that instances of a class share graphs."""
    threshold, mode, options = config_key
    config = CompileConfig(threshold, mode, dict(options))

    def resu_backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        return compile_graph(gm, example_inputs, config)

    return resu_backend


def compile_in_place(
    controller: Controller, *, fullgraph: bool = False, dynamic: bool | None = None
) -> Any:
    """Make the model's own call run compiled, as ``nn.Module.compile`` does; returns that call."""
    know(controller)
    config = controller.compile_config
    inductor_patches(config)  # wrong options are errors here, not at the first call
    try:
        options = tuple(sorted(config.inductor_options.items()))
        backend = backend_for((config.sparse_threshold, config.mode, options))
    except TypeError:  # options that cannot be hashed get a backend of their own
        backend = functools.partial(compile_graph, config=config)
    compiling = functools.partial(
        torch.compile, backend=backend, fullgraph=fullgraph, dynamic=dynamic
    )
    call = CompiledCall(controller.model, compiling)
    controller.model._compiled_call_impl = call
    return call


class CompiledCall:
    """A model's own call, compiled; stands where ``nn.Module.compile`` puts its own.

    What the hooks of a controller do, the graphs do themselves (runtime/variants.py). So where they
    are the only ones, ``forward`` alone is called: 10 us less than with the hooks, which Dynamo
    would compile as frames of their own (tiny model, one thread of a Zen 5).
    """

    def __init__(
        self, model: nn.Module, compiling: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        self._model = model
        self._compiling = compiling
        self._function = _function_of(model)
        # Dynamo skips the code of torch.nn itself (nn.Sequential and its like) at the top of a
        # call, but traces into it from anywhere else
        self._is_torchs_own = bool(torch._dynamo.trace_rules.check(model.forward))
        self._forward = self._compiled("forward")
        self._hooked: tuple[tuple[int, ...], Callable[..., Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        model = self._model
        if (
            len(model._forward_pre_hooks) == 1
            and len(model._forward_hooks) == 1
            and not model._backward_pre_hooks
            and not model._backward_hooks
            and not _has_any_global_hook()
            and _function_of(model) is self._function
        ):
            return self._forward(*args, **kwargs)
        return self._with_hooks()(*args, **kwargs)

    def _with_hooks(self) -> Callable[..., Any]:
        model = self._model
        # hooks traced along with torch.nn's code would be those of the first call for ever
        hooks = (*model._forward_pre_hooks, *model._forward_hooks) if self._is_torchs_own else ()
        if self._hooked is None or self._hooked[0] != hooks:
            self._hooked = hooks, self._compiled("_call_impl")
        return self._hooked[1]

    def _compiled(self, method: str) -> Callable[..., Any]:
        if not self._is_torchs_own:
            return self._compiling(getattr(self._model, method))
        model = self._model

        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(model, method)(*args, **kwargs)

        # code of its own: Dynamo counts recompiles per code object
        code = call.__code__.replace(co_name=f"call_{type(model).__name__}")
        function = types.FunctionType(
            code, call.__globals__, call.__name__, call.__defaults__, call.__closure__
        )
        return self._compiling(function)


def _function_of(model: nn.Module) -> Any:
    """What ``model.forward`` runs; changes if it is put in another's place."""
    forward = model.forward
    return getattr(forward, "__func__", forward)


# -- torch.compile's way in --------------------------------------------------------------------
_adopted: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _adopt(
    sparsity: SparsityConfig,
    compiling: CompileConfig,
    gm: fx.GraphModule,
    args: Sequence[Any],
) -> None:
    """Prune and mask the model that ``args`` belong to, once: a released model stays plain."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from resu_compile.pruning import attach_controller
    from resu_compile.runtime.controller import find_controller

    parameters = {i: a for i, a in enumerate(args) if isinstance(a, nn.Parameter)}
    if not parameters or any(masked_weight_of(p) is not None for p in parameters.values()):
        return
    root = find_root(list(parameters.values()))
    if root is None:
        raise ArgumentError(
            "backend 'resu': expected the compiled call to use one nn.Module that holds all the "
            "weights of a graph, found none; compile the module instead of a function, or call "
            "resu_compile.sparsify(module) before compiling a function that uses it"
        )
    if root in _adopted or find_controller(root) is not None:
        return  # this graph uses none of the weights that were pruned
    sites, _ = find_weights(gm, list(parameters))
    multiplied = {site.index: site.op for site in sites}
    captured = {id(p): multiplied.get(i) for i, p in parameters.items()}
    with unset_fake_temporarily(), torch.no_grad():
        know(attach_controller(root, sparsity, compiling, captured))
    _adopted.add(root)


def find_root(parameters: Sequence[nn.Parameter]) -> nn.Module | None:
    """The module that was compiled, or called in what was: it holds all of ``parameters``.

    Of several in one frame the largest, of several frames the outermost within the call of
    ``torch.compile``'s wrapper.
    """
    wanted = {id(parameter) for parameter in parameters}
    root: nn.Module | None = None
    most = 0
    for modules in _modules_by_frame():
        sizes = {module: {id(p) for p in module.parameters()} for module in modules}
        holding = {module: len(held) for module, held in sizes.items() if wanted <= held}
        largest = max(holding, key=holding.__getitem__, default=None)
        if largest is not None and holding[largest] >= most:
            root, most = largest, holding[largest]
    return root


def _modules_by_frame() -> Iterator[list[nn.Module]]:
    """The modules that each frame of the compiled call names, from the innermost frame out."""
    from torch._dynamo import eval_frame
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:  # Dynamo traces a frame before it runs, so that frame is not on the stack
        traced: Any = InstructionTranslator.current_tx()
    except AttributeError:  # nothing is being traced: a graph meets another instance's weights
        traced = None
    if traced is not None:
        yield _modules_of(traced.f_locals, traced.f_globals, traced.f_code)
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename == eval_frame.__file__ and code.co_qualname.startswith(
            "_TorchDynamoContext.__call__."
        ):
            return  # whoever called torch.compile's result is no part of it
        if not str(frame.f_globals.get("__name__")).startswith(("torch._", "resu_compile.")):
            yield _modules_of(frame.f_locals, frame.f_globals, code)
        frame = frame.f_back


def _modules_of(
    local: Mapping[str, Any], shared: Mapping[str, Any], code: types.CodeType
) -> list[nn.Module]:
    """Modules that a frame names, or that lie one step behind what it names."""
    found: list[Any] = []
    for value in [*local.values(), *(shared[name] for name in code.co_names if name in shared)]:
        if isinstance(value, types.MethodType):
            value = value.__self__
        if isinstance(value, (list, tuple)):
            found += value
        elif isinstance(value, dict):
            found += value.values()
        elif isinstance(value, (nn.Module, type, types.ModuleType)):
            found.append(value)
        else:
            found += getattr(value, "__dict__", {}).values()  # a trainer that is no module
    return [
        getattr(value, "_orig_mod", value)
        for value in found
        if isinstance(value, nn.Module) and not isinstance(value, fx.GraphModule)
    ]


# -- Inductor ----------------------------------------------------------------------------------
def inductor_patches(config: CompileConfig) -> dict[str, Any]:
    """Inductor settings for ``config``: the mode's, the user's own, and the tag of our files.

    Raises:
        ArgumentError: unknown mode or setting.
    """
    from torch._inductor import list_mode_options

    patches: dict[str, Any] = {}
    if config.mode not in (None, "default"):
        check_choice(config.mode, [name for name in list_mode_options() if name], name="mode")
        patches.update(list_mode_options(config.mode))
    check_known_keys(config.inductor_options, inductor_option_names(), what="Inductor option")
    patches.update(config.inductor_options)
    own = {"post_grad_custom_pre_pass": None, "joint_custom_pre_pass": use_weights_themselves}
    for name, graph_pass in own.items():
        users = patches.get(name) or getattr(torch._inductor.config, name)
        patches[name] = _passes(graph_pass, users)
    return patches


@functools.cache
def sources_digest() -> str:
    """Digest of the files that decide what compiled code does; part of Inductor's cache key."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for folder in ("kernels", "passes"):
        for path in sorted((root / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _passes(own: Callable[[fx.Graph], None] | None, users: Any) -> Any:
    """One pass for Inductor: ours if any, then the user's. Its cache key covers the ``uuid``."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    theirs = list(users) if isinstance(users, (list, tuple)) else [users] if users else []

    class Passes(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for graph_pass in [own, *theirs] if own else theirs:
                graph_pass(graph)

        def uuid(self) -> Any:
            uuids = [
                graph_pass.uuid() if isinstance(graph_pass, CustomGraphPass) else None
                for graph_pass in theirs
            ]
            if None in uuids:
                return None  # a pass without a uuid cannot be cached
            return f"resu_compile {sources_digest()} {uuids!r}"

    return Passes()
