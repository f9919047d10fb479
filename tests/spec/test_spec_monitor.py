"""What the Monitor writes, against float64 recomputation on a copy of the model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import KINDS, batch, build, expected, features
from monitored import VALUES, assert_row
from truth import cka

from inflection_fast import Monitor, MonitorConfig, Timeline

ALL_ROWS = MonitorConfig(every=1, rows=None)


def inputs_only(one):
    return {name: value for name, value in one.items() if name != "labels"}


def run(model, steps, config=ALL_ROWS, *, lr=0.1, clip=None, before_step=None, between=None, **options):
    """Train on `steps`, each a list of micro-batches; the timeline of it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    with Monitor(model, config, **options) as monitor:
        for micro_batches in steps:
            for one in micro_batches:
                loss = model(**one).loss / len(micro_batches)
                loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            if before_step:
                before_step(model)
            monitor.step(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
            if between:
                between(model)
    return monitor.timeline


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_equals_the_truth(kind, attn):
    if kind == "plain" and attn == "eager":
        pytest.skip("it has no other attention")
    model, one = build(kind, attn=attn), batch(kind)
    truth = expected(model, kind, [one])
    timeline = run(model, [[one]])
    assert timeline.steps.tolist() == [0] and timeline.entropy.shape == (1, 3, 4)
    assert_row(timeline, 0, truth)
    assert truth["entropy"].std() > 1e-3 and truth["activation_grad"].std() > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_micro_batches_count_by_token_and_not_by_batch(kind):
    model = build(kind)
    micro = [
        batch(kind, rows=2, length=11, seed=1),
        batch(kind, rows=5, length=4, seed=2),
        batch(kind, rows=1, length=7),
    ]
    truth, means = expected(model, kind, micro), [expected(model, kind, [one])["entropy"] for one in micro]
    assert np.abs(np.mean(means, 0) - truth["entropy"]).max() > 1e-2
    assert_row(run(model, [micro]), 0, truth)


@pytest.mark.parametrize("kind", ["bert", "llama", "plain"])
def test_every_step_is_measured_at_its_own_weights(kind):
    model, steps = build(kind), [[batch(kind, seed=s)] for s in range(3)]
    truths, twin = [], build(kind)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for micro in steps:
        truths.append(expected(twin, kind, micro))
        twin(**micro[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    timeline = run(model, steps)
    assert timeline.steps.tolist() == [0, 1, 2]
    for i, truth in enumerate(truths):
        assert_row(timeline, i, truth, rtol=1e-3)


@pytest.mark.parametrize("kind", ["bert", "llama", "plain"])
def test_frozen_blocks_have_an_activation_gradient_and_no_parameter_gradient(kind):
    model, one = build(kind), batch(kind)
    for name, p in model.named_parameters():
        p.requires_grad_(any(word in name for word in (".2.", "head", "classifier")))
    truth = expected(model, kind, [one])
    assert np.isnan(truth["parameter_grad"]).tolist() == [True, True, False]
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    timeline = run(model, [[one], [one]], replace(ALL_ROWS, frozen_share=1.0))
    assert_row(timeline, 0, truth)
    assert np.isfinite(timeline.activation_grad).all()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == frozen
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("kind", ["bert", "plain"])
def test_a_block_with_some_frozen_parameters_counts_the_trainable_ones(kind):
    model, one = build(kind), batch(kind)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("bias"))
    truth = expected(model, kind, [one])
    assert_row(run(model, [[one]]), 0, truth)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "plain"])
def test_clipping_between_backward_and_step_changes_nothing(kind):
    model, one = build(kind), batch(kind)
    truth = expected(model, kind, [one])
    timeline = run(model, [[one]], clip=1e-4)
    assert_row(timeline, 0, truth)
    assert truth["parameter_grad"].min() > 1e-4


