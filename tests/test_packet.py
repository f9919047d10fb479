"""What the sums of a step amount to, and how much memory they take."""

import functools

import numpy as np
import pytest
import torch
from helpers.packets import ALL, packet_of, row_of
from helpers.tiny_models import loss_of, model_and_batch, one_thread  # noqa: F401
from torch import nn

from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.measure.schedule import MOST_LENGTHS, RowSampler

L, H = 2, 3


def test_views_cover_the_memory_once():
    packet = packet_of(L, H)
    names = [(field.quantity, field.name) for field in packet.fields.all]
    assert len(set(names)) == len(names) > 20
    for value, (quantity, name) in enumerate(names):
        view = packet[quantity][name]
        assert (view == (-torch.inf if name == "max_logit" else 0)).all()
        view.fill_(value + 1)
    for value, (quantity, name) in enumerate(names):
        assert (packet[quantity][name] == value + 1).all(), (quantity, name)
    kinds = packet.sums, packet.parts, packet.maxima
    assert [kind.dtype for kind in kinds] == [torch.float64, torch.float32, torch.float32]
    assert all((kind > 0).all() for kind in kinds)
    assert 0 <= packet.data.nbytes - sum(kind.nbytes for kind in kinds) < 8
    assert packet["attention"]["rows"].shape == (L, H) and packet["attention"]["parts"].shape == (L, 5, H)
    packet.reset()
    assert (packet.sums == 0).all() and (packet.parts == 0).all() and (packet.maxima == -torch.inf).all()


def test_another_tensor_in_the_place_of_an_accumulator_is_refused_in_words():
    sums = packet_of(L, H)["attention"]
    sums["rows"] += 1.0
    sums["rows"][1] += 1.0
    assert sums["rows"][:, 0].tolist() == [1, 2]
    with pytest.raises(TypeError, match="accumulator 'rows' is fixed memory, whose shape does not depend on the batch"):
        sums["rows"] = torch.zeros(7)


def test_a_packet_of_other_heads_has_the_same_numbers():
    packet = packet_of(L, H)
    packet["attention"]["rows"].copy_(torch.arange(6.0).view(2, 3))
    packet["attention"]["max_logit"].copy_(torch.arange(6.0).view(2, 3))
    wide, narrow = packet.with_heads(4), packet.with_heads(2)
    assert wide["attention"]["rows"].tolist() == [[0, 1, 2, 0], [3, 4, 5, 0]]
    assert wide["attention"]["max_logit"].tolist() == [[0, 1, 2, -torch.inf], [3, 4, 5, -torch.inf]]
    assert narrow["attention"]["rows"].tolist() == [[0, 1], [3, 4]] and narrow.fields.heads == 2


def test_a_value_without_pieces_is_missing():
    row = row_of(packet_of(L, H))
    assert row.keys() >= {"entropy", "activation_grad", "delta_cka", "loss", "probe_entropy"}
    assert all(np.isnan(value).all() for value in row.values())


def test_norms_are_roots_of_sums_and_the_rest_are_means():
    packet = packet_of(L, H)
    packet["activation_grad"]["squares"].copy_(torch.tensor([9.0, 16.0]))
    packet["activation_grad"]["count"].copy_(torch.tensor([2.0, 0.0]))
    for name, value in (("delta", 0.5), ("count", 2), ("error", 0.2), ("error_count", 2)):
        packet["delta_cka"][name].fill_(value)
    for name, value in (("loss", 3.0), ("losses", 4), ("skipped", 2), ("scaled", 3)):
        packet["step"][name].fill_(value)
    value = row_of(packet)
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
    packet = packet_of(L, H)
    packet["attention"]["rows"].copy_(torch.from_numpy(v.sum(0)))
    packet["attention"]["entropy"].copy_(torch.from_numpy(y.sum(0)))
    parts = [0 * v[0], 0 * v[0], (dy * dy).sum(0), (dy * dv).sum(0), (dv * dv).sum(0)]
    packet["attention"]["parts"].copy_(torch.from_numpy(np.stack(parts, 1)))
    mean = y.sum(0) / v.sum(0)
    expected = np.sqrt((np.diff(y - mean * v, axis=0) ** 2).sum(0)) / v.sum(0)
    np.testing.assert_allclose(row_of(packet)["entropy_se"], expected, rtol=1e-6)
    np.testing.assert_allclose(row_of(packet)["entropy"], mean, rtol=1e-15)


# ---- memory ----------------------------------------------------------------------------------------------------------


def kept_bytes(layers, heads, rows, micro_batches, probe, lengths=1):
    """All that stays on the device between measured steps but states of CKA, as docs/scale.md has it."""
    forward = (
        40 * layers * heads + 32
    )  # what attention and the step add up to: once for what has gone back, once not yet
    of_probe = (16 * layers * heads + 16 * layers) * probe
    packet = forward + of_probe + 64 * layers + 120
    gradients = 16 * layers * micro_batches  # norms at the outputs, by micro-batch
    lists = (2 + probe) * 2 * 8 * layers  # which layers are pushed together, and which have gradients
    sampling = (1 + probe) * (16 * lengths + 8) * rows  # weights of strata by length of the sequences; positions
    return packet + forward + 80 + 3 * of_probe + gradients + lists + sampling


def tensors_in(value, seen):
    """Every tensor that an object holds, but for those of the model."""
    if id(value) in seen or isinstance(value, (nn.Module, nn.Parameter, type)):
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
    signals = ALL if probe else ALL[:3]
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
        assert monitor._taps.sums.packet.data.data_ptr() in storages
        kept = sum(storage.nbytes() for storage in storages.values())
    assert 0 < kept <= kept_bytes(3, 4, rows, micro_batches, probe)


@pytest.mark.parametrize("probe", [False, True])
def test_a_model_of_405b_is_measured_in_less_than_two_mebibytes(probe):
    layers, heads = 126, 128
    packet = packet_of(layers, heads, ALL if probe else ALL[:3], "meta")
    most = kept_bytes(layers, heads, rows=64, micro_batches=32, probe=probe, lengths=MOST_LENGTHS)
    assert packet.data.nbytes < 2**20 and packet.data.nbytes < most < (2.5 if probe else 2) * 2**20


def test_sequences_of_all_lengths_do_not_pile_up():
    sampler = RowSampler(4, 0, torch.device("cpu"))
    sampler.begin(0)
    for length in range(100, 400):
        assert sampler.draw(length).weights.sum() == length
    assert sum(tensor.nbytes for tensor in tensors_in(sampler._shapes, set())) <= MOST_LENGTHS * 24 * 4
