"""Attention that models write themselves: seen once, told from every other softmax, and read as it is applied."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import entropy, one_thread  # noqa: F401
from torch import nn

from inflection_fast.blocks import find_blocks
from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.measure.attention_call import AttentionCall, stats_of
from inflection_fast.measure.attention_observer import AttentionObserver, heads_first

WIDTH, HEADS, B, T = 16, 4, 2, 6
ALL_ROWS = MonitorConfig(every=1, rows=None, quantities=("attention",))


class MaskedSoftmax(torch.autograd.Function):
    """A softmax with a backward pass of its own, as DeBERTa brought one."""

    @staticmethod
    def forward(ctx, scores):
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        return p * (grad - (p * grad).sum(-1, keepdim=True))


SOFTMAXES = {
    "torch.softmax": lambda s: torch.softmax(s, -1),
    "F.softmax": lambda s: F.softmax(s, dim=-1, dtype=torch.float32),
    "Tensor.softmax": lambda s: s.softmax(dim=3),
    "nn.Softmax": nn.Softmax(-1),
    "log_softmax": lambda s: F.log_softmax(s, dim=-1).exp(),
    "logsumexp": lambda s: torch.exp(s - torch.logsumexp(s, dim=-1, keepdim=True)),
    "autograd function": MaskedSoftmax.apply,
    "[B * H, Q, K]": lambda s: s.flatten(0, 1).softmax(-1).view_as(s),
    "[B, Q, H, K]": lambda s: s.transpose(1, 2).softmax(-1).transpose(1, 2),
}


class Attention(nn.Module):
    def __init__(self, softmax, heads=HEADS):
        super().__init__()
        self.num_heads, self.softmax = heads, softmax
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.seen = None  # [B, H, T, T]

    def forward(self, x, memory=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if memory is not None:
            _, k, v = self.qkv(memory).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        self.seen = 3 * q @ k.mT
        return self.out((self.softmax(self.seen) @ v).transpose(1, 2).flatten(2))


def held(**children):
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


class Layer(nn.Module):
    """Attention, and a router and a pooling that use softmax as well."""

    def __init__(self, softmax):
        super().__init__()
        self.mixing = Attention(softmax)
        self.router, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.pool = nn.Linear(WIDTH, 1)

    def forward(self, x):
        x = x + self.mixing(x)
        weights = self.router(x).softmax(-1)  # [B, T, E]
        x = x + sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))
        pooled = self.pool(x).mT.softmax(-1) @ x  # [B, 1, T] @ [B, T, D]
        by_head = (
            x.unflatten(-1, (HEADS, -1)).transpose(1, 2).softmax(-1)
        )  # [B, H, T, D]: in the block, not in attention
        return x + pooled + by_head.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, softmax=SOFTMAXES["F.softmax"], layer=Layer):
        super().__init__()
        self.layers = nn.ModuleList(layer(softmax) for _ in range(2))
        self.head = nn.Linear(WIDTH, 9)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x).log_softmax(-1)  # a vocabulary


def measured(model, x, config=ALL_ROWS):
    with Monitor(model, config) as monitor:
        model(x).square().mean().backward()
        monitor.step()
    return monitor.timeline


def truth(model):
    """[L, H] of the scores of the last forward."""
    return torch.stack([entropy(layer.mixing.seen.double().softmax(-1)).mean((0, 2)) for layer in model.layers])


def calls_of(model, *inputs):
    """Every call that is seen: (module, call)."""
    found = []
    with AttentionObserver(find_blocks(model)).observing(lambda module, read: found.append((module, read()))):
        model(*inputs)
    return found


@pytest.mark.parametrize("softmax", SOFTMAXES.values(), ids=SOFTMAXES)
def test_attention_by_hand_is_that_of_its_softmax_and_nothing_else_is_attention(softmax):
    torch.manual_seed(0)
    model, x = Model(softmax), torch.randn(B, T, WIDTH)
    timeline = measured(model, x)
    expected = truth(model)
    assert expected.max() - expected.min() > 0.05
    np.testing.assert_allclose(timeline.entropy[0], expected.detach().numpy(), atol=2e-6)
    assert [module for module, _ in calls_of(model, x)] == [layer.mixing for layer in model.layers]  # once each


def test_the_outputs_stay_equal_to_the_bit():
    torch.manual_seed(0)
    model, x = Model(), torch.randn(B, T, WIDTH)
    before, outputs = model(x), []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    measured(model, x)
    assert torch.equal(before, outputs[0])


def test_a_block_that_attends_in_its_own_code_needs_a_head_axis():
    class Bare(nn.Module):
        def __init__(self, softmax):
            super().__init__()
            self.n_heads = HEADS
            self.qkv, self.gate = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            x = x + ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
            return x * self.gate(x).softmax(-1).amax(-1, keepdim=True)  # [B, T, 3]

    assert [call.logits.shape for _, call in calls_of(Model(layer=Bare), torch.randn(B, T, WIDTH))] == [
        (B, HEADS, T, T)
    ] * 2


def test_a_softmax_over_features_of_linear_attention_is_none():
    class LinearAttention(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            return self.out((q.softmax(-1) @ (k.softmax(-2).mT @ v)).transpose(1, 2).flatten(2))

    class Linear(Layer):
        def __init__(self, softmax):
            super().__init__(softmax)
            self.mixing = LinearAttention(softmax)

    assert calls_of(Model(layer=Linear), torch.randn(B, T, WIDTH)) == []


class Twice(nn.Module):
    """Attention over frames, the block's own, and cross attention, in this order."""

    def __init__(self, softmax):
        super().__init__()
        self.temporal_attn, self.attn, self.cross_attn = Attention(softmax), Attention(softmax), Attention(softmax)

    def forward(self, x):
        x = x + self.temporal_attn(x.transpose(0, 1)).transpose(0, 1)
        return self.cross_attn(x + self.attn(x), x[:, :4])


