"""Measuring without the Trainer: a plain PyTorch loop around a small transformer of its own.

The task: which of two kinds of token stands in a sequence more often. Nothing is fetched, and it takes seconds.

    python examples/plain_loop.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from inflection_fast import Monitor, MonitorConfig, SelectConfig, Timeline, select

LENGTH, WIDTH, HEADS, BLOCKS, KINDS = 24, 32, 4, 4, 12


class SelfAttention(nn.Module):
    """Any module that calls `F.scaled_dot_product_attention` can be measured."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] to the same."""
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention and a feed-forward part, both with a residual."""

    def __init__(self):
        super().__init__()
        self.attention = SelfAttention()
        self.feed = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] to the same."""
        x = x + self.attention(self.norm(x))
        return x + self.feed(x)


class Classifier(nn.Module):
    """A stack of blocks that answers yes or no."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(KINDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] integers to [batch, 2] logits."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


def batch(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, and whether there are more zeros than ones among them."""
    tokens = torch.randint(KINDS, (size, LENGTH), generator=generator)
    return tokens, ((tokens == 0).sum(1) > (tokens == 1).sum(1)).long()


def main(steps: int = 60, out: str | None = None) -> Timeline:
    """Trains, measures every fifth step, and prints what was measured and which blocks it points at."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    probe = [{"tokens": batch(64, generator)[0]}]
    with Monitor(model, MonitorConfig(every=5), out=out, probe=probe) as monitor:
        for _ in range(steps):
            tokens, labels = batch(64, generator)
            loss = F.cross_entropy(model(tokens), labels)
            loss.backward()
            monitor.step(loss)  # after backward, before the gradients are cleared
            optimizer.step()
            optimizer.zero_grad()
    timeline = monitor.timeline
    print("block  entropy (nats)  gradient norm  moved since the start (delta-CKA)")
    for layer, name in enumerate(timeline.layers):
        entropy, gradient = timeline.entropy[-1, layer].mean(), timeline.activation_grad[-1, layer]
        print(f"{name:9}  {entropy:9.3f}  {gradient:13.2e}  {timeline.delta_cka[-1, layer]:8.3f}")
    print(f"loss {timeline.loss[0]:.3f} -> {timeline.loss[-1]:.3f}")
    print(select(timeline, SelectConfig(method="greedy")).summary)
    return timeline


if __name__ == "__main__":
    main()
