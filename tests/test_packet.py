"""What the sums of a step amount to."""

import numpy as np
import torch

from inflection_fast.measure.packet import ATTENTION_SUMS, Packet, row_of

L, H = 2, 3


def row(packet):
    return row_of(packet.sums.numpy(), packet.maxima.numpy(), packet.layers, packet.heads, probe=packet.probe)


def test_views_cover_both_tensors_once():
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
    packet["max_logit"].fill_(7.0)
    assert (packet.maxima == 7).all() and packet.maxima.shape == (L * H,)


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
    sums = [v.sum(0), y.sum(0), 0 * v[0], 0 * v[0], (dy * dy).sum(0), (dy * dv).sum(0), (dv * dv).sum(0)]
    packet["attention"].copy_(torch.from_numpy(np.stack(sums)))
    mean = y.sum(0) / v.sum(0)
    expected = np.sqrt((np.diff(y - mean * v, axis=0) ** 2).sum(0)) / v.sum(0)
    np.testing.assert_allclose(row(packet)["entropy_se"], expected, rtol=1e-12)
    np.testing.assert_allclose(row(packet)["entropy"], mean, rtol=1e-15)
