"""One callback for several trainings, repeated attempts, and what is left on the model."""

import numpy as np
import pytest
from helpers import trainers
from helpers.tiny_models import one_thread  # noqa: F401
from helpers.trainers import STEPS
from transformers import TrainerCallback

from inflection_fast.integrations import InflectionCallback
from inflection_fast.measure import MonitorConfig
from inflection_fast.timeline import Timeline

CONFIG = MonitorConfig(every=1, rows=None, signals=("attention", "activation_grad", "parameter_grad"))


def assert_same(a, b):
    np.testing.assert_array_equal(a.steps, b.steps)
    for name in ("entropy", "activation_grad", "parameter_grad", "loss"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-5, err_msg=name)


@pytest.fixture
def expected(tmp_path):
    """What a training of its own measures."""
    callback = InflectionCallback(CONFIG)
    trainers.trainer(tmp_path / "expected", callback).train()
    assert callback.timeline.steps.tolist() == list(range(STEPS))
    return callback.timeline


def test_a_second_training_is_measured_from_its_own_beginning(tmp_path, expected):
    callback = InflectionCallback(CONFIG)
    for _ in range(2):
        trainers.trainer(tmp_path, callback).train()
        assert_same(callback.timeline, expected)
    trainer = trainers.trainer(tmp_path, callback)
    trainer.train()
    first = callback.timeline
    trainer.train()  # of the same model, which goes on from its weights
    assert callback.timeline.steps.tolist() == list(range(STEPS))
    assert callback.timeline.loss[0] != first.loss[0]


def test_every_model_of_model_init_is_measured(tmp_path):
    def trained(callback):
        options = {"model_init": lambda trial=None: trainers.classifier()}
        trainer = trainers.trainer(tmp_path, callback, options=options)
        trainer.train()
        return trainer

    alone, callback = InflectionCallback(CONFIG), InflectionCallback(CONFIG)
    trained(alone)
    trainer = trained(callback)
    assert_same(callback.timeline, alone.timeline)
    trainer.train()
    assert_same(callback.timeline, alone.timeline)


@pytest.mark.parametrize("how", ["error", "overwrite", "new"])
def test_a_timeline_that_is_there_is_treated_as_asked(tmp_path, expected, how):
    callback = InflectionCallback(CONFIG, tmp_path / "run", if_exists=how)
    trainers.trainer(tmp_path / "a", callback).train()
    before = (tmp_path / "run" / "timeline.arrows").read_bytes()
    again = trainers.trainer(tmp_path / "b", callback, max_steps=2)
    if how == "error":
        with pytest.raises(ValueError, match="exists already"):
            again.train()
    else:
        again.train()
        assert callback.folder == tmp_path / ("run" if how == "overwrite" else "run-2")
        assert Timeline.load(callback.folder).steps.tolist() == [0, 1]
    assert ((tmp_path / "run" / "timeline.arrows").read_bytes() == before) == (how != "overwrite")
    with pytest.raises(ValueError, match="if_exists: expected one of error, overwrite, new, got 'append'"):
        InflectionCallback(CONFIG, tmp_path, if_exists="append")


class OutOfMemory(TrainerCallback):
    """The first attempts end as those do that need too much memory."""

    def __init__(self, attempts=1, after=2):
        self.left, self.after = attempts, after

    def on_step_end(self, args, state, control, **kwargs):
        if self.left and state.global_step == self.after:
            self.left -= 1
            raise RuntimeError("CUDA out of memory.")


@pytest.mark.parametrize("how", ["error", "new"])
def test_an_attempt_that_is_repeated_is_forgotten(tmp_path, how):
    if how == "new":
        trainers.trainer(tmp_path / "old", InflectionCallback(CONFIG, tmp_path / "run")).train()
        before = (tmp_path / "run" / "timeline.arrows").read_bytes()
    callback = InflectionCallback(CONFIG, tmp_path / "run", if_exists=how)
    trainer = trainers.trainer(tmp_path / "a", callback, auto_find_batch_size=True)
    trainer.add_callback(OutOfMemory(attempts=2))
    trainer.train()
    assert callback.timeline.steps.tolist() == list(range(STEPS))
    assert Timeline.load(callback.folder).steps.tolist() == list(range(STEPS))
    np.testing.assert_allclose(callback.timeline.loss, trainers.logged(trainer)[-STEPS:], rtol=1e-4)
    if how == "new":
        assert callback.folder == tmp_path / "run-2" and not (tmp_path / "run-3").exists()
        assert (tmp_path / "run" / "timeline.arrows").read_bytes() == before


def test_a_training_that_was_broken_off_is_not_deleted_by_the_next(tmp_path):
    callback = InflectionCallback(CONFIG, tmp_path / "run")
    trainer = trainers.trainer(tmp_path / "a", callback)
    trainer.add_callback(OutOfMemory())
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    with pytest.raises(ValueError, match="exists already"):
        trainers.trainer(tmp_path / "b", callback).train()
    callback.close()
    assert Timeline.load(tmp_path / "run").steps.tolist() == [0, 1]


# ---- hooks -----------------------------------------------------------------------------------------------------------

TABLES = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
]


def hooks(model):
    """By module and table, what the hooks are called; and those of the parameters."""
    found = {
        (name, table): sorted(getattr(hook, "__qualname__", str(hook)) for hook in getattr(module, table).values())
        for name, module in model.named_modules()
        for table in TABLES
    }
    for name, parameter in model.named_parameters():
        found[name, "tensor"] = [str(hook) for hook in (parameter._backward_hooks or {}).values()]
        found[name, "accumulated"] = [
            str(hook) for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()
        ]
    return {key: names for key, names in found.items() if names}


def peft_model():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    return peft.get_peft_model(trainers.classifier(), config)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (trainers.classifier, {}),
        (trainers.classifier, {"gradient_accumulation_steps": 2}),
        (trainers.classifier, {"gradient_checkpointing": True}),
        (
            trainers.classifier,
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        ),
        (trainers.classifier, {"bf16": True}),
        (trainers.classifier, {"eval_strategy": "steps", "eval_steps": 1}),
        (peft_model, {}),
        (peft_model, {"gradient_checkpointing": True}),
    ],
    ids=["plain", "accumulation", "checkpointing", "reentrant", "bf16", "evaluation", "peft", "peft checkpointing"],
)
def test_the_callback_leaves_no_hook_that_the_trainer_would_not(tmp_path, make, changes):
    left = []
    options = {"eval_dataset": trainers.items(4)} if "eval_strategy" in changes else {}
    for callback in (None, InflectionCallback(CONFIG)):
        model = make()
        trainers.trainer(tmp_path, callback, model=model, options=options, max_steps=2, **changes).train()
        left.append(hooks(model))
    assert left[0] == left[1]
    assert not any("inflection" in str(names) for names in left[1].values())
