"""Tiny models with random weights, batches for them, and what a measurement of one optimizer step should say."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from truth import attendable, stats_of

VOCAB, T = 50, 11
KINDS = ["bert", "gpt2", "llama", "plain"]
BLOCKS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers", "plain": "body"}


class PlainBlock(nn.Module):
    def __init__(self, dim, heads, dropout, is_causal):
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.drop, self.recorder = nn.Dropout(dropout), None

    def forward(self, x, mask=None):
        B, N, D = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if self.recorder is not None:
            self.recorder(q, k, mask, (D // self.heads) ** -0.5)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.is_causal and mask is None)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(B, N, D)))
        return x + self.mlp(x)


class Plain(nn.Module):
    """A model that no library knows, and that calls PyTorch's attention."""

    def __init__(self, layers=3, dim=32, heads=4, dropout=0.0, is_causal=True):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.body = nn.ModuleList(PlainBlock(dim, heads, dropout, is_causal) for _ in range(layers))
        self.head = nn.Linear(dim, VOCAB)

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        for block in self.body:
            x = block(x, mask)
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return type("Output", (), {"loss": loss, "logits": logits})()


def build(kind, *, dropout=0.0, attn="sdpa", seed=0):
    import transformers as hf

    torch.manual_seed(seed)
    if kind == "plain":
        return Plain(dropout=dropout)
    if kind == "bert":
        config = hf.BertConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=3,
        )  # fmt: skip
        model = hf.BertForSequenceClassification._from_config(config, attn_implementation=attn)
    elif kind == "gpt2":
        config = hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, attn_pdrop=dropout,
                               resid_pdrop=dropout, embd_pdrop=dropout)  # fmt: skip
        model = hf.GPT2LMHeadModel._from_config(config, attn_implementation=attn)
    else:
        config = hf.LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=64, attention_dropout=dropout,
        )  # fmt: skip
        model = hf.LlamaForCausalLM._from_config(config, attn_implementation=attn)
    with torch.no_grad():  # larger than the usual initialisation, or every attention would be flat
        for name, p in model.named_parameters():
            if any(word in name for word in ("query", "key.", "c_attn", "q_proj", "k_proj")):
                p.mul_(12.0)
    return model.train()


def batch(kind, *, rows=3, length=T, padded=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=g)
    out = {"input_ids": ids}
    if padded and kind != "plain":
        keep = torch.arange(length) < torch.randint(4, length + 1, (rows, 1), generator=g)
        keep[0] = True
        out["attention_mask"] = keep.long()
    out["labels"] = torch.randint(0, 3, (rows,), generator=g) if kind == "bert" else ids.clone()
    return out


def blocks_of(model, kind):
    return list(model.get_submodule(BLOCKS[kind]))


def record_scores(model, kind, into):
    """Make `model` note every layer's scores and who attends whom, and attend as before."""
    if kind == "plain":
        for i, block in enumerate(model.body):

            def recorder(q, k, mask, scale, i=i):
                scores = q.double() @ k.double().mT * scale
                allowed, _ = attendable(scores.shape, attn_mask=mask, is_causal=mask is None)
                into.setdefault(i, []).append((scores, allowed))

            block.recorder = recorder
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module, query, key, value, attention_mask, scaling=None, **rest):
        groups = query.shape[1] // key.shape[1]
        scores = query.double() @ key.double().repeat_interleave(groups, 1).mT
        scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        causal = attention_mask is None and bool(getattr(module, "is_causal", False))
        allowed, _ = attendable(scores.shape, attn_mask=attention_mask, is_causal=causal)
        into.setdefault(module.layer_idx, []).append((scores, allowed))
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)

    AttentionInterface.register("recorded", attention)
    AttentionMaskInterface.register("recorded", sdpa_mask)
    model.set_attn_implementation("recorded")


def expected(model, kind, micro_batches):
    """Float64 truth of one optimizer step over these micro-batches, the loss divided by their number."""
    twin, scores, outputs = copy.deepcopy(model).double(), {}, {}
    for p in twin.parameters():
        p.requires_grad_(True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    record_scores(twin, kind, scores)
    modules = blocks_of(twin, kind)
    for i, module in enumerate(modules):
        module.register_forward_hook(
            lambda m, a, out, i=i: outputs.__setitem__(i, out[0] if isinstance(out, tuple) else out)
        )
    L, squares, names = len(modules), torch.zeros(len(modules), dtype=torch.float64), ("entropy", "collision", "sink")
    sums, count, peak = {name: 0.0 for name in names}, 0.0, None
    for one in micro_batches:
        scores.clear()
        loss = twin(**one).loss / len(micro_batches)
        grads = torch.autograd.grad(loss, [outputs[i] for i in range(L)], retain_graph=True)
        squares += torch.stack([g.square().sum() for g in grads])
        loss.backward()
        valid = one.get("attention_mask", torch.ones_like(one["input_ids"])).bool()[:, None, :]
        per_layer = [stats_of(s, a) for ((s, a),) in (scores[i] for i in range(L))]
        for name in names:  # [L, H]
            sums[name] = sums[name] + torch.stack([(s[name] * valid).sum((0, 2)) for s in per_layer])
        count += valid.sum().item()
        top = torch.stack([s["max_logit"].masked_fill(~valid, -torch.inf).amax((0, 2)) for s in per_layer])
        peak = top if peak is None else torch.maximum(peak, top)
    parameter_grad = []
    for module, prefix in zip(modules, (f"{BLOCKS[kind]}.{i}." for i in range(L)), strict=True):
        parts = [p.grad.square().sum() for n, p in module.named_parameters() if prefix + n in trainable]
        parameter_grad.append(torch.stack(parts).sum().sqrt() if parts else torch.tensor(torch.nan))
    return {
        **{name: (value / count).detach().numpy() for name, value in sums.items()},
        "max_logit": peak.detach().numpy(),
        "activation_grad": squares.sqrt().numpy(),
        "parameter_grad": torch.stack([p.double() for p in parameter_grad]).numpy(),
    }


def features(model, kind, probe):
    """Outputs of every block [L, N, D] in eval mode, at the tokens that are no padding."""
    twin, outputs = copy.deepcopy(model).eval(), {}
    for i, module in enumerate(blocks_of(twin, kind)):
        module.register_forward_hook(
            lambda m, a, out, i=i: outputs.setdefault(i, []).append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        for one in probe:
            twin(**one)
    valid = [one.get("attention_mask", torch.ones_like(one["input_ids"])).bool() for one in probe]
    return torch.stack([torch.cat([x[v] for x, v in zip(xs, valid, strict=True)]) for xs in outputs.values()])
