"""delta-CKA of every block on a fixed probe set, against the start of the run or against switched-off adapters."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.monitored import train
from helpers.probes import CKA, adapted, measured_after_moving, moved
from helpers.tiny_models import bert, classify, model_and_batch, one_thread, sharpened, translate  # noqa: F401
from torch import nn

from inflection_fast import ops
from inflection_fast.blocks import find_blocks
from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.measure.packet import StepSums
from inflection_fast.measure.panel import Panel
from inflection_fast.measure.probe import Probe
from inflection_fast.quantities.quantity import MeasuredModel


def probe_of(model, batches, config):
    blocks, panel = find_blocks(model, config.blocks), Panel(config.instances())
    panel.prepare(MeasuredModel(model, tuple(blocks), torch.device("cpu"), config))
    panel.begin(config.names)
    return Probe(model, blocks, batches, config, panel)


def sums_of(probe, layers, heads):
    return StepSums(probe._panel.fields(layers, heads), (), (), torch.device("cpu"))


def features(model, batches, pool=None):
    """Per block [N, D] in float64: the valid tokens of the whole probe set."""
    model, kept = model.double().eval(), [[] for _ in find_blocks(model)]
    for batch in batches:
        outputs = []

        def keep(module, args, output, outputs=outputs):
            outputs.append(output)

        handles = [block.module.register_forward_hook(keep) for block in find_blocks(model)]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        for layer, output in enumerate(outputs):
            output = output if isinstance(output, torch.Tensor) else output[0]
            valid = batch["attention_mask"].bool()
            kept[layer] += [pool(o[v]) if pool else o[v] for o, v in zip(output, valid, strict=True)]
    model.float().train()
    return [(torch.stack if pool else torch.cat)(rows) for rows in kept]


def delta_cka(before, after):
    """Biased linear CKA from its definition, in float64."""
    x, y = before - before.mean(0), after - after.mean(0)
    k, m = x @ x.T, y @ y.T
    return 1 - (k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()


@pytest.mark.parametrize(
    "pooling, pool",
    [("tokens", None), ("mean", lambda rows: rows.mean(0)), ("first", lambda r: r[0]), ("last", lambda r: r[-1])],
)
def test_delta_cka_is_that_of_the_valid_tokens_of_the_probe(pooling, pool):
    torch.manual_seed(0)
    model, probe = sharpened(bert().train()), [classify(), classify()]
    before = features(model, probe, pool)
    config = MonitorConfig(every=1, signals=("delta_cka",), cka_debiased=False, cka_pooling=pooling)
    delta = measured_after_moving(model, probe, config)
    np.testing.assert_allclose(delta[0], 0, atol=1e-6)  # measured before the first update
    expected = torch.stack([delta_cka(x, y) for x, y in zip(before, features(model, probe, pool), strict=True)])
    assert expected.min() > 0.01
    np.testing.assert_allclose(delta[1], expected, rtol=1e-4, atol=1e-6)


def test_debiasing_and_rank_are_those_of_the_operator():
    torch.manual_seed(0)
    model, probe = sharpened(bert().train()), [classify(), classify()]
    before = torch.stack(features(model, probe)).float()
    start = copy.deepcopy(model)
    for settings in ({"cka_debiased": True}, {"cka_debiased": False, "cka_rank": 5}):
        model = copy.deepcopy(start)
        delta = measured_after_moving(model, probe, MonitorConfig(every=1, signals=("delta_cka",), **settings))[1]
        after = torch.stack(features(model, probe)).float()
        debiased, rank = settings["cka_debiased"], settings.get("cka_rank")
        np.testing.assert_allclose(delta, ops.delta_cka(before, after, debiased=debiased, rank=rank), rtol=1e-3)
        other = ops.delta_cka(before, after, debiased=not debiased, rank=None)
        assert abs(torch.from_numpy(delta) - other).min() > 1e-3


def test_the_previous_snapshot_as_the_reference():
    torch.manual_seed(0)
    model, probe = sharpened(bert().train()), [classify(), classify()]
    states, config = [], MonitorConfig(every=1, signals=("delta_cka",), cka_debiased=False, cka_reference="previous")
    with Monitor(model, config, probe=probe) as monitor:
        for step in range(3):
            model(**probe[0]).loss.backward()
            monitor.step()
            states.append(features(model, probe))
            moved(model, step)
    delta = monitor.timeline.delta_cka
    np.testing.assert_allclose(delta[0], 0, atol=1e-6)
    for step in (1, 2):
        exact = torch.stack([delta_cka(x, y) for x, y in zip(states[step - 1], states[step], strict=True)])
        np.testing.assert_allclose(delta[step], exact, rtol=1e-4, atol=1e-6)
    from_start = torch.stack([delta_cka(x, y) for x, y in zip(states[0], states[2], strict=True)])
    assert np.abs(delta[2] - from_start.numpy()).min() > 1e-3


@pytest.mark.parametrize("pooling", ["tokens", "mean"])
def test_the_standard_error_comes_from_leaving_out_sequences(pooling):
    torch.manual_seed(0)
    model, probe = sharpened(bert().train()), [classify(), classify()]
    pool = None if pooling == "tokens" else lambda rows: rows.mean(0)
    before = features(model, probe, pool)
    settings = {"every": 1, "signals": ("delta_cka",), "cka_debiased": False, "cka_pooling": pooling}
    start = copy.deepcopy(model)
    timelines = []
    for se in (True, False):
        model = copy.deepcopy(start)
        with Monitor(model, MonitorConfig(**settings, cka_se=se), probe=probe) as monitor:
            model(**probe[0]).loss.backward()
            moved(model)
            monitor.step()
        timelines.append(monitor.timeline)
    asked, not_asked = timelines
    np.testing.assert_allclose(asked.delta_cka, not_asked.delta_cka, rtol=1e-5)
    assert np.isnan(not_asked.delta_cka_se).all()
    assert (asked.probe_ms > 0).all() and (asked.probe_ms <= asked.measure_ms).all()
    sequences = torch.cat([batch["attention_mask"].sum(1) for batch in probe])
    if pooling == "mean":
        sequences = torch.ones_like(sequences)
    ids = torch.repeat_interleave(torch.arange(len(sequences)), sequences)
    for layer, (x, y) in enumerate(zip(before, features(model, probe, pool), strict=True)):
        without = torch.stack([delta_cka(x[ids != s], y[ids != s]) for s in ids.unique()])
        m = len(without)
        exact = ((m - 1) / m * (without - without.mean()).square().sum()).sqrt()
        assert exact > 1e-3
        np.testing.assert_allclose(asked.delta_cka_se[0, layer], exact, rtol=1e-3)


def test_a_budget_keeps_a_reproducible_part_of_the_rows():
    torch.manual_seed(0)
    model, probe = bert(), [classify(), classify(), classify()]
    kept = [probe_of(model, probe, MonitorConfig(cka_rows=n))._features() for n in (20, 20, 50, 2048)]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in probe)
    assert [len(layers[0]) for layers in kept] == [20, 20, 50, tokens]
    assert all(torch.equal(a, b) for a, b in zip(kept[0], kept[1], strict=True))
    everything = {tuple(row) for row in kept[3][1].tolist()}
    assert len({tuple(row) for row in kept[0][1].tolist()} & everything) == 20  # each once, none of padding
    other = probe_of(model, probe, MonitorConfig(cka_rows=20, seed=1))._features()
    assert not torch.equal(other[0], kept[0][0])


def test_encoder_and_decoder_have_rows_of_their_own():
    model, batch = model_and_batch("t5")
    rows = probe_of(model, [batch], MonitorConfig())._features()
    expected = [int(batch["attention_mask"].sum())] * 2 + [int(batch["decoder_attention_mask"].sum())] * 2
    assert [len(layer) for layer in rows] == expected
    delta = train(model, translate(), 2, CKA, probe=[batch]).timeline.delta_cka
    assert np.isfinite(delta).all() and (delta[1] > 0).all()


def test_the_probe_runs_in_evaluation_mode():
    torch.manual_seed(0)
    model = sharpened(bert(dropout=0.3).train())
    probe = probe_of(model, [classify()], CKA)
    before = probe._features()
    torch.rand(1)  # the next run would draw another dropout
    assert all(map(torch.equal, before, probe._features()))


def test_the_probe_leaves_no_trace():
    torch.manual_seed(0)
    model, probe = bert(dropout=0.3).train(), [classify()]
    model.bert.encoder.layer[1].eval()  # as somebody who freezes a block would
    # A model that is random in evaluation too.
    model.bert.embeddings.register_forward_hook(lambda module, args, output: output + torch.rand(1))
    model(**probe[0]).loss.backward()
    flags = [module.training for module in model.modules()]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    random = torch.get_rng_state()
    one = probe_of(model, probe, CKA)
    one.remember()
    one.measure(sums_of(one, 3, 4), CKA.names)
    broken = probe_of(model, [{"input_ids": torch.tensor([[10**6]])}], CKA)
    with pytest.raises(IndexError):
        broken.remember()
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert sum(len(module._forward_hooks) for module in model.modules()) == 1


def test_the_probe_is_run_on_its_own_schedule():
    model, batch = model_and_batch("bert")
    config = MonitorConfig(every=2, probe_every=4, signals=("attention", "delta_cka"))
    timeline = train(model, batch, 7, config, probe=[batch]).timeline
    assert timeline.steps.tolist() == [0, 2, 4, 6]
    assert np.isnan(timeline.delta_cka).all(1).tolist() == [False, True, False, True]


def test_a_resumed_run_keeps_the_reference_of_the_start(tmp_path):
    whole = train(*model_and_batch("bert"), 4, CKA, probe=[classify_once()]).timeline
    model, batch = model_and_batch("bert")
    train(model, batch, 2, CKA, tmp_path, probe=[classify_once()])
    resumed = train(model, batch, 2, CKA, tmp_path, probe=[classify_once()], start_step=2).timeline
    assert (whole.delta_cka[1:] > 1e-6).all()
    np.testing.assert_allclose(resumed.delta_cka, whole.delta_cka, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="another probe"):
        train(model, batch, 1, CKA, tmp_path, probe=[classify_once(), classify_once()], start_step=4)


def classify_once():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return classify()


def test_without_the_reference_of_the_start_the_log_says_against_what(tmp_path, caplog):
    train(*model_and_batch("bert"), 1, CKA, tmp_path, probe=[classify()], start_step=3)
    assert "delta_cka is measured against step 3" in caplog.text


def test_adapters_switched_off_are_a_reference_that_stores_nothing():
    model, probe = adapted(), [classify()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    config = MonitorConfig(every=1, signals=("delta_cka",), cka_debiased=False, cka_reference="adapters_off")
    with Monitor(model, config, probe=probe) as monitor:
        assert monitor._probe._reference is None
        model(**probe[0]).loss.backward()
        monitor.step()
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    after = features(model, probe)
    with model.disable_adapter():
        before = features(model, probe)
    expected = torch.stack([delta_cka(x, y) for x, y in zip(before, after, strict=True)])
    assert expected.min() > 1e-3
    np.testing.assert_allclose(monitor.timeline.delta_cka[0], expected, rtol=1e-4, atol=1e-6)


def test_a_peft_model_is_measured_like_its_base():
    model, batch = adapted(), classify()
    timeline = train(model, batch, 1).timeline
    assert timeline.layers == [f"bert.encoder.layer.{i}" for i in range(3)]
    assert np.isfinite(timeline.entropy).all() and (timeline.activation_grad > 0).all()
    assert np.isnan(timeline.parameter_grad[0]).tolist() == [False, False, True]


def test_probes_that_cannot_be_used_are_refused():
    model, batch = model_and_batch("bert")
    for probe in ([], [torch.ones(2)], torch.ones(2), "text", 3):
        with pytest.raises(TypeError, match="probe: expected a list of model inputs"):
            Monitor(model, CKA, probe=probe)
    with pytest.raises(ValueError, match="'adapters_off' needs a peft model, got BertForSequenceClassification"):
        Monitor(model, MonitorConfig(cka_reference="adapters_off"), probe=[batch])
    with pytest.MonkeyPatch.context() as little:
        little.setattr(ops, "memory_bytes", lambda device: 1000)
        with pytest.raises(
            ValueError, match=r"cka_rows: 1 batches with \d+ rows of 3 blocks take about \d+ bytes, cpu"
        ):
            train(model, batch, 1, CKA, probe=[batch])
    short = {"input_ids": torch.tensor([[5, 6, 7]])}
    with pytest.raises(ValueError, match="fewer than 4 feature rows"):
        train(model, batch, 1, CKA, probe=[short])
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"expected block outputs \[B, T, D\]"):
        flat = nn.Sequential(nn.Linear(2, 2))
        probe_of(flat, [{"input": torch.ones(5, 2)}], replace(CKA, blocks=("0",)))._features()


# ---- the second source -----------------------------------------------------------------------------------------------

BOTH = MonitorConfig(every=1, rows=None, signals=(*MonitorConfig().signals, "probe_entropy", "probe_activation_grad"))


def sources(model, batch, probe, **settings):
    with Monitor(model, BOTH, probe=probe, **settings) as monitor:
        model(**batch).loss.backward()
        monitor.step()
    return monitor.timeline


@pytest.mark.parametrize("frozen", [False, True])
def test_the_probe_shows_what_training_on_it_would_show(frozen):
    model, batch = model_and_batch("bert")
    probe = [classify(), classify()]
    for parameter in list(model.parameters())[:-2]:
        parameter.requires_grad_(not frozen)
    both = MonitorConfig(every=1, rows=None, frozen_share=1.0)
    with Monitor(model, both) as monitor:
        for one in probe:
            model(**one).loss.backward()
        monitor.step()
    expected = monitor.timeline
    model.zero_grad()
    timeline = sources(model, batch, probe)
    np.testing.assert_allclose(timeline.probe_entropy, expected.entropy, rtol=1e-6)
    np.testing.assert_allclose(timeline.probe_activation_grad, expected.activation_grad, rtol=1e-6)
    assert not np.allclose(timeline.entropy, timeline.probe_entropy, rtol=1e-3)  # told apart
    assert not np.allclose(timeline.activation_grad, timeline.probe_activation_grad, rtol=1e-3)
    assert np.isfinite(timeline.delta_cka).all()


def test_gradients_of_the_probe_reach_no_parameter():
    model, batch = model_and_batch("bert")
    model(**batch).loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    arrived = []
    for parameter in model.parameters():  # as DistributedDataParallel listens
        parameter.register_post_accumulate_grad_hook(lambda parameter: arrived.append(parameter))
        parameter.register_hook(lambda gradient: arrived.append(gradient))
    probe = probe_of(model, [classify()], BOTH)
    probe.remember()
    sums = sums_of(probe, 3, 4)
    probe.measure(sums, BOTH.names)
    assert not arrived and (sums.packet["probe_activation_grad"]["squares"] > 0).all()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_probe_without_labels_has_no_gradients():
    model, batch = model_and_batch("bert")
    probe = [{name: value for name, value in classify().items() if name != "labels"}]
    timeline = sources(model, batch, probe)
    assert np.isnan(timeline.probe_activation_grad).all() and np.isfinite(timeline.probe_entropy).all()


def test_the_probe_of_a_compiled_model_is_seen():
    model, batch = model_and_batch("bert")
    expected = sources(model, batch, [batch])
    model.zero_grad()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**batch)
    actual = sources(compiled, batch, [batch])
    for name in ("probe_entropy", "probe_activation_grad"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=1e-6)


def test_the_probe_does_not_enter_a_wrapper():
    model, batch = model_and_batch("bert")
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    probe = probe_of(wrapped, [batch], BOTH)  # its forward would fail, it was never set up
    probe.remember()
    sums = sums_of(probe, 3, 4)
    probe.measure(sums, BOTH.names)
    assert (sums.packet["probe_entropy"]["rows"] > 0).all()
    assert (sums.packet["probe_activation_grad"]["squares"] > 0).all()
