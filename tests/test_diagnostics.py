"""Every diagnostic through a Monitor, against float64 truth, also under accumulation and checkpointing."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers.tiny_models import bert, gpt2, in_float64, model_and_batch, one_thread, probabilities, token_masks  # noqa: F401
from peft import LoraConfig, get_peft_model

from inflection_fast import AlertConfig, Monitor, MonitorConfig, find_blocks
from inflection_fast.ops import weight_spectrum
from inflection_fast.quantities import QUANTITIES
from inflection_fast.quantities.rank import Rank
from inflection_fast.quantities.spectrum import Spectrum

OURS = ("residual", "update", "adapter", "gradient_noise", "rank", "output", "router", "spectrum", "trajectory")


def halves(batch):
    """Two micro-batches of different sizes."""
    return [{k: v[part] for k, v in batch.items()} for part in (slice(0, 1), slice(1, None))]


def train(model, steps, quantities, pieces, *, optimizer=None, probe=None, on_alert=None, every=1):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.0)
    config = MonitorConfig(quantities=quantities, every=every)
    with Monitor(model, config, probe=probe, on_alert=on_alert, alerts=AlertConfig()) as monitor:
        for _ in range(steps):
            for batch in pieces:
                (model(**batch)["loss"] / len(pieces)).backward()
            monitor.step()
            optimizer.step()
            optimizer.zero_grad()
        return monitor.timeline


def block_features(model, batch):
    """Inputs and outputs of the blocks, float64."""
    model, batch = in_float64(model, batch)
    found, hooks = [], []
    for block in find_blocks(model):

        def hook(module, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            found.append((before.detach(), (output[0] if isinstance(output, tuple) else output).detach()))

        hooks.append(block.module.register_forward_hook(hook, with_kwargs=True))
    model(**batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
@pytest.mark.parametrize("mode", ["whole", "accumulated", "checkpointed"])
def test_residual(name, mode):
    model, batch = model_and_batch(name)
    truth = block_features(model, batch)
    if mode == "checkpointed":
        model.gradient_checkpointing_enable()
    timeline = train(model, 1, ("residual",), halves(batch) if mode == "accumulated" else [batch])
    masks = token_masks(batch, len(truth))
    for layer, ((x, y), mask) in enumerate(zip(truth, masks, strict=True)):
        x, y = x[mask], y[mask]
        centred = y - y.mean()
        expected = {
            "residual_rms": y.square().mean().sqrt(),
            "residual_max": y.abs().max(),
            "residual_kurtosis": centred.pow(4).mean() / centred.square().mean() ** 2,
            "massive_activations": torch.tensor(0.0),
            "block_ratio": ((y - x).norm(dim=-1) / x.norm(dim=-1)).mean(),
            "block_cosine": torch.cosine_similarity(x, y, dim=-1).mean(),
        }
        for column, value in expected.items():
            assert getattr(timeline, column)[0, layer] == pytest.approx(value.item(), rel=2e-5, abs=1e-6), column


@pytest.mark.parametrize("mode", ["whole", "accumulated", "checkpointed"])
def test_output(mode):
    model, batch = model_and_batch("gpt2")
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :4] = -100
    wide, doubled = in_float64(model, batch)
    logits = wide(**doubled).logits[:, :-1][batch["labels"][:, 1:] != -100]
    if mode == "checkpointed":
        model.gradient_checkpointing_enable()
    timeline = train(model, 1, ("output",), halves(batch) if mode == "accumulated" else [batch])
    log_p, log_z = logits.log_softmax(-1), logits.logsumexp(-1)
    expected = {
        "output_confidence": log_p.exp().amax(-1).mean(),
        "output_saturation": (log_p.exp().amax(-1) > 0.99).double().mean(),
        "output_entropy": -(log_p.exp() * log_p).sum(-1).mean(),
        "output_log_z": log_z.mean(),
        "output_log_z_squared": log_z.square().mean(),
        "output_max_logit": logits.max(),
    }
    for column, value in expected.items():
        assert getattr(timeline, column)[0] == pytest.approx(value.item(), rel=2e-5), column


@pytest.mark.parametrize("accumulated", [False, True])
def test_update(accumulated):
    model, batch = model_and_batch("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    expected = []
    config = MonitorConfig(quantities=("update",), every=1)
    with Monitor(model, config) as monitor:
        for _ in range(3):
            for piece in halves(batch) if accumulated else [batch]:
                model(**piece).loss.backward()
            monitor.step()
            before = [[p.detach().double().clone() for p in b.module.parameters()] for b in monitor.blocks]
            optimizer.step()
            after = [[p.detach().double() for p in b.module.parameters()] for b in monitor.blocks]
            scheduler.step()
            optimizer.zero_grad()
            norms = [sum(p.square().sum() for p in ps).sqrt() for ps in before]
            changes = [
                sum((b - a).square().sum() for a, b in zip(old, new, strict=True)).sqrt()
                for old, new in zip(before, after, strict=True)
            ]
            expected.append([[n.item(), (c / n).item()] for n, c in zip(norms, changes, strict=True)])
    expected = np.array(expected)
    np.testing.assert_allclose(monitor.timeline.weight_norm, expected[..., 0], rtol=1e-6)
    np.testing.assert_allclose(monitor.timeline.update_ratio, expected[..., 1], rtol=1e-4)


def test_adapters_that_learn_nothing_are_named_within_three_measurements():
    model, batch = model_and_batch("bert")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"]))
    names = [name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")]
    idle = names[3]
    model.base_model.model.get_submodule(idle).lora_B["default"].weight.requires_grad_(False)
    alerts = []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    timeline = train(model, 4, ("adapter",), [batch], optimizer=optimizer, on_alert=alerts.extend)
    named = [a for a in alerts if a.kind == "idle_adapter"]
    assert len(named) == 1 and named[0].step == 2 and idle in named[0].message, [a.message for a in alerts]
    assert timeline.adapter_idle[1:, 3].all() and timeline.adapter_idle[1:].sum() == 3
    assert timeline.axes["adapter"] == names
    layer = model.base_model.model.get_submodule(names[0])
    assert (timeline.adapter_norm[0] == 0).all() and (timeline.adapter_norm[1:, 0] > 0).all()
    assert (timeline.adapter_gradient[:, 0] > 0).all() and layer is not None


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_gradient_noise(name):
    model, batch = model_and_batch(name)
    pieces = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    timeline = train(model, 1, ("gradient_noise",), pieces)
    per_piece = []
    for piece in pieces:
        wide, doubled = in_float64(model, piece)
        wide(**doubled).loss.backward()
        grads = [[p.grad.flatten() for p in b.module.parameters()] for b in find_blocks(wide)]
        per_piece.append([torch.cat(of_block) for of_block in grads])
    total_signal = total_variance = 0.0
    for layer in range(3):
        x = torch.stack([piece[layer] for piece in per_piece])
        big, small = x.mean(0).square().sum().item(), x.square().sum(1).mean().item()
        signal, variance = (3 * big - small) / 2, (small - big) / (1 - 1 / 3)
        total_signal, total_variance = total_signal + signal, total_variance + variance
        assert timeline.gradient_signal[0, layer] == pytest.approx(signal, rel=1e-3, abs=1e-4 * small)
        assert timeline.gradient_variance[0, layer] == pytest.approx(variance, rel=1e-3)
    assert timeline.noise_scale[0] == pytest.approx(total_variance / total_signal, rel=1e-2)
    assert math.isnan(train(model, 1, ("gradient_noise",), [batch]).noise_scale[0])


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_rank(name):
    model, batch = model_and_batch(name)
    probe = [{k: v for k, v in batch.items() if k != "labels"}]
    timeline = train(model, 1, (Rank(every=1),), [batch], probe=probe)
    masks = token_masks(batch, 3)
    for layer, (p, mask) in enumerate(zip(probabilities(model.eval(), batch), masks, strict=True)):
        p = p.detach() * mask[:, None, :, None]
        squares = torch.linalg.svdvals(p).square()
        total = squares.sum(-1)
        k = ((squares.cumsum(-1) < 0.9 * total[..., None]).sum(-1) + 1).double().mean(0)
        np.testing.assert_allclose(timeline.rank_k90[0, layer], k, rtol=1e-6)
        np.testing.assert_allclose(timeline.rank_stable[0, layer], (total / squares[..., 0]).mean(0), rtol=1e-4)
        mass = (p.square().sum(-2).amax(-1) / total).mean(0)
        np.testing.assert_allclose(timeline.column_mass[0, layer], mass, rtol=1e-4)
        assert timeline.rank_max[0, layer] == pytest.approx(k.max().item(), rel=1e-6)
        assert timeline.lazy_heads[0, layer] == (k < 1.5).double().mean()


def test_router():
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.MixtralConfig(**sizes, intermediate_size=24, vocab_size=40, num_local_experts=5, num_experts_per_tok=2)
    model = hf.MixtralForCausalLM(config).train()
    for block in find_blocks(model):
        torch.nn.init.normal_(block.module.mlp.gate.weight)
    ids = torch.randint(0, 40, (3, 7))
    batch = {"input_ids": ids, "labels": ids}
    outputs = {}
    for block in find_blocks(model):
        block.module.mlp.gate.register_forward_hook(
            lambda module, args, output, layer=block.index: outputs.setdefault(layer, []).append(output)
        )
    model.gradient_checkpointing_enable()
    timeline = train(model, 1, ("router",), halves(batch))
    for layer, of in outputs.items():
        assert len(of) == 4
        first = of[::2]  # checkpointing ran each again in its backward pass
        log_p = torch.cat([logits for logits, _, _ in first]).double().log_softmax(-1)
        load = torch.bincount(torch.cat([indices for _, _, indices in first]).flatten(), minlength=5).double()
        entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
        assert timeline.router_entropy[0, layer] == pytest.approx(entropy, rel=1e-6)
        np.testing.assert_allclose(timeline.router_load[0, layer], load / load.sum(), rtol=1e-6)


def test_spectrum():
    model, batch = model_and_batch("bert")
    timeline = train(model, 6, (Spectrum(every=1), "residual"), [batch])
    matrices = timeline.axes["matrix"]
    assert len(matrices) == 6
    measured = np.isfinite(timeline.spectrum_stable_rank).any(0)
    assert measured.any(), "nothing was measured in six steps"
    for layer, place in np.argwhere(measured):
        weight = model.bert.encoder.layer[layer].get_parameter(matrices[place])
        expected = weight_spectrum(weight.detach())
        step = np.flatnonzero(np.isfinite(timeline.spectrum_stable_rank[:, layer, place]))[0]
        assert timeline.spectrum_stable_rank[step, layer, place] == pytest.approx(expected.stable_rank, rel=1e-6)
        assert timeline.spectrum_outliers[step, layer, place] == expected.outliers


def test_trajectory():
    model, batch = model_and_batch("llama")
    probe = [{k: v for k, v in batch.items() if k != "labels"}]
    timeline = train(model, 1, ("trajectory",), [batch], probe=probe)
    features = [y for _, y in block_features(model.eval(), batch)]
    masks = token_masks(batch, 3)
    for layer in (1, 2):
        x, y = features[layer - 1][masks[0]], features[layer][masks[0]]
        distance = ((y - x).norm(dim=-1) / x.norm(dim=-1)).mean().item()
        assert timeline.trajectory_distance[0, layer] == pytest.approx(distance, rel=1e-4)
        angle = torch.cosine_similarity(x, y, dim=-1).arccos().mean().item()
        assert timeline.trajectory_angle[0, layer] == pytest.approx(angle, rel=1e-4)
    assert np.isfinite(timeline.transport[0, 1:]).all() and np.isfinite(timeline.contraction[0]).all()
    assert np.isfinite(timeline.trajectory_bend[0, 1]) and np.isfinite(timeline.block_cka[0, 1:]).all()


def test_all_of_them_together_change_nothing_of_the_training():
    model, batch = model_and_batch("gpt2")
    twin = copy.deepcopy(model)
    names = tuple(name for name in OURS if name not in ("adapter", "router"))
    probe = [{k: v for k, v in batch.items() if k != "labels"}]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin)]
    timeline = train(model, 3, names, halves(batch), optimizer=optimizers[0], probe=probe)
    for _ in range(3):
        for piece in halves(batch):
            (twin(**piece)["loss"] / 2).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert {c.quantity for c in timeline.columns.values()} >= set(names)
    for name in ("residual_rms", "update_ratio", "gradient_snr", "rank_k90", "output_entropy", "trajectory_distance"):
        assert np.isfinite(getattr(timeline, name)).any(), name


def test_every_name_of_ours_is_known():
    assert set(OURS) <= set(QUANTITIES)
    for name, cls in QUANTITIES.items():
        assert cls.name == name and cls.__doc__ and cls().every in (None, 500)


def test_models_that_a_quantity_does_not_fit_are_refused_in_words():
    for name, words in (("adapter", "no adapters of peft"), ("router", "no router")):
        with pytest.raises(ValueError, match=words), Monitor(bert(), MonitorConfig(quantities=(name,))):
            pass
    assert gpt2() is not None


@pytest.mark.parametrize("mode", ["whole", "accumulated", "checkpointed"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_attention_detail(name, mode):
    model, batch = model_and_batch(name)
    truth = [p.detach() for p in probabilities(copy.deepcopy(model).eval(), batch)]
    masks = token_masks(batch, 3)
    if mode == "checkpointed":
        model.gradient_checkpointing_enable()
    config = MonitorConfig(quantities=("attention_detail",), every=1, rows=None)
    calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, *args, **kwargs):
        calls.append((query.detach().double(), key.detach().double()))
        return sdpa(query, key, *args, **kwargs)

    with Monitor(model, config) as monitor, torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention = spy
        try:
            copy.deepcopy(model)(**batch)
        finally:
            torch.nn.functional.scaled_dot_product_attention = sdpa
        with torch.enable_grad():
            for piece in halves(batch) if mode == "accumulated" else [batch]:
                model(**piece)["loss"].backward()
        monitor.step()
    timeline = monitor.timeline
    assert len(calls) == 3
    for layer, (p, mask, (query, key)) in enumerate(zip(truth, masks, calls, strict=True)):
        entropy, keys = -torch.special.xlogy(p, p).sum(-1), (p > 0).sum(-1)
        several = (keys > 1) & mask[:, None]
        for head in range(p.shape[1]):
            ratio = (entropy / keys.double().log())[:, head][several[:, head]].mean().item()
            assert timeline.entropy_ratio[0, layer, head] == pytest.approx(ratio, rel=1e-4)
            assert timeline.query_norm[0, layer, head] == pytest.approx(
                query[:, head].norm(dim=-1)[mask].mean().item(), rel=1e-4
            )
            of_keys = key[:, head * key.shape[1] // p.shape[1]].norm(dim=-1)[mask].mean().item()
            assert timeline.key_norm[0, layer, head] == pytest.approx(of_keys, rel=1e-4)
        sinks = (torch.stack([p[:, h, :, 0][mask].mean() for h in range(p.shape[1])]) > 0.3).double().mean()
        assert timeline.sink_heads[0, layer] == sinks
