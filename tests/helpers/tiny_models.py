"""Small random models of every kind that is measured, a padded batch for each, and their float64 truth."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

B, T, VOCAB, WIDTH, HEADS = 3, 12, 40, 16, 4
_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": HEADS, "intermediate_size": 24}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def one_thread():
    """For modules that import it: models of this size only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bert(dropout=0.0, **kw):
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return hf.BertForSequenceClassification(hf.BertConfig(**_SIZES, vocab_size=VOCAB, **drop, **kw))


def distilbert():
    sizes = {"dim": WIDTH, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 24, "vocab_size": VOCAB}
    return hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(**sizes, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0)
    )


def gpt2(dropout=0.0):
    drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    sizes = {"n_embd": WIDTH, "n_layer": 3, "n_head": HEADS, "vocab_size": VOCAB, "n_positions": 64}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **drop, bos_token_id=0, eos_token_id=0))


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, vocab_size=VOCAB, num_key_value_heads=2))


def mistral():
    # The window is longer than the padding: in float64, eager rows without any key would make the truth NaN.
    return hf.MistralForCausalLM(
        hf.MistralConfig(**_SIZES, vocab_size=VOCAB, num_key_value_heads=2, head_dim=4, sliding_window=6)
    )


def gemma2():
    return hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **_SIZES,
            vocab_size=VOCAB,
            num_key_value_heads=2,
            head_dim=4,
            sliding_window=6,
            attn_logit_softcapping=0.5,
            query_pre_attn_scalar=4,
        )
    )


def gpt_oss():
    """Sharpened, because its sinks are to be seen; they are drawn when it is made."""
    torch.manual_seed(0)
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    sizes = _SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 4}
    config = hf.GptOssConfig(**sizes, **experts, vocab_size=VOCAB)
    return sharpened(hf.GptOssForCausalLM(config).train())


