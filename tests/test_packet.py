"""What the sums of a step amount to, and how much memory they take."""

import functools

import numpy as np
import pytest
import torch
from tiny_models import loss_of, model_and_batch, one_thread  # noqa: F401
from torch import nn

from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.measure.config import SIGNALS
from inflection_fast.measure.packet import ATTENTION_PARTS, ATTENTION_SUMS, Packet, row_of
from inflection_fast.measure.schedule import MOST_LENGTHS, RowSampler

L, H = 2, 3


def row(packet):
    return row_of(packet.data.numpy(), packet.layers, packet.heads, probe=packet.probe)


def test_views_cover_the_memory_once():
    packet = Packet(L, H, "cpu", probe=True)
    sums = ("attention", "activation_squares", "parameter_squares", "delta_cka", "loss", "skipped", "probe_attention")
    sums += ("probe_activation_squares", "probe_activation_count", "delta_cka_se", "probe_ms")
    counts = ("activation_count", "parameter_count", "delta_cka_count", "loss_count", "skipped_count")
    counts += ("delta_cka_se_count", "probe_ms_count")
    for value, name in enumerate([*sums, *counts]):
        assert (packet[name] == 0).all()
        packet[name].fill_(value + 1)
    assert packet.sums.dtype == torch.float64 and (packet.sums > 0).all()
    assert packet["attention"].shape == (len(ATTENTION_SUMS), L, H) and (packet["attention"] == 1).all()
    assert packet["probe_attention"].shape == (len(ATTENTION_SUMS), L, H)
    packet["attention_parts"].fill_(6.0)
    assert (packet.parts == 6).all() and packet["attention_parts"].shape == (len(ATTENTION_PARTS), L, H)
    packet["max_logit"].fill_(7.0)
    assert (packet.maxima == 7).all() and packet.maxima.shape == (L * H,)
    kinds = packet.sums, packet.parts, packet.maxima
    assert packet.data.nbytes == sum(kind.nbytes for kind in kinds)
    assert (packet.parts == 6).all() and (packet.sums > 0).all() and not packet.sums.isnan().any()


def test_a_value_without_pieces_is_nan():
    assert all(np.isnan(value).all() for value in row(Packet(L, H, "cpu", probe=True)).values())


def test_norms_are_roots_of_sums_and_the_rest_are_means():
    packet = Packet(L, H, "cpu")
    packet["activation_squares"].copy_(torch.tensor([9.0, 16.0]))
    packet["activation_count"].copy_(torch.tensor([2.0, 0.0]))
    packet["delta_cka"].fill_(0.5)
    packet["delta_cka_count"].fill_(2)
    packet["delta_cka_se"].fill_(0.2)
    packet["delta_cka_se_count"].fill_(2)
    packet["loss"].fill_(3.0)
    packet["loss_count"].fill_(4)
    packet["skipped"].fill_(2)
    packet["skipped_count"].fill_(3)
    value = row(packet)
    assert value["skipped"] == 1
    np.testing.assert_array_equal(value["activation_grad"], [3.0, np.nan])
    np.testing.assert_array_equal(value["delta_cka"], [0.25, 0.25])
    np.testing.assert_array_equal(value["delta_cka_se"], [0.1, 0.1])
    assert value["loss"] == 0.75 and np.isnan(value["parameter_grad"]).all()


def test_the_standard_error_is_that_of_the_linearised_ratio():
    """Against the residuals themselves: differences of e = y - mean v at successive positions."""
    generator = np.random.default_rng(0)
    y, v = generator.random((9, L, H)), 1 + generator.random((9, L, H))
    dy, dv = np.diff(y, axis=0), np.diff(v, axis=0)
    packet = Packet(L, H, "cpu")
    packet["attention"].copy_(torch.from_numpy(np.stack([v.sum(0), y.sum(0)])))
    parts = [0 * v[0], 0 * v[0], (dy * dy).sum(0), (dy * dv).sum(0), (dv * dv).sum(0)]
    packet["attention_parts"].copy_(torch.from_numpy(np.stack(parts)))
    mean = y.sum(0) / v.sum(0)
    expected = np.sqrt((np.diff(y - mean * v, axis=0) ** 2).sum(0)) / v.sum(0)
    np.testing.assert_allclose(row(packet)["entropy_se"], expected, rtol=1e-6)
    np.testing.assert_allclose(row(packet)["entropy"], mean, rtol=1e-15)


# ---- memory ----------------------------------------------------------------------------------------------------------


def kept_bytes(layers, heads, rows, micro_batches, probe, lengths=1):
    """All that stays on the device between measured steps but states of CKA, as docs/scale.md has it."""
    packet = (56 if probe else 40) * layers * heads + (80 if probe else 64) * layers + 48
    gradients = 4 * layers * (1 << (micro_batches - 1).bit_length()) + 8 * layers  # norms; squares of parameters
    lists = (2 + probe) * 2 * 8 * layers  # which layers are pushed together, and which have gradients
    sampling = (1 + probe) * (16 * lengths + 8) * rows  # weights of strata by length of the sequences; positions
    losses = 4 * micro_batches
    return packet + (1 + probe) * gradients + lists + sampling + losses


def tensors_in(value, seen):
    """Every tensor that an object holds, but for those of the model."""
    if id(value) in seen or isinstance(value, (nn.Module, type)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in (*value, *value.values()):
            yield from tensors_in(one, seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for one in value:
            yield from tensors_in(one, seen)
    elif isinstance(value, functools.partial):
        yield from tensors_in((value.args, value.keywords), seen)
    elif type(value).__module__.startswith("inflection_fast"):
        yield from tensors_in(vars(value), seen)


@pytest.mark.parametrize("probe", [False, True])
def test_no_more_is_kept_between_steps_than_is_said(probe):
    model, batch = model_and_batch("bert")
    signals = SIGNALS if probe else SIGNALS[:3]
    rows, micro_batches = 5, 3
    with Monitor(
        model, MonitorConfig(every=1, rows=rows, signals=signals), probe=[batch] if probe else None
    ) as monitor:
        for _ in range(3):
            for _ in range(micro_batches):
                loss_of(model(**batch)).backward()
            monitor.step()
        for _ in range(micro_batches):
            loss_of(model(**batch)).backward()
        held = [monitor._taps, monitor._probe.taps] if probe else [monitor._taps]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors_in(held, set())}
        assert monitor._taps.packet.data.data_ptr() in storages
        kept = sum(storage.nbytes() for storage in storages.values())
    assert 0 < kept <= kept_bytes(3, 4, rows, micro_batches, probe)


@pytest.mark.parametrize("probe", [False, True])
def test_a_model_of_405b_is_measured_in_less_than_a_mebibyte(probe):
    layers, heads = 126, 128
    packet = Packet(layers, heads, "meta", probe=probe)
    most = kept_bytes(layers, heads, rows=64, micro_batches=32, probe=probe, lengths=MOST_LENGTHS)
    assert packet.data.nbytes < most < 2**20


def test_sequences_of_all_lengths_do_not_pile_up():
    sampler = RowSampler(4, 0, torch.device("cpu"))
    sampler.begin(0)
    for length in range(100, 400):
        assert sampler.draw(length).weights.sum() == length
    assert sum(tensor.nbytes for tensor in tensors_in(sampler._shapes, set())) <= MOST_LENGTHS * 24 * 4
