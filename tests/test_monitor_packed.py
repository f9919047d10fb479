"""Sequences packed into one row: measured as if each were alone."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers.attention_measured import ALL_ROWS, check_attention, measured
from helpers.plain_flash import flash  # noqa: F401
from helpers.tiny_models import (  # noqa: F401
    CASES,
    HEADS,
    VOCAB,
    WIDTH,
    entropy,
    gpt_oss,
    loss_of,
    model_and_batch,
    one_thread,
    probabilities,
    sharpened,
)

from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.measure.attention_call import VARLEN, AttentionCall, SequenceStarts, stats_of
from inflection_fast.measure.attention_observer import InterfaceCall, _interface_call
from inflection_fast.measure.schedule import RowSampler
from inflection_fast.ops import qk_arguments, reference

hf.logging.set_verbosity_error()

LENGTHS = (7, 1, 12, 5)
T = sum(LENGTHS)
FLATTENED = {
    "positions": {},
    "lengths": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "both": {"return_flash_attn_kwargs": True},
}


def bert_for_tokens():
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 24}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return sharpened(hf.BertForMaskedLM(hf.BertConfig(**sizes, **dropout, vocab_size=VOCAB)).train())


def model_of(name, implementation):
    """Without a cache, which would keep Transformers from looking for packed sequences when it makes masks."""
    special = {"bert": bert_for_tokens, "gpt-oss": gpt_oss}
    model = special[name]() if name in special else model_and_batch(name)[0]
    model.config.use_cache = False
    model.set_attn_implementation(implementation)
    return model


def texts():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, VOCAB, (length,), generator=generator)} for length in LENGTHS]


def flattened(items, how="positions"):
    return dict(hf.DataCollatorWithFlattening(**FLATTENED[how])(items, return_tensors="pt"))


def alone(item):
    ids = item["input_ids"][None]
    return {"input_ids": ids, "labels": ids}


def padded(items):
    ids = torch.stack([F.pad(item["input_ids"], (0, max(LENGTHS) - len(item["input_ids"]))) for item in items])
    mask = torch.stack([torch.arange(max(LENGTHS)) < length for length in LENGTHS]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def truth_of(model, items):
    """Probabilities per block [1, H, sum of T, max T] of every sequence by itself, one after the other."""
    by_sequence = [probabilities(model, alone(item), double=model.config.model_type != "gpt_oss") for item in items]
    if model.config.model_type == "gpt_oss":  # drops the column of the sink, which is what they lack of 1
        by_sequence = [
            [torch.cat([(1 - p.sum(-1, keepdim=True)).clamp(min=0), p], -1) for p in layers] for layers in by_sequence
        ]
    width = max(LENGTHS) + 1
    layers = zip(*by_sequence, strict=True)
    return [torch.cat([F.pad(p, (0, width - p.shape[-1])) for p in layer], 2) for layer in layers]


def every_row(truth):
    return [torch.ones(1, T, dtype=torch.bool)] * len(truth)


WAYS = [
    *((name, how) for name in ("llama", "mistral", "gemma2", "gpt-oss") for how in FLATTENED),
    ("bert", "both"),  # whose attention is not told of positions
]


@pytest.mark.parametrize("name, how", WAYS)
def test_a_packed_sequence_has_through_a_flash_kernel_what_it_has_alone(name, how, flash):
    model, items = model_of(name, flash), texts()
    timeline = measured(model, flattened(items, how))
    truth = truth_of(model, items)
    check_attention(timeline, truth, every_row(truth))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_packed_sequence_has_under_a_mask_what_it_has_alone(name, implementation):
    model, items = model_of(name, implementation), texts()
    timeline = measured(model, flattened(items))
    truth = truth_of(model, items)
    check_attention(timeline, truth, every_row(truth), ("entropy", "collision"))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss"])
def test_packed_equals_padded_and_one_by_one(name, flash):
    model, items = model_of(name, flash), texts()
    packed = measured(model, flattened(items))
    together = measured(model, padded(items))
    with Monitor(model, ALL_ROWS) as monitor:
        for item in items:
            loss_of(model(**alone(item))).backward()
        monitor.step()
    for signal in ("entropy", "collision", "sink", "max_logit"):
        for other in (together, monitor.timeline):
            actual, expected = (torch.from_numpy(getattr(one, signal)) for one in (packed, other))
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{signal}: {text}")  # noqa: B023


def test_the_layers_of_a_forward_share_what_is_made_of_the_lengths(flash, monkeypatch):
    made = []
    bounds = qk_arguments.key_bounds
    monkeypatch.setattr(qk_arguments, "key_bounds", lambda *lengths: made.append(1) or bounds(*lengths))
    model = model_of("llama", flash)
    timeline = measured(model, flattened(texts(), "lengths"))
    assert len(timeline.layers) > 1 and len(made) == 1


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss"])
def test_sampled_rows_of_packed_sequences_stand_for_their_strata(name, flash):
    model, items = model_of(name, flash), texts()
    sampler = RowSampler(9, 0, torch.device("cpu"))
    sampler.begin(0)
    strata = sampler.draw(T)  # of the row, which the sequences share
    timeline = measured(model, flattened(items), MonitorConfig(every=1, rows=9, signals=("attention",)))
    truth = truth_of(model, items)
    for signal, values in {"entropy": entropy, "sink": lambda p: p[..., 0]}.items():
        expected = torch.stack([values(p)[0, :, strata.rows].double() @ strata.weights for p in truth]) / T
        actual = torch.from_numpy(getattr(timeline, signal)[0])
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5, msg=lambda text: f"{signal}: {text}")  # noqa: B023
    assert (timeline.entropy_se > 0).all()


def full_mask(keep):
    """What an eager model adds to scores, [1, 1, T, T], for True where it attends; a row without keys has itself."""
    keep = keep | (torch.eye(len(keep), dtype=torch.bool) & ~keep.any(-1, keepdim=True))
    return torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, torch.finfo(torch.float64).min)[None, None]


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


def test_positions_that_start_again_in_a_batch_of_several_rows_pack_nothing(flash):
    model, _ = model_and_batch("llama")
    ids, positions = torch.randint(3, VOCAB, (2, 10)), torch.arange(10).remainder(6).expand(2, -1)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    mask = full_mask(causal(10)).expand(2, -1, -1, -1)
    truth = probabilities(model, batch | {"attention_mask": mask})
    model.set_attn_implementation(flash)
    check_attention(measured(model, batch), truth, [torch.ones(2, 10, dtype=torch.bool)] * len(truth))


POSITIONS = {
    "a gap": [0, 1, 2, 3, 8, 9, 10, 11, 12, 13],
    "other starts than 0": [2, 3, 4, 5, 2, 3, 4, 2, 3, 4],
    "a first sequence without its beginning": [3, 4, 5, 6, 0, 1, 2, 3, 4, 5],
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_sequences_begin_at_the_lowest_position(positions, flash):
    model, _ = model_and_batch("llama")
    ids, positions = torch.randint(3, VOCAB, (1, 10)), torch.tensor([positions])
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    sequence = (positions[0] == positions.min()).cumsum(0)
    inside = sequence > 0  # what comes before the first start is in no sequence
    keep = causal(10) & (sequence[:, None] == sequence) & inside
    truth = [p[:, :, inside] for p in probabilities(model, batch | {"attention_mask": full_mask(keep)})]
    model.set_attn_implementation(flash)
    check_attention(measured(model, batch), truth, [inside[inside][None]] * len(truth), ("entropy", "collision"))


def test_padding_goes_before_positions(flash):
    """A batch of one with padding in front: its positions do not go up by one, and pack nothing."""
    model, _ = model_and_batch("llama")
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
    ids, positions = torch.randint(3, VOCAB, (1, 10)), (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions, "attention_mask": mask}
    truth = probabilities(model, batch | {"attention_mask": full_mask(causal(10) & mask[0].bool())})
    model.set_attn_implementation(flash)
    check_attention(measured(model, batch), truth, [mask.bool()] * len(truth))


def test_lengths_of_a_batch_of_several_rows_are_those_of_the_rows_one_after_the_other(flash):
    model = model_of("llama", flash)
    items = [{"input_ids": torch.randint(3, VOCAB, (length,))} for length in (5, 9, 10)]
    batch = flattened(items, "both")
    expected = measured(model, batch)
    folded = batch | {name: batch[name].view(2, 12) for name in ("input_ids", "labels", "position_ids")}
    actual = measured(model, folded)
    for signal in ("entropy", "collision", "sink", "max_logit"):
        actual_values, values = (torch.from_numpy(getattr(one, signal)) for one in (actual, expected))
        torch.testing.assert_close(actual_values, values, rtol=1e-5, atol=1e-5)


# ---- one call --------------------------------------------------------------------------------------------------------


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (4, 2)},
    "causal window softcap scale": {"is_causal": True, "window": (6, 0), "softcap": 0.7, "scale": 0.9},
    "sinks": {"is_causal": True, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [None, torch.tensor([0, 3, 7, 8, 19, 24])])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_statistics_are_those_of_the_sequence_alone(options, rows, biased):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, T, 8, generator=generator) * 2 for heads in (HEADS, 2))
    bias = torch.randn(1, HEADS, T, T, generator=generator) if biased else None
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    stats = stats_of(AttentionCall(query, key, bias=bias, cu_seqlens=cu_seqlens, **options), rows)
    expected = []
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        part, mask = slice(begin, end), None if bias is None else bias[..., begin:end, begin:end].double()
        one = query[:, :, part].double(), key[:, :, part].double()
        expected.append(reference.attention_stats_qk(*one, attn_mask=mask, **options))
    for name, *fields in zip(stats._fields, stats, *expected, strict=True):
        truth = torch.cat(fields[1:], -1)
        truth = truth if rows is None else truth[..., rows]
        torch.testing.assert_close(fields[0].double(), truth.double(), rtol=1e-5, atol=1e-5, msg=name)


def read(name, query, key, settings, mask=None):
    given = InterfaceCall(name, None, torch.nn.Identity(), query, key, mask, (), settings)
    return _interface_call(given, mask, SequenceStarts())


def call_of(positions=None, lengths=(None, None), keys=6, mask=None, device="cpu"):
    """Of attention on 6 queries, through an implementation of which nothing but its name is known."""
    query, key = (torch.zeros(1, HEADS, length, 4, device=device) for length in (6, keys))
    settings = {"position_ids": None if positions is None else torch.tensor([positions], device=device)}
    if lengths[0] is not None:
        settings |= dict(zip(VARLEN, [*(torch.tensor(one) for one in lengths), 3, 3], strict=True))
    return read("other", query, key, settings, mask)


def test_keys_of_other_sequences_than_the_queries_are_refused_in_words():
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k differ"):
        call_of(lengths=([0, 3, 6], [0, 6]))
    with pytest.raises(ValueError, match="keys of a cache"):
        call_of(lengths=([0, 3, 6], [0, 3, 6]), keys=8)
    for call in (call_of(lengths=([0, 3, 6], [0, 2, 6])), call_of(positions=[0, 1, 2, 0, 1, 2], keys=8)):
        with pytest.raises(ValueError, match="attention gets packed sequences whose keys"):
            call.refuse_foreign_keys()
        assert all(field.isnan().all() for field in stats_of(call, None))  # where nobody may wait to know
    for call in (call_of(lengths=([0, 3, 6], [0, 3, 6])), call_of(positions=[2, 3, 4, 5, 6, 7], keys=8)):
        call.refuse_foreign_keys()
        assert all(field.isfinite().all() for field in stats_of(call, None))


def test_a_call_that_cannot_be_read_is_an_error_at_first_and_costs_the_values_of_a_step_later(flash, caplog):
    model, items = model_of("llama", flash), texts()
    good = flattened(items, "both")
    bad = good | {"cu_seq_lens_k": torch.cat([good["cu_seq_lens_k"], torch.tensor([T])])}
    with Monitor(model, ALL_ROWS), pytest.raises(ValueError, match="packed sequences whose keys"):
        model(**bad)
    with Monitor(model, ALL_ROWS) as monitor:
        for batch in (good, bad, good):
            loss_of(model(**batch)).backward()
            monitor.step()
    assert monitor.timeline.entropy[:, 0, 0].tolist() == pytest.approx(
        [monitor.timeline.entropy[0, 0, 0], float("nan"), monitor.timeline.entropy[0, 0, 0]], nan_ok=True
    )
    assert "measured step 1 failed" in caplog.text and "packed sequences whose keys" in caplog.text


def test_lengths_without_a_longest_one_are_not_looked_at():
    query, lengths = torch.zeros(1, HEADS, 6, 4), torch.tensor([0, 3, 6])
    settings = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
    assert read("other", query, query, settings).cu_seqlens is None
    settings |= {"max_length_q": 3, "max_length_k": 3}
    assert read("other", query, query, settings).cu_seqlens is lengths


@pytest.mark.parametrize("positions", [[3], [[0, 1, 2, 0, 1, 2]] * 3])
def test_positions_that_are_not_those_of_one_row_pack_nothing(positions):
    call = call_of(positions=positions)
    assert call.cu_seqlens is None and call.foreign_keys is None


def test_masks_of_another_kind_than_those_of_flash_kernels_hold_packing_themselves(flash):
    query, settings = torch.zeros(1, HEADS, 6, 4), {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    made = {
        name: read(name, query, query, settings).cu_seqlens
        for name in ("sdpa", "eager", "flex_attention", "other", flash)
    }
    assert {name: found is None for name, found in made.items()} == {
        "sdpa": True, "eager": True, "flex_attention": True, "other": False, flash: False
    }  # fmt: skip
    assert made[flash].tolist() == [0, 3, 6, 6, 6, 6, 6]


def test_layers_of_one_forward_share_the_starts():
    starts, positions = SequenceStarts(), torch.tensor([[0, 1, 0, 1]])
    assert starts.of(positions) is starts.of(positions)
    assert starts.of(torch.tensor([[0, 1, 2, 0]])).tolist() == [0, 3, 4, 4, 4]


@pytest.mark.parametrize("how", ["positions", "lengths"])
def test_no_number_of_a_device_is_waited_for(how):
    """A meta tensor has no numbers: whatever asks for one is an error."""
    query, key = (torch.empty(1, heads, T, 8, device="meta", dtype=torch.bfloat16) for heads in (HEADS, 2))
    if how == "positions":
        settings = {"position_ids": torch.empty(1, T, dtype=torch.int64, device="meta")}
    else:
        lengths = [torch.empty(5, dtype=torch.int32, device="meta") for _ in range(2)]
        settings = dict(zip(VARLEN, [*lengths, 12, 12], strict=True))
    call = read("other", query, key, settings)
    assert (call.foreign_keys is None) == (how == "positions")
    for rows in (None, torch.empty(9, dtype=torch.int64, device="meta")):
        stats = stats_of(call, rows)
        assert {(field.device.type, field.shape[2]) for field in stats} == {("meta", T if rows is None else 9)}
    with pytest.raises((RuntimeError, NotImplementedError)):
        AttentionCall(query, key, foreign_keys=torch.zeros((), dtype=torch.bool, device="meta")).refuse_foreign_keys()
