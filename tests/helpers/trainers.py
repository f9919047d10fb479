"""A Trainer on a tiny BERT, and its data, for tests of the callback."""

from __future__ import annotations

import torch

import helpers.tiny_texts as tiny

STEPS, BATCH = 6, 4


def classifier():
    """A BERT without dropout, always the same."""
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2}
    return BertForSequenceClassification(tiny.bert_config(**settings))


def items(count=STEPS * BATCH, length=9):
    """Texts of 5 to 9 tokens, and labels."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(4, 60, (length,), generator=generator),
            "attention_mask": (torch.arange(length) < 5 + i % 5).long(),
            "labels": torch.tensor(i % 2),
        }
        for i in range(count)
    ]


def arguments(folder, kind=None, **changes):
    """Training arguments that print nothing, save nothing and log every loss."""
    from transformers import TrainingArguments

    settings = {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    return (kind or TrainingArguments)(output_dir=str(folder), **{**settings, **changes})


def trainer(folder, callback, *, model=None, kind=None, data=None, options=None, **changes):
    """A Trainer, or one of `kind`, with the callback."""
    from transformers import PrinterCallback, Trainer

    made = (kind or Trainer)(
        model=classifier() if model is None and not (options or {}).get("model_init") else model,
        args=arguments(folder, **changes),
        train_dataset=items() if data is None else data,
        callbacks=[callback] if callback is not None else [],
        **(options or {}),
    )
    made.remove_callback(PrinterCallback)
    return made


def logged(trainer):
    """The losses that it logged, step by step."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
