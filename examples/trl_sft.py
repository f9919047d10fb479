"""TRL's SFTTrainer: the same argument as for the Trainer. A tiny Llama learns made-up sentences.

python examples/trl_sft.py
"""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from inflection_fast import InflectionCallback, MonitorConfig, Timeline

WORDS = ("a", "small", "model", "learns", "what", "comes", "next")


def main(folder: str = "runs/trl") -> Timeline:
    """Trains, and returns what was measured."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("<pad>", "<end>", *WORDS))}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(WORDS) + 2, pad_token_id=0, eos_token_id=1))
    data = Dataset.from_dict({"text": [" ".join(WORDS[i % 3 :]) for i in range(64)]})

    callback = InflectionCallback(MonitorConfig(every=2), out=f"{folder}/timeline", if_exists="overwrite")
    args = SFTConfig(folder, max_steps=6, max_length=16, use_cpu=True, bf16=False, report_to="none")
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=[callback])
    trainer.train()
    print(callback.timeline)
    return callback.timeline


if __name__ == "__main__":
    main()
