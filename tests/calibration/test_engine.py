"""Block by block: order, replay, memory, and the state of the model."""

import weakref

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.calibration import engine
from resu_compile.calibration.data import Batches
from resu_compile.calibration.replay import find_chain
from resu_compile.errors import ArgumentError
from resu_compile.methods import DSnoT, Wanda, WandaPlus
from tests.methods.test_wanda import reference_rows, reference_squares


class Attention(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, mask=None, causal=True):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(
            nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        )
        return self.dropout(x + self.down(torch.relu(self.up(x))))


class GPT(nn.Module):
    def __init__(self, n=3, vocab=11, dim=8):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.stem = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Attention(dim) for _ in range(n))
        self.head = nn.Linear(dim, vocab)

    def forward(self, tokens):
        x = self.stem(self.embed(tokens))
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        for block in self.blocks:
            x = block(x, mask=mask, causal=False)
        return self.head(x)


def tokens(n=3):
    return [torch.randint(11, (2, 5)) for _ in range(n)]


def copies(model, n):
    """``n`` models of the same class and values."""
    made = []
    for _ in range(n):
        other = type(model)()
        other.load_state_dict(model.state_dict())
        made.append(other)
    return made


def masks_of(model, method, calibration, **arguments):
    resu.sparsify(model, method=method, calibration=calibration, compile=False, **arguments)
    return resu.controller(model).masks


METHODS = [Wanda(), WandaPlus(rounds=2, lr=1e-3, samples=2), DSnoT()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_batches_and_a_loop_give_the_same(method):
    data = tokens()
    first, second = copies(GPT(), 2)

    def forward_loop(model):
        for batch in data:
            model(batch)

    one, two = masks_of(first, method, data), masks_of(second, method, forward_loop)
    assert one.keys() == two.keys()
    assert len(one) == 14
    assert all(torch.equal(mask, two[name]) for name, mask in one.items())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_each_block_sees_what_the_pruned_ones_before_it_give():
    """Against a loop of one's own: run all, look at one weight group, zero it, run all again."""
    model, data = GPT(), tokens()
    reference = copies(model, 1)[0].eval()
    parts = [
        ["stem"],
        *([f"blocks.{i}.{n}" for n in ("qkv", "out", "up", "down")] for i in range(3)),
    ]
    parts.append(["head"])
    expected = {}
    for names in parts:
        seen = {name: [] for name in names}
        handles = [
            reference.get_submodule(name).register_forward_pre_hook(
                lambda _m, args, kept=seen[name]: kept.append(args[0].detach())
            )
            for name in names
        ]
        for batch in data:
            reference(batch)
        for handle in handles:
            handle.remove()
        for name in names:
            weight = reference.get_submodule(name).weight
            mask = reference_rows(weight.detach(), reference_squares(seen[name]), 0.5)
            expected[f"{name}.weight"] = mask
            weight.data[~mask] = 0.0
    found = masks_of(model, "wanda", data, sparsity=0.5)
    assert found.keys() == expected.keys()
    assert all(torch.equal(mask, expected[name]) for name, mask in found.items())


# -- replay --------------------------------------------------------------------------------------
def count_calls(model):
    """Forward calls of the model and of each block, as they happen."""
    counts = dict.fromkeys(["model", *range(len(model.blocks))], 0)

    def counter(key):
        def count(_module, _args):
            counts[key] += 1

        return count

    model.register_forward_pre_hook(counter("model"))
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(counter(index))
    return counts


def test_blocks_of_a_chain_run_alone():
    model = GPT()
    counts = count_calls(model)
    masks_of(model, "wanda", tokens(4), targets="blocks")
    # the trial and the capture at the first block
    assert counts["model"] == 1 + 4
    # trial, trial on its own, capture (stopped there), gather, output for the next
    assert counts[0] == 1 + 1 + 4 + 4 + 4
    assert counts[1] == 1 + 1 + 4 + 4
    assert counts[2] == 1 + 1 + 4


def test_a_dense_block_between_is_run_as_well():
    first, second = copies(GPT(), 2)
    data = tokens()
    loop = Batches(data)
    dense = ["blocks.1", "stem", "head"]
    counts = count_calls(first)
    one = masks_of(first, "wanda", data, exclude=dense)
    assert counts["model"] == 1 + 3
    two = masks_of(second, "wanda", lambda model: loop(model), exclude=dense)
    assert len(one) == 8
    assert all(torch.equal(mask, two[name]) for name, mask in one.items())


def test_batches_of_several_forms_run_whole():
    class Masked(GPT):
        def forward(self, tokens, mask=None):
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x) if mask is None else block(x, mask=mask, causal=False)
            return self.head(x)

    first, second = Masked(), Masked()
    second.load_state_dict(first.state_dict())
    mask = torch.ones(5, 5, dtype=torch.bool)
    data = [(tokens(1)[0], mask), tokens(1)[0]]
    loop = Batches(data)
    masks = masks_of(first, "wanda", data, targets="blocks")
    others = masks_of(second, "wanda", lambda model: loop(model), targets="blocks")
    assert all(torch.equal(mask, others[name]) for name, mask in masks.items())


