import dataclasses
import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_runs import CONFIG, write_run, write_stage

from inflection_fast import report
from inflection_fast.records import Metrics
from inflection_fast.report import canvas, pictures, sections
from inflection_fast.report import folder as run_files
from inflection_fast.report.verdict import compare, verdict


def touch(drawn, path):
    """In place of painting, which `test_pictures.py` looks at."""
    path.touch()


@pytest.fixture(autouse=True)
def unpainted(monkeypatch):
    monkeypatch.setattr(canvas, "save", touch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "demo"
    plan = write_run(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "save", touch)
        return run, plan, report.write(run)


def stage(accuracy, n=2500, label="the other", **more):
    metrics = Metrics(n, more.pop("loss", None), accuracy, right=more.pop("right", None))
    known = dict.fromkeys(run_files.Stage.__dataclass_fields__) | {"stage": "x", "metrics": metrics}
    known["trainable_parameters"] = more.pop("trainable", 1000)
    return run_files.Stage(**known | {"label": label} | more)


def terminal(run):
    """The summary as it goes through a pipe."""
    from rich.console import Console

    file = io.StringIO()
    report.summary(run, Console(file=file, width=80, soft_wrap=True))
    return file.getvalue()


# ---- the answer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "outcomes", "answer"),
    [
        ((0.85, 0.75), ["won"], "The injected model beats the only baseline beyond the noise."),
        ((0.75, 0.85), ["lost"], "Injecting did not help: the injected model is worse than the only baseline"),
        ((0.755, 0.75), ["tie"], "This run shows no gain from injecting: the injected model is within the noise"),
        ((0.85, 0.75, 0.74), ["won", "won"], "beats all 2 baselines beyond the noise"),
        ((0.80, 0.75, 0.79), ["won", "tie"], "does not beat every baseline: it beats a beyond the noise and is within"),
        ((0.80, 0.75, 0.85), ["won", "lost"], "and is worse than b beyond the noise."),
    ],
)
def test_the_answer_says_what_the_numbers_say(accuracies, outcomes, answer):
    injected = stage(accuracies[0])
    others = [stage(accuracy, label=name) for accuracy, name in zip(accuracies[1:], "ab", strict=False)]
    assert [compare(injected, other).outcome for other in others] == outcomes
    stages = {"tune": injected} | {f"baseline-{other.label}": other for other in others}
    run = run_files.Run(Path(), (), {}, None, None, stages=stages)
    assert answer in verdict(run)[0]


def test_the_border_of_the_noise_is_two_standard_errors_of_the_difference():
    error = np.sqrt(0.8 * 0.2 / 2500 + 0.8 * 0.2 / 2500)
    assert compare(stage(0.8 + 1.9 * error), stage(0.8)).outcome == "tie"
    assert compare(stage(0.8 + 2.1 * error), stage(0.8)).outcome == "won"
    assert compare(stage(0.8 - 2.1 * error), stage(0.8)).outcome == "lost"


def test_everything_right_out_of_few_is_not_without_noise():
    assert compare(stage(1.0, n=40), stage(0.9, n=40)).outcome == "tie"
    assert compare(stage(1.0, n=4, right="1111"), stage(0.75, n=4, right="1110")).outcome == "tie"


def test_what_both_get_right_or_wrong_carries_no_noise():
    ours = "1" * 1990 + "0" * 500 + "1" * 10
    injected = stage(ours.count("1") / 2500, right=ours)
    for gained, lost, outcome in [(12, 10, "tie"), (50, 10, "won"), (10, 50, "lost")]:
        theirs = "0" * gained + "1" * (1990 - gained) + "1" * lost + "0" * (500 - lost) + "1" * 10
        other = stage(theirs.count("1") / 2500, right=theirs)
        comparison = compare(injected, other)
        assert comparison.outcome == outcome
        differences = np.array(list(ours), dtype=float) - np.array(list(theirs), dtype=float)
        assert comparison.difference == pytest.approx(differences.mean())
        assert comparison.standard_error == pytest.approx(differences.std() / 50, rel=0.05)
        assert (
            compare(
                dataclasses.replace(injected, metrics=dataclasses.replace(injected.metrics, right=None)), other
            ).outcome
            == "tie"
        )  # too little to see unpaired


def test_different_test_sets_are_not_compared():
    comparison = compare(stage(0.9, n=100), stage(0.5, n=2500))
    assert comparison.outcome == "unknown" and "different examples (100 and 2,500)" in comparison.why