def t5():
    sizes = {"d_model": WIDTH, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": HEADS, "vocab_size": VOCAB}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**_SIZES, **_NO_DROPOUT, image_size=16, patch_size=4))


class Encoder(nn.Module):
    """nn.TransformerEncoder with a padding mask, whose attention goes through F.multi_head_attention_forward."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, input_ids, padding=None, labels=None):
        hidden = self.encoder(self.embed(input_ids), src_key_padding_mask=padding)
        logits = self.head(hidden[:, 0])
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Attention(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.weights = weights
        self.both = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) if weights else None

    def forward(self, x):
        if self.weights:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
            return self.both(x, x, x, attn_mask=mask)[0]  # need_weights is the default: softmax instead of SDPA
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mixer = Attention(weights)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, x):
        x = x + self.mixer(self.n1(x))
        return x + self.mlp(self.n2(x))


class HandWritten(nn.Module):
    """A GPT as people write it themselves; `checkpoint` may be torch's, whose recomputation runs the blocks' hooks."""

    def __init__(self, weights=False):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Layer(weights) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.checkpoint = None

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x) if self.checkpoint is None else self.checkpoint(block, x)
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def weighted():
    return HandWritten(weights=True)


@dataclass(frozen=True)
class Case:
    """A model and how its batch looks."""

    build: object
    batch: object
    implementations: tuple = ("sdpa", "eager")  # of attention, where there is a choice


def _ids():
    return torch.randint(3, VOCAB, (B, T))


def _padding():
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, 7:] = 0
    mask[2, 10:] = 0
    return mask


def classify():
    return {"input_ids": _ids(), "attention_mask": _padding(), "labels": torch.tensor([0, 1, 1])}


def continue_text():
    ids = _ids()
    return {"input_ids": ids, "attention_mask": _padding(), "labels": ids}


def translate():
    decoder_mask = torch.ones(B, T, dtype=torch.long)  # as long as the encoder's: which is whose shows in the values
    decoder_mask[1, 5:] = 0
    return classify() | {"labels": _ids(), "decoder_attention_mask": decoder_mask}


def see():
    return {"pixel_values": torch.randn(B, 3, 16, 16), "labels": torch.tensor([0, 1, 1])}


def encode():
    return {"input_ids": _ids(), "padding": _padding() == 0, "labels": torch.tensor([0, 1, 1])}


def plain_text():
    ids = _ids()
    return {"input_ids": ids, "labels": ids}


CASES = {
    "bert": Case(bert, classify),
    "distilbert": Case(distilbert, classify),
    "gpt2": Case(gpt2, continue_text),
    "llama": Case(llama, continue_text),
    "mistral": Case(mistral, continue_text),
    "gemma2": Case(gemma2, continue_text, ("eager",)),  # the only one that knows its softcap
    "t5": Case(t5, translate),
    "vit": Case(vit, see),
    "encoder": Case(Encoder, encode, (None,)),
    "hand-written": Case(HandWritten, plain_text, (None,)),
    "weighted": Case(weighted, plain_text, (None,)),
}


def model_and_batch(name, implementation=None, seed=0):
    """A model in training mode, with attention that is far from uniform, and its batch."""
    torch.manual_seed(seed)
    case = CASES[name]
    model = sharpened(case.build().train())
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model, case.batch()


def sharpened(model):
    """A fresh model attends nearly uniformly, which a wrong mask or scale would hardly move."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name.lower() and parameter.any():
                parameter.mul_(0.4 / parameter.std())
    return model


def loss_of(output):
    return output["loss"]


# ---- truth -----------------------------------------------------------------------------------------------------------


def in_float64(model, batch):
    model = copy.deepcopy(model).double()
    return model, {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def probabilities(model, batch, double=True):
    """Attention probabilities per block [B, H, Tq, Tk] in float64, from the model's own eager attention."""
    if double:
        model, batch = in_float64(model, batch)
    if isinstance(model, Encoder):
        return _of_multi_head([layer.self_attn for layer in model.encoder.layers], model, batch)
    if isinstance(model, HandWritten):
        return _of_hand_written(model, batch)
    model.set_attn_implementation("eager")
    output = model(**batch, output_attentions=True)
    if "encoder_attentions" in output:
        return [*output.encoder_attentions, *output.decoder_attentions]
    return list(output.attentions)


def _inputs_of(modules, model, batch):
    seen = []
    handles = [m.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True) for m in modules]
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def _of_multi_head(modules, model, batch):
    found = []
    for module, (args, kwargs) in zip(modules, _inputs_of(modules, model, batch), strict=True):
        kwargs = kwargs | {"need_weights": True, "average_attn_weights": False}
        found.append(module(*args, **kwargs)[1])
    return found


def _of_hand_written(model, batch):
    mixers = [block.mixer for block in model.blocks]
    if mixers[0].weights:
        return _of_multi_head([mixer.both for mixer in mixers], model, batch)
    found = []
    for mixer, ((x,), _) in zip(mixers, _inputs_of(mixers, model, batch), strict=True):
        q, k, _ = mixer.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        found.append(scores.masked_fill(future, -torch.inf).softmax(-1))
    return found


def token_masks(batch, layers):
    """The [B, T] bool mask of valid rows for every block."""
    if "pixel_values" in batch:
        return [torch.ones(B, 17, dtype=torch.bool)] * layers
    if "padding" in batch:
        return [~batch["padding"]] * layers
    mask = batch.get("attention_mask", torch.ones(B, T)).bool()
    if "decoder_attention_mask" in batch:
        return [mask] * (layers // 2) + [batch["decoder_attention_mask"].bool()] * (layers // 2)
    return [mask] * layers


def head_means(values, masks):
    """[L, H]: means over valid rows of values [B, H, T] per block."""
    return torch.stack([v.transpose(1, 2)[m].mean(0) for v, m in zip(values, masks, strict=True)]).double().detach()


def entropy(p):
    return -torch.special.xlogy(p, p).sum(-1)


def output_gradients(model, batch, blocks):
    """dL/d(block output) per block in float64, from autograd alone, also below frozen parameters."""
    model, batch = in_float64(model, batch)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    outputs = []

    def keep(module, args, output):
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [model.get_submodule(block.path).register_forward_hook(keep) for block in blocks]
    loss = loss_of(model(**batch))
    for handle in handles:
        handle.remove()
    return torch.autograd.grad(loss, outputs)