@pytest.mark.parametrize("when", ["between", "before_step"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "plain"])
def test_an_evaluation_in_between_is_not_measured(kind, when):
    steps = [[batch(kind, seed=1)], [batch(kind, seed=2)]]

    def check(model):
        model.eval()
        with torch.no_grad():
            model(**batch(kind, seed=77, length=5))
        model.train()

    calm, busy = run(build(kind), steps), run(build(kind), steps, **{when: check})
    for name in VALUES:
        assert np.array_equal(getattr(calm, name), getattr(busy, name), equal_nan=True), name


@pytest.mark.parametrize(
    "every, count, measured", [(1, 4, [0, 1, 2, 3]), (2, 5, [0, 2, 4]), (3, 7, [0, 3, 6]), (10, 3, [0])]
)
def test_steps_are_measured_by_their_number(every, count, measured):
    timeline = run(build("plain"), [[batch("plain")]] * count, MonitorConfig(every=every, rows=None))
    assert timeline.steps.tolist() == measured


def test_a_measured_step_after_unmeasured_ones_holds_that_step_only():
    kind, steps = "bert", [[batch("bert", seed=s)] for s in range(3)]
    every, sparse = run(build(kind), steps), run(build(kind), steps, MonitorConfig(every=2, rows=None))
    assert sparse.steps.tolist() == [0, 2]
    for name in VALUES:
        assert np.allclose(getattr(sparse, name), getattr(every, name)[::2], rtol=1e-6, atol=1e-7), name


def test_the_loss_is_kept_as_a_number_or_a_tensor():
    model, one = build("plain"), batch("plain")
    with Monitor(model, ALL_ROWS) as monitor:
        for loss in (2.5, torch.tensor(1.25)):
            model(**one).loss.backward()
            monitor.step(loss=loss)
    assert monitor.timeline.loss.tolist() == [2.5, 1.25]
    assert (monitor.timeline.measure_ms >= 0).all()


