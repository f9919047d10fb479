"""The stages of the command line: configuration, data, and training with transformers.Trainer."""
