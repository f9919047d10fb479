"""Flash attention as Transformers calls it, with kernels in plain PyTorch in place of those that need a GPU."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from transformers import modeling_flash_attention_utils as flash_utils
from transformers import modeling_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from helpers.tiny_models import T, model_and_batch

FLASH = "plain_flash"


def attend(
    q, k, v, cu_seqlens_q, cu_seqlens_k, *, max_seqlen_q=None, max_seqlen_k=None,
    causal=False, softmax_scale=None, window_size=(-1, -1), softcap=0.0, s_aux=None,
):  # fmt: skip
    """[T, H, D] out of packed [T, H, D] and twice [T, Hkv, D], as `flash_attn_varlen_func`; 0 outside all sequences."""
    out = torch.zeros_like(q)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    for i in range(len(cu_seqlens_q) - 1):
        rows, keys = (slice(int(cu[i]), int(cu[i + 1])) for cu in (cu_seqlens_q, cu_seqlens_k))
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * (softmax_scale or q.shape[-1] ** -0.5)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        queries, length = scores.shape[1:]
        of_keys = torch.arange(length, device=q.device)
        distance = of_keys - of_keys[length - queries :, None]  # aligned at the last key
        left, right = (reach if reach >= 0 else length for reach in window_size)
        keep = (distance >= -left) & (distance <= (0 if causal else right))
        scores = scores.masked_fill(~keep, -torch.inf)
        if s_aux is not None:
            scores = torch.cat([s_aux[:, None, None].expand(-1, queries, 1).to(scores), scores], -1)
        p = scores.softmax(-1).nan_to_num(0.0)[..., scores.shape[-1] - length :]
        out[rows] = torch.einsum("hqk,khd->qhd", p, v[keys])
    return out


def attend_unpacked(q, k, v, *, causal=False, softmax_scale=None, window_size=(-1, -1), softcap=0.0, s_aux=None):
    """[B, T, H, D] as `flash_attn_func`."""
    options = {"causal": causal, "softmax_scale": softmax_scale, "window_size": window_size, "softcap": softcap}
    ends = ([0, q.shape[1]], [0, k.shape[1]])
    return torch.stack([attend(*one, *ends, **options, s_aux=s_aux) for one in zip(q, k, v, strict=True)])


def packed_llama(implementation):
    """A model in training mode with that attention, and three sequences of 12 tokens in one row."""
    model, batch = model_and_batch("llama")
    model.set_attn_implementation(implementation)
    ids = batch["input_ids"].view(1, -1)
    return model, {"input_ids": ids, "labels": ids, "position_ids": torch.arange(ids.numel()).remainder(T)[None]}


@pytest.fixture
def flash(monkeypatch):
    """The name of an implementation that goes all the way of Transformers' flash attention, up to the kernels."""
    process = flash_utils._lazy_define_process_function(attend)
    functions = (attend_unpacked, attend, None, flash_utils._pad_input, flash_utils._unpad_input)
    for module in (flash_utils, modeling_utils):
        monkeypatch.setattr(module, "lazy_import_flash_attention", lambda *args, **kw: (functions, (process, dict)))
    monkeypatch.setitem(hf.AttentionInterface._global_mapping, FLASH, flash_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, FLASH, flash_attention_mask)
    monkeypatch.setattr(hf.GptOssPreTrainedModel, "_compatible_flash_implementations", None)  # else it takes another
    return FLASH