def test_a_loss_without_noise_decides_nothing():
    other = stage(None, loss=3.3, label="last")
    comparison = compare(stage(None, loss=3.2), other)
    assert comparison.outcome == "unknown" and comparison.words == "+0.100"
    run = run_files.Run(Path(), (), {}, None, None, stages={"tune": stage(None, loss=3.2), "baseline-last": other})
    assert verdict(run)[0].startswith("The injected model has a lower loss than last; losses come without a standard")
    run.stages["baseline-first"] = stage(None, loss=3.1, label="first")
    assert "has a lower loss than last and a higher loss than first;" in verdict(run)[0]


def test_losses_that_are_nearly_equal_are_no_gain():
    run = run_files.Run(Path(), (), {}, None, None, stages={"tune": stage(None, loss=5.13562)})
    run.stages["baseline-last"] = stage(None, loss=5.13572, label="last")
    assert verdict(run)[0] == (
        "This run shows no gain from injecting: the injected model has the same loss as last to 0.001 nats per token."
    )
    run.stages["baseline-first"] = stage(None, loss=5.2, label="first")
    run.stages["baseline-random"] = stage(None, loss=5.135, label="random")
    run.stages["baseline-all"] = stage(None, loss=5.1, label="all")
    assert verdict(run)[0].startswith(
        "The injected model has a lower loss than first, the same loss as last and random to 0.001 nats per token and"
        " a higher loss than all; losses come without"
    )


def test_the_place_is_judged_at_equal_parameters_only():
    big = stage(0.7, trainable=10_000_000, label="big")
    run = run_files.Run(Path(), (), {}, None, None, stages={"tune": stage(0.8), "measure": big})
    assert any("cannot tell whether the chosen place matters" in sentence for sentence in verdict(run))
    run.stages["baseline-x"] = stage(0.8, label="same size")
    assert any("same size trains about as many" in s and "made no difference" in s for s in verdict(run))


def test_no_better_than_the_most_frequent_answer_is_said():
    run = run_files.Run(Path(), (), {}, None, None, stages={"tune": stage(0.58, majority=0.578)})
    assert any("has not learnt the task" in sentence for sentence in verdict(run))
    run = run_files.Run(Path(), (), {}, None, None, stages={"tune": stage(0.7, majority=0.578)})
    assert not any("has not learnt the task" in sentence for sentence in verdict(run))


def test_unequal_training_is_said():
    stages = {"tune": stage(0.8, steps=60), "measure": stage(0.7, steps=30, label="short")}
    run = run_files.Run(Path(), (), {}, None, None, stages=stages)
    assert "Not all trained equally long: injected 60 steps, short 30." in verdict(run)


@pytest.mark.parametrize(
    ("sure", "rule", "says"),
    [
        (0.95, 80.0, "unfreezing the top blocks paid most for sources like this one"),
        (0.75, 80.0, "LoRA on all layers paid most for sources like this one"),
        (0.95, 70.0, "no ground to choose by: LoRA on chosen layers was the best choice without a rule (75.0 %)"),
    ],
)
def test_what_the_study_says_of_sources_like_this_one(monkeypatch, sure, rule, says):
    study = {"transfers": 5, "threshold": 0.8, "below": "LoRA everywhere", "above": "unfreezing",
             "always": "selective LoRA", "accuracy": {"rule": rule, "always": 75.0, "hindsight": 82.0},
             "minus_random": {"planned": [-1.64, -2.91, -0.38], "last": [1.66, -0.43, 3.75]}}  # fmt: skip
    monkeypatch.setattr("inflection_fast.report.verdict._study", lambda: study)
    found = dataclasses.replace(stage(0.9).metrics, largest_probability=sure, share_above_099=2 * sure - 1)
    run = run_files.Run(Path(), (), {}, None, None, stages={"tune": stage(0.8), "baseline-x": stage(0.8)})
    assert not any("study" in sentence for sentence in verdict(run))
    run.stages["source"] = dataclasses.replace(stage(0.9), metrics=found)
    assert any(says in sentence for sentence in verdict(run))
    lead = f"is {'' if sure > 0.9 else 'not '}saturated: on its own test texts the mean largest probability is {sure}"
    assert any(lead in sentence for sentence in verdict(run))
    place = "There, LoRA on the planned layers was -1.6 points from LoRA on as many random layers (95 % interval"
    assert any(sentence.startswith(place) and "last layers was +1.7 points" in sentence for sentence in verdict(run))


# ---- the page --------------------------------------------------------------------------------------------------------


def words(run):
    """The page of a run without its pictures."""
    return sections.page(run_files.read(run), pictures.Pictures({}, {}))


