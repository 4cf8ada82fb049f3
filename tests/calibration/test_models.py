"""Models as they come: two of Hugging Face's, and a mixture of experts."""

import warnings

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.methods import Wanda
from tests.methods.test_wanda import reference_rows, reference_squares

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quiet():
    """No advice of transformers' in the output."""
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def llama():
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def batches(n=2):
    return [
        {
            "input_ids": torch.randint(50, (2, 7)),
            "attention_mask": torch.tensor([[1] * 7, [0, 0] + [1] * 5]),
        }
        for _ in range(n)
    ]


def inputs_of(model, names, data):
    """What forward pre-hooks see: module name -> inputs."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, kept=seen[name]: kept.append(args[0].detach())
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("make", "container", "transposed"),
    [(llama, "model.layers", False), (gpt2, "transformer.h", True)],
    ids=["llama", "gpt2"],
)
@pytest.mark.parametrize("cache", [True, False])
def test_masks_of_the_published_rule_block_by_block(make, container, transposed, cache):
    """The reference: all linear layers of a block pruned at once, then the next block."""
    model, data = make(), batches()
    reference = make().eval()
    reference.load_state_dict(model.state_dict())
    blocks = reference.get_submodule(container)
    expected = {}
    for index, block in enumerate(blocks):
        names = [
            f"{container}.{index}.{name}"
            for name, module in block.named_modules()
            if getattr(module, "weight", None) is not None and module.weight.dim() == 2
        ]
        for name, seen in inputs_of(reference, names, data).items():
            weight = reference.get_submodule(name).weight.data
            rows = weight.t() if transposed else weight
            mask = reference_rows(rows, reference_squares(seen), 0.5)
            expected[f"{name}.weight"] = mask.t() if transposed else mask
        for name in names:
            reference.get_submodule(name).weight.data[~expected[f"{name}.weight"]] = 0.0
    calls = []
    model.register_forward_pre_hook(lambda _module, _args: calls.append(1))
    given = data if cache else [{**batch, "use_cache": False} for batch in data]
    resu.sparsify(model, 0.5, method="wanda", calibration=given, compile=False)
    assert len(calls) == 1 + len(data)  # layers run alone, also with a cache of keys and values
    found = resu.controller(model).masks
    assert found.keys() == expected.keys()
    for name, mask in found.items():
        # sums of float32 in another order may turn two scores that are nearly equal
        assert (mask != expected[name]).float().mean() < 0.005
        assert torch.equal(
            mask.sum(0 if transposed else 1), expected[name].sum(0 if transposed else 1)
        )


@pytest.mark.parametrize("method", ["wanda", "wanda++", "dsnot"])
def test_patterns_of_both_orientations(method):
    for make, transposed in ((llama, False), (gpt2, True)):
        model = make()
        resu.sparsify(model, pattern="2:4", method=method, calibration=batches(), compile=False)
        for mask in resu.controller(model).masks.values():
            rows = mask.t() if transposed else mask
            assert (rows.reshape(-1, 4).sum(1) == 2).all()


def test_gpt2_by_magnitude_knows_its_inputs():
    model = gpt2()
    resu.sparsify(model, pattern="2:4", compile=False)
    for mask in resu.controller(model).masks.values():
        assert (mask.t().reshape(-1, 4).sum(1) == 2).all()


def test_named_blocks_of_llama():
    first, data = llama(), batches()
    second = llama()
    second.load_state_dict(first.state_dict())
    resu.sparsify(first, 0.5, method="wanda", calibration=data, compile=False)
    method = Wanda(blocks="model.layers")
    resu.sparsify(second, 0.5, method=method, calibration=data, compile=False)
    one, two = resu.controller(first).masks, resu.controller(second).masks
    assert all(torch.equal(mask, two[name]) for name, mask in one.items())


class Experts(nn.Module):
    """Stacked experts, the input of each in turn."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 2)
        self.up = nn.Parameter(torch.randn(2, 8, 12))
        self.down = nn.Parameter(torch.randn(2, 12, 8))

    def forward(self, x):
        share = self.router(x).softmax(-1)
        hidden = torch.einsum("btd,edh->ebth", x, self.up).relu()
        return torch.einsum("ebth,ehd,bte->btd", hidden, self.down, share)


def test_rows_of_every_expert():
    model = Experts()
    data = [torch.randn(2, 5, 8) for _ in range(2)]
    weight = model.up.detach().clone()
    resu.sparsify(model, 0.5, method="wanda", calibration=data, compile=False)
    masks = resu.controller(model).masks
    for expert in range(2):
        rows = reference_rows(weight[expert].t(), reference_squares(data), 0.5)
        assert torch.equal(masks["up"][expert], rows.t())
    assert (masks["down"].sum(1) == 6).all()
