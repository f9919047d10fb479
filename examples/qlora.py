"""QLoRA: a base of 4-bit weights is measured as it is, then gets adapters on the layers that this points to.

bitsandbytes computes on CPUs, too, so that this runs anywhere: pip install bitsandbytes. A tiny Llama of random weights
stands in for yours, on made-up texts; name a model to measure that one:

    python examples/qlora.py [FOLDER_OR_HUB_NAME]
"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from inflection_fast import Monitor, MonitorConfig, SelectConfig, inject, select

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def tiny_base(folder: str) -> str:
    """A folder with a model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100)).save_pretrained(folder)
    return folder


def main(folder: str = "runs/qlora", base: str | None = None, steps: int = 8) -> PeftModel:
    """Measures, plans, injects and trains, and returns the model, whose adapter and plan lie in `folder`/adapter."""
    base = base or tiny_base(f"{folder}/base")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4)
    model = prepare_model_for_kbit_training(model)
    model.enable_input_require_grads()  # gradients reach the blocks, though no weight of them trains
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(3, 100, (steps, 4, 16), generator=generator).to(model.device)

    with Monitor(model, MonitorConfig(every=1), f"{folder}/timeline", if_exists="overwrite") as monitor:
        for ids in batches:
            model(input_ids=ids, labels=ids).loss.backward()
            monitor.step()
            model.zero_grad()
    two = SelectConfig("top", k=2, significance=None)  # the best two, however little they stand out
    plan = select(monitor.timeline, two)
    print(plan.summary)

    model = inject(model, plan, r=8)
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        for ids in batches:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")
    model.save_pretrained(f"{folder}/adapter")
    return model


if __name__ == "__main__":
    main(base=sys.argv[1] if len(sys.argv) > 1 else None)
