"""Tiny models and texts, made here and now: nothing is fetched, and a training takes a second."""

from __future__ import annotations

import csv
import random
from pathlib import Path

GOOD = ("good", "great", "fine", "lovely", "bright", "warm", "clever", "fresh")
BAD = ("bad", "awful", "dull", "weak", "cold", "grim", "stale", "flat")
OTHER = tuple(f"word{i}" for i in range(40))


def tokenizer():
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *OTHER]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
    )


def bert_config(**changes):
    """Three blocks, two heads."""
    from transformers import BertConfig

    settings = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return BertConfig(**{**settings, **changes})


def bert(folder: Path, **changes) -> Path:
    """A BERT without a head, and its tokenizer, saved."""
    import torch
    from transformers import BertModel

    torch.manual_seed(0)
    BertModel(bert_config(**changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def llama(folder: Path) -> Path:
    """A decoder for language, and its tokenizer, saved."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def reviews(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Distinct texts whose label can be read off their words; ten films."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        label = rng.choice(["neg", "pos"])
        words = [rng.choice(GOOD if label == "pos" else BAD), *rng.choices(OTHER, k=rng.randint(2, 9))]
        rng.shuffle(words)
        text = " ".join(words)
        rows[text] = {"text": text, "label": label, "film": f"film{rng.randrange(10)}"}
    return list(rows.values())


def write_csv(path: Path, rows: list[dict]) -> Path:
    """The rows as a CSV file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def gguf(folder: Path, width: int = 32, blocks: int = 2) -> dict:
    """A decoder in 8-bit blocks, one token per letter, in `folder`/tiny.gguf; returns its weights as dequantised."""
    import gguf as files
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    rng, vocabulary = np.random.default_rng(0), 64
    writer = files.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789", "\u0120", "th", "<end>"]  # U+0120: a space, byte level
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters, *(f"token{i}" for i in range(vocabulary - len(letters)))])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(letters.index("<end>"))
    squares = {
        "attn_q": (width, width),
        "attn_k": (width, width),
        "attn_v": (width, width),
        "attn_output": (width, width),
    }
    shapes = squares | {"ffn_gate": (2 * width, width), "ffn_up": (2 * width, width), "ffn_down": (width, 2 * width)}
    tensors = {"token_embd.weight": (vocabulary, width), "output.weight": (vocabulary, width)}
    tensors |= {f"blk.{i}.{name}.weight": shape for i in range(blocks) for name, shape in shapes.items()}
    kind, plain = files.GGMLQuantizationType.Q8_0, {}
    for name, shape in tensors.items():
        packed = files.quants.quantize(rng.standard_normal(shape).astype(np.float32) / 8, kind)
        plain[name] = files.quants.dequantize(packed, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    for name in ["output_norm", *(f"blk.{i}.{one}" for i in range(blocks) for one in ("attn_norm", "ffn_norm"))]:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return plain
