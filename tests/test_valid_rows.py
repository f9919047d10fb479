"""Rows of padding do not count, wherever a model says what is padding."""

import numpy as np
import pytest
import torch
from helpers.tiny_models import HandWritten, entropy, loss_of, one_thread, plain_text, sharpened  # noqa: F401

from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.measure.attention_call import AttentionCall
from inflection_fast.measure.micro_batch import ValidRows, token_mask

hf = pytest.importorskip("transformers")
hf.logging.set_verbosity_error()

ALL_ROWS = MonitorConfig(every=1, rows=None, quantities=("attention",))


def entropies(model, **batch):
    with Monitor(model, ALL_ROWS) as monitor:
        output = model(**batch)
        (output["loss"] if "loss" in output else output[0].square().mean()).backward()
        monitor.step()
    return monitor.timeline.entropy[0]


def test_decoder_rows_are_those_up_to_the_last_label():
    labels = torch.tensor([[5, 6, 7, -100, -100], [5, -100, 7, 8, 9], [-100] * 5])
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert token_mask({"labels": labels}, decoder=True).int().tolist() == expected
    given = torch.ones(3, 5)
    assert token_mask({"labels": labels, "decoder_attention_mask": given}, decoder=True) is given
    assert token_mask({"labels": labels}, decoder=False) is None
    assert token_mask({"labels": torch.tensor([0, 1, 1])}, decoder=True) is None  # of classes


@pytest.mark.parametrize("fits", [True, False])
def test_padded_rows_that_no_mask_tells_are_included_and_said(fits):
    class Pooled(HandWritten):
        def forward(self, input_ids, attention_mask, labels):
            return super().forward(input_ids, labels)

    torch.manual_seed(0)
    model, batch = Pooled().train(), plain_text()
    mask = torch.ones(3, 12 if fits else 24, dtype=torch.long)
    mask[0, 6:] = 0
    with Monitor(model, MonitorConfig(every=1, quantities=("attention",))) as monitor:
        loss_of(model(**batch, attention_mask=mask)).backward()
        monitor.step()
    assert monitor.timeline.padded_rows.tolist() == [0.0 if fits else 1.0]


def test_texts_in_a_padded_batch_are_the_texts_one_by_one():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 40, "pad_token_id": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 2, "decoder_layers": 2}
    config = hf.BartConfig(**sizes, **heads, max_position_embeddings=32)
    model = sharpened(hf.BartForConditionalGeneration(config)).eval()
    source, labels = torch.randint(4, 40, (2, 8)), torch.randint(4, 40, (2, 9))
    labels[0, 5:] = -100
    alone = [
        entropies(model, input_ids=source[i : i + 1], labels=labels[i : i + 1, :length])
        for i, length in ((0, 5), (1, 9))
    ]
    together = entropies(model, input_ids=source, labels=labels)
    np.testing.assert_allclose(together[2:], (5 * alone[0] + 9 * alone[1])[2:] / 14, atol=2e-6)
    wider = torch.nn.functional.pad(labels, (0, 12), value=-100)
    np.testing.assert_allclose(entropies(model, input_ids=source, labels=wider)[2:], together[2:], atol=2e-6)
    assert np.ptp(together[2:]) > 0.05


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Wav2Vec2", "Hubert", "SEW"])
def test_frames_of_padding_do_not_count_where_the_mask_counts_samples(name, implementation):
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8, 8),
        conv_kernel=(10, 3, 3), conv_stride=(5, 2, 2), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = getattr(hf, f"{name}Model")._from_config(config, attn_implementation=implementation).eval()
    sound, mask = torch.randn(2, 400), torch.ones(2, 400, dtype=torch.long)
    mask[1, 200:] = 0
    measured = entropies(model, input_values=sound, attention_mask=mask)
    eager = getattr(hf, f"{name}Model")._from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        attentions = eager.double()(sound.double(), attention_mask=mask, output_attentions=True).attentions
    frames = attentions[0].shape[2]
    lengths = eager._get_feat_extract_output_lengths(mask.sum(1))
    if name == "SEW":  # pools frames, and keeps those with any token in them
        lengths = -(-lengths // config.squeeze_factor)
    valid = torch.arange(frames) < lengths[:, None]
    assert 0 < valid[1].sum() < frames
    for layer, p in enumerate(attentions):
        expected = entropy(p).transpose(1, 2)[valid].mean(0)
        np.testing.assert_allclose(measured[layer], expected.numpy(), atol=2e-5)


def test_a_sparse_mask_tells_nothing_of_padding():
    q = torch.randn(1, 2, 4, 8)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)[None, None]
    dense, sparse = AttentionCall(q, q, mask), AttentionCall(q, q, mask, sparse=True)
    assert ValidRows({}).of(dense, None, False).tolist() == [[True, True, False, False]]
    assert ValidRows({}).of(sparse, None, False) is None
