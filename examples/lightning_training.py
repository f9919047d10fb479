"""Lightning: one callback. The transformer inside the LightningModule is found.

python examples/lightning_training.py
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from inflection_fast import MonitorConfig, Timeline
from inflection_fast.integrations.lightning import LightningCallback


class Classifier(pl.LightningModule):
    """A tiny BERT that says whether the first token is a large one."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
        self.model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=100, num_labels=2))

    def training_step(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of a batch [batch, length] of tokens."""
        return self.model(input_ids=ids, labels=(ids[:, 0] > 50).long()).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(folder: str = "runs/lightning") -> Timeline:
    """Trains for one epoch, and returns what was measured."""
    pl.seed_everything(0, verbose=False)
    callback = LightningCallback(MonitorConfig(every=2), out=folder, if_exists="overwrite")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(callbacks=[callback], max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(Classifier(), DataLoader(torch.randint(4, 100, (64, 16)), batch_size=8))
    print(callback.timeline)
    return callback.timeline


if __name__ == "__main__":
    main()