def test_the_page_answers_first_and_repeats_the_plan_in_its_own_words(finished):
    run, plan, path = finished
    text = path.read_text(encoding="utf-8")
    assert path == run / "report" / "index.md"
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads[0] == "# Inflection layers of tiny-bert" and heads[1] == "## The answer"
    assert "**The injected model beats all 4 baselines beyond the noise.**" in text
    assert "80.0 ± 0.8 %" in text and "61,442 (0.27 %)" in text
    assert "| LoRA on 5 random layers | 75.5 ± 0.9 % | 0.500 | +4.5 ± 1.2, beyond noise |" in text
    assert "| source model, not trained further | 65.0 ± 1.0 % | 0.700 | +15.0 ± 1.2, beyond noise |" in text
    assert plan.layers == (0, 1, 4, 5, 6) and plan.summary in text
    for layer, reason in plan.reasons.items():
        assert f"**{layer}:** {reason}" in text
    assert "9,000 texts to train on, 2,500 to test on and 64 only to follow" in text
    assert "Split at random by `movie_name`, 20 %" in text and "Left out: 55 duplicates." in text
    assert "takes 900 ms, one that is not 800 ms" in text and "+1.25 ± 0.40 % of the training" in text
    assert CONFIG.rstrip() in text and "| torch | 2.13.0 |" in text
    assert "inflection-fast run --config runs/demo/config.yaml --output runs/demo-again" in text


def test_every_picture_is_shown_once_and_nothing_else_lies_in_the_folder(finished):
    _, _, path = finished
    text = path.read_text(encoding="utf-8")
    there = {file.name for file in path.parent.iterdir()} - {"index.md", "index.html"}
    signals = ("entropy", "max_logit", "collision", "sink", "activation_grad", "parameter_grad", "delta_cka")
    assert there == {*pictures.FILES.values(), *(f"{name}.png" for name in signals)}
    for name in there:
        assert text.count(f"]({name})") == 1
    assert not list(path.parent.parent.glob(".report*"))


def test_missing_stages_are_named(tmp_path):
    run = tmp_path / "run"
    write_run(run)
    for name in ("tune", "baseline-random"):
        (run / name / "stage.json").unlink()
    text = words(run)
    assert "There is no answer yet" in text and "The tune stage has not finished" in text
    assert "The stage baseline-random has no results" in text
    assert "run.json calls the stage tune finished, and its results (stage.json) are not there." in text
    assert "LoRA on the last 5 layers" in text
    shown = " ".join(terminal(run).split())
    assert "There is no answer yet" in shown and "The tune stage has not finished" in shown


def test_steps_that_lack_the_values_of_other_ranks_are_said(finished):
    run = run_files.read(finished[0])
    steps = len(run.timeline.steps)
    assert not any("a rank was lost" in sentence for sentence in sections.missing_parts(run))
    run.timeline.missing_ranks[3:] = 7
    said = f"In {steps - 3} of {steps} measured steps, from step 30 on, a rank was lost"
    assert any(sentence.startswith(said) for sentence in sections.missing_parts(run))
    assert not any("Padded rows are included" in sentence for sentence in sections.missing_parts(run))
    object.__setattr__(run.timeline, "padded_rows", np.array([0.0, 1.0]))
    assert any("Padded rows are included" in sentence for sentence in sections.missing_parts(run))


def test_a_run_that_has_only_begun_still_has_a_page(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"format": 2, "finished": [], "versions": {}, "seed": 1}')
    text = report.write(run).read_text(encoding="utf-8")
    for sentence in ("There is no timeline", "There is no plan", "There is no config.yaml", "No stage has finished"):
        assert sentence in text
    assert not list((run / "report").glob("*.png"))
    assert "No stage has finished" in terminal(run)


def test_signals_without_values_are_said_to_be_missing(tmp_path):
    run = tmp_path / "run"
    write_run(run, drop=("delta_cka", "sink", "activation_grad"), steps=3)
    text = report.write(run).read_text(encoding="utf-8")
    assert "Representation drift: no value was measured: it needs a fixed set of probe texts." in text
    assert "Attention on the first token: no finite value was measured." in text
    assert "SKI by layer" in text and "the scores rest on the attention entropy alone" in text
    assert not (run / "report" / "sink.png").exists() and (run / "report" / "entropy.png").exists()


def test_scores_that_belong_to_another_plan_are_said_to(tmp_path):
    run = tmp_path / "run"
    write_run(run)
    assert "do not belong together" not in words(run)
    write_stage(run, "tune", 0.8, layers=[2, 3])
    assert "they do not belong together" in words(run)


def test_a_plan_for_another_model_is_named(tmp_path, finished):
    run = tmp_path / "run"
    write_run(run, layers=6, steps=8)
    shutil.copy(finished[0] / "plan.json", run / "plan.json")
    assert "made for a model of 12 layers, and 6 were measured here" in words(run)


