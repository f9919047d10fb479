"""The twins in plain PyTorch have the same names and signatures, and in float64 they are the truth."""

import inspect

import pytest
import torch
from truth import FIELDS, INF, cka, logits_stats, qk_stats, worst

import inflection_fast
from inflection_fast.ops import reference

TWINS = [
    "attention_entropy",
    "attention_entropy_qk",
    "attention_stats",
    "attention_stats_qk",
    "linear_cka",
    "delta_cka",
    "sum_of_squares",
]


@pytest.mark.parametrize("name", TWINS)
def test_every_operator_has_a_twin_of_the_same_signature(name):
    ours, twin = (inspect.signature(getattr(module, name)) for module in (inflection_fast, reference))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in twin.parameters.values()
    ]


def test_reference_statistics_in_float64_are_the_truth():
    q, k = torch.randn(2, 4, 9, 16).double() * 3, torch.randn(2, 2, 21, 16).double()
    mask = torch.randn(2, 1, 9, 21).masked_fill(torch.rand(2, 1, 9, 21) < 0.3, -INF)
    options = {
        "attn_mask": mask,
        "is_causal": True,
        "scale": 0.4,
        "window": (5, 2),
        "softcap": 3.0,
        "rows": torch.tensor([8, 0]),
    }
    got, truth = reference.attention_stats_qk(q, k, **options), qk_stats(q, k, **options)
    for name in FIELDS:
        assert worst(getattr(got, name), truth[name]) <= 1e-12 + (1e-6 if getattr(got, name).dtype != q.dtype else 0), (
            name
        )
    plain = reference.attention_entropy(q, attn_mask=mask[..., :16], is_causal=True)
    assert worst(plain, logits_stats(q, attn_mask=mask[..., :16], is_causal=True)["entropy"]) <= 1e-12


def test_reference_cka_in_float64_is_the_truth():
    x, y = torch.randn(3, 20, 6).double(), torch.randn(3, 20, 6).double()
    y = x + 0.7 * y
    for options in ({}, {"debiased": False}, {"rank": 3}, {"rank": 2, "debiased": False}):
        assert worst(reference.linear_cka(x, y, **options), cka(x, y, **options)) <= 1e-10