@pytest.mark.parametrize("kind", ["bert", "plain"])
def test_a_nan_loss_is_recorded_and_the_next_step_is_clean(kind):
    model, one = build(kind), batch(kind)
    truth = expected(model, kind, [one])
    with Monitor(model, ALL_ROWS) as monitor:
        for factor in (1.0, float("nan"), 1.0):
            loss = model(**one).loss * factor
            loss.backward()
            monitor.step(loss=loss)
            model.zero_grad()
    timeline = monitor.timeline
    assert np.isnan(timeline.loss).tolist() == [False, True, False]
    assert np.isnan(timeline.activation_grad).all(1).tolist() == [False, True, False]
    assert np.isfinite(timeline.entropy).all()
    for i in (0, 2):
        assert_row(timeline, i, truth)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_recomputed_activations_are_counted_once(kind):
    model, one = build(kind), batch(kind)
    truth = expected(model, kind, [one])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_row(run(model, [[one]]), 0, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_rows_estimate_the_mean_within_their_standard_error(kind):
    wide = [batch(kind, rows=4, length=48, seed=s) for s in (5, 6)]
    full = run(build(kind), [wide])
    part = run(build(kind), [wide], MonitorConfig(every=1, rows=12))
    se = part.entropy_se[0]
    assert (se > 0).all() and np.isfinite(se).all()
    assert (np.abs(part.entropy - full.entropy)[0] <= 5 * se + 1e-4).all()
    assert (np.abs(part.entropy - full.entropy)[0] > 0).any()
    assert (part.max_logit <= full.max_logit + 1e-5).all()
    for name in ("activation_grad", "parameter_grad"):
        assert np.allclose(getattr(part, name), getattr(full, name), rtol=1e-5), name


def test_more_rows_than_there_are_is_all_rows():
    one = [batch("gpt2", padded=False)]
    full, many = run(build("gpt2"), [one]), run(build("gpt2"), [one], MonitorConfig(every=1, rows=1000))
    for name in ("entropy", "collision", "sink", "max_logit"):
        assert np.allclose(getattr(full, name), getattr(many, name), rtol=0, atol=1e-5), name


def test_the_same_seed_samples_the_same_rows():
    steps = [[batch("gpt2", rows=4, length=48)]] * 2
    one, two, other = (run(build("gpt2"), steps, MonitorConfig(every=1, rows=8, seed=s)) for s in (1, 1, 2))
    assert np.array_equal(one.entropy, two.entropy)
    assert not np.array_equal(one.entropy, other.entropy)


@pytest.mark.parametrize("options", [
    {}, {"cka_debiased": False}, {"cka_rank": 6, "cka_debiased": False}
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_delta_cka_compares_the_probe_with_the_start(kind, options):
    probe = [inputs_only(batch(kind, rows=4, seed=s)) for s in (11, 12)]
    model = build(kind, dropout=0.1)
    start, truths, twin = features(model, kind, probe), [], build(kind)

    def note(model):
        rank = options.get("cka_rank")
        twin.load_state_dict(model.state_dict())
        now = features(twin, kind, probe)
        truths.append(1 - cka(start, now, rank=rank, debiased=options.get("cka_debiased", True)).numpy())

    steps = [[batch(kind, seed=s)] for s in range(3)]
    timeline = run(model, steps, MonitorConfig(every=1, rows=None, **options), before_step=note, lr=1.0, probe=probe)
    assert np.abs(timeline.delta_cka[0]).max() <= 2e-6
    assert np.allclose(timeline.delta_cka, np.stack(truths), rtol=1e-3, atol=1e-5)
    assert np.stack(truths)[2].max() > 1e-4


def test_without_a_probe_delta_cka_is_nan():
    assert np.isnan(run(build("plain"), [[batch("plain")]]).delta_cka).all()


def test_signals_that_are_not_wanted_are_nan():
    timeline = run(build("bert"), [[batch("bert")]], MonitorConfig(every=1, signals=("attention",)))
    assert np.isfinite(timeline.entropy).all()
    assert np.isnan(timeline.activation_grad).all() and np.isnan(timeline.parameter_grad).all()
    timeline = run(build("bert"), [[batch("bert")]], MonitorConfig(every=1, signals=("activation_grad",)))
    assert np.isnan(timeline.entropy).all() and np.isfinite(timeline.activation_grad).all()


def test_blocks_given_by_name_are_the_ones_measured():
    model, one = build("bert"), batch("bert")
    truth = expected(model, "bert", [one])
    names = ("bert.encoder.layer.0", "bert.encoder.layer.2")
    timeline = run(model, [[one]], MonitorConfig(every=1, rows=None, blocks=names))
    assert tuple(timeline.layers) == names
    assert_row(timeline, 0, {name: value[[0, 2]] for name, value in truth.items()})


@pytest.mark.parametrize("kind", ["bert", "plain"])
def test_the_file_holds_what_the_monitor_holds(kind, tmp_path):
    timeline = run(build(kind), [[batch(kind)]] * 2, out=tmp_path / "run")
    loaded = Timeline.load(tmp_path / "run")
    for name in (*VALUES, "steps", "loss", "delta_cka", "entropy_se"):
        assert np.array_equal(getattr(loaded, name), getattr(timeline, name), equal_nan=True), name
    assert len(loaded.layers) == 3 and loaded.meta["config"]["every"] == 1
    assert loaded.meta["model"]["class"] == type(build(kind)).__name__


def test_a_resumed_run_continues_its_timeline(tmp_path):
    steps = [[batch("plain", seed=s)] for s in range(4)]
    run(build("plain"), steps, out=tmp_path)
    timeline = run(build("plain"), steps[:2], out=tmp_path, start_step=2)
    assert timeline.steps.tolist() == [0, 1, 2, 3]
    assert Timeline.load(tmp_path).steps.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError):
        run(build("plain"), steps, out=tmp_path)
    assert Timeline.load(tmp_path).steps.tolist() == [0, 1, 2, 3]