def test_an_empty_plan_has_no_injected_model(tmp_path):
    run = tmp_path / "run"
    write_run(run)
    write_stage(run, "tune", None, layers=[], trainable=0, steps=0)
    assert "**Nothing was injected, because no layer was chosen" in words(run)


def test_a_language_model_is_reported_by_its_loss(tmp_path):
    run = tmp_path / "run"
    write_run(run, steps=3)
    losses = {"source": 3.5, "measure": 3.4, "tune": 3.2, "baseline-last": 3.3, "baseline-random": 3.3}
    for name, loss in losses.items():
        metrics = {"loss": loss, "perplexity": float(np.exp(loss)), "n": 10000}
        write_stage(run, name, None, metrics=metrics, majority=None, layers=[0])
    text = report.write(run).read_text(encoding="utf-8")
    assert "Loss, nats per token | Perplexity" in text and "| 3.20 | 24.5 |" in text
    assert "a lower loss than measure, baseline-last and baseline-random; losses come without" in text
    assert "| 3.30 | 27.1 | +0.100 |" in text
    assert (run / "report" / "stages.png").exists()


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for call in (report.write, terminal):
        with pytest.raises(ValueError, match=r"not a run folder: it holds no run\.json"):
            call(tmp_path)
        with pytest.raises(ValueError, match="there is no such folder"):
            call(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("run.json", '{"format": 1}', "format 1; this version reads format 2"),
        ("run.json", "[]", "must hold a JSON object"),
        ("tune/stage.json", "{", "is not JSON"),
        ("tune/stage.json", "{}", "format None; this version reads format 2"),
        ("plan.json", "{}", "is not a plan"),
        ("config.yaml", "a: [", "is not YAML"),
        ("measure/timeline.arrows", "not arrow", "is not a timeline"),
    ],
)
def test_a_damaged_file_is_named(finished, tmp_path, file, content, says):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / file).write_text(content)
    before = (run / "report" / "index.md").read_bytes()
    with pytest.raises(ValueError, match=says):
        report.write(run)
    assert (run / "report" / "index.md").read_bytes() == before


def test_a_failure_leaves_the_older_report_and_nothing_else(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    before = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    calls = []

    def full_disk(drawn, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        path.write_text("half")

    monkeypatch.setattr(canvas, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        report.write(run)
    assert len(calls) == 2
    assert {path.name: path.read_bytes() for path in (run / "report").iterdir()} == before
    assert not list(run.glob(".report*"))


def test_an_older_report_is_replaced_and_a_readers_notes_are_kept(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"format": 2, "finished": []}')
    (run / "report").mkdir()
    for name in ("index.md", "sink.png", "notes.txt"):
        (run / "report" / name).write_text("![a picture](sink.png) of an earlier page" if name == "index.md" else "old")
    report.write(run)
    assert {path.name for path in (run / "report").iterdir()} == {"index.md", "index.html", "notes.txt"}
    assert (
        "earlier page" not in (run / "report" / "index.md").read_text()
        and (run / "report" / "notes.txt").read_text() == "old"
    )
    assert not list(run.glob(".report*"))


# ---- the terminal ----------------------------------------------------------------------------------------------------


def test_the_summary_fits_80_columns_and_carries_no_codes_through_a_pipe(finished):
    shown = terminal(finished[0])
    assert max(map(len, shown.splitlines())) <= 80 and "\x1b" not in shown
    lines = [line.split() for line in shown.splitlines()]
    chosen = [int(line[0]) for line in lines if len(line) > 4 and line[0].isdecimal() and line[4] == "*"]
    assert tuple(chosen) == finished[1].layers
    assert "The injected model beats all 4 baselines beyond the noise." in shown and "+1.25 ± 0.40 %" in shown


def test_a_deep_models_summary_lists_the_chosen_layers_and_their_neighbours(tmp_path):
    run = tmp_path / "run"
    plan = write_run(run, layers=96, heads=2, steps=8)
    shown = terminal(run)
    table = shown[shown.index("layer   entropy") : shown.index("Cost of measuring")]
    rows = [int(line.split()[0]) for line in table.splitlines() if line[:5].strip().isdecimal()]
    near = {layer for chosen in plan.layers for layer in (chosen - 1, chosen, chosen + 1)} & set(range(96))
    assert plan.layers and rows == sorted(near) and "The chosen of 96 layers and their neighbours" in shown


def test_drawing_libraries_are_loaded_only_when_they_draw():
    code = "import sys, inflection_fast.report; print({'matplotlib', 'rich', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
