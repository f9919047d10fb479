"""transformers.Trainer: one argument, and every measured step is in its log.

python examples/trainer.py
"""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from inflection_fast import InflectionCallback, MonitorConfig, Timeline


def main(folder: str = "runs/trainer") -> Timeline:
    """Trains a tiny BERT on made-up texts, and returns what was measured."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=100, num_labels=2))
    ids = torch.randint(4, 100, (96, 16))
    data = [{"input_ids": row, "labels": int(row[0] > 50)} for row in ids]

    callback = InflectionCallback(MonitorConfig(every=2), out=f"{folder}/timeline", if_exists="overwrite")
    args = TrainingArguments(f"{folder}/trainer", max_steps=8, use_cpu=True, report_to="none")
    trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
    trainer.train()
    for row in trainer.state.log_history:
        if "inflection/entropy/mean" in row:
            print(f"step {row['step']}: entropy {row['inflection/entropy/mean']:.3f} nats")
    return callback.timeline


if __name__ == "__main__":
    main()
