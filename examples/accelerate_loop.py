"""A loop of Accelerate: one argument of the Accelerator, and no line in the loop.

accelerate launch examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from inflection_fast import MonitorConfig, Timeline
from inflection_fast.integrations.accelerate import InflectionTracker


def main(folder: str = "runs/accelerate") -> Timeline:
    """Trains for one epoch, two micro-batches a step, and returns what was measured."""
    torch.manual_seed(0)
    tracker = InflectionTracker(MonitorConfig(every=2), out=folder)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, log_with=[tracker])
    accelerator.init_trackers("an example")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=100, num_labels=2))
    loader = DataLoader(torch.randint(4, 100, (64, 16)), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader)
    for ids in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids, labels=(ids[:, 0] > 50).long()).loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    accelerator.print(tracker.timeline)
    return tracker.timeline


if __name__ == "__main__":
    main()
