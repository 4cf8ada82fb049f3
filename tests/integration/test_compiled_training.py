"""Training ends in the same weights, whichever way the same model runs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import resu_compile as resu
from tests.compiling import Backend, eager_masking, no_recompile


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


# -- models: a weight reached in every way -------------------------------------------------------
class Mlp(nn.Module):
    shape = (6, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.second = nn.Parameter(torch.randn(12, 8) * 0.3)
        self.third = nn.Linear(8, 4)

    def forward(self, x):
        return self.third(F.gelu(self.norm(self.first(x))) @ self.second)


class Convolutions(nn.Module):
    shape = (2, 3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1),
            nn.ConvTranspose2d(8, 4, 2, stride=2),
        )

    def forward(self, x):
        return self.body(x).mean((2, 3))


class Attention(nn.Module):
    shape = (2, 5, 8)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.memory = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        x = self.layer(x)
        return self.memory(x)[0][:, -1]  # Dynamo leaves an LSTM to eager mode


class Experts(nn.Module):
    shape = (6, 8)

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, 8) * 0.3)
        self.down = nn.Parameter(torch.randn(3, 8, 12) * 0.3)
        self.mix = nn.Parameter(torch.randn(8, 8) * 0.3)
        self.fused = nn.Linear(8, 24)

    def forward(self, x):
        hidden = torch.bmm(x.expand(3, -1, -1), self.up.mT).tanh()
        out = torch.einsum("enh,edh->nd", hidden, self.down)
        q, k, v = F.linear(out, self.fused.weight, self.fused.bias).chunk(3, -1)
        return (self.mix.t() @ (q * k).t()).t() + F.linear(v, self.fused.weight[:8])


class Checkpointed(Mlp):
    use_reentrant = False

    def body(self, x):
        return F.gelu(self.norm(self.first(x))) @ self.second

    def forward(self, x):
        return self.third(checkpoint(self.body, x, use_reentrant=self.use_reentrant))


class CheckpointedReentrant(Checkpointed):
    use_reentrant = True


class Broken(Mlp):
    def forward(self, x):
        x = F.gelu(self.norm(self.first(x)))
        torch._dynamo.graph_break()
        return self.third(x @ self.second)


class Regularised(Mlp):
    """One weight is used inside and, by ``train``, outside of the compiled call."""


MODELS = [
    Mlp,
    Convolutions,
    Attention,
    Experts,
    Checkpointed,
    CheckpointedReentrant,
    Broken,
    Regularised,
]


# -- training ------------------------------------------------------------------------------------
def train(model, call, optimizer, steps, *, seed, autocast=None):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(model.shape, generator=generator).to(dtype).requires_grad_()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = call(x).float().square().mean()
        if isinstance(model, Regularised):
            loss = loss + 0.1 * model.second.square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def through_all_phases(model, call, *, steps=2, autocast=None):
    """Final weights after SPARSE, DENSE, SPARSE, RESU frozen, RESU unfrozen, SPARSE."""
    ctl = resu.controller(model)
    eps = 1e-3 if next(model.parameters()).dtype == torch.float16 else 1e-8  # what fp16 can hold
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=eps)

    def run(seed):
        train(model, call, optimizer, steps, seed=seed, autocast=autocast)

    run(0)
    ctl.set_phase("dense")
    run(1)
    ctl.set_phase("sparse")
    run(2)
    for seed, freeze_active in ((3, True), (5, False)):
        options = {"init": "normal", "budget": 0.2, "adam_eps": eps}
        with ctl.resurrect(lr=1e-2, freeze_active=freeze_active, **options):
            run(seed)
        run(seed + 1)
    for name, mask in ctl.masks.items():
        weight = model.get_parameter(name)
        assert (weight[~mask] == 0).all(), name
        for value in optimizer.state[weight].values():
            if value.shape == weight.shape:
                assert (value[~mask] == 0).all(), name
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def make(cls, dtype=torch.float32):
    torch.manual_seed(0)
    return resu.sparsify(cls().to(dtype), 0.6, compile=False)


def assert_same(weights, expected, **tolerance):
    for name, value in weights.items():
        torch.testing.assert_close(
            value, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


@pytest.mark.parametrize("cls", MODELS)
def test_graphs_end_in_the_weights_of_eager(cls):
    model = make(cls)
    eager = copy.deepcopy(model)
    backend = Backend()
    weights = through_all_phases(model, torch.compile(model, backend=backend))
    assert backend.graphs
    assert_same(weights, through_all_phases(eager, eager), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [Mlp, Convolutions, Experts])
def test_every_variant_compiles_once(cls):
    model = make(cls)
    backend = Backend()
    call = torch.compile(model, backend=backend, fullgraph=True)
    through_all_phases(model, call)
    assert backend.counts == [3]
    with no_recompile():
        through_all_phases(model, call)
    assert backend.counts == [3]


def test_gradients_are_masked_in_graphs_wherever_they_can_be(monkeypatch):
    with eager_masking(monkeypatch) as masked:
        for cls in (Mlp, Convolutions, Experts, Checkpointed, Broken):
            model = make(cls)
            call = torch.compile(model, backend=Backend())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            train(model, call, optimizer, 2, seed=0)
        assert masked == []
        model = make(Regularised)
        call = torch.compile(model, backend=Backend())
        train(model, call, torch.optim.SGD(model.parameters(), lr=0.1), 2, seed=0)
    assert masked == [model.second.shape] * 2


# one Inductor compilation for each variant is what these cost
def test_inductor_ends_in_the_weights_of_eager_and_of_other_backends():
    torch.manual_seed(0)
    start = Mlp()
    results = {}
    for name in ("resu", "resu as a string", "inductor", "aot_eager", "eager"):
        torch._dynamo.reset()
        model = copy.deepcopy(start)
        options = {"sparsity": 0.6, "sparse_threshold": 1.0}
        if name == "resu":
            call = resu.sparsify(model, compile=True, fullgraph=True, **options)
        elif name == "resu as a string":
            call = torch.compile(model, backend="resu", options=options, fullgraph=True)
            with torch.no_grad():
                call(torch.zeros(model.shape))
        else:
            resu.sparsify(model, compile=False, **options)
            call = torch.compile(model, backend=name) if name != "eager" else model
        counters.clear()
        results[name] = through_all_phases(model, call)
        if name.startswith("resu"):
            assert counters["stats"]["unique_graphs"] == 1, counters["stats"]
    for name, weights in results.items():
        assert_same(weights, results["eager"], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes(dtype):
    model = make(Mlp, dtype)
    eager = copy.deepcopy(model)
    weights = through_all_phases(model, torch.compile(model, backend=Backend()))
    tolerance = 1e-6 if dtype is torch.float64 else 0.05  # a few steps of Adam amplify rounding
    assert_same(weights, through_all_phases(eager, eager), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = make(Mlp)
    eager = copy.deepcopy(model)
    call = torch.compile(model, backend=Backend())
    weights = through_all_phases(model, call, autocast=dtype)
    expected = through_all_phases(eager, eager, autocast=dtype)
    assert_same(weights, expected, rtol=0.05, atol=0.05)


def test_accumulated_and_clipped_gradients(monkeypatch):
    model = make(Mlp)
    eager = copy.deepcopy(model)
    call = torch.compile(model, backend=Backend())
    with eager_masking(monkeypatch) as masked:
        for m, run in ((model, call), (eager, eager)):
            optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
            for step in range(6):
                x = torch.randn(m.shape, generator=torch.Generator().manual_seed(step))
                run(x).square().mean().backward()
                if step % 3 == 2:
                    nn.utils.clip_grad_norm_(m.parameters(), 0.1)
                    optimizer.step()
                    optimizer.zero_grad()
            if m is model:
                assert masked == []
    assert_same(dict(model.named_parameters()), dict(eager.named_parameters()))
