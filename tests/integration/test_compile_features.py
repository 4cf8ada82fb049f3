"""What people do with compiled models: other modes, dtypes, shapes, libraries."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

import resu_compile as resu
from resu_compile.config import CompileConfig
from resu_compile.runtime import sparse_products
from tests.compiling import Backend, no_recompile

X = torch.randn(4, 8)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def aot(monkeypatch):
    """AOTAutograd in place of Inductor."""

    def compile_fx(gm, inputs, config_patches):
        assert config_patches
        return aot_eager(gm, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Parameter(torch.randn(16, 8) * 0.3)
        self.third = nn.Parameter(torch.randn(8, 8) * 0.3)

    def forward(self, x):
        x = F.relu(self.first(x)) @ self.second
        return (self.third @ x.mT).mT


# -- inference -----------------------------------------------------------------------------------
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
def test_inference_through_inductor_and_the_sparse_kernels(mode):
    """Right, dynamic, and toggled without a recompile, with one compilation for each variant."""
    model = resu.sparsify(Net(), 0.6, sparse_threshold=0.0)
    ctl = resu.controller(model)
    plain = copy.deepcopy(model)
    with MODES[mode]():
        torch.testing.assert_close(model(X), plain(X))
        torch.testing.assert_close(model(torch.randn(7, 8)).shape, torch.Size([7, 8]))
        graphs = counters["stats"]["unique_graphs"]
        with no_recompile():
            for rows in (2, 3, 33, 130):
                x = torch.randn(rows, 8)
                torch.testing.assert_close(model(x), plain(x))
            ctl.set_phase("dense")
            for rows in (2, 33):
                x = torch.randn(rows, 8)
                torch.testing.assert_close(model(x), plain(x))
    assert counters["stats"]["unique_graphs"] == graphs == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inference_of_models_of_other_dtypes(dtype):
    model = resu.sparsify(Net().to(dtype), 0.6, compile=False)
    call = torch.compile(model, backend=Backend(threshold=0.0))
    with torch.no_grad():
        out, expected = call(X.to(dtype)), model(X.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inference_under_autocast(dtype):
    model = resu.sparsify(Net(), 0.6, compile=False)
    call = torch.compile(model, backend=Backend(threshold=0.0))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        out, expected = call(X), model(X)
    assert out.dtype == expected.dtype == dtype
    torch.testing.assert_close(out, expected)
    with torch.no_grad():
        torch.testing.assert_close(call(X), model(X))


def test_evaluation_between_training_steps():
    model = resu.sparsify(Net(), 0.6, compile=False)
    call = torch.compile(model, backend=Backend(threshold=0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        call(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(call(X), model(X))


# -- Inductor ------------------------------------------------------------------------------------
def test_reduce_overhead_is_accepted():
    model = resu.sparsify(Net(), 0.6, mode="reduce-overhead", sparse_threshold=0.0)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(model(X), plain(X))


def test_dynamic_training_through_inductor():
    """The first variant of a dynamic graph, and later ones, are right for sizes unseen."""
    model = resu.sparsify(Net(), 0.6, sparse_threshold=1.0, dynamic=True)
    ctl = resu.controller(model)
    plain = copy.deepcopy(model)
    plain_ctl = resu.controller(plain)
    for phase in ("sparse", "dense"):
        ctl.set_phase(phase)
        plain_ctl.set_phase(phase)
        for rows in (4, 5, 17, 2):
            x = torch.randn(rows, 8)
            for m in (model, plain):
                m.zero_grad()
                m(x).square().mean().backward()
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
    assert counters["stats"]["unique_graphs"] == 1


def test_inductors_cache_is_used_again():
    """Masks and counts are no part of the code, so another model of the class finds it."""
    model = resu.sparsify(Net(), 0.6, sparse_threshold=1.0)

    def hits():
        found = counters["inductor"]["fxgraph_cache_hit"]
        return found + counters["aot_autograd"]["autograd_cache_hit"]

    with torch._inductor.config.patch(fx_graph_cache=True):
        model(X).sum().backward()
        before = hits()
        torch._dynamo.reset()
        other = resu.sparsify(Net(), 0.3, sparse_threshold=1.0)
        other(X).sum().backward()
    assert hits() > before
    mask = resu.controller(other).masks["second"]
    assert (other.second.grad[~mask] == 0).all()
    assert (other.second.grad[mask] != 0).any()


# -- on the GPU ----------------------------------------------------------------------------------
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_commits_reach_sparse_kernels_and_cuda_graphs_without_a_compilation(mode):
    """Padding of the rows changes with every mask; sizes and addresses may not."""
    model = nn.Sequential(nn.Linear(100, 60), nn.ReLU(), nn.Linear(60, 50)).cuda()
    resu.sparsify(model, 0.7, sparse_threshold=0.0, mode=mode)
    ctl = resu.controller(model)
    plain = copy.deepcopy(model)
    x = torch.randn(2, 100, device="cuda")

    def agrees():
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            for _ in range(3):  # the third call replays what the second has recorded
                torch.compiler.cudagraph_mark_step_begin()
                out = model(x).clone()
            torch.testing.assert_close(out, nn.Sequential.forward(plain, x))

    agrees()
    counters.clear()
    with no_recompile():
        for _ in range(3):
            with ctl.resurrect(init="normal", budget=0.3):
                pass
            resu.controller(plain).load_state_dict(ctl.state_dict())
            agrees()
        ctl.set_phase("dense")
        resu.controller(plain).set_phase("dense")
        agrees()
        ctl.set_phase("sparse")
        resu.controller(plain).set_phase("sparse")
        agrees()
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_training_on_the_gpu_is_that_of_eager_in_every_phase(mode):
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).cuda()
    resu.sparsify(model, 0.7, compile=False)
    eager = copy.deepcopy(model)
    ctl = resu.controller(model)
    ctl.compile_config = CompileConfig(mode=mode)
    ctl.compile()
    for m in (model, eager):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True)

        def train(m=m, optimizer=optimizer):
            for _ in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                with torch.autocast("cuda", torch.bfloat16):
                    loss = m(torch.randn(16, 64, device="cuda")).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        train()
        resu.controller(m).set_phase("dense")
        train()
        resu.controller(m).set_phase("sparse")
        for frozen in (True, False):
            # abandoned: a commit could decide a near tie the other way
            resu.controller(m).resurrect(freeze_active=frozen).__enter__()
            train()
            if not frozen:
                break
            resu.controller(m).abandon()
            train()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.02, atol=2e-3)
    ctl.abandon()
    for name, mask in ctl.masks.items():
        assert (model.get_parameter(name)[~mask] == 0).all()


# -- wrappers ------------------------------------------------------------------------------------
@pytest.mark.usefixtures("aot")
def test_regional_compilation_shares_one_graph_between_blocks():
    model = nn.Sequential(*[Net() for _ in range(4)])
    resu.sparsify(model, 0.6, compile=False)
    plain = copy.deepcopy(model)
    for block in model:
        block.compile(backend="resu", options={"sparse_threshold": 0.0})
    for _ in range(2):
        for m in (model, plain):
            m.zero_grad()
            m(X).square().sum().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        with torch.no_grad():
            torch.testing.assert_close(model(X), plain(X))
    # training and inference; the first block's input has other strides and needs no gradient
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.usefixtures("aot")
def test_copies_of_a_compiled_model_train_apart():
    model = resu.sparsify(Net(), 0.6, sparse_threshold=1.0)
    model(X).sum().backward()
    twin = copy.deepcopy(model)
    resu.controller(twin).compile()
    resu.controller(twin).set_phase("dense")
    model.zero_grad()
    twin.zero_grad()
    for m in (model, twin):
        m(X).square().sum().backward()
    mask = resu.controller(model).masks["second"]
    assert (model.second.grad[~mask] == 0).all()
    assert (twin.second.grad[~mask] != 0).any()


@pytest.mark.usefixtures("aot")
def test_gradients_of_a_compiled_model_in_a_compiled_step():
    """torch.compile around a whole step, forward, loss and all."""
    model = resu.sparsify(Net(), 0.6, compile=False)
    plain = copy.deepcopy(model)
    step = torch.compile(lambda x: F.mse_loss(model(x), x), backend="resu")
    step(X).backward()
    F.mse_loss(plain(X), X).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_force_eager_and_disable():
    model = resu.sparsify(Net(), 0.6, compile=False)
    mask = resu.controller(model).masks["second"]
    call = torch.compile(model, backend=Backend())
    with torch.compiler.set_stance("force_eager"):
        call(X).sum().backward()
    assert (model.second.grad[~mask] == 0).all()
    model.zero_grad()
    torch.compile(model, backend="resu", disable=True)(X).sum().backward()
    assert (model.second.grad[~mask] == 0).all()


# -- transformers --------------------------------------------------------------------------------
VOCABULARY = 40


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.usefixtures("aot")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_language_models_train_and_generate(make):
    model = make()
    eager = copy.deepcopy(model)
    resu.sparsify(model, 0.6, sparse_threshold=0.0)
    resu.sparsify(eager, 0.6, compile=False)
    ctl = resu.controller(model)
    assert not any("embed" in name or "lm_head" in name or "wte" in name for name in ctl.masks)
    ids = torch.randint(3, VOCABULARY, (2, 7))
    for m in (model, eager):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
        for _ in range(2):
            m(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    eager.load_state_dict(model.state_dict())
    model.eval()
    eager.eval()
    arguments = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        model.generate(ids[:1, :4], **arguments), eager.generate(ids[:1, :4], **arguments)
    )
    for name, mask in ctl.masks.items():
        assert (model.get_parameter(name)[~mask] == 0).all()
    assert counters["stats"]["unique_graphs"] >= 2


def test_generation_takes_the_sparse_kernels(monkeypatch):
    taken = set()
    packed_of = sparse_products.packed_of

    def watched(members, formats):
        taken.update((weight.name, transposed) for weight, transposed in members)
        return packed_of(members, formats)

    monkeypatch.setattr(sparse_products, "packed_of", watched)
    model = resu.sparsify(gpt2().eval(), 0.6, compile=False)
    with torch.no_grad():
        torch.compile(model, backend=Backend(threshold=0.0))(torch.ones(1, 3, dtype=torch.long))
    assert taken == {(name, True) for name in resu.controller(model).masks}  # Conv1D is [in, out]