def test_the_attention_that_counts_is_the_own_one_of_the_block():
    model, x = Model(layer=Twice), torch.randn(B, T, WIDTH)
    kinds = [(module, call.kind) for module, call in calls_of(model, x)]
    expected = [((layer.attn, "self"), (layer.cross_attn, "cross")) for layer in model.layers]
    assert kinds == [one for pair in expected for one in pair]


class Unequal(nn.Module):
    """Two attentions of equal standing, of 2 and of 4 heads, and a mixing of residual streams beside one of them."""

    def __init__(self, softmax):
        super().__init__()
        self.text = held(self_attn=Attention(softmax, 2))
        self.image = held(self_attn=Attention(softmax), attn_hc=HyperConnection())

    def forward(self, x):
        x = self.image.attn_hc(x + self.text.self_attn(x))
        return x + self.image.self_attn(x)


class HyperConnection(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.mix = HEADS, nn.Linear(WIDTH, HEADS * HEADS)

    def forward(self, x):
        streams = x.unflatten(-1, (HEADS, -1))  # [B, T, streams, width]
        return (self.mix(x).unflatten(-1, (HEADS, HEADS)).softmax(-1) @ streams).flatten(2)


def test_of_attentions_with_different_numbers_of_heads_the_widest_counts_and_no_mixing_of_streams():
    model, x = Model(layer=Unequal), torch.randn(B, T, WIDTH)
    assert [module for module, _ in calls_of(model, x)] == [layer.image.self_attn for layer in model.layers]


def test_cross_attention_has_columns_of_its_own():
    torch.manual_seed(0)
    model, x = Model(layer=Twice), torch.randn(B, T, WIDTH)
    timeline = measured(model, x, MonitorConfig(every=1, rows=None, quantities=("attention", "cross_attention")))
    for column, name in ((timeline.entropy, "attn"), (timeline.cross_entropy, "cross_attn")):
        scores = [getattr(layer, name).seen.double() for layer in model.layers]
        expected = torch.stack([entropy(one.softmax(-1)).mean((0, 2)) for one in scores])
        np.testing.assert_allclose(column[0], expected.detach().numpy(), atol=2e-6)
    assert np.isnan(measured(Model(), x, MonitorConfig(every=1, quantities=("cross_attention",))).cross_entropy).all()


class CrossAttention(Attention):
    def forward(self, x):
        return super().forward(x, x[:, :4])


def test_a_block_that_is_a_cross_attention_has_no_self_attention():
    model, x = Model(layer=CrossAttention), torch.randn(B, T, WIDTH)
    assert [(module, call.kind) for module, call in calls_of(model, x)] == [(one, "cross") for one in model.layers]


class Chunked(nn.Module):
    """Attends image by image, as vision blocks of Qwen-VL's kind do."""

    def __init__(self, softmax):
        super().__init__()
        self.mixing = Attention(softmax)

    def forward(self, x):
        return torch.cat([self.mixing(x[:, :2]), self.mixing(x[:, 2:])], 1)


def test_calls_of_one_attention_add_up_by_rows():
    torch.manual_seed(0)
    model, x = Model(layer=Chunked), torch.randn(B, T, WIDTH)
    expected = torch.zeros(2, HEADS, dtype=torch.float64)

    def add(module, args, output):
        layer = [layer.mixing for layer in model.layers].index(module)
        expected[layer] += entropy(module.seen.double().softmax(-1)).sum((0, 2)).detach()

    handles = [layer.mixing.register_forward_hook(add) for layer in model.layers]
    model(x)
    for handle in handles:
        handle.remove()
    np.testing.assert_allclose(measured(model, x).entropy[0], expected.numpy() / (B * T), atol=2e-6)


@pytest.mark.parametrize(
    "shape, heads, sizes, expected",
    [
        ((2, 4, 5, 7), 4, (), (2, 4, 5, 7)),
        ((2, 5, 4, 7), 4, (), (2, 4, 5, 7)),
        ((4, 2, 5, 7), 4, (), (2, 4, 5, 7)),
        ((2, 4, 5, 7), None, (), (2, 4, 5, 7)),
        ((8, 5, 7), 4, (2, 5), (2, 4, 5, 7)),
        ((24, 5, 7), 4, (2, 5), (6, 4, 5, 7)),  # three windows
        ((4, 5, 7), 4, (2, 5), None),  # no heads of a batch of two: a router's
        ((2, 5, 7), 4, (2, 5), None),
        ((2, 5, 7), 1, (2, 5), (2, 1, 5, 7)),
        ((2, 3, 4, 5, 7), 4, (), (6, 4, 5, 7)),  # windows
        ((2, 4, 3, 5, 7), 4, (), (6, 4, 5, 7)),
        ((2, 2, 3, 5, 7), 6, (), (2, 6, 5, 7)),  # grouped queries
        ((2, 3, 5, 7), 4, (), None),
        ((5, 7), 4, (), None),
        ((2, 9, 4, 4), 4, (), None),  # the heads of a token among each other, as SAM 2 has them
        ((2, 4, 4, 4), 4, (), (2, 4, 4, 4)),
    ],
)
def test_the_heads_are_found_among_the_dimensions(shape, heads, sizes, expected):
    logits = torch.randn(shape)
    found = heads_first(logits, heads, sizes)
    assert (None if found is None else tuple(found.shape)) == expected
    if found is not None:  # every row is there once
        assert torch.equal(found.flatten(0, -2).sum(-1).sort().values, logits.flatten(0, -2).sum(-1).sort().values)


def test_sinks_of_single_queries_are_one_more_column():
    torch.manual_seed(0)
    q, k, sinks = torch.randn(B, HEADS, T, 8), torch.randn(B, 2, T, 8), torch.randn(B, HEADS, T, 1)
    bias, rows = torch.randn(1, HEADS, T, T), torch.tensor([0, 3, 5])
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    stats = stats_of(AttentionCall(q, k, mask, bias, 0.5, sinks=sinks), rows)
    scores = 0.5 * q.double() @ k.double().repeat_interleave(2, 1).mT + bias + mask
    p = torch.cat([scores, sinks], -1).softmax(-1)[:, :, rows]
    torch.testing.assert_close(stats.entropy.double(), entropy(p), atol=2e-6, rtol=0)
    torch.testing.assert_close(stats.sink.double(), p[..., -1], atol=1e-6, rtol=0)
    assert torch.equal(stats.keys[0, 0], rows + 1)
    causal = stats_of(AttentionCall(q, k, None, bias, 0.5, is_causal=True, sinks=sinks), rows)
    torch.testing.assert_close(causal.entropy, stats.entropy)


def test_an_eager_function_that_adds_its_mask_adds_a_bool_as_a_number():
    from inflection_fast.measure.attention_observer import _as_added

    mask, q = torch.ones(1, 1, T, T, dtype=torch.bool).tril(), torch.randn(1, 1, T, 4)

    def adds(module, query, key, value, attention_mask, **kwargs):
        return query @ key.mT + attention_mask

    def fills(module, query, key, value, attention_mask, **kwargs):
        return (query @ key.mT).masked_fill(~attention_mask, -torch.inf)

    assert torch.equal(_as_added(mask, q, adds), mask.float()) and _as_added(mask, q, fills) is mask


# ---- FlexAttention ---------------------------------------------------------------------------------------------------


def test_flex_attention_is_seen_through_its_own_call():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    bias = torch.randn(HEADS, T, T)

    class Flex(nn.Module):
        def __init__(self, softmax):
            super().__init__()
            self.attn = Attention(softmax)
            self.attn.forward = self.attend

        def attend(self, x):
            q, k, v = self.attn.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            self.q, self.k = q, k
            mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device="cpu")
            with torch.no_grad():  # on the CPU it has no backward pass
                args = [one.detach() for one in (q, k, v)]
                out = flex.flex_attention(*args, score_mod=lambda s, b, h, i, j: s + bias[h, i, j], block_mask=mask)
            return self.attn.out(out.transpose(1, 2).flatten(2))

        def forward(self, x):
            return x + self.attn(x)

    torch.manual_seed(0)
    model, rows = Model(layer=Flex), torch.tensor([1, 4])
    with torch.compiler.set_stance("force_eager"):
        calls = calls_of(model, torch.randn(B, T, WIDTH))
    assert len(calls) == 2
    layer = model.layers[1]
    scores = layer.q.double() @ layer.k.double().mT / (WIDTH // HEADS) ** 0.5 + bias
    p = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)[:, :, rows]
    torch.testing.assert_close(stats_of(calls[1][1], rows).entropy.double(), entropy(p), atol=2e-6, rtol=0)


def test_flex_attention_of_transformers_is_read_from_its_block_mask():
    from inflection_fast.measure.attention_call import SequenceStarts
    from inflection_fast.measure.attention_observer import InterfaceCall, _interface_call

    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    torch.manual_seed(0)
    q, k = torch.randn(B, HEADS, T, 8), torch.randn(B, HEADS, T, 8)
    mask = flex.create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < 3), B, None, T, T, device="cpu")
    settings = {"scaling": 0.5, "softcap": 2.0}
    given = InterfaceCall("flex_attention", None, nn.Identity(), q, k, mask, (), settings)
    call = _interface_call(given, mask, SequenceStarts())
    seen = torch.ones(T, T, dtype=torch.bool).tril().triu(-2)
    scores = 2 * torch.tanh(0.5 * q.double() @ k.double().mT / 2)
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    torch.testing.assert_close(stats_of(call, None).entropy.double(), entropy(p), atol=2e-6, rtol=0)
