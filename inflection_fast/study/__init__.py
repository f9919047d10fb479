"""The study: a grid of transfers, source regimes, arms and seeds that says whether the place of LoRA matters."""
