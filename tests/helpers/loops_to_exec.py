"""Loops as somebody has written them, who knows nothing of this package: `python loops_to_exec.py KIND FOLDER`."""

import sys

import torch
from torch import nn

WIDTH, HEADS = 16, 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


def batches(count=4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(3, 5, WIDTH, generator=generator), torch.tensor([0, 1, 1])


def distributed(folder):
    torch.distributed.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches():
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.distributed.destroy_process_group()


def accelerate(folder):
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = Net()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for x, y in batches(8):
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()


def trainer(folder):
    from helpers import trainers

    trainers.trainer(folder, None, max_steps=4, optim="sgd").train()


def lightning(folder):
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch):
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=folder, **quiet, enable_model_summary=False).fit(
        Module(), torch.utils.data.DataLoader([*batches()], batch_size=None)
    )


def both(folder):
    lightning(folder)
    trainer(folder)


def collapse(folder):
    """Attention logits beyond every limit."""
    model = Net()
    for layer in model.encoder.layers:
        nn.init.constant_(layer.self_attn.in_proj_weight, 30.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for x, y in batches():
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def nothing(folder):
    print("no training here")
    sys.exit(5)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    globals()[sys.argv[1]](sys.argv[2])
    print("the script ran to its end")