class Cache:
    """Something that blocks leave their states in, as generation with keys and values does."""

    def __init__(self):
        self.states = []

    def __deepcopy__(self, memo):
        made = type(self)()
        made.states = [state.clone() for state in self.states]
        return made


class NoCopy(Cache):
    def __deepcopy__(self, memo):
        raise TypeError("no copies")


class CachedBlock(Attention):
    def forward(self, x, cache, shared=False):
        cache.states.append(x)
        return super().forward(cache.states[0] + x if shared else x)


class Cached(GPT):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList(CachedBlock() for _ in range(3))

    def forward(self, tokens):
        x = self.embed(tokens)
        cache = NoCopy() if self.kind == "no copy" else Cache()
        for block in self.blocks:
            x = block(x, cache, shared=self.kind == "shared")
        return self.head(x)


@pytest.mark.parametrize(
    ("kind", "alone"), [("left alone", True), ("shared", False), ("no copy", False)]
)
def test_a_cache_that_blocks_write_to(kind, alone):
    first, second = Cached(kind), Cached(kind)
    second.load_state_dict(first.state_dict())
    data = tokens()
    loop = Batches(data)
    counts = count_calls(first)
    masks = masks_of(first, "wanda", data, targets="blocks")
    assert counts["model"] == (1 + 3 if alone else 1 + 3 * 3)
    others = masks_of(second, "wanda", lambda model: loop(model), targets="blocks")
    assert all(torch.equal(mask, others[name]) for name, mask in masks.items())


