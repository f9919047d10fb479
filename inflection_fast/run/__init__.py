"""The stages behind the command line: configuration, data, and training with transformers.Trainer."""
