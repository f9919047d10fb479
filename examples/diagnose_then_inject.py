"""One training: measure a shallow unfreezing, choose layers, put adapters there, train the rest.

A tiny model on made-up texts stands in for yours. Nothing is fetched, and it takes seconds:

    python examples/diagnose_then_inject.py
"""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from inflection_fast import DiagnoseThenInject, MonitorConfig, Plan, SelectConfig


def main(folder: str = "runs/diagnosed") -> Plan:
    """Trains, and returns the plan."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=100, num_labels=2))
    ids = torch.randint(4, 100, (320, 16))
    data = [{"input_ids": row, "labels": int(row[0] > 50)} for row in ids]

    args = TrainingArguments(folder, max_steps=40, learning_rate=1e-3, use_cpu=True, report_to="none", save_steps=20)
    trainer = Trainer(model, args, train_dataset=data)
    two = SelectConfig(method="top", k=2, significance=None)  # the best two, however little they stand out
    run = DiagnoseThenInject(trainer, steps=20, r=8, config=MonitorConfig(every=2), select=two)
    run.train()
    trainer.save_model(f"{folder}/adapter")
    print(run.plan.summary)
    return run.plan


if __name__ == "__main__":
    main()
