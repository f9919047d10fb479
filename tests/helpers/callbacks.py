"""Trainers with the callback, and what their batches hold."""

import pytest
import torch

import helpers.tiny_texts as tiny
from inflection_fast.measure import MonitorConfig

STEPS, BATCH = 6, 4


CONFIG = MonitorConfig(every=2, rows=None)


@pytest.fixture
def model():
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        tiny.bert_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2)
    )


@pytest.fixture
def items():
    generator = torch.Generator().manual_seed(1)
    length = 9
    return [
        {
            "input_ids": torch.randint(4, 60, (length,), generator=generator),
            "attention_mask": (torch.arange(length) < 5 + i % 5).long(),
            "labels": torch.tensor(i % 2),
        }
        for i in range(STEPS * BATCH)
    ]


def trainer_of(model, items, folder, callbacks, eval_dataset=None, **arguments):
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    settings = {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "max_grad_norm": 1e-3,  # so small that gradients read after clipping would be seen to be wrong
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "use_cpu": True,
        **arguments,
    }
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    trainer = InOrder(model=model, args=arguments, train_dataset=items, eval_dataset=eval_dataset, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer
