"""A model and its tokenizer: loaded for a task, and the choice of the parameters that train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from inflection_fast.blocks import find_blocks
from inflection_fast.run.config import ModelConfig
from inflection_fast.run.errors import UserError, user_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "check_model",
    "load_model",
    "load_tokenizer",
    "most_tokens",
    "pad_on_the_right",
    "parameter_counts",
    "unfreeze",
]


@contextmanager
def _loading(config: ModelConfig) -> Iterator[None]:
    """UserError that names the model that could not be loaded, and why."""
    with user_errors(OSError, ValueError, ImportError, KeyError, about=f"model {config.path} could not be loaded"):
        yield


def _options(config: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None:
        options["revision"] = config.revision
    if config.gguf_file is not None:
        options["gguf_file"] = config.gguf_file
    return options


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, which pads on the right."""
    from transformers import AutoTokenizer

    with _loading(config):
        tokenizer = AutoTokenizer.from_pretrained(expanduser(config.path), **_options(config))
    pad_on_the_right(tokenizer, f"model {config.path}")
    return tokenizer


def pad_on_the_right(tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Set the side of padding, and the end token as padding token if there is none. UserError without both tokens."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{model}: its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"


def check_model(config: ModelConfig, task: str, names: tuple[str, ...] | None) -> int:
    """The number of blocks of the model, found without its weights. UserError if the model cannot be used."""
    from transformers import AutoConfig

    path = Path(config.path).expanduser()
    if config.gguf_file is not None:
        _check_gguf(config.gguf_file, config.path, path)
    if config.path.startswith((".", "/", "~")) and not path.is_dir():
        raise UserError(f"model.path: there is no folder {config.path}")
    if path.is_dir() and config.gguf_file is None and not (path / "config.json").is_file():
        raise UserError(f"model.path: {config.path} holds no model (it has no config.json)")
    with _loading(config):
        settings = AutoConfig.from_pretrained(expanduser(config.path), **_options(config))
    with _loading(config), torch.device("meta"):
        model = _class_of(task).from_config(settings, trust_remote_code=config.trust_remote_code)
    longest = most_tokens(model)
    if longest is not None and config.max_length > longest:
        raise UserError(f"model.max_length is {config.max_length}, and {config.path} takes at most {longest} tokens")
    with user_errors(about=f"model {config.path}"):
        return len(find_blocks(model, names))


def _check_gguf(name: str, model: str, path: Path) -> None:
    import_module("gguf")  # the command line says how to install it
    if path.is_dir() and not (path / name).is_file():
        found = sorted(file.name for file in path.glob("*.gguf"))
        raise UserError(f"model.gguf_file: there is no {name} in {model}; it has {found or 'none'}")


def most_tokens(model: PreTrainedModel) -> int | None:
    """The largest number of tokens that the model accepts; None if its configuration gives no limit.

    A table of positions with a padding index, as of RoBERTa, begins after that index.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is None:
        return None
    tables = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "position_embeddings"]
    unused = [
        table.padding_idx + 1
        for table in tables
        if isinstance(table, nn.Embedding) and table.num_embeddings == longest and table.padding_idx is not None
    ]
    return longest - max(unused, default=0)


def load_model(
    config: ModelConfig,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    labels: tuple[str, ...] = (),
    folder: Path | None = None,
) -> PreTrainedModel:
    """The model for a task, from the `folder` of an earlier stage, or from the path in the configuration.

    A head that the weights lack, or have for another number of labels, is drawn from torch's generator.
    """
    import transformers

    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    options.update(_options(config) if folder is None else {"trust_remote_code": config.trust_remote_code})
    if config.gguf_file is None or folder is not None:
        options["use_safetensors"] = True  # other formats are pickles, which can run code when they are loaded
    if config.attention is not None:
        options["attn_implementation"] = config.attention
    if task == "sequence-classification":
        options.update(
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={name: i for i, name in enumerate(labels)},
            ignore_mismatched_sizes=True,
        )
    if folder is None and config.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _loading(config):
        model = _class_of(task).from_pretrained(str(folder or expanduser(config.path)), **options)
    if getattr(model, "hf_quantizer", None) is not None and config.gguf_file is not None:
        model.hf_quantizer.remove_quantization_config(model)  # the weights are dequantised and will be trained
    model.config.pad_token_id = tokenizer.pad_token_id
    if task == "sequence-classification":
        # Many heads accept the number of items of the accumulated batch without dividing by it. The Trainer would
        # then add up the losses of the micro-batches instead of averaging them.
        model.accepts_loss_kwargs = False
    return model


def unfreeze(model: PreTrainedModel, blocks: list[Any], top: int | None, head: tuple[str, ...] | None) -> list[str]:
    """`unfreeze_top` with UserErrors that name the setting; `top` None: all parameters train."""
    if top is None:
        return [name for name, _ in model.named_parameters()]
    from inflection_fast.act.unfreeze import unfreeze_top

    try:
        return unfreeze_top(model, blocks, top, head)
    except ValueError as error:
        raise UserError(f"measure.{error}".replace("measure.top:", "measure.unfreeze:")) from error


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """The number of parameters that train, and of all parameters."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)


def _class_of(task: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
