"""Folding a commit into a graph: by its text, its numbers and what it reports."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from resu_compile.errors import ArgumentError, WeightError
from resu_compile.kernels.effective_weight import effective_weight
from resu_compile.kernels.packed_weight import pack_weight, unpack_weight
from resu_compile.passes.base import PassReport
from resu_compile.passes.fold_commit import PACKED, fold_commit


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.head(self.fc(x).relu())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8, bias=False)
        self.b = nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


def graph_of(model, *args):
    torch.manual_seed(0)
    return torch.export.export(model.eval(), args, strict=False).module()


def mask_of(model, name, density=0.25):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(model.get_parameter(name).shape, generator=generator) < density


def text(gm):
    """One line a node, without guards: ``name = target(args)``."""
    lines = []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            lines.append(f"{node.name} = {node.target}")
        elif node.op == "call_function":
            lines.append(f"{node.name} = {node.target}({', '.join(map(str, node.args))})")
    return "\n".join(lines)


def test_pack_by_text():
    model = Model()
    gm = graph_of(model, torch.randn(2, 16))
    out, report = fold_commit(gm, {"fc.weight": mask_of(model, "fc.weight")})
    assert text(out) == (
        "fc_weight_values = fc.weight_values\n"
        "fc_weight_bits = fc.weight_bits\n"
        "unpack_weight_default = resu_compile.unpack_weight.default"
        "(fc_weight_values, fc_weight_bits, [8, 16])\n"
        "fc_bias = fc.bias\n"
        "head_weight = head.weight\n"
        "linear = aten.linear.default(x, unpack_weight_default, fc_bias)\n"
        "relu = aten.relu.default(linear)\n"
        "linear_1 = aten.linear.default(relu, head_weight)"
    )
    assert list(report.rewritten) == ["fc.weight"]
    assert "of 128 active" in report.rewritten["fc.weight"]
    assert out.meta[PACKED] == {"fc.weight": ("fc.weight_values", "fc.weight_bits")}
    assert set(out.state_dict()) == {
        "fc.weight_values",
        "fc.weight_bits",
        "fc.bias",
        "head.weight",
    }


def test_values_of_new_nodes_are_known():
    model = Model()
    gm = graph_of(model, torch.randn(2, 16))
    mask = mask_of(model, "fc.weight")
    out, _ = fold_commit(gm, {"fc.weight": mask})
    vals = {node.name: node.meta.get("val") for node in out.graph.nodes}
    assert vals["fc_weight_values"].shape == (int(mask.sum()),)
    assert vals["fc_weight_bits"].dtype == torch.uint8
    assert vals["unpack_weight_default"].shape == (8, 16)


@pytest.mark.parametrize("pack", [True, False])
def test_numbers_and_purity(pack):
    model = Model()
    gm = graph_of(model, torch.randn(2, 16))
    before, code = {k: v.clone() for k, v in gm.state_dict().items()}, gm.code
    masks = {name: mask_of(model, name) for name in ("fc.weight", "head.weight")}
    out, _ = fold_commit(gm, masks, pack=pack)
    assert gm.code == code
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())
    x = torch.randn(2, 16)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
        assert torch.equal(out(x), model(x))


def test_dense_by_text():
    model = Model()
    gm = graph_of(model, torch.randn(2, 16))
    mask = mask_of(model, "fc.weight")
    out, report = fold_commit(gm, {"fc.weight": mask}, pack=False)
    assert text(out) == text(gm)
    assert not out.fc.weight[~mask].any()
    assert report.rewritten == {}
    assert "dense was asked for" in report.skipped["fc.weight"]


def test_dense_shares_a_weight_that_is_zero_already():
    model = Model()
    mask = mask_of(model, "fc.weight")
    with torch.no_grad():
        model.fc.weight.mul_(mask)
    gm = graph_of(model, torch.randn(2, 16))
    out, _ = fold_commit(gm, {"fc.weight": mask}, pack=False)
    assert out.fc.weight is gm.fc.weight


def test_larger_packed_form_stays_dense():
    model = Model()
    gm = graph_of(model, torch.randn(2, 16))
    out, report = fold_commit(gm, {"fc.weight": torch.ones(8, 16, dtype=torch.bool)})
    assert "unpack_weight" not in text(out)
    assert report.skipped["fc.weight"] == (
        "dense: packed form of 528 bytes is not smaller than 512 bytes"
    )


def test_all_pruned():
    model = Model()
    gm = graph_of(model, torch.randn(2, 16))
    out, report = fold_commit(gm, {"fc.weight": torch.zeros(8, 16, dtype=torch.bool)})
    assert report.rewritten["fc.weight"] == "packed, 0 of 128 active, 16 of 512 bytes"
    with torch.no_grad():
        model.fc.weight.zero_()
        x = torch.randn(2, 16)
        assert torch.equal(out(x), model(x))


@pytest.mark.parametrize("name", ["a.weight", "b.weight"])
@pytest.mark.parametrize("pack", [True, False])
def test_tied_names_share_one_weight(name, pack):
    model = Tied()
    gm = graph_of(model, torch.randn(2, 8))
    mask = mask_of(model, name)
    out, _ = fold_commit(gm, {name: mask}, pack=pack)
    stored = {name} if not pack else {f"{name}_values", f"{name}_bits"}
    assert set(out.state_dict()) == stored
    with torch.no_grad():
        model.a.weight.mul_(mask)
        x = torch.randn(2, 8)
        assert torch.equal(out(x), model(x))


def test_taken_buffer_name_is_avoided():
    model = Model()
    model.fc.register_buffer("weight_bits", torch.ones(8))
    model.fc.forward = lambda x: nn.functional.linear(x, model.fc.weight) + model.fc.weight_bits
    gm = graph_of(model, torch.randn(2, 16))
    out, _ = fold_commit(gm, {"fc.weight": mask_of(model, "fc.weight")})
    assert out.meta[PACKED]["fc.weight"] == ("fc.weight_values", "fc.weight_bits_")
    assert torch.equal(out.fc.weight_bits, torch.ones(8))


def test_unread_weight_is_reported():
    model = Model()
    gm = graph_of(model, torch.randn(2, 16))
    _, report = fold_commit(gm, {"gone": torch.ones(2, dtype=torch.bool)})
    assert report.skipped == {"gone": "no node of the graph reads it"}


def test_wrong_mask_shape():
    gm = graph_of(Model(), torch.randn(2, 16))
    with pytest.raises(WeightError, match=r"fc.weight: expected a mask of shape \(8, 16\)"):
        fold_commit(gm, {"fc.weight": torch.ones(16, 8, dtype=torch.bool)})


class Training(nn.Module):
    """As the backend routes gradients: the mask bits are a buffer, the op copies the weight."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.register_buffer("bits", torch.zeros(16, dtype=torch.uint8))

    def forward(self, x):
        weight = effective_weight(self.fc.weight, self.bits, True)
        return nn.functional.linear(x, weight, self.fc.bias)


