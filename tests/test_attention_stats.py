"""Entropy and row statistics from logits against the float64 twin."""

import pytest
import torch

from inflection_fast import attention_entropy, attention_stats
from inflection_fast.ops import reference

pytestmark = [pytest.mark.kernel, pytest.mark.emulated, pytest.mark.sanitized]

INF = float("inf")
NATS = 2e-6
SHAPES = [(1, 1), (5, 7), (2, 3, 5, 7), (1, 2, 64, 64), (2, 9, 1031), (1, 1, 3, 4097), (2, 2, 1, 1, 3, 5, 33)]
TEMPERS = {"flat": 0.01, "typical": 3.0, "peaked": 40.0, "huge": 1e4}
FIELDS = ("entropy", "lse", "max_logit", "keys", "collision", "sink")


def logits(shape, temper, dtype=torch.float32):
    """Rows with planted outliers: the first row nearly one-hot, the second with two equal maxima."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7)) * TEMPERS[temper]
    if shape[-2] > 2 and shape[-1] > 4:
        x[..., 0, 3] = x.abs().max() + 12
        x[..., 1, 1] = x[..., 1, 4] = x.abs().max() + 1
    return x.to(dtype)


def wide(x):
    """float64, with -inf where the narrow dtype means -inf."""
    if x is None or x.dtype == torch.bool:
        return x
    return x.double().masked_fill(x <= torch.finfo(x.dtype).min / 2, -INF)


def assert_same(ours, truth, exact_max=True):
    for name in FIELDS:
        got, want = getattr(ours, name).double(), getattr(truth, name).double()
        assert getattr(ours, name).dtype == torch.float32
        finite = want.isfinite()
        assert torch.equal(got.isnan(), want.isnan()), name
        assert torch.equal(got[want.isinf()], want[want.isinf()]), name
        error = (got - want)[finite].abs()
        rounding = want[finite].abs() * 2**-23
        bound = {"keys": 0 * error, "max_logit": rounding * (not exact_max), "lse": rounding + NATS}.get(name, NATS)
        assert (error <= bound).all(), f"{name}: {error.max():.2e}"


def check(x, **options):
    mask = options.pop("attn_mask", None)
    ours = attention_stats(x, attn_mask=mask, **options)
    truth = reference.attention_stats(wide(x), attn_mask=wide(mask), **options)
    assert_same(ours, truth, exact_max=options.get("scale", 1.0) == 1.0 and (mask is None or mask.dtype == torch.bool))
    entropy = attention_entropy(x, attn_mask=mask, **options)
    assert torch.allclose(entropy, ours.entropy, rtol=0, atol=NATS, equal_nan=True)
    return truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temper", TEMPERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_statistic_is_the_truth(isa, shape, temper, dtype):
    truth = check(logits(shape, temper, dtype))
    if shape == (1, 2, 64, 64) and temper == "typical":
        assert truth.entropy.min() < 0.1 and truth.entropy.max() > 1.0  # the input spans what it claims to span


@pytest.mark.parametrize("scale", [0.125, 0.37, -1.0, -2.3, 0.0, 1e-30, 1e4, 1e-3])
def test_any_scale(isa, scale):
    check(logits((3, 17, 131), "typical"), scale=scale)


def masks():
    keep = torch.rand(17, 131, generator=torch.Generator().manual_seed(3)) > 0.4
    keep[4] = False
    return {
        "boolean": keep,
        "one row": keep[:1],
        "one column": keep[:, :1],
        "batched": keep.expand(2, 1, 17, 131),
        "transposed": keep.mT.contiguous().mT,
        "additive": torch.randn(17, 131),
        "finfo.min": torch.zeros(17, 131).masked_fill(~keep, torch.finfo(torch.float32).min),
        "half": torch.randn(3, 1, 131).half().masked_fill(~keep[:3, None], torch.finfo(torch.float16).min),
        "large": torch.randn(17, 1) * 1e4 + torch.randn(17, 131),
        "bfloat16": torch.randn(131).bfloat16(),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", masks())
def test_any_mask(isa, name, causal):
    check(logits((2, 3, 17, 131), "typical"), attn_mask=masks()[name], is_causal=causal, scale=0.7)


def test_scores_that_cancel_against_a_mask_are_exact(isa):
    x = torch.randn(4, 600) * 1e4
    check(x, attn_mask=(-0.31 * x).bfloat16().float(), scale=0.31)


def views():
    x = logits((4, 6, 40, 130), "typical")
    return {
        "transposed": x.mT,
        "every third column": x[..., ::3],
        "heads behind rows": x.transpose(1, 2),
        "expanded rows": x[:, :, :1].expand(-1, -1, 40, -1),
        "expanded columns": x[..., :1].expand(-1, -1, -1, 70),
        "sliced": x[1:, ::2, 3:, 5:],
        "bfloat16": x.bfloat16()[..., 1:].transpose(0, 1),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", views())
def test_any_strides(isa, name, causal):
    check(views()[name], is_causal=causal)


def test_rows_of_two_levels_lose_nothing_in_long_sums(isa):
    n = 8192
    for gap in torch.linspace(0.5, 30, 13):
        x = torch.zeros(2, n)
        x[0, n // 2] = gap
        x[1, ::2] = gap / 4
        check(x)


def test_nearly_one_hot_rows_are_relatively_exact(isa):
    x = torch.zeros(30, 64)
    x[:, 5] = torch.linspace(2, 31, 30)
    for options in ({}, {"attn_mask": torch.zeros(64)}, {"scale": 0.9}):
        truth = reference.attention_entropy(x.double(), **options)
        assert truth.min() < 1e-8
        assert ((attention_entropy(x, **options).double() - truth).abs() / truth).max() < 1e-4


def long_rows(dtype=torch.float32):
    """So few and so long that a GPU cuts them: a key that stands out, two equal maxima far apart, a flat row."""
    x = torch.randn(3, 50003, generator=torch.Generator().manual_seed(7)) * torch.tensor([[3.0], [1.0], [0.01]])
    x[0, 31000], x[1, 70], x[1, 49999] = 20.0, 9.0, 9.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_few_long_rows_equal_the_truth(isa, dtype):
    check(long_rows(dtype))
    check(long_rows(dtype)[:, 1:], scale=-0.7)  # not aligned to 16 bytes


def test_few_long_rows_under_masks_equal_the_truth(isa):
    x, keep = long_rows(), torch.rand(3, 50003, generator=torch.Generator().manual_seed(3)) > 0.4
    keep[0], keep[1, :45000] = False, False
    check(x, attn_mask=keep)
    check(x, attn_mask=torch.randn(50003).masked_fill(~keep[1], -INF), is_causal=True)
    check(x, attn_mask=torch.randn(3, 50003).masked_fill(~keep, -INF))
    check(x.mT.contiguous().mT, is_causal=True)


def test_poison_anywhere_in_a_long_row_spoils_that_row_only(isa):
    x = long_rows()
    x[0, 49990], x[1, :-1], x[2] = float("nan"), -INF, -INF
    check(x)
    ours = attention_stats(x)
    assert ours.entropy.isnan().tolist() == [True, False, False] and ours.keys.tolist() == [50003.0, 1.0, 0.0]


SIXTEEN = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
WIDTH = 16376  # of two slices, of 8192 columns each, where a row has a block of a GPU


@SIXTEEN
def test_16_bit_rows_of_every_length_equal_the_truth(isa, dtype):
    x = logits((3, WIDTH + 8), "typical", dtype)
    for cols in (1, 7, 8, 9, 255, 264, 1016, 1023, 1024, 1025, 1032, 2056, 8184, 8191, 8192, 8200, WIDTH):
        check(x[:, :cols])  # on 16 bytes,
        check(x[:, 1 : cols + 1])  # and beside them
    check(logits((40, 1032), "typical", dtype), is_causal=True)


@SIXTEEN
def test_many_16_bit_rows_equal_the_truth(isa, dtype):
    x = logits((8450, 1032), "typical", dtype)  # a warp each, of two slices
    x[5, 1024:], x[6, 1030], x[7, :1024], x[8, 1024:] = -INF, float("nan"), -INF, x[8].max()
    check(x)


@SIXTEEN
def test_odd_values_anywhere_in_a_16_bit_row(isa, dtype):
    least = torch.finfo(dtype).min
    above = torch.nextafter(torch.tensor(least / 2, dtype=dtype), torch.zeros((), dtype=dtype)).item()
    odd = [float("nan"), INF, -INF, least, least / 2, above, -least]
    places = [0, 1, 1023, 8191, 8192, 12000, WIDTH - 6]
    x = logits((len(odd), len(places), WIDTH), "typical", dtype)
    for i, value in enumerate(odd):
        for j, place in enumerate(places):
            x[i, j, place] = value
    check(x)
    check(x[..., : WIDTH - 5])
    ours = attention_stats(x)
    assert ours.entropy.isnan().sum(-1).tolist() == [7, 7, 0, 0, 0, 0, 0]
    assert (WIDTH - ours.keys[2:, 0]).tolist() == [1, 1, 1, 0, 0]


@SIXTEEN
@pytest.mark.parametrize("scale", [1.0, 0.088, 1e-3, 1e-5, 2.0, -1.0])
def test_masked_columns_of_16_bit_rows_weigh_nothing_at_any_scale(isa, dtype, scale):
    least = torch.finfo(dtype).min
    x = logits((8, WIDTH), "typical", dtype)
    for row, bounds in enumerate(((0, 8192), (8192, WIDTH), (0, WIDTH), (1, WIDTH), (0, WIDTH, 2))):
        x[row, slice(*bounds)] = least
    x[5] = least * torch.linspace(0.4, 0.6, WIDTH)  # from attended to masked
    x[6, :8192], x[6, 8192:] = least * 0.49, least
    x[7, ::3] = -INF
    check(x, scale=scale)


@SIXTEEN
def test_equal_maxima_of_a_16_bit_row_are_counted_wherever_they_are(isa, dtype):
    places = [(0, 1), (2, 4), (8, 48), (3, 8195), (5, 6, 7, 300, 1030, 2040, 9000), (*range(40),), (*range(WIDTH),)]
    x = torch.full((len(places) + 2, WIDTH), -20.0, dtype=dtype)
    for row, tops in enumerate(places):
        x[row, list(tops)] = 1.5
    x[-2, :4], x[-2, 8192] = 1.5, 2.5  # overtaken in a later slice
    x[-1, 5], x[-1, 8197] = -0.0, 0.0
    truth = check(x)
    assert (attention_stats(x).collision[:-2].double() - truth.collision[:-2]).abs().max() < 1e-7
    check(x * 0.25)
    if dtype == torch.bfloat16:  # as float16 the bits of these would be NaN
        x[:-1] *= 1e37
        check(x)
        check(x, scale=1e-28)


@SIXTEEN
def test_nearly_one_hot_16_bit_rows_are_relatively_exact(isa, dtype):
    x = torch.zeros(30, 8200, dtype=dtype)
    for row, top in enumerate(torch.linspace(16, 34, 30)):
        x[row, row * 280] = top
    for scale in (1.0, 0.9):
        truth = reference.attention_entropy(x.double(), scale=scale)
        assert truth.min() < 2e-8 and truth.max() > 1e-3
        assert ((attention_entropy(x, scale=scale).double() - truth).abs() / truth).max() < 1e-4


@SIXTEEN
def test_subnormal_16_bit_values_count(isa, dtype):
    least = torch.finfo(dtype).smallest_normal
    x = logits((4, 2048), "typical", torch.float32) * least / 4
    x[0, ::2], x[1, ::2], x[2, ::3] = -0.0, 0.0, 2.0
    for scale in (1.0, 1e4, 1e28):
        check(x.to(dtype), scale=scale)
    if dtype == torch.float16:
        assert attention_stats(x.to(dtype), scale=1e6).entropy.max() < 7.6  # log 2048 is 7.62


def test_poison_stays_in_its_row(isa):
    x = logits((3, 9, 50), "typical")
    x[0, 1, 7], x[0, 2, 9], x[0, 3, 0] = float("nan"), INF, -INF
    x[1, 4] = -INF
    x[1, 5] = torch.finfo(torch.float32).min
    x[2, 6, 49] = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)
    for options in ({}, {"scale": -1.0}, {"scale": 0.0}, {"attn_mask": torch.zeros(50)}, {"is_causal": True}):
        ours = attention_stats(x, **options)
        assert ours.entropy.isnan().sum() == (0 if options.get("is_causal") else 3)
        check(x, **options)
    keep = torch.ones(9, 50, dtype=torch.bool)
    keep[1, 7] = keep[2, 9] = keep[6, 49] = False
    assert not attention_stats(x, attn_mask=keep).entropy.isnan().any()  # what is masked is ignored, whatever it holds


def test_a_row_without_keys_has_the_stated_values(isa):
    x = torch.randn(2, 3, 8)
    keep = torch.ones(3, 8, dtype=torch.bool)
    keep[1] = False
    ours = attention_stats(x, attn_mask=keep)
    for name, value in zip(FIELDS, (0.0, -INF, -INF, 0.0, 0.0, 0.0), strict=True):
        assert (getattr(ours, name)[:, 1] == value).all(), name
    assert attention_stats(torch.empty(2, 3, 0)).lse.eq(-INF).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0)], ids=str)
def test_empty_tensors(shape):
    assert attention_entropy(torch.empty(shape)).shape == shape[:-1]


def test_a_constant_added_to_a_row_changes_nothing_but_its_level():
    x = (torch.randn(6, 200) * 64).round() / 16  # sums with the shift are exact in float32
    a, b = attention_stats(x), attention_stats(x + 4096.0)
    for name in ("entropy", "keys", "collision", "sink"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_threads_do_not_change_a_bit():
    x = logits((2, 3, 64, 257), "typical")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = attention_stats(x, is_causal=True)
        torch.set_num_threads(3)
        three = attention_stats(x, is_causal=True)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_more_batch_dimensions_than_kernels_take_are_refused():
    x = torch.randn((2,) * 10 + (3, 4)).permute(9, 7, 5, 3, 1, 8, 6, 4, 2, 0, 10, 11)
    with pytest.raises(RuntimeError, match="batch dimensions"):
        attention_entropy(x)


@pytest.mark.parametrize("size", [1e5, 1e7, 1e10, 1e15, 1e25, 1e37])
@pytest.mark.parametrize("scale", [1.0, 3.0, -0.7])
def test_added_masks_on_scores_of_any_size_give_probabilities(isa, size, scale):
    torch.manual_seed(0)
    logits = torch.randn(3, 40, 70) * size
    logits[0, :, 10:40] = logits[0, :, :1]  # ties in float32
    mask = torch.randn(40, 70).masked_fill(torch.rand(40, 70) < 0.3, -torch.inf)
    stats = attention_stats(logits, attn_mask=mask, scale=scale)
    assert all(x.isfinite().all() for x in stats)
    assert (stats.entropy >= 0).all() and (stats.entropy <= stats.keys.log() + 1e-5).all()
    for x in (stats.collision, stats.sink):
        assert (x >= 0).all() and (x <= 1).all()
    exact = (logits.double() * scale + mask).amax(-1)
    assert ((stats.lse - exact).abs() <= 5 + 2e-7 * exact.abs()).all()
