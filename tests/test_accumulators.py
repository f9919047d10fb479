"""Token-weighted means, their standard errors, and gradient norms, pushed in pieces and merged."""

import numpy as np
import pytest
import torch
from helpers.packets import packet_of, row_of, tensors_of

from inflection_fast import quantities
from inflection_fast.measure.attention import rows_of
from inflection_fast.measure.packet import Packet
from inflection_fast.measure.schedule import RowSampler
from inflection_fast.ops import AttentionStats
from inflection_fast.quantities.quantity import OutputGradient

CPU = torch.device("cpu")
L, H = 3, 2


def random_stats(batch, rows, seed, empty=0.2):
    generator = torch.Generator().manual_seed(seed)
    fields = {name: torch.rand(batch, H, rows, generator=generator) for name in AttentionStats._fields}
    fields["keys"] = (torch.rand(batch, H, rows, generator=generator) > empty).float() * 5
    return AttentionStats(**fields)


def everything(length):
    return RowSampler(None, 0, CPU).draw(length)


def push(packet, layers, stats, valid, strata):
    rows = rows_of(tuple(layers), torch.tensor(layers), slice(0, H), stats, valid, strata)
    quantities.made("attention").on_attention(packet["attention"], rows)


def value_of(packet):
    return tensors_of(row_of(packet))


def test_means_count_valid_rows_with_keys():
    stats = [random_stats(4, 9, seed) for seed in range(L)]
    valid = torch.rand(4, 9, generator=torch.Generator().manual_seed(9)) > 0.4
    packet = packet_of(L, H)
    push(packet, [0, 1, 2], stats, valid, everything(9))
    value = value_of(packet)
    for layer in range(L):
        for head in range(H):
            rows = valid & (stats[layer].keys[:, head] > 0)
            for name in ("entropy", "collision", "sink"):
                expected = getattr(stats[layer], name)[:, head][rows].double().mean()
                torch.testing.assert_close(value[name][layer, head], expected)
            assert value["max_logit"][layer, head] == stats[layer].max_logit[:, head][rows].max()
    assert (value["entropy_se"] == 0).all()


def test_pieces_whose_sums_and_maxima_are_joined_give_the_same_as_one_push():
    strata = everything(6)
    pieces = [([random_stats(2, 6, 10 * i + j) for j in range(L)], torch.rand(2, 6) > 0.3) for i in range(3)]
    whole = packet_of(L, H)
    together = [AttentionStats(*(torch.cat(x) for x in zip(*(p[0][j] for p in pieces), strict=True))) for j in range(L)]
    push(whole, [0, 1, 2], together, torch.cat([valid for _, valid in pieces]), strata)
    left, right = packet_of(L, H), packet_of(L, H)
    for i, (stats, valid) in enumerate(pieces):
        for layers in ([1], [2, 0]):  # any grouping of layers
            push(left if i else right, layers, [stats[layer] for layer in layers], valid, strata)
    left.sums += right.sums
    left.parts += right.parts
    torch.maximum(left.maxima, right.maxima, out=left.maxima)
    for name, value in value_of(whole).items():
        torch.testing.assert_close(value_of(left)[name], value, equal_nan=True)
    assert value_of(whole)["entropy"].isfinite().all() and value_of(whole)["max_logit"].isfinite().all()
    left.reset()
    assert all(value.isnan().all() for value in value_of(left).values())


def test_a_layer_without_rows_has_no_value_and_nan_stays_nan():
    packet = packet_of(L, H)
    stats = random_stats(2, 4, 0, empty=0.0)
    stats.entropy[0, 1, 2] = torch.nan
    push(packet, [1], [stats], None, everything(4))
    push(packet, [2], [stats], torch.zeros(2, 4, dtype=torch.bool), everything(4))
    value = value_of(packet)
    assert value["entropy"].isnan().tolist() == [[True, True], [False, True], [True, True]]
    hidden = torch.ones(2, 4, dtype=torch.bool)
    hidden[0, 2] = False  # padding may hold anything
    packet.reset()
    push(packet, [1], [stats], hidden, everything(4))
    assert not value_of(packet)["entropy"][1].isnan().any()


# ---- sampling --------------------------------------------------------------------------------------------------------


