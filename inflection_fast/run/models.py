"""Loading a model and its tokenizer for a task, and deciding which of its parameters train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inflection_fast.run.config import ModelConfig
from inflection_fast.run.errors import UserError, user_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_model", "load_model", "load_tokenizer", "most_tokens", "parameter_counts", "unfreeze"]


@contextmanager
def _loading(config: ModelConfig) -> Iterator[None]:
    """Says which model could not be loaded and why, in one sentence."""
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
    """The model's tokenizer, able to pad on the right."""
    from transformers import AutoTokenizer

    with _loading(config):
        tokenizer = AutoTokenizer.from_pretrained(expanduser(config.path), **_options(config))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"model {config.path}: its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def check_model(config: ModelConfig, task: str, names: tuple[str, ...] | None) -> int:
    """The number of the model's blocks; UserError where it cannot be used. Its weights are not loaded."""
    import torch
    from transformers import AutoConfig

    from inflection_fast.blocks import find_blocks

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
    import_module("gguf")  # named by the command line where it is not installed
    if path.is_dir() and not (path / name).is_file():
        found = sorted(file.name for file in path.glob("*.gguf"))
        raise UserError(f"model.gguf_file: there is no {name} in {model}; it has {found or 'none'}")


def most_tokens(model: PreTrainedModel) -> int | None:
    """The longest text that the model takes, where its configuration says.

    A table of positions with a padding index (RoBERTa's kind) counts from the position after that.
    """
    from torch import nn

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
    """The model for a task: from `folder` where a stage has saved one, else from where the configuration says.

    A head that the weights do not hold, or hold for another number of labels, is made anew from the caller's seed.
    """
    import torch
    import transformers

    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    options.update(_options(config) if folder is None else {"trust_remote_code": config.trust_remote_code})
    if config.gguf_file is None or folder is not None:
        options["use_safetensors"] = True  # other formats are pickles, which run code when they are read
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
        model.hf_quantizer.remove_quantization_config(model)  # the weights are plain numbers now, to be trained
    model.config.pad_token_id = tokenizer.pad_token_id
    if task == "sequence-classification":
        # Many heads take the number of items in a whole accumulated batch and do not divide by it, and the Trainer
        # then adds up the losses of the parts instead of averaging them.
        model.accepts_loss_kwargs = False
    return model


def unfreeze(model: PreTrainedModel, blocks: list[Any], top: int | None, head: tuple[str, ...] | None) -> list[str]:
    """Leaves the last `top` blocks and the head trainable (None: everything) and returns the trainable names.

    Without names, the head is every parameter that the model registers after its last block. A weight shared with the
    embeddings counts as theirs, and stays frozen.
    """
    named = dict(model.named_parameters())
    if top is None:
        return list(named)
    if top > len(blocks):
        raise UserError(f"measure.unfreeze is {top}, and the model has {len(blocks)} blocks")
    for prefix in head or ():
        if not any(f"{name}.".startswith(f"{prefix}.") for name in named):
            raise UserError(f"measure.head: the model has no parameters under {prefix!r}")
    from inflection_fast.act.shallow import unfreeze_top

    try:
        return unfreeze_top(model, blocks, top, head)
    except ValueError as error:
        raise UserError(
            "measure.unfreeze is 0 and the model has no head of its own: nothing would be trained"
        ) from error


def parameter_counts(model: Any) -> tuple[int, int]:
    """How many parameters train, and how many there are."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)


def _class_of(task: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
