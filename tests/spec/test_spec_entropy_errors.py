"""Bad input of the entropy operators: TypeError or ValueError that names the argument."""

import pytest
import torch

from inflection_fast import attention_entropy, attention_entropy_qk, attention_stats, attention_stats_qk

Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
LOGITS = torch.zeros(2, 4, 5, 7)

BAD_LOGITS = {
    "a list": (TypeError, "logits", lambda: ([[1.0, 2.0]],), {}),
    "float64": (TypeError, "logits", lambda: (LOGITS.double(),), {}),
    "int64": (TypeError, "logits", lambda: (LOGITS.long(),), {}),
    "bool": (TypeError, "logits", lambda: (LOGITS.bool(),), {}),
    "complex": (TypeError, "logits", lambda: (LOGITS.to(torch.complex64),), {}),
    "one axis": (ValueError, "logits", lambda: (torch.zeros(7),), {}),
    "no axis": (ValueError, "logits", lambda: (torch.zeros(()),), {}),
    "a mask that does not broadcast": (ValueError, "attn_mask", lambda: (LOGITS,), {"attn_mask": torch.zeros(5, 6)}),
    "a mask with a wrong batch": (ValueError, "attn_mask", lambda: (LOGITS,), {"attn_mask": torch.zeros(3, 1, 5, 7)}),
    "a mask with too many axes": (
        ValueError,
        "attn_mask",
        lambda: (LOGITS,),
        {"attn_mask": torch.zeros(1, 2, 4, 5, 7)},
    ),
    "an integer mask": (TypeError, "attn_mask", lambda: (LOGITS,), {"attn_mask": torch.ones(5, 7).long()}),
    "a mask on another device": (
        ValueError,
        "attn_mask",
        lambda: (LOGITS,),
        {"attn_mask": torch.zeros(5, 7, device="meta")},
    ),
    "a mask that is a list": (TypeError, "attn_mask", lambda: (LOGITS,), {"attn_mask": [[True] * 7] * 5}),
    "a scale of NaN": (ValueError, "scale", lambda: (LOGITS,), {"scale": float("nan")}),
    "a scale that is a word": (TypeError, "scale", lambda: (LOGITS,), {"scale": "big"}),
}

BAD_QK = {
    "query of float64": (TypeError, "query", lambda: (Q.double(), K.double()), {}),
    "query of integers": (TypeError, "query", lambda: (Q.long(), K), {}),
    "query that is a list": (TypeError, "query", lambda: ([1.0], K), {}),
    "key that is None": (TypeError, "key", lambda: (Q, None), {}),
    "key of another dtype": (TypeError, "key", lambda: (Q, K.half()), {}),
    "query of three axes": (ValueError, "query", lambda: (Q[0], K), {}),
    "key of three axes": (ValueError, "key", lambda: (Q, K[0]), {}),
    "key of another batch": (ValueError, "key", lambda: (Q, K[:1]), {}),
    "key of another head size": (ValueError, "key", lambda: (Q, K[..., :4]), {}),
    "key on another device": (ValueError, "key", lambda: (Q, K.to("meta")), {}),
    "heads that do not divide": (ValueError, "head", lambda: (Q, torch.zeros(2, 3, 7, 8)), {}),
    "more key heads than query heads": (ValueError, "head", lambda: (Q, torch.zeros(2, 8, 7, 8)), {}),
    "no key heads": (ValueError, "head", lambda: (Q, torch.zeros(2, 0, 7, 8)), {}),
    "a mask that does not broadcast": (ValueError, "attn_mask", lambda: (Q, K), {"attn_mask": torch.zeros(7, 5)}),
    "an integer mask": (TypeError, "attn_mask", lambda: (Q, K), {"attn_mask": torch.ones(5, 7, dtype=torch.int32)}),
    "a window of one number": (TypeError, "window", lambda: (Q, K), {"window": 3}),
    "a window of three": (ValueError, "window", lambda: (Q, K), {"window": (1, 2, 3)}),
    "a window of fractions": (TypeError, "window", lambda: (Q, K), {"window": (1.5, 2)}),
    "a softcap of zero": (ValueError, "softcap", lambda: (Q, K), {"softcap": 0.0}),
    "a negative softcap": (ValueError, "softcap", lambda: (Q, K), {"softcap": -1.0}),
    "a softcap of NaN": (ValueError, "softcap", lambda: (Q, K), {"softcap": float("nan")}),
    "sinks of a wrong length": (ValueError, "sinks", lambda: (Q, K), {"sinks": torch.zeros(2)}),
    "sinks of integers": (TypeError, "sinks", lambda: (Q, K), {"sinks": torch.zeros(4).long()}),
    "sinks of two axes": (ValueError, "sinks", lambda: (Q, K), {"sinks": torch.zeros(1, 4)}),
    "rows of int32": (TypeError, "rows", lambda: (Q, K), {"rows": torch.tensor([0], dtype=torch.int32)}),
    "rows of floats": (TypeError, "rows", lambda: (Q, K), {"rows": torch.tensor([0.0])}),
    "rows of two axes": (ValueError, "rows", lambda: (Q, K), {"rows": torch.tensor([[0]])}),
    "a scale of infinity": (ValueError, "scale", lambda: (Q, K), {"scale": float("inf")}),
}


@pytest.mark.parametrize("function", [attention_entropy, attention_stats])
@pytest.mark.parametrize("case", BAD_LOGITS.values(), ids=BAD_LOGITS)
def test_bad_logits_are_refused_by_name(function, case):
    error, name, arguments, options = case
    with pytest.raises(error, match=name):
        function(*arguments(), **options)


@pytest.mark.parametrize("function", [attention_entropy_qk, attention_stats_qk])
@pytest.mark.parametrize("case", BAD_QK.values(), ids=BAD_QK)
def test_bad_queries_and_keys_are_refused_by_name(function, case):
    error, name, arguments, options = case
    with pytest.raises(error, match=name):
        function(*arguments(), **options)


@pytest.mark.parametrize("rows", [[5], [-6], [0, 99]], ids=str)
def test_rows_outside_the_queries_are_never_read(rows):
    # Checking values on a device would synchronise: an error and a row of NaN are both honest, a number is not.
    try:
        got = attention_entropy_qk(torch.randn_like(Q), torch.randn_like(K), rows=torch.tensor(rows))
    except (ValueError, IndexError) as refused:
        assert "rows" in str(refused)
    else:
        assert got[..., -1].isnan().all()


def test_an_error_says_what_came_and_what_is_accepted():
    with pytest.raises(TypeError, match="float64") as caught:
        attention_entropy(LOGITS.double())
    assert all(word in str(caught.value) for word in ("float32", "bfloat16", "float16"))
    with pytest.raises(ValueError, match="3") as caught:
        attention_entropy_qk(Q, torch.zeros(2, 3, 7, 8))
    assert "4" in str(caught.value)


@pytest.mark.parametrize("function", [attention_entropy_qk, attention_stats_qk])
def test_options_are_keywords_only(function):
    with pytest.raises(TypeError):
        function(Q, K, None)


def test_good_input_passes_the_same_checks():
    assert attention_entropy(LOGITS).shape == (2, 4, 5)
    assert attention_entropy_qk(
        Q, K, window=(1, 2), softcap=1.0, sinks=torch.zeros(4), rows=torch.tensor([4])
    ).shape == (2, 4, 1)
