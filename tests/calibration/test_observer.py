"""Statistics of inputs, however the product is spelled, against sums over the very inputs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import resu_compile as resu
from resu_compile.calibration import input_norms
from resu_compile.calibration.observer import Observer
from resu_compile.errors import ArgumentError

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums in another order


class Product(nn.Module):
    """A function of x and one bare weight."""

    def __init__(self, call, *shape):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.call = call

    def forward(self, x):
        return self.call(x, self.w)


def batches(*shape, n=3):
    return [torch.randn(shape) * torch.rand(shape[-1]) for _ in range(n)]


def column_norms(data, samples):
    """sqrt of the mean over samples of ||X_j||^2, columns last."""
    flat = torch.cat([batch.flatten(0, -2) for batch in data])
    return (flat.square().sum(0) / samples).sqrt()


def norm_of(model, data, name="w"):
    return input_norms(model, [name], data)[name]


RIGHT = {
    "matmul": lambda x, w: x @ w,
    "einsum": lambda x, w: torch.einsum("btk,kn->btn", x, w),
    "tensordot": lambda x, w: torch.tensordot(x, w, 1),
    "linear of the transpose": lambda x, w: F.linear(x, w.t()),
    "addmm": lambda x, w: torch.addmm(torch.zeros(5), x.flatten(0, 1), w),
    "baddbmm": lambda x, w: torch.baddbmm(torch.zeros(1), x, w.expand(len(x), -1, -1)),
    "halves of the outputs": lambda x, w: torch.cat([x @ part for part in w.split(2, 1)], -1),
    "halves of the inputs": lambda x, w: x[..., :2] @ w[:2] + x[..., 2:] @ w[2:],
    "cast": lambda x, w: x.double() @ w.double(),
}
LEFT = {
    "linear": lambda x, w: F.linear(x, w),
    "linear with bias": lambda x, w: F.linear(x, w, torch.ones(5)),
    "w @ x": lambda x, w: w @ x.transpose(1, 2),
    "mv": lambda x, w: torch.stack([w.mv(row) for row in x.flatten(0, 1)]),
    "einsum": lambda x, w: torch.einsum("btk,nk->btn", x, w),
    "cast": lambda x, w: F.linear(x.double(), w.double()),
    "strided": lambda x, w: F.linear(x.transpose(0, 1), w),
}


@pytest.mark.parametrize("name", RIGHT)
def test_products_from_the_right(name):
    data = batches(2, 7, 4)
    found = norm_of(Product(RIGHT[name], 4, 5), data)
    expected = column_norms(data, 6)
    torch.testing.assert_close(found.expand(4, 5), expected[:, None].expand(4, 5), **CLOSE)


@pytest.mark.parametrize("name", LEFT)
def test_products_from_the_left(name):
    data = batches(2, 7, 4)
    model = Product(LEFT[name], 5, 4)
    found = norm_of(model, data)
    # each of the 14 rows of mv is a product of its own: it counts the samples 14 times
    samples = 6 * 14 if name == "mv" else 6
    expected = column_norms(data, samples)
    torch.testing.assert_close(found.expand(5, 4), expected.expand(5, 4), **CLOSE)


def test_a_uniform_norm_is_one_row():
    assert norm_of(nn.Linear(4, 5), batches(2, 7, 4), "weight").shape == (1, 4)
    assert norm_of(Product(RIGHT["matmul"], 4, 5), batches(2, 7, 4)).shape == (4, 1)


@pytest.mark.parametrize(("n_in", "n_out"), [(1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_dimensions_of_size_one(n_in, n_out, side):
    data = batches(2, 3, n_in)
    if side == "left":
        found = norm_of(Product(LEFT["linear"], n_out, n_in), data)
        expected = column_norms(data, 6).view(1, -1)
    else:
        found = norm_of(Product(RIGHT["matmul"], n_in, n_out), data)
        expected = column_norms(data, 6).view(-1, 1)
    torch.testing.assert_close(found, expected, **CLOSE)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_orientation_for_all_shapes(n_in, n_out, samples, tokens, transposed):
    data = [torch.randn(samples, tokens, n_in) for _ in range(2)]
    if transposed:
        found = norm_of(Product(RIGHT["matmul"], n_in, n_out), data).expand(n_in, n_out).t()
    else:
        found = norm_of(Product(LEFT["linear"], n_out, n_in), data).expand(n_out, n_in)
    expected = column_norms(data, 2 * samples).expand(n_out, n_in)
    torch.testing.assert_close(found, expected, **CLOSE)


# -- experts -------------------------------------------------------------------------------------
def test_a_stack_of_experts_has_norms_of_its_own_each():
    model = Product(lambda x, w: torch.bmm(x, w), 3, 4, 5)
    data = [torch.randn(3, 6, 4) for _ in range(2)]
    found = norm_of(model, data)
    # the leading dimension of the input counts as samples
    expected = (sum(batch.square().sum(1) for batch in data) / 6).sqrt()
    torch.testing.assert_close(found, expected[:, :, None].expand(3, 4, 5), **CLOSE)


def test_experts_that_are_taken_one_by_one():
    def call(x, w):
        return [F.linear(x[:, e : e + 1], w[e]) for e in range(3)]

    data = [torch.randn(2, 3, 4) for _ in range(2)]
    found = norm_of(Product(call, 3, 5, 4), data)
    expected = (torch.cat(data).square().sum(0) / 4).sqrt()  # (expert, column)
    torch.testing.assert_close(found, expected[:, None].expand(3, 5, 4), **CLOSE)


def test_an_expert_that_no_token_reaches_is_named():
    model = Product(lambda x, w: F.linear(x, w[0]), 3, 5, 4)
    with pytest.raises(ArgumentError, match="^w: expected the calibration data to reach all of it"):
        norm_of(model, batches(2, 3, 4))


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="not in this release")
def test_tokens_that_are_grouped_by_expert():
    ends = torch.tensor([2, 5, 9], dtype=torch.int32)
    model = Product(lambda x, w: torch._grouped_mm(x, w.transpose(1, 2), offs=ends), 3, 16, 8)
    model.bfloat16()
    data = [torch.randn(9, 8).bfloat16() for _ in range(2)]
    found = norm_of(model, data)
    for expert, (start, end) in enumerate([(0, 2), (2, 5), (5, 9)]):
        expected = column_norms([x[start:end].float() for x in data], 2)
        torch.testing.assert_close(found[expert], expected.expand(16, 8), **CLOSE)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind):
    model, data = kind(4, 5, batch_first=True), batches(2, 3, 4)
    found = input_norms(model, ["weight_ih_l0", "weight_hh_l0"], data)
    expected = column_norms(data, 6)
    ratio = found["weight_ih_l0"][0] / expected  # a product a token or one for all of them
    torch.testing.assert_close(ratio, ratio[:1].expand(4), **CLOSE)
    assert found["weight_hh_l0"].shape == (1, 5)
    assert torch.backends.mkldnn.enabled
    assert torch.backends.cudnn.enabled


# -- attention -----------------------------------------------------------------------------------
@pytest.mark.parametrize("training", [True, False])
def test_attention_with_one_input(training):
    model = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    data = batches(2, 5, 8)

    def loop(attention):
        for x in data:
            attention(x, x, x)

    seen = []
    found = input_norms(model, ["in_proj_weight", "out_proj.weight"], loop)
    expected = column_norms(data, 6)
    torch.testing.assert_close(
        found["in_proj_weight"].expand(24, 8), expected.expand(24, 8), **CLOSE
    )
    # what enters out_proj, whose forward nobody calls
    with torch.no_grad():
        for x in data:
            heads = [
                part.unflatten(-1, (2, 4)).transpose(1, 2)
                for part in F.linear(x, model.in_proj_weight, model.in_proj_bias).chunk(3, -1)
            ]
            seen.append(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
    torch.testing.assert_close(
        found["out_proj.weight"], column_norms(seen, 6)[None], rtol=1e-4, atol=1e-5
    )
    assert model.training is training
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_with_three_inputs_has_three_norms():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    q, k, v = torch.randn(2, 3, 8), 2 * torch.randn(2, 5, 8), 3 * torch.randn(2, 5, 8)
    found = input_norms(model, ["in_proj_weight"], [(q, k, v)])["in_proj_weight"]
    rows = [column_norms([x], 2).expand(8, 8) for x in (q, k, v)]
    torch.testing.assert_close(found, torch.cat(rows), **CLOSE)


def test_a_transformer_layer_is_seen_in_eval_mode():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    data = batches(2, 5, 8)
    names = [name for name, p in model.named_parameters() if p.dim() == 2]
    found = input_norms(model, names, data)
    assert sorted(found) == sorted(names)
    torch.testing.assert_close(
        found["self_attn.in_proj_weight"].expand(24, 8),
        column_norms(data, 6).expand(24, 8),
        **CLOSE,
    )


# -- convolutions --------------------------------------------------------------------------------
CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 4, 3), (2, 3, 6, 7)),
    "strided": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 3, 6, 7)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2, padding=2), (2, 3, 6, 7)),
    "same": (nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 6, 7)),
    "pointwise": (nn.Conv2d(3, 4, 1), (2, 3, 6, 7)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_has_a_norm_for_each_channel_and_place(name):
    conv, shape = CONVOLUTIONS[name]
    data = [torch.randn(shape) for _ in range(2)]
    found = norm_of(conv, data, "weight")
    pad = (conv.dilation[0] * (conv.kernel_size[0] - 1) // 2,) * 2
    patches = torch.cat(
        [
            F.unfold(
                x,
                conv.kernel_size,
                conv.dilation,
                pad if name == "same" else conv.padding,
                conv.stride,
            )
            for x in data
        ]
    )  # (samples, columns, places)
    expected = (patches.square().sum((0, 2)) / 4).sqrt().view(1, *conv.weight.shape[1:])
    torch.testing.assert_close(found, expected, **CLOSE)


def test_groups_of_a_convolution_have_norms_of_their_own():
    conv = nn.Conv1d(4, 6, 3, groups=2, padding=1)
    x = torch.randn(5, 4, 9)
    found = norm_of(conv, [x], "weight")
    windows = F.pad(x, (1, 1)).unfold(2, 3, 1)  # (samples, channels, places, kernel)
    columns = (windows.square().sum((0, 2)) / 5).sqrt().view(2, 2, 3)
    torch.testing.assert_close(found, columns.repeat_interleave(3, 0), **CLOSE)


def test_a_convolution_of_one_sample_without_a_batch_dimension():
    conv = nn.Conv2d(3, 4, 3)
    x = torch.randn(3, 6, 6)
    expected = F.unfold(x[None], 3).square().sum((0, 2)).view(1, 3, 3, 3)
    found = norm_of(conv, [x], "weight")
    torch.testing.assert_close(found.square() * 3, expected, **CLOSE)  # three channels, as samples


def test_a_convolution_kernel_used_as_a_matrix():
    model = Product(lambda x, w: F.linear(x, w.flatten(1)), 5, 2, 3)
    data = batches(2, 4, 6)
    expected = column_norms(data, 6).view(1, 2, 3)
    torch.testing.assert_close(norm_of(model, data), expected, **CLOSE)


# -- how the data are run ------------------------------------------------------------------------
@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["inference", "grad", "autocast"],
)
def test_whatever_mode_the_loop_runs_in(context):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    data = batches(2, 7, 4)

    def loop(net):
        with context():
            for x in data:
                net(x)

    found = input_norms(model, ["0.weight", "1.weight"], loop)
    assert not any(norm.is_inference() or norm.requires_grad for norm in found.values())
    expected = column_norms(data, 6)
    torch.testing.assert_close(found["0.weight"][0], expected, rtol=1e-2, atol=1e-2)  # bfloat16
    assert found["1.weight"].shape == (1, 6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_is_summed_in_float32():
    x = torch.full((1, 5000, 4), 10.0, dtype=torch.bfloat16)
    found = norm_of(nn.Linear(4, 5, dtype=torch.bfloat16), [x], "weight")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((1, 4), (5000 * 100.0) ** 0.5), **CLOSE)


def test_moments_do_not_depend_on_how_the_data_are_batched():
    model = nn.Linear(4, 5)
    data = torch.randn(6, 7, 4) * 3 + 100
    results = []
    for size in (1, 2, 6):
        observer = Observer({"weight": model.weight}, moments=True)
        with torch.no_grad(), observer.counting(model):
            for batch in data.split(size):
                model(batch)
        results.append(observer.statistics()["weight"])
    flat = data.flatten(0, 1)
    for found in results:
        torch.testing.assert_close(
            found.variance[0], flat.var(0, unbiased=False), rtol=1e-4, atol=0
        )
        torch.testing.assert_close(found.total[0], flat.sum(0) / 6, **CLOSE)


def test_moments_of_parts_that_overlap():
    def call(x, w):
        return F.linear(x, w), F.linear(5 + 2 * x, w[:2])

    model = Product(call, 3, 4)
    x = torch.randn(1, 6, 4)
    observer = Observer({"w": model.w}, moments=True)
    with torch.no_grad(), observer.counting(model):
        model(x)
    found = observer.statistics()["w"]
    both = torch.cat([x, 5 + 2 * x], 1)[0]
    torch.testing.assert_close(found.variance[0], both.var(0, unbiased=False), **CLOSE)
    torch.testing.assert_close(found.variance[2], x[0].var(0, unbiased=False), **CLOSE)
    torch.testing.assert_close(found.square[0], both.square().sum(0) / 2, **CLOSE)


def test_a_plain_matrix_is_one_sample():
    data = batches(7, 4)
    torch.testing.assert_close(
        norm_of(nn.Linear(4, 5), data, "weight")[0], column_norms(data, 3), **CLOSE
    )


def test_a_cast_that_is_also_laid_out_anew():
    def call(x, w):
        return torch.einsum("btd,edh->ebth", x.double(), w.double())

    data = batches(2, 7, 4)
    found = norm_of(Product(call, 3, 4, 5), data)
    expected = column_norms(data, 6)[None, :, None]
    torch.testing.assert_close(found.expand(3, 4, 5), expected.expand(3, 4, 5), **CLOSE)


def test_masked_weights_of_a_controller_in_any_phase():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    data = batches(2, 7, 4)
    resu.sparsify(model, 0.5, compile=False)
    controller = resu.controller(model)
    expected = column_norms([model[0](x).detach() for x in data], 6)
    found = input_norms(model, controller.weights, data)
    torch.testing.assert_close(found["1.weight"][0], expected, **CLOSE)
    controller.resurrect(init="normal", storage="compact", freeze="all").__enter__()
    expected = column_norms([model[0](x).detach() for x in data], 6)
    again = input_norms(model, controller.weights, data)
    torch.testing.assert_close(again["1.weight"][0], expected, **CLOSE)
    assert not torch.equal(again["1.weight"], found["1.weight"])


# -- what cannot be told -------------------------------------------------------------------------
UNSEEN = {
    "never": (lambda x, _w: x, "saw none"),
    "added": (lambda x, w: x + w[:4, :4].sum(), "saw only .*sum"),
    "elementwise": (lambda x, w: x * w[0], "saw only aten.mul"),
    "transposed": (
        lambda x, w: F.conv_transpose1d(x, w[:, :, None]),
        "saw only a transposed convolution",
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_weight_in_no_product_is_named(name):
    call, seen = UNSEEN[name]
    shape = (3, 4) if name == "transposed" else (5, 4)
    with pytest.raises(ArgumentError, match=f"^w: expected a matrix product .*{seen}.*exclude='w'"):
        norm_of(Product(call, *shape), [torch.randn(2, 3, 4)])


def test_two_orientations_have_no_one_input():
    model = Product(lambda x, w: (x @ w) @ w.t(), 4, 4)
    with pytest.raises(ArgumentError, match="^w: expected products along one dimension"):
        norm_of(model, batches(2, 3, 4))


def test_inputs_that_are_not_finite_are_named():
    with pytest.raises(ArgumentError, match="^calibration: expected finite inputs of weight"):
        norm_of(nn.Linear(4, 5), [torch.full((2, 4), torch.nan)], "weight")


def test_an_unknown_name_is_named():
    with pytest.raises(ArgumentError, match="^weights: expected names of parameters, got 'wight'"):
        input_norms(nn.Linear(4, 5), ["wight"], batches(2, 4))
