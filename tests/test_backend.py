from __future__ import annotations

import copy
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import resu_compile as resu
from resu_compile import backend as backend_module
from resu_compile.backend import backend_for, find_root, inductor_patches, sources_digest
from resu_compile.config import CompileConfig
from resu_compile.errors import ArgumentError, NotSparsifiedError
from tests.compiling import no_recompile

X = torch.randn(4, 8)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def inductor(monkeypatch):
    """AOTAutograd in place of Inductor; the settings of each compilation."""
    settings = []

    def compile_fx(gm, inputs, config_patches):
        settings.append(config_patches)
        return aot_eager(gm, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return settings


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Broken(Net):
    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x.relu())


class Nested(nn.Module):
    """Graph breaks inside a submodule: each part of it is captured for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Broken()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def assert_sparse(model, sparsity):
    assert resu.controller(model).sparsity == pytest.approx(sparsity, abs=0.02)
    assert all(
        (model.get_parameter(n)[~m] == 0).all() for n, m in resu.controller(model).masks.items()
    )


# -- the string, however the model is called -----------------------------------------------------
OPTIONS = {"sparsity": 0.5, "sparse_threshold": 1.0}


def through_torch_compile(model):
    return torch.compile(model, backend="resu", options=OPTIONS)


def through_the_method(model):
    model.compile(backend="resu", options=OPTIONS)
    return model


def through_a_closure(model):
    return torch.compile(lambda x: model(x), backend="resu", options=OPTIONS)


def through_a_list(model):
    models = [model]
    return torch.compile(lambda x: models[0](x), backend="resu", options=OPTIONS)


def through_a_trainer(model):
    class Trainer:
        def __init__(self):
            self.model = model

        def step(self, x):
            return self.model(x)

    return torch.compile(Trainer().step, backend="resu", options=OPTIONS)


def through_an_argument(model):
    call = torch.compile(lambda m, x: m(x), backend="resu", options=OPTIONS)
    return lambda x: call(model, x)


def through_a_decorated_function(model):
    @torch.compile(backend="resu", options=OPTIONS)
    def call(x):
        return model(x) * 2

    return call


WAYS = [
    through_torch_compile,
    through_the_method,
    through_a_closure,
    through_a_list,
    through_a_trainer,
    through_an_argument,
    through_a_decorated_function,
]


@pytest.mark.parametrize("make", [Net, Broken, Nested, lambda: nn.Sequential(Net(), nn.ReLU())])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("inductor")
def test_the_model_is_pruned_at_the_first_call(way, make):
    model = make()
    call = way(model)
    with pytest.raises(NotSparsifiedError):
        resu.controller(model)
    call(X).sum().backward()
    assert_sparse(model, 0.5)
    assert len(resu.controller(model).masks) == sum(p.dim() == 2 for p in model.parameters())
    model.zero_grad()
    call(X)  # Dynamo sees the model's hooks for the first time
    with no_recompile():
        call(X).sum().backward()
    for name, mask in resu.controller(model).masks.items():
        assert (model.get_parameter(name).grad[~mask] == 0).all()
    if way is through_torch_compile:
        assert resu.controller(call) is resu.controller(model)


GLOBAL_MODEL = Net()


@pytest.mark.usefixtures("inductor")
def test_a_global_model():
    torch.compile(lambda x: GLOBAL_MODEL(x), backend="resu", options=OPTIONS)(X)
    assert_sparse(GLOBAL_MODEL, 0.5)
    resu.controller(GLOBAL_MODEL).release()


@pytest.mark.usefixtures("inductor")
def test_what_calls_the_compiled_module_is_no_part_of_it():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Broken()
            self.compiled = torch.compile(self.inner, backend="resu", options=OPTIONS)
            self.head = nn.Linear(8, 8)

        def forward(self, x):
            return self.head(self.compiled(x))

    model = Outer()
    model(X)
    assert_sparse(model.inner, 0.5)
    with pytest.raises(NotSparsifiedError):
        resu.controller(model)


@pytest.mark.usefixtures("inductor")
def test_only_the_compiled_submodule_is_pruned():
    model = Nested()
    model.body.compile(backend="resu", options=OPTIONS)
    model(X)
    assert list(resu.controller(model.body).masks) == ["first.weight", "second.weight"]


@pytest.mark.usefixtures("inductor")
def test_instances_are_pruned_one_by_one():
    models = [Net() for _ in range(3)]
    calls = [torch.compile(model, backend="resu", options=OPTIONS) for model in models]
    for _ in range(2):
        for model, call in zip(models, calls, strict=True):
            torch.testing.assert_close(call(X), model(X))
            assert_sparse(model, 0.5)
    assert counters["stats"]["unique_graphs"] == 1  # wrappers with equal options are equal
    masks = [resu.controller(model).masks["first.weight"] for model in models]
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.usefixtures("inductor")
def test_instances_with_other_options_have_their_own_graphs():
    a, b = Net(), Net()
    torch.compile(a, backend="resu", options={"sparsity": 0.25, "sparse_threshold": 1.0})(X)
    torch.compile(b, backend="resu", options={"sparsity": 0.75, "sparse_threshold": 1.0})(X)
    assert_sparse(a, 0.25)
    assert_sparse(b, 0.75)


@pytest.mark.usefixtures("inductor")
def test_a_released_model_stays_plain():
    model = Net()
    call = torch.compile(model, backend="resu", options=OPTIONS)
    call(X)
    resu.controller(model).release()
    with torch.no_grad():
        model.first.weight.fill_(1.0)
        torch.testing.assert_close(call(X), model(X))
    call(torch.randn(7, 8)).sum().backward()
    assert (model.first.weight == 1.0).all()
    with pytest.raises(NotSparsifiedError):
        resu.controller(model)


@pytest.mark.usefixtures("inductor")
def test_a_sparsified_model_keeps_its_masks():
    model = resu.sparsify(Net(), 0.75, compile=False)
    torch.compile(model, backend="resu", options=OPTIONS)(X)
    assert_sparse(model, 0.75)
    inner = resu.sparsify(Net(), 0.75, compile=False)
    torch.compile(lambda x: inner(x), backend="resu", options=OPTIONS)(X)
    assert_sparse(inner, 0.75)


@pytest.mark.usefixtures("inductor")
def test_a_copy_has_its_own_masks():
    model = Net()
    call = torch.compile(model, backend="resu", options=OPTIONS)
    call(X)
    twin = copy.deepcopy(model)
    resu.controller(model).prune(0.75)
    twin_call = torch.compile(twin, backend="resu", options=OPTIONS)
    torch.testing.assert_close(twin_call(X), twin(X))
    assert_sparse(twin, 0.5)
    assert_sparse(model, 0.75)


@pytest.mark.usefixtures("inductor")
def test_the_graph_decides_what_a_weight_is():
    class Table(Net):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            return super().forward(x + self.table)

    model = Table()
    torch.compile(model, backend="resu", options=OPTIONS)(X)
    assert "table" not in resu.controller(model).masks
    assert resu.controller(model).skipped["table"] == "no matmul multiplies by it"


@pytest.mark.usefixtures("inductor")
def test_pruning_leaves_the_random_state():
    options = {**OPTIONS, "method": "random"}
    before = torch.get_rng_state()
    torch.compile(Net().eval(), backend="resu", options=options)  # nothing happens yet
    model = Net()
    before = torch.get_rng_state()
    torch.compile(model, backend="resu", options=options)(X)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("inductor")
def test_two_models_in_one_function_cannot_be_pruned_together():
    a, b = Net(), Net()
    call = torch.compile(lambda x: a(x) + b(x), backend="resu", options=OPTIONS)
    with pytest.raises(Exception, match="expected the compiled call to use one nn.Module"):
        call(X)
    assert not a._forward_pre_hooks


def test_find_root_finds_nothing_for_loose_parameters():
    assert find_root([nn.Parameter(torch.randn(2, 2))]) is None


# -- options -------------------------------------------------------------------------------------
def first_error(options, **kwargs):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        torch.compile(Net(), backend="resu", options=options, **kwargs)(X)
    return str(caught.value)


@pytest.mark.usefixtures("inductor")
def test_unknown_options_are_errors_that_list_the_known():
    message = first_error({"sparcity": 0.5})
    assert "unknown option 'sparcity' (did you mean 'sparsity'?); known: " in message
    known = message.split("known: ")[1]
    assert all(name in known for name in ("sparsity", "sparse_threshold", "exclude", "method"))


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, r"sparsity: expected a number in \[0, 1\)"),
        ({"sparse_threshold": "always"}, "sparse_threshold"),
        ({"mode": "fastest"}, "mode: expected one of .*; got 'fastest'"),
        ({"targets": "nothing*"}, "targets: expected a name or glob"),
    ],
)
def test_wrong_options_are_named(options, message):
    assert re.search(message, first_error(options))


def test_wrong_compile_options_are_errors_at_once_and_leave_the_model_as_it_is():
    model = Net()
    before = model.first.weight.detach().clone()
    with pytest.raises(ArgumentError, match="unknown Inductor option 'max_autotoon'"):
        resu.sparsify(model, options={"max_autotoon": True})
    with pytest.raises(ArgumentError, match="mode: expected one of"):
        resu.sparsify(model, mode="fastest")
    assert torch.equal(model.first.weight, before)
    assert model._compiled_call_impl is None


def test_modes_and_inductor_options_are_passed_on(inductor):
    model = resu.sparsify(Net(), mode="max-autotune", options={"epilogue_fusion": False})
    model(X)
    torch.compile(
        Net(), backend="resu", options={**OPTIONS, "mode": "max-autotune", "max-autotune": False}
    )(X)
    torch.compile(Net(), backend="resu", mode="reduce-overhead")(X)
    first, second, third = inductor
    assert (first["max_autotune"], first["epilogue_fusion"]) == (True, False)
    assert (second["max_autotune"], second["coordinate_descent_tuning"]) == (False, True)
    assert third["triton.cudagraphs"] is True


@pytest.mark.usefixtures("inductor")
def test_options_that_cannot_be_hashed():
    class Options(list):
        __hash__ = None

    model = resu.sparsify(Net(), options={"post_grad_fusion_options": {"a": Options()}})
    assert model(X).shape == X.shape


def test_equal_options_share_a_backend():
    assert backend_for(("auto", None, ())) is backend_for(("auto", None, ()))
    assert backend_for(("auto", None, ())) is not backend_for((1.0, None, ()))


# -- passes of the user's, and the cache key -----------------------------------------------------
class Counting(CustomGraphPass):
    def __init__(self, uuid="counting"):
        self.calls = 0
        self._uuid = uuid

    def __call__(self, _graph):
        self.calls += 1

    def uuid(self):
        return self._uuid


PASSES = ("post_grad_custom_pre_pass", "joint_custom_pre_pass")


def test_custom_passes_of_the_user_keep_running():
    through_options, through_config = Counting(), Counting()
    model = Net()
    resu.sparsify(
        model, sparse_threshold=1.0, options={PASSES[0]: through_options, "fx_graph_cache": False}
    )
    with inductor_config.patch({PASSES[1]: through_config}):
        model(X).sum().backward()
    assert through_options.calls
    assert through_config.calls
    assert (model.first.weight.grad[~resu.controller(model).masks["first.weight"]] == 0).all()


@pytest.mark.parametrize("name", PASSES)
def test_cache_key_covers_our_files_and_the_users_passes(name, monkeypatch):
    def key(users=None):
        options = {name: users} if users is not None else {}
        return inductor_patches(CompileConfig(inductor_options=options))[name].uuid()

    plain = key()
    assert sources_digest() in plain
    assert key(Counting("a")) not in (plain, key(Counting("b")))
    assert key([Counting("a"), Counting("b")]) != key([Counting("b"), Counting("a")])
    assert key(lambda _: None) is None  # a function has no uuid: never cached
    monkeypatch.setattr(backend_module, "sources_digest", lambda: "of other sources")
    assert key() != plain


def test_digest_is_that_of_the_sources(tmp_path, monkeypatch):
    def digest(text):
        sources_digest.cache_clear()
        (tmp_path / "passes").mkdir(exist_ok=True)
        (tmp_path / "passes" / "a.py").write_text(text)
        monkeypatch.setattr(backend_module, "__file__", str(tmp_path / "backend.py"))
        found = sources_digest()
        sources_digest.cache_clear()
        return found

    assert digest("x = 1") == digest("x = 1") != digest("x = 2")


def test_digest_is_the_same_in_another_process():
    code = "from resu_compile.backend import sources_digest; print(sources_digest())"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == sources_digest()


# -- sparsify ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), (4, 8)),
        (nn.Linear(8, 8), (4, 8)),
        (nn.Conv2d(3, 4, 3), (1, 3, 6, 6)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 4, 8)),
        (nn.Bilinear(8, 8, 8), None),
        (Net(), (4, 8)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules_of_torch_and_of_the_user_really_compile(model, shape, inductor):
    resu.sparsify(model, 0.5, sparse_threshold=1.0)
    inputs = (torch.randn(4, 8), torch.randn(4, 8)) if shape is None else (torch.randn(shape),)
    out = model(*inputs)
    assert counters["stats"]["unique_graphs"] == 1
    assert len(inductor) == 1
    torch.manual_seed(0)
    model.eval()
    torch.testing.assert_close(model(*inputs).shape, out.shape)


def test_containers_of_one_class_do_not_count_as_recompiles_of_each_other(inductor):
    models = [resu.sparsify(nn.Sequential(nn.Linear(8, n)), 0.5) for n in range(2, 14)]
    for model in models:
        model(X)
    assert len(inductor) == len(models)


@pytest.mark.usefixtures("inductor")
def test_fullgraph_raises_at_a_graph_break():
    model = resu.sparsify(Broken(), 0.5, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(X)
    resu.sparsify(Net(), 0.5, fullgraph=True)(X)


@pytest.mark.usefixtures("inductor")
def test_a_copy_compiles_anew():
    model = resu.sparsify(Net(), 0.5, sparse_threshold=1.0)
    model(X)
    twin = copy.deepcopy(model)
    assert twin._compiled_call_impl is None
    resu.controller(twin).compile()
    resu.controller(model).prune(0.75)
    twin(X).sum().backward()
    assert_sparse(twin, 0.5)
    mask = resu.controller(twin).masks["first.weight"]
    assert (twin.first.weight.grad[~mask] == 0).all()
    assert model.first.weight.grad is None


@pytest.mark.usefixtures("inductor")
def test_release_takes_the_compiled_call_away():
    model = resu.sparsify(Net(), 0.5)
    model(X)
    resu.controller(model).release()
    assert model._compiled_call_impl is None


# -- hooks of the user's -------------------------------------------------------------------------
@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("make", [Net, lambda: nn.Sequential(Net())])
def test_hooks_of_the_user_run_whenever_they_are_added(make):
    model = resu.sparsify(make(), 0.5, sparse_threshold=1.0)
    expected = model(X)
    handles = [
        model.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
        model.register_forward_hook(lambda _, __, out: out + 1),
    ]
    torch.testing.assert_close(model(X), model.eval()._call_impl(X))
    torch.testing.assert_close(model(X), model(X))
    assert not torch.allclose(model(X), expected)
    handles.append(model.register_forward_hook(lambda _, __, out: out + 1))
    torch.testing.assert_close(model(X), model._call_impl(X))
    seen = []
    handles.append(model.register_full_backward_hook(lambda *_: seen.append(1)))
    model(X.clone().requires_grad_()).sum().backward()
    assert seen == [1]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model(X), expected)


@pytest.mark.usefixtures("inductor")
def test_a_forward_put_in_place_of_the_own_one_runs():
    model = resu.sparsify(Net(), 0.5, sparse_threshold=1.0)
    expected = model(X)
    forward = model.forward
    model.forward = lambda x: forward(x) + 1
    torch.testing.assert_close(model(X), expected + 1)
    del model.forward
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("outer", ["eager", "aot_eager"])
@pytest.mark.usefixtures("inductor")
def test_a_compiled_model_inside_another_compiled_function(outer):
    model = resu.sparsify(Net(), 0.5, sparse_threshold=1.0)
    mask = resu.controller(model).masks["first.weight"]
    call = torch.compile(lambda x: model(x) * 2, backend=outer)
    torch.testing.assert_close(call(X), model(X) * 2)
    call(X).sum().backward()
    assert (model.first.weight.grad[~mask] == 0).all()
