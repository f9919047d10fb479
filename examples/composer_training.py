"""MosaicML Composer: one callback. The transformer inside the ComposerModel is found.

python examples/composer_training.py
"""

from __future__ import annotations

import torch
from composer import Trainer
from composer.models import ComposerModel
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from inflection_fast import MonitorConfig, Timeline
from inflection_fast.integrations.composer import ComposerCallback


class Classifier(ComposerModel):
    """A tiny BERT that says whether the first token is a large one."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
        self.model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=100, num_labels=2))

    def forward(self, ids: torch.Tensor) -> SequenceClassifierOutput:
        """The model's output for a batch [batch, length] of tokens."""
        return self.model(input_ids=ids, labels=(ids[:, 0] > 50).long())

    def loss(self, outputs: SequenceClassifierOutput, batch: torch.Tensor) -> torch.Tensor:
        """What Composer differentiates."""
        return outputs.loss


def main(folder: str = "runs/composer") -> Timeline:
    """Trains for one epoch, and returns what was measured."""
    torch.manual_seed(0)
    model = Classifier()
    callback = ComposerCallback(MonitorConfig(every=2), out=folder, keys=("loss",))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = DataLoader(torch.randint(4, 100, (64, 16)), batch_size=8)
    quiet = {"progress_bar": False, "auto_log_hparams": False}
    trainer = Trainer(
        model=model, optimizers=optimizer, train_dataloader=data, max_duration="1ep", callbacks=[callback], **quiet
    )
    trainer.fit()
    timeline = callback.monitor.timeline
    trainer.close()
    print(timeline)
    return timeline


if __name__ == "__main__":
    main()