def population(length, kind, seed=0):
    """Entropies [B, H, T] that depend on the position, and rows that are padding."""
    generator = np.random.default_rng(seed)
    batch = 6
    position = np.arange(length)
    smooth = {"trend": np.log1p(position), "flat": 0 * position, "wave": np.sin(position / 9)}[kind]
    values = smooth + generator.normal(0, 0.3, (batch, 1, length)) + generator.normal(0, 0.1, (1, 1, length))
    lengths = generator.integers(length // 2, length + 1, batch)
    valid = position < lengths[:, None]
    return torch.from_numpy(np.repeat(values, H, 1)).float(), torch.from_numpy(valid)


def estimates(length, rows, kind, draws, micro_batches=1):
    means, errors = [], []
    sampler = RowSampler(rows, 0, CPU)
    parts = [population(length, kind, seed) for seed in range(micro_batches)]
    for draw in range(draws):
        sampler.begin(draw)
        packet = packet_of(1, H)
        for values, valid in parts:
            strata = sampler.draw(length)
            entropy = values[:, :, strata.rows]
            stats = AttentionStats(*[torch.ones_like(entropy)] * 6)._replace(entropy=entropy)
            push(packet, [0], [stats], valid[:, strata.rows], strata)
        value = value_of(packet)
        means.append(value["entropy"][0, 0])
        errors.append(value["entropy_se"][0, 0])
    total = sum(values[:, 0][valid].double().sum() for values, valid in parts)
    count = sum(valid.sum() for _, valid in parts)
    return torch.stack(means), torch.stack(errors), total / count


@pytest.mark.parametrize(
    "length, rows, kind, micro_batches, at_most",
    # Where neighbouring strata differ by more than noise, differences between them overstate the error.
    [
        (200, 40, "flat", 1, 1.25),
        (100, 64, "flat", 1, 1.25),
        (97, 13, "flat", 2, 1.25),
        (200, 40, "trend", 1, 1.4),
        (100, 64, "wave", 2, 1.4),
        (97, 13, "wave", 1, 2.0),
    ],
)
def test_the_standard_error_is_honest(length, rows, kind, micro_batches, at_most):
    means, errors, truth = estimates(length, rows, kind, 300, micro_batches)
    spread = means.std()
    assert abs(means.mean() - truth) < 4 * spread / len(means) ** 0.5 + 0.05 * spread  # a ratio: bias below its noise
    assert 0.85 * spread < errors.square().mean().sqrt() < at_most * spread
    covered = ((means - truth).abs() < 1.96 * errors).float().mean()
    assert 0.88 < covered <= 1.0


@pytest.mark.parametrize("lengths", [(200,), (50, 50, 50, 50), (90, 11, 60, 39), (25,) * 8])
def test_the_standard_error_of_packed_sequences_is_honest(lengths):
    """Entropies that begin anew in every sequence, as causal ones do."""
    total, starts = sum(lengths), torch.tensor([0, *np.cumsum(lengths)])
    generator = np.random.default_rng(0)
    trend = np.concatenate([np.log1p(np.arange(length)) for length in lengths])
    values = torch.from_numpy(trend + 0.2 * generator.normal(size=(1, H, total))).float()
    sampler, means, errors = RowSampler(64, 0, CPU), [], []
    for draw in range(300):
        sampler.begin(draw)
        strata = sampler.draw(total).within(starts)
        entropy, packet = values[:, :, strata.rows], packet_of(1, H)
        stats = AttentionStats(*[torch.ones_like(entropy)] * 6)._replace(entropy=entropy)
        push(packet, [0], [stats], None, strata)
        value = value_of(packet)
        means.append(value["entropy"][0, 0])
        errors.append(value["entropy_se"][0, 0])
    means, errors = torch.stack(means), torch.stack(errors)
    assert abs(means.mean() - values[0, 0].double().mean()) < 4 * means.std() / len(means) ** 0.5
    # It was 2.2 to 2.4 times the spread when neighbours of other sequences counted.
    assert 0.8 * means.std() < errors.square().mean().sqrt() < 1.6 * means.std()


def test_stratified_positions_are_better_than_random_ones():
    means, _, truth = estimates(200, 20, "trend", 100)
    values, valid = population(200, "trend")
    generator = torch.Generator().manual_seed(0)
    free = []
    for _ in range(100):
        rows = torch.randperm(200, generator=generator)[:20]
        free.append(values[:, 0, rows][valid[:, rows]].mean())
    assert (means - truth).std() < 0.5 * (torch.stack(free).double() - truth).std()


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-25, 1e-21, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_norms_of_gradients_whose_squares_leave_float32(dtype, size):
    quantity, packet, gradient = (
        quantities.made("activation_grad"),
        packet_of(L, H),
        torch.full((5, 20), size, dtype=dtype),
    )
    quantity.on_output_gradient(packet["activation_grad"], OutputGradient(1, gradient, 0))
    exact = gradient.double().square().sum()
    torch.testing.assert_close(packet["activation_grad"]["squares"][1], exact, rtol=1e-12, atol=0)


def test_gradient_norms_join_micro_batches_and_overwrite_repetitions():
    quantity, packet = quantities.made("activation_grad"), packet_of(L, H)
    fields, region = packet.fields.only(["activation_grad"]), packet.fields.region(["activation_grad"])
    gradients = torch.randn(20, 2, 5, 4)
    for micro_batch, (first, second) in enumerate(gradients):
        piece = Packet(fields)
        for layer, gradient in ((0, 7 * first), (0, first), (2, second.bfloat16())):
            quantity.on_output_gradient(piece["activation_grad"], OutputGradient(layer, gradient, micro_batch))
        packet.add(piece, region)
    squares = packet["activation_grad"]["squares"]
    torch.testing.assert_close(squares[0], gradients[:, 0].double().square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(squares[2], gradients[:, 1].bfloat16().double().square().sum(), rtol=1e-6, atol=0)
    assert packet["activation_grad"]["count"].tolist() == [20, 0, 20]
    value = value_of(packet)["activation_grad"]
    assert value.isnan().tolist() == [False, True, False]
    quantity.on_output_gradient(packet["activation_grad"], OutputGradient(0, torch.tensor(torch.nan), 0))
    assert value_of(packet)["activation_grad"][0].isnan()
