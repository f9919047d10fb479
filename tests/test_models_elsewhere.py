"""Models outside Transformers: what people write themselves, and packages that are skipped where they are absent."""

import numpy as np
import pytest
import torch
from tiny_models import entropy, one_thread  # noqa: F401
from torch import nn

from inflection_fast.measure import Monitor, MonitorConfig

WIDTH, HEADS, B, T = 16, 4, 2, 6
ALL_ROWS = MonitorConfig(every=1, rows=None, quantities=("attention", "activation_grad"))


def measured(model, *inputs):
    with Monitor(model, ALL_ROWS) as monitor:
        model(*inputs).square().mean().backward()
        monitor.step()
    return monitor.timeline


class EinsumAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.qkv, self.out = HEADS, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.probabilities = None

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        scores = 2 * torch.einsum("bqhd,bkhd->bhqk", q, k)
        self.probabilities = scores.softmax(dim=-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", self.probabilities, v).flatten(2))


class DiffusionBlock(nn.Module):
    """A block of a diffusion transformer: a condition shifts, scales and gates its attention and its feed-forward."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH, elementwise_affine=False), EinsumAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 4 * WIDTH))

    def forward(self, x, condition):
        shift, scale, gate, gate_mlp = self.modulation(condition)[:, None].chunk(4, -1)
        x = x + gate * self.attn(self.norm(x) * (1 + scale) + shift)
        return x + gate_mlp * self.mlp(self.norm(x))


class Diffusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(DiffusionBlock() for _ in range(2))

    def forward(self, x, condition):
        for block in self.transformer_blocks:
            x = block(x, condition)
        return x


class Pairs(nn.Module):
    """Attention and feed-forward in bare lists, as many short implementations keep them."""

    def __init__(self):
        super().__init__()
        mlp = lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))  # noqa: E731
        self.layers = nn.ModuleList(nn.ModuleList([EinsumAttention(), mlp()]) for _ in range(2))

    def forward(self, x):
        for attend, mlp in self.layers:
            x = attend(x) + x
            x = mlp(x) + x
        return x


@pytest.mark.parametrize("build, inputs", [(Diffusion, 2), (Pairs, 1)], ids=["diffusion", "pairs"])
def test_einsum_attention_is_measured(build, inputs):
    torch.manual_seed(0)
    model = build()
    timeline = measured(model, torch.randn(B, T, WIDTH), *[torch.randn(B, WIDTH)] * (inputs - 1))
    attentions = [module for module in model.modules() if isinstance(module, EinsumAttention)]
    expected = np.stack([entropy(one.probabilities.double()).mean((0, 2)).detach().numpy() for one in attentions])
    assert np.ptp(expected) > 0.02
    np.testing.assert_allclose(timeline.entropy[0], expected, atol=2e-6)
    assert (timeline.activation_grad > 0).all()


def test_x_transformers_is_measured_attention_by_attention():
    x_transformers = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    layers = x_transformers.Decoder(dim=WIDTH, depth=2, heads=HEADS, attn_dim_head=4)
    model = x_transformers.TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=layers)
    ids, found = torch.randint(0, 20, (B, T)), []
    for module in model.modules():
        if type(module).__name__ == "Attend":
            module.register_forward_hook(lambda module, args, output: found.append(output[1].post_softmax_attn))
    timeline = measured(model, ids)
    assert timeline.layers == ["attn_layers.layers.0.1", "attn_layers.layers.2.1"]
    expected = np.stack([entropy(p.double()).mean((0, 2)).detach().numpy() for p in found])
    np.testing.assert_allclose(timeline.entropy[0], expected, atol=2e-6)
    assert (timeline.activation_grad > 0).all()