def test_training_ops_go():
    gm = graph_of(Training(), torch.randn(2, 16))
    assert "resu_compile.effective_weight" in text(gm)
    out, _ = fold_commit(gm, {})
    assert text(out) == (
        "fc_weight = fc.weight\n"
        "fc_bias = fc.bias\n"
        "linear = aten.linear.default(x, fc_weight, fc_bias)"
    )
    assert set(out.state_dict()) == {"fc.weight", "fc.bias"}


def test_unknown_own_op_is_refused():
    graph = fx.Graph()
    x, bits = graph.placeholder("x"), graph.placeholder("bits")
    target = torch.ops.resu_compile.route_gradient.default
    graph.output(graph.call_function(target, (x, bits, True)))
    with pytest.raises(ArgumentError, match="resu_compile::route_gradient at node"):
        fold_commit(fx.GraphModule(nn.Module(), graph), {})


def test_committed_graph_is_taken_as_it_is():
    model = Model()
    gm = graph_of(model, torch.randn(2, 16))
    once, _ = fold_commit(gm, {"fc.weight": mask_of(model, "fc.weight")})
    twice, report = fold_commit(once, {})
    assert text(twice) == text(once)
    assert report.rewritten == {}


def test_strided_weight_becomes_row_major():
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        model[0].weight = nn.Parameter(torch.randn(8, 8).t())
    mask = mask_of(model, "0.weight")
    gm = graph_of(model, torch.randn(2, 8))
    out, _ = fold_commit(gm, {"0.weight": mask})
    values, bits = out.get_buffer("0.weight_values"), out.get_buffer("0.weight_bits")
    expected = pack_weight(model[0].weight, mask)
    assert torch.equal(values, expected[0])
    assert torch.equal(unpack_weight(values, bits, [8, 8]), model[0].weight.detach() * mask)


def test_report_text():
    report = PassReport("fold_commit", {"a.weight": "packed"}, {"b": "why"}, 1.25)
    assert str(report) == (
        "fold_commit: 1 rewritten, 1 skipped, 1.2 ms\n  a.weight  -> packed\n  b         left: why"
    )
