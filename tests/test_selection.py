import pytest
import torch
from torch import nn

from resu_compile.config import SparsityConfig
from resu_compile.errors import ArgumentError, WeightError
from resu_compile.selection import check_values, matches, named_weights, select


class Small(nn.Module):
    """One of each kind of parameter that a default leaves dense, and three that it prunes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.position = nn.Parameter(torch.randn(1, 4, 8))
        self.conv = nn.Conv1d(8, 8, 3)
        self.norm = nn.LayerNorm((4, 8))
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.lm_head = nn.Linear(8, 10)

    def forward(self, tokens):
        x = self.norm(self.embed(tokens) + self.position)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            x = layer(x).relu()
        return self.lm_head(x)


def names(model, captured=None, **arguments):
    chosen = select(model, SparsityConfig(**arguments), captured).chosen
    return [weight.name for weight in chosen]


def test_defaults_and_their_reasons():
    selection = select(Small(), SparsityConfig())
    assert [w.name for w in selection.chosen] == [
        "conv.weight",
        "layers.0.weight",
        "layers.1.weight",
    ]
    reasons = selection.skipped
    assert "embedding" in reasons["embed.weight"]
    assert "additive table" in reasons["position"]
    assert reasons["norm.weight"] == "norm"
    assert "vector" in reasons["layers.0.bias"]
    assert "excluded by ('*lm_head*',)" in reasons["lm_head.weight"]
    every = {name for name, _ in Small().named_parameters()}
    assert set(reasons) | {w.name for w in selection.chosen} == every


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("layers.1.weight", ["layers.1.weight"]),
        ("layers", ["layers.0.weight", "layers.1.weight"]),
        ("layers.0", ["layers.0.weight"]),
        ("layers.*", ["layers.0.weight", "layers.1.weight"]),
        ("*.weight", ["conv.weight", "layers.0.weight", "layers.1.weight"]),
        (["conv", "layers.?.weight"], ["conv.weight", "layers.0.weight", "layers.1.weight"]),
        (lambda _name, p: p.dim() == 3, ["conv.weight"]),
        (lambda name, _p: "layers" in name, ["layers.0.weight", "layers.1.weight"]),
    ],
)
def test_targets_choose_among_the_weights(targets, expected):
    assert names(Small(), targets=targets) == expected


@pytest.mark.parametrize(
    "name", ["embed.weight", "position", "norm.weight", "layers.0.bias", "lm_head.weight"]
)
def test_a_full_name_takes_what_is_dense_by_default(name):
    assert names(Small(), targets=[name, "conv"]) == sorted([name, "conv.weight"], key=_order)


def _order(name):
    return [n for n, _ in Small().named_parameters()].index(name)


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("layers.0", ["conv.weight", "layers.1.weight", "lm_head.weight"]),
        (["*.0.*", "conv"], ["layers.1.weight", "lm_head.weight"]),
        (lambda _name, p: p.dim() == 3, ["layers.0.weight", "layers.1.weight", "lm_head.weight"]),
        (None, ["conv.weight", "layers.0.weight", "layers.1.weight", "lm_head.weight"]),
    ],
)
def test_exclude(exclude, expected):
    assert names(Small(), exclude=exclude) == expected


@pytest.mark.parametrize("argument", ["targets", "exclude"])
def test_a_pattern_that_matches_nothing(argument):
    with pytest.raises(
        ArgumentError, match=rf"^{argument}: .* but 'head' matches none; parameters: "
    ):
        names(Small(), **{argument: ["layers", "head"]})
    with pytest.raises(ArgumentError, match=r"^overrides: .* but 'head' matches none"):
        names(Small(), overrides={"layers": 0.5, "head": 0.5})


@pytest.mark.parametrize("argument", ["targets", "overrides"])
def test_a_pattern_that_reaches_only_what_is_left_out(argument):
    value = ["conv", "norm"] if argument == "targets" else {"norm": 0.5}
    with pytest.raises(ArgumentError, match=rf"^{argument}: expected 'norm' .* norm.weight: norm"):
        names(Small(), **{argument: value})


def test_the_default_exclude_may_match_nothing():
    assert names(nn.Linear(4, 4)) == ["weight"]


@pytest.mark.parametrize(
    "model",
    [nn.LayerNorm(4), nn.Sequential(), nn.Embedding(4, 4), nn.BatchNorm2d(3), nn.PReLU(3)],
    ids=lambda m: type(m).__name__,
)
def test_a_model_without_matmul_weights(model):
    with pytest.raises(
        ArgumentError, match=rf"^model: expected at least one .* {type(model).__name__}"
    ):
        names(model)


def test_every_module_that_multiplies():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2, add_bias_kv=True),
            "lstm": nn.LSTM(4, 4),
            "bilinear": nn.Bilinear(2, 3, 4),
            "conv": nn.ConvTranspose2d(2, 2, 2),
            "batch_norm": nn.BatchNorm2d(2),
        }
    )
    assert names(model) == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "bilinear.weight",
        "conv.weight",
    ]
    assert select(model, SparsityConfig()).skipped["attention.bias_k"] == "bias"


def test_bare_parameters_are_weights():
    model = nn.Module()
    model.experts = nn.Parameter(torch.randn(3, 4, 4))
    model.projection = nn.Parameter(torch.randn(4, 4))
    assert names(model) == ["experts", "projection"]


def test_a_captured_graph_decides():
    model = Small()
    captured = {id(model.position): "matmul", id(model.conv.weight): None}
    assert names(model, captured) == ["position", "layers.0.weight", "layers.1.weight"]


# -- what no mask can be put on ----------------------------------------------------------------
def integer():
    return nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("parameter", "text"),
    [
        (integer(), "torch.int8 is no floating point"),
        (nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), False), "float8_e4m3fn"),
        (nn.Parameter(torch.ones(4, 4, dtype=torch.complex64)), "torch.complex64"),
        (nn.Parameter(torch.ones(4, 4).to_sparse()), "sparse_coo"),
        (nn.Parameter(torch.ones(0, 4)), "no elements"),
        (nn.Parameter(torch.ones(())), "a single number"),
        (nn.UninitializedParameter(), "run the model once"),
    ],
    ids=["int8", "float8", "complex", "coo", "empty", "scalar", "lazy"],
)
def test_an_unusable_parameter(parameter, text):
    model = nn.Linear(4, 4)
    model.strange = parameter
    selection = select(model, SparsityConfig())
    assert text in selection.skipped["strange"]
    with pytest.raises(
        WeightError, match=rf"^strange: expected a weight that can be pruned, .*{text}"
    ):
        names(model, targets="strange")
    del model.weight
    with pytest.raises(
        ArgumentError, match=f"^model: expected at least one floating-point.*{text}"
    ):
        names(model)


def test_an_embedding_with_sparse_gradients_is_refused():
    with pytest.raises(WeightError, match="sparse gradients"):
        names(nn.Embedding(4, 4, sparse=True), targets="weight")


# -- ties --------------------------------------------------------------------------------------
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.c = nn.Linear(4, 4)
        self.b.weight = self.a.weight


class TiedToEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_skipped_or_masked_once():
    assert names(Tied()) == ["c.weight"]
    assert "tied to b.weight" in select(Tied(), SparsityConfig()).skipped["a.weight"]
    assert names(Tied(), tied="mask_all") == ["a.weight", "c.weight"]
    assert names(Tied(), tied="mask_all", targets="b") == ["a.weight"]


def test_a_module_with_two_names_is_tied():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"] = model["a"]
    assert names(model) == ["c.weight"]
    assert names(model, tied="mask_all") == ["a.weight", "c.weight"]


def test_an_embedding_tie_stays_dense_unless_named():
    assert names(TiedToEmbedding()) == ["body.weight"]
    assert names(TiedToEmbedding(), tied="mask_all") == ["body.weight"]
    named = {"targets": ["head.weight"], "tied": "mask_all"}
    assert names(TiedToEmbedding(), **named) == ["embed.weight"]
    with pytest.raises(ArgumentError, match=r"^targets: .*tied to head.weight \(tied='skip'\)"):
        names(TiedToEmbedding(), targets="head.weight")


@pytest.mark.parametrize(
    "view", [lambda w: w.detach(), lambda w: w.detach().t()], ids=["same", "t"]
)
def test_two_tensors_over_one_memory_are_tied_and_cannot_be_masked(view):
    model = Tied()
    model.b.weight = nn.Parameter(view(model.a.weight))
    assert names(model) == ["c.weight"]
    assert names(model, tied="mask_all") == ["c.weight"]
    skipped = select(model, SparsityConfig(tied="mask_all")).skipped
    assert "shares memory with b.weight" in skipped["a.weight"]


def test_slices_of_one_buffer_are_weights_of_their_own():
    buffer = torch.randn(2, 4, 4)
    model = nn.ParameterList([nn.Parameter(buffer[0]), nn.Parameter(buffer[1])])
    assert names(model) == ["0", "1"]


def test_named_weights_lists_every_parameter_once():
    found = named_weights(Tied())
    assert [w.name for w in found] == ["a.weight", "a.bias", "b.bias", "c.weight", "c.bias"]
    assert found[0].names == ("a.weight", "b.weight")
    assert found[0].one_tensor


# -- values ------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_name_the_weight(value, dtype):
    model = Small().to(dtype)
    with torch.no_grad():
        model.layers[1].weight[3, 2] = value
    with pytest.raises(WeightError, match="^layers.1.weight: expected finite values"):
        check_values(select(model, SparsityConfig()).chosen)


def test_meta_and_inference_weights_are_refused():
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(WeightError, match="^weight: .* meta device"):
        check_values(select(model, SparsityConfig()).chosen)
    with torch.inference_mode():
        model = nn.Linear(4, 4)
    with pytest.raises(WeightError, match="^weight: .*inference_mode"):
        check_values(select(model, SparsityConfig()).chosen)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("fc", "fc.weight", True),
        ("fc", "fc2.weight", False),
        ("f*", "fc.weight", True),
        ("blocks.*.fc", "blocks.3.fc.weight", True),
        ("fc.weight", "fc.weight", True),
        ("weight", "fc.weight", False),
        ("FC", "fc.weight", False),
    ],
)
def test_matches(pattern, name, expected):
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    ("name", "word"),
    [("A_log", "log"), ("relative_position_bias_table", "position"), ("scale", "scale")],
)
def test_bare_tables_and_scales_stay_dense(name, word):
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(4, 4))
    setattr(model, name, nn.Parameter(torch.randn(4, 4)))
    chosen = select(model, SparsityConfig())
    assert [weight.name for weight in chosen.chosen] == ["weight"]
    assert repr(word) in chosen.skipped[name]
    assert select(model, SparsityConfig(targets=(name,))).chosen[0].name == name
