"""What counts as a step of TRL's trainers: which sequences are measured, each as if it were alone in the batch."""

import copy

import helpers.tiny_texts as tiny
import numpy as np
import pytest
import torch
from helpers import tiny_models, trainers
from helpers.tiny_models import one_thread  # noqa: F401

pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from inflection_fast.integrations import InflectionCallback
from inflection_fast.measure import MonitorConfig

CONFIG = MonitorConfig(every=1, rows=None, quantities=("attention", "activation_grad"))
TEXTS = [row["text"] for row in tiny.reviews(6, seed=3)]
BAD = "bad word1 word2"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("decoder"))


class Trained:
    """The sequences of the passes that go back, without padding, and what they were taken from."""

    def __init__(self, model, tokenizer):
        self.sequences, self.tokenizer = [], tokenizer
        model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, model, args, kwargs):
        if not (model.training and torch.is_grad_enabled()):
            return
        ids, mask, positions = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        for row in range(len(ids)):
            if positions is not None and mask is None:  # packed: a sequence begins where positions do
                starts = (positions[row] == 0).nonzero().flatten().tolist()
                self.sequences += [part for part in ids[row].tensor_split(starts[1:])]
            else:
                self.sequences.append(ids[row] if mask is None else ids[row][mask[row].bool()])

    def words(self):
        return sorted(self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.sequences)


def entropy_of(model, sequences):
    """[L, H]: the mean over all tokens, from each sequence alone, in float64."""
    sums, tokens = 0.0, 0
    for ids in sequences:
        found = tiny_models.probabilities(model, {"input_ids": ids[None]})
        sums += torch.stack([tiny_models.entropy(p).sum((0, 2)) for p in found]).detach()
        tokens += len(ids)
    return sums / tokens


def joined(*parts):
    return " ".join(parts)


CASES = {
    "sft": ("SFT", {"text": TEXTS}, {}, TEXTS),
    "packing": ("SFT", {"text": TEXTS}, {"packing": True, "max_length": 32}, TEXTS),
    "padding-free": ("SFT", {"text": TEXTS}, {"padding_free": True, "max_length": None}, TEXTS),
    "completion-only": (
        "SFT",
        {"prompt": TEXTS, "completion": [" good word3"] * 6},
        {},
        [joined(text, "good word3") for text in TEXTS],
    ),
    "dpo": (
        "DPO",
        {"prompt": ["good"] * 6, "chosen": [f" {text}" for text in TEXTS], "rejected": [f" {BAD}"] * 6},
        {},
        [joined("good", text) for text in TEXTS] + [joined("good", BAD)] * 6,
    ),
    "reward": ("Reward", {"chosen": TEXTS, "rejected": [BAD] * 6}, {}, [*TEXTS, *[BAD] * 6]),
    "grpo": ("GRPO", {"prompt": [f"good {text}" for text in TEXTS]}, {"num_generations": 2}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_sequences_that_are_trained_on_are_measured_each_as_if_alone(tmp_path, decoder, case):
    import trl

    method, columns, changes, expected = CASES[case]
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    kind = AutoModelForSequenceClassification if method == "Reward" else AutoModelForCausalLM
    model = kind.from_pretrained(decoder, **({"num_labels": 1} if method == "Reward" else {}))
    tiny_models.sharpened(model)
    before, trained, generated = copy.deepcopy(model), Trained(model, tokenizer), []
    options = {}
    if method == "GRPO":

        def reward(prompts, completions, **more):
            generated.extend(zip(prompts, completions, strict=True))
            return [float(len(one)) for one in completions]

        changes = {"max_completion_length": 4, "generation_batch_size": 12, **changes}
        options["reward_funcs"] = reward
    settings = {"max_steps": 1, "bf16": False, "per_device_train_batch_size": 12, **changes}
    arguments = trainers.arguments(tmp_path, getattr(trl, f"{method}Config"), **settings)
    callback = InflectionCallback(CONFIG)
    trainer = getattr(trl, f"{method}Trainer")(
        model=model, args=arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer,
        callbacks=[callback], **options,
    )  # fmt: skip
    trainer.train()
    if expected is None:
        assert len(generated) == 12
        expected = [joined(prompt, completion).strip() for prompt, completion in generated]
    assert trained.words() == sorted(expected)
    timeline = callback.timeline
    assert timeline.steps.tolist() == [0]
    np.testing.assert_allclose(timeline.entropy[0], entropy_of(before, trained.sequences), atol=1e-5)
    assert (timeline.activation_grad > 0).all() or case == "grpo"  # rewards of one group may be equal
