"""Models outside Transformers: what people write themselves, and packages that are skipped where they are absent."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from helpers.tiny_models import entropy, one_thread  # noqa: F401
from helpers.without_kernels import import_torchvision
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


class TwoStreams(nn.Module):
    """A joint block of image and text as SD3 and Flux have it: the text's stream is returned first."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = EinsumAttention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, encoder_hidden_states):
        joint = self.attn(torch.cat([encoder_hidden_states, hidden_states], dim=1))
        text, image = joint.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        encoder_hidden_states = encoder_hidden_states + text
        hidden_states = hidden_states + self.mlp(image)
        return encoder_hidden_states, hidden_states


class Joint(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(TwoStreams() for _ in range(2))

    def forward(self, image, text):
        for block in self.transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text)
        return image


def test_the_output_of_a_block_with_two_streams_is_the_image():
    torch.manual_seed(0)
    model, outputs = Joint(), []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output[1]))
    image, text = torch.randn(B, T, WIDTH), torch.randn(B, T, WIDTH)  # of one shape, so that only the names tell
    timeline = measured(model, image, text)
    outputs.clear()
    loss = model(image, text).square().mean()
    gradients = torch.autograd.grad(loss, outputs)
    np.testing.assert_allclose(timeline.activation_grad[0], [float(g.norm()) for g in gradients], rtol=1e-5)


def test_blocks_of_diffusers_are_measured():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(B, 4, 4), "encoder_hidden_states": torch.randn(B, 3, 32),
        "pooled_projections": torch.randn(B, 8), "timestep": torch.ones(B), "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip
    with Monitor(model, ALL_ROWS) as monitor:
        model(**inputs).sample.square().mean().backward()
        monitor.step()
    assert monitor.timeline.layers == ["transformer_blocks.0", "single_transformer_blocks.0"]
    assert (monitor.timeline.entropy > 0).all() and (monitor.timeline.activation_grad > 0).all()


def test_the_vision_transformer_of_timm_is_measured():
    if find_spec("torchvision") is not None:
        import_torchvision()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    weights = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda module, args: weights.append(args[0].detach()))
    timeline = measured(model, torch.randn(B, 3, 32, 32))
    expected = np.stack([entropy(p.double()).mean((0, 2)).numpy() for p in weights])
    np.testing.assert_allclose(timeline.entropy[0], expected, atol=2e-6)
    assert timeline.layers == ["blocks.0", "blocks.1"] and (timeline.activation_grad > 0).all()


class NanoGPT(nn.Module):
    """As nanoGPT writes it: one layer for queries, keys and values, and torch's own attention."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.c_attn, self.c_proj = (
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 3 * WIDTH),
                nn.Linear(WIDTH, WIDTH),
            )
            self.n_head, self.seen = HEADS, None

        def forward(self, x):
            q, k, v = (
                one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in self.c_attn(self.ln_1(x)).split(WIDTH, dim=2)
            )
            self.seen = q.detach().double(), k.detach().double()
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return x + self.c_proj(y.transpose(1, 2).flatten(2))

    def __init__(self):
        super().__init__()
        self.transformer = nn.ModuleDict({"h": nn.ModuleList(self.Block() for _ in range(2))})

    def forward(self, x):
        for block in self.transformer.h:
            x = block(x)
        return x


def test_nanogpt_is_measured():
    torch.manual_seed(0)
    model = NanoGPT()
    timeline = measured(model, 3 * torch.randn(B, T, WIDTH))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    expected = []
    for block in model.transformer.h:
        q, k = block.seen
        p = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf).softmax(-1)
        expected.append(entropy(p).mean((0, 2)).numpy())
    np.testing.assert_allclose(timeline.entropy[0], np.stack(expected), atol=2e-6)


def test_torch_decoder_layers_have_self_and_cross_attention():
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 8, dropout=0.0, batch_first=True), 2)
    x, memory, seen = torch.randn(B, T, WIDTH), torch.randn(B, 4, WIDTH), {"self": [], "cross": []}
    config = MonitorConfig(every=1, rows=None, quantities=("attention", "cross_attention"))
    with Monitor(model, config) as monitor:
        model(x, memory).square().mean().backward()
        monitor.step()
    for layer in model.layers:
        for kind, module in (("self", layer.self_attn), ("cross", layer.multihead_attn)):

            def keep(module, args, kwargs, kind=kind):
                weights = nn.MultiheadAttention.forward(
                    module, *args, **kwargs | {"need_weights": True, "average_attn_weights": False}
                )
                seen[kind].append(entropy(weights[1].double()).mean((0, 2)).detach().numpy())

            module.register_forward_pre_hook(keep, with_kwargs=True)
    model(x, memory)
    np.testing.assert_allclose(monitor.timeline.entropy[0], np.stack(seen["self"]), atol=2e-6)
    np.testing.assert_allclose(monitor.timeline.cross_entropy[0], np.stack(seen["cross"]), atol=2e-6)


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


class Attending(nn.Module):
    """A block that asks `nn.MultiheadAttention` for its weights, of each head or averaged over heads, or not."""

    def __init__(self, **settings):
        super().__init__()
        self.attn, self.mlp = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.Linear(WIDTH, WIDTH)
        self.settings = settings

    def forward(self, x):
        return x + self.mlp(self.attn(x, x, x, **self.settings)[0])


@pytest.mark.parametrize(
    "settings",
    [{"need_weights": True}, {"need_weights": True, "average_attn_weights": False}, {"need_weights": False}],
    ids=["averaged", "of each head", "none"],
)
def test_multihead_attention_of_torch_is_measured_whatever_weights_it_returns(settings):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.layers = nn.ModuleList(Attending(**settings) for _ in range(2))
    model.forward = lambda x: model.layers[1](model.layers[0](x))
    x, seen = 3 * torch.randn(B, T, WIDTH), []
    timeline = measured(model, x)
    for layer in model.layers:
        _, p = layer.attn(x, x, x, need_weights=True, average_attn_weights=False)
        seen.append(entropy(p.double()).mean((0, 2)).detach().numpy())
        x = layer(x)
    assert np.ptp(seen) > 0.02
    np.testing.assert_allclose(timeline.entropy[0], np.stack(seen), atol=2e-6)


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_encoder_layers_are_measured_with_padding(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    padding = torch.arange(T) >= torch.tensor([[T], [T - 2]])  # True: nobody attends to it
    x, seen = torch.randn(B, T, WIDTH), []
    with Monitor(model, ALL_ROWS) as monitor:
        model(x, src_key_padding_mask=padding).square().mean().backward()
        monitor.step()
    for layer in model.layers:
        y = layer.norm1(x) if norm_first else x
        _, p = layer.self_attn(y, y, y, key_padding_mask=padding, average_attn_weights=False)
        rows = entropy(p.double()).transpose(1, 2)[~padding]  # [tokens, H]: a padded position is no token
        seen.append(rows.mean(0).detach().numpy())
        x = layer(x, src_key_padding_mask=padding)
    np.testing.assert_allclose(monitor.timeline.entropy[0], np.stack(seen), atol=2e-6)