class NoChain(GPT):
    """``kind`` says in which way its blocks do not simply follow one another."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.cache = []

    def forward(self, tokens):
        x = start = self.stem(self.embed(tokens))
        for index, block in enumerate(self.blocks):
            if self.kind == "sum":
                x = block(x) + start
            elif self.kind == "in place":
                x = block(x)
                x += start
            elif self.kind == "other constants":
                x = block(x, causal=index > 0)
            elif self.kind == "new arguments":
                x = block(x, mask=torch.ones(5, 5, dtype=torch.bool), causal=False)
            elif self.kind == "twice":
                x = block(block(x))
            elif self.kind == "context":
                with torch.autocast("cpu", torch.bfloat16):
                    x = block(x)
        if self.kind == "backwards":
            for block in reversed(self.blocks):
                x = block(x)
        return self.head(x)


KINDS = ["sum", "in place", "other constants", "new arguments", "twice", "context", "backwards"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_chain_runs_whole_and_gives_the_same(kind):
    data = tokens(2)
    first, second = NoChain(kind), NoChain(kind)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert find_chain(list(first.eval().blocks), first, data[0]) is None
    loop = Batches(data)
    counts = count_calls(first)
    one, two = masks_of(first, "wanda", data), masks_of(second, "wanda", lambda m: loop(m))
    assert counts["model"] == 1 + 5 * 2
    assert all(torch.equal(mask, two[name]) for name, mask in one.items())


def test_a_write_that_changes_nothing_in_the_first_batch():
    class Sometimes(GPT):
        def forward(self, tokens):
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x)
                x += (tokens > 5).unsqueeze(-1)
            return self.head(x)

    first, second = Sometimes(), Sometimes()
    second.load_state_dict(first.state_dict())
    data = [torch.zeros(2, 5, dtype=torch.long), torch.full((2, 5), 10)]
    loop = Batches(data)
    counts = count_calls(first)
    masks = masks_of(first, "wanda", data, targets="blocks")
    assert counts["model"] == 1 + 3 * 2
    others = masks_of(second, "wanda", lambda model: loop(model), targets="blocks")
    assert all(torch.equal(mask, others[name]) for name, mask in masks.items())


# -- memory --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["batches", "loop"])
def test_activations_of_one_block_at_a_time(kind, monkeypatch):
    """While a block is pruned, no input or output of any other block is alive."""
    model, data = GPT(n=4), tokens(3)
    alive = {index: [] for index in range(4)}
    for index, block in enumerate(model.blocks):
        block.up.register_forward_hook(
            lambda _m, args, out, i=index: alive[i].extend(map(weakref.ref, (args[0], out)))
        )
    seen = []
    prune = Wanda.prune

    def look(self, block):
        found = prune(self, block)
        seen.append(sum(ref() is not None for refs in alive.values() for ref in refs))
        return found

    monkeypatch.setattr(Wanda, "prune", look)
    loop = Batches(data)
    masks_of(model, "wanda", data if kind == "batches" else lambda m: loop(m))
    assert len(seen) == 6
    assert sum(len(refs) for refs in alive.values()) > 0
    assert seen == [0] * 6


def test_stored_inputs_are_those_of_one_block(monkeypatch):
    model, data = GPT(n=4), tokens(3)
    sizes = []
    advance = engine.Replay.advance

    def measure(self, module):
        advance(self, module)
        tensors = [leaf for leaves, _ in self._inputs for leaf in leaves if torch.is_tensor(leaf)]
        sizes.append((len(tensors), sum(t.numel() for t in tensors)))

    monkeypatch.setattr(engine.Replay, "advance", measure)
    masks_of(model, "wanda", data)
    # a state (2, 5, 8) and a mask (5, 5) for each of three batches, before each later block
    assert sizes == [(6, 3 * (80 + 25))] * 3


def test_an_error_in_a_later_block_undoes_what_was_trained():
    model, runs = GPT(), []

    def forward_loop(net):
        runs.append(net)
        if len(runs) == 4:
            raise KeyboardInterrupt
        net(tokens(1)[0])

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        masks_of(model, WandaPlus(lr=0.1), forward_loop)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    masks_of(model, "magnitude", None)  # and it has no controller


# -- methods of one's own --------------------------------------------------------------------------
class LoudestInputs:
    """Keeps the inputs of the highest mean square, the same in each row."""

    blocks = None

    def __init__(self, shape=lambda mask: mask):
        self.shape = shape

    def prune(self, block):
        found = block.statistics()
        scores = {n: found[n].square.expand(w.shape) for n, w in block.weights.items()}
        masks = block.lowest_masks(scores, {n: s.layout for n, s in found.items()})
        return {name: self.shape(mask) for name, mask in masks.items()}


def test_a_method_of_ones_own():
    model, x = nn.Linear(6, 4), torch.tensor([[3.0, 0.0, 2.0, 1.0, 5.0, 4.0]])
    masks = masks_of(model, LoudestInputs(), [x], sparsity=0.5)
    assert masks["weight"].int().tolist() == [[1, 0, 0, 0, 1, 1]] * 4


@pytest.mark.parametrize("shape", [lambda mask: mask[:1], lambda mask: mask.float()])
def test_masks_that_do_not_fit_are_named(shape):
    model = nn.Linear(6, 4)
    before = model.weight.detach().clone()
    with pytest.raises(ArgumentError, match=r"^method: .* \(4, 6\) from LoudestInputs for weight"):
        masks_of(model, LoudestInputs(shape), [torch.ones(1, 6)])
    assert torch.equal(model.weight.detach(), before)


# -- the state of the model ------------------------------------------------------------------------
def test_modes_gradients_and_statistics_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 4))
    model[1].eval()
    model[0].weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in model.modules()]
    mean = model[1].running_mean.clone()
    inside = []

    def forward_loop(net):
        inside.append((net.training, torch.is_grad_enabled()))
        net(torch.randn(5, 8))

    masks_of(model, "wanda", forward_loop)
    assert inside == [(False, False)]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[1].running_mean, mean)
    assert all((p.grad == 1).all() for p in (model[0].bias, model[3].bias))
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert torch.is_grad_enabled()


def test_calibration_compiles_nothing():
    from torch._dynamo.utils import counters

    model, data = GPT(2), tokens(2)
    resu.sparsify(model, 0.2)
    counters.clear()
    resu.controller(model).prune(0.5, method="wanda", calibration=data)
    resu.controller(model).prune(0.6, method="wanda", calibration=lambda net: net(data[0]))
    assert not counters["stats"]
    masks = resu.controller(model).masks
    assert ((~masks["blocks.0.down.weight"]).sum(1) == int(16 * 0.6)).all()


def test_weights_under_mixed_names_and_tied_ones():
    model = GPT(2)
    model.blocks[1].out.weight = model.blocks[0].out.weight
    masks = masks_of(model, "wanda", tokens(), tied="mask_all")
    assert "blocks.0.out.weight" in masks
    assert "blocks.1.out.weight" not in masks
    assert ((~masks["blocks.0.out.weight"]).sum(1) == int(8 * 0.7)).all()


def test_two_runs_are_the_same_to_the_bit():
    first, second = copies(GPT(), 2)
    data = tokens()
    one, two = masks_of(first, "dsnot", data), masks_of(second, "dsnot", data)
    assert all(torch.equal(mask, two[name]) for name, mask in one.items())
