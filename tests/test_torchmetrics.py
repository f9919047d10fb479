"""Metrics of torchmetrics, by the real package: any split over updates and ranks gives the values of all rows."""

import pytest
import torch
from helpers.programs import spawn
from torch import distributed

pytest.importorskip("torchmetrics")

from torchmetrics import MetricCollection

from inflection_fast import attention_entropy_qk, linear_cka
from inflection_fast.integrations.torchmetrics import AttentionEntropy, LinearCKA

LAYERS, ROWS, DIM = 2, 60, 5
ERROR = 1e-6


def features():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(LAYERS, ROWS, DIM, generator=generator)
    y = torch.cat([x, torch.randn(LAYERS, ROWS, 2, generator=generator)], -1)
    return x + torch.linspace(50, 80, ROWS)[:, None], y - 20.0


def calls():
    """Attention calls of different sizes: queries, keys, rows that count."""
    generator = torch.Generator().manual_seed(6)
    for length in (7, 20, 3, 12):
        query, key = torch.randn(2, 2, 4, length, 8, generator=generator)
        yield query * 3, key, torch.rand(2, length, generator=generator) < 0.7


def mean_entropy():
    sums, rows = 0.0, 0
    for query, key, valid in calls():
        entropy = attention_entropy_qk(query, key, is_causal=True).double()
        sums, rows = sums + (entropy * valid[:, None]).sum((0, 2)), rows + valid.sum()
    return (sums / rows).float()


def test_updates_give_the_mean_over_all_rows_and_the_cka_of_all_rows():
    entropy, cka = AttentionEntropy(4, per_head=True), LinearCKA(LAYERS, DIM, DIM + 2)
    for query, key, valid in calls():
        entropy.update(query, key, valid, is_causal=True)
    x, y = features()
    for part in torch.arange(ROWS).split(13):
        cka.update(x[:, part], y[:, part])
    torch.testing.assert_close(entropy.compute(), mean_entropy(), rtol=0, atol=ERROR)
    torch.testing.assert_close(cka.compute(), linear_cka(x, y), rtol=0, atol=ERROR)
    cka.reset()
    cka.update(x[:, :9], y[:, :9], torch.arange(9) > 1)
    torch.testing.assert_close(cka.compute(), linear_cka(x[:, 2:9], y[:, 2:9]), rtol=0, atol=ERROR)


def test_a_forward_is_the_value_of_its_rows_and_joins_the_others():
    x, y = features()
    cka = LinearCKA(LAYERS, DIM, DIM + 2, debiased=False)
    for part in torch.arange(ROWS).split(20):
        own = cka(x[:, part], y[:, part])
        torch.testing.assert_close(own, linear_cka(x[:, part], y[:, part], debiased=False), rtol=0, atol=ERROR)
    torch.testing.assert_close(cka.compute(), linear_cka(x, y, debiased=False), rtol=0, atol=ERROR)


def test_metrics_merge_are_copied_and_stand_in_collections():
    x, y = features()
    parts = [LinearCKA(LAYERS, DIM, DIM + 2) for _ in range(3)]
    for metric, part in zip(parts, torch.arange(ROWS).split(25), strict=True):
        metric.update(x[:, part], y[:, part])
    kept = parts[0].clone()
    for other in (*parts[1:], LinearCKA(LAYERS, DIM, DIM + 2)):
        parts[0].merge_state(other)
    torch.testing.assert_close(parts[0].compute(), linear_cka(x, y), rtol=0, atol=ERROR)
    torch.testing.assert_close(kept.compute(), linear_cka(x[:, :25], y[:, :25]), rtol=0, atol=ERROR)
    assert set(MetricCollection({"a": kept, "b": AttentionEntropy(2)}).keys()) == {"a", "b"}


def work(rank, store, results):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        entropy, cka = AttentionEntropy(4, per_head=True), LinearCKA(LAYERS, DIM, DIM + 2)
        for number, (query, key, valid) in enumerate(calls()):
            if number % 2 == rank:
                entropy.update(query, key, valid, is_causal=True)
        x, y = features()
        own = torch.arange(ROWS)[rank::2]
        cka.update(x[:, own], y[:, own])
        values = {"entropy": entropy.compute(), "cka": cka.compute()}
        cka.update(x[:, own], y[:, own])  # after a synced compute the metric holds its own rows again
        values["rows"] = cka.sums[0]
        torch.save(values, f"{results}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_two_ranks_give_the_values_of_all_rows(tmp_path):
    spawn(work, (tmp_path / "store", tmp_path), 2)
    for rank in range(2):
        values = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(values["entropy"], mean_entropy(), rtol=0, atol=ERROR)
        torch.testing.assert_close(values["cka"], linear_cka(*features()), rtol=0, atol=ERROR)
        assert values["rows"] == ROWS


@pytest.mark.parametrize("call, words", [
    (lambda q: AttentionEntropy(0), "num_heads: expected an int of at least 1, got 0"),
    (lambda q: AttentionEntropy(3).update(q, q), "query: expected 3 heads, got 4"),
    (lambda q: AttentionEntropy(4).update(q, q, torch.ones(2, 6)), r"valid: expected bool \[2, 7\], got torch.float32"),
    (lambda q: LinearCKA(1, 8).update(q[:, 0], q[:, 0]), r"x: expected shape \[1, N, 8\]"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.randn(2, 4, 7, 8))
