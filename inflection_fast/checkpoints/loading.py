"""Loading a model and its tokenizer from a checkpoint, to measure it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from inflection_fast.checkpoints.files import Source
from inflection_fast.checkpoints.gguf_files import low_memory_gguf
from inflection_fast.checkpoints.memory import trim_memory
from inflection_fast.run.errors import UserError, user_errors
from inflection_fast.run.models import most_tokens, pad_on_the_right

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Loaded", "damaged_file_errors", "load", "reading", "tokenizer_of"]

# Ends of class names in `architectures` -> task of such a model on texts.
_TASKS = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForMaskedLM": "masked",
    "ForPreTraining": "masked",
    "ForConditionalGeneration": "translated",
}
_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "translated": "AutoModelForSeq2SeqLM",
    "embedded": "AutoModel",
}
LOSSES = {
    "causal": "the next token",
    "masked": "15 % of the tokens, masked",
    "translated": "the second half of a text from its first",
    "embedded": "which two halves belong to one text",
}


@dataclass(frozen=True)
class Loaded:
    """A model ready to be measured: in evaluation mode, no parameter trainable."""

    model: PreTrainedModel
    task: str  # of `LOSSES`: what its own loss on plain texts is
    device: torch.device

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights; shared ones count once."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def longest(self) -> int | None:
        """Tokens that the model takes, where its configuration says."""
        return most_tokens(self.model)


def damaged_file_errors() -> tuple[type[Exception], ...]:
    """The exceptions for damaged or truncated files of weights."""
    from safetensors import SafetensorError

    return (SafetensorError, OSError, ValueError, IndexError)


def load(source: Source, *, device: str | None = None, config: PretrainedConfig | None = None) -> Loaded:
    """The model of a checkpoint, in float32 on the CPU and as it was saved on a GPU.

    `config` is its configuration, where it has been read before: to read that of a GGUF file takes seconds. UserError
    where Transformers cannot build the model, or its folder has no configuration.
    """
    import transformers

    _check_described(source)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    about = f"{source.name} could not be loaded"
    options: dict[str, object] = {"dtype": torch.float32 if where.type == "cpu" else "auto"}
    with user_errors(*damaged_file_errors(), ImportError, KeyError, about=about):
        if source.gguf is not None:
            options["gguf_file"] = source.gguf
            if hasattr(transformers, "GgufConfig"):
                options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        else:
            options["use_safetensors"] = True
        config = _config_of(source) if config is None else config
        task = _task_of(config)
        with reading(source):
            model = getattr(transformers, _CLASSES[task]).from_pretrained(source.folder, config=config, **options)
    if source.gguf is not None and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    model.config.use_cache = False  # no cache of keys and values
    model.to(where).eval().requires_grad_(False)
    trim_memory()
    return Loaded(model, task, where)


def reading(source: Source) -> AbstractContextManager[None]:
    """A context for Transformers to read a checkpoint: GGUF files once and in little memory."""
    return nullcontext() if source.gguf is None else low_memory_gguf()


def import_libraries(source: Source) -> PretrainedConfig:
    """Import what `load` and a Monitor need, so that later memory is that of the model and of measuring.

    Returns the configuration of the model.
    """
    import transformers

    import_module("pyarrow.ipc")
    _check_described(source)
    with user_errors(OSError, ValueError, ImportError, KeyError, about=f"{source.name} could not be loaded"):
        config = _config_of(source)
        with torch.device("meta"):
            getattr(transformers, _CLASSES[_task_of(config)]).from_config(config)
    return config


def _config_of(source: Source) -> PretrainedConfig:
    from transformers import AutoConfig

    named = {"gguf_file": source.gguf} if source.gguf is not None else {}
    return AutoConfig.from_pretrained(source.folder, **named)


def _check_described(source: Source) -> None:
    if not source.described:
        raise UserError(f"{source.name}: has no config.json, so only its weights can be read; leave --data out")


def _task_of(config: PretrainedConfig) -> str:
    if names := getattr(config, "architectures", None):
        return next((task for end, task in _TASKS.items() if names[0].endswith(end)), "embedded")
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type  # a GGUF file names no class
    if kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "translated"
    encodes = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES  # some of these have a class with a causal mask as well
    return "causal" if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not encodes else "embedded"


def tokenizer_of(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, able to pad on the right. UserError where there is none."""
    from transformers import AutoTokenizer

    _check_described(source)
    if not source.has_tokenizer:
        raise UserError(
            f"{source.name}: has no tokenizer, so no text can be given to it; leave --data out for the weights"
        )
    named = {"gguf_file": source.gguf} if source.gguf is not None else {}
    with user_errors(OSError, ValueError, ImportError, KeyError, about=f"the tokenizer of {source.name}"):
        tokenizer = AutoTokenizer.from_pretrained(source.folder, **named)
    pad_on_the_right(tokenizer, source.name)
    return tokenizer


def halves_loss(embedded: Tensor, tokens: Tensor) -> Tensor:
    """[]: cross entropy of finding the other half of each text by the cosine of mean embeddings, at temperature 0.05.

    Args:
        embedded: [2 B, T, D], the first halves of B texts, then the second ones.
        tokens: [2 B, T], 1 at tokens.
    """
    weights = tokens.to(embedded.dtype)[..., None]
    means = (embedded * weights).sum(1) / weights.sum(1).clamp(min=1.0)
    first, second = nn.functional.normalize(means, dim=-1).chunk(2)
    logits = first @ second.mT / 0.05  # the temperature of SimCSE (arXiv 2104.08821)
    own = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.mT, own)) / 2
