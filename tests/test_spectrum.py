"""Spectra of weight matrices against SVD, planted power laws and planted noise."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from inflection_fast.ops import power_law, singular_values, weight_spectrum
from inflection_fast.ops.spectrum import marchenko_pastur_median, noise_singular_values, outliers, spectrum_of
from inflection_fast.quantities.spectrum import spectra_of_checkpoint


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 70), (100, 100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_singular_values_equal_those_of_the_svd(shape, dtype):
    w = torch.randn(shape).to(dtype)
    truth = torch.linalg.svdvals(w.double()).numpy()
    np.testing.assert_allclose(singular_values(w), truth, rtol=1e-7, atol=1e-8 * truth[0])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_moves_singular_values_and_nothing_else(scale):
    w = torch.randn(40, 60)
    np.testing.assert_allclose(singular_values(w * scale), singular_values(w) * scale, rtol=1e-5)
    plain, scaled = weight_spectrum(w), weight_spectrum(w * scale)
    np.testing.assert_allclose(scaled[:5], plain[:5], rtol=1e-4)
    assert scaled.outliers == plain.outliers


def test_ranks_of_what_is_known():
    isometry = torch.linalg.qr(torch.randn(50, 20))[0]
    found = weight_spectrum(isometry)
    assert found.stable_rank == pytest.approx(20, rel=1e-5) and found.effective_rank == pytest.approx(20, rel=1e-5)
    found = weight_spectrum(torch.outer(torch.randn(30), torch.randn(20)))
    assert found.stable_rank == pytest.approx(1, rel=1e-6) and found.effective_rank == pytest.approx(1, rel=1e-3)
    s = torch.tensor([3.0, 2.0, 1.0]).double()
    p = s / s.sum()
    found = weight_spectrum(torch.diag(s))
    assert found.stable_rank == pytest.approx(14 / 9) and found.effective_rank == pytest.approx(
        (-(p * p.log()).sum()).exp()
    )


@pytest.mark.parametrize("shape", [(256, 256), (256, 512), (1024, 256)], ids=str)
def test_pure_noise_has_no_outliers(shape):
    for seed in range(5):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
        assert weight_spectrum(w).outliers == 0
    uniform = (torch.rand(shape) - 0.5) * 0.1  # as torch initialises linear layers
    assert weight_spectrum(uniform).outliers == 0


@pytest.mark.parametrize("shape", [(256, 256), (256, 1024)], ids=str)
def test_planted_directions_are_counted(shape):
    noise = torch.randn(shape)
    edge = math.sqrt(shape[0]) + math.sqrt(shape[1])
    u, v = (torch.linalg.qr(torch.randn(n, 7))[0] for n in shape)
    strengths = torch.tensor([10.0, 6.0, 4.0, 3.0, 2.5, 2.0, 1.8]) * edge
    assert outliers(singular_values(noise + (u * strengths) @ v.T), *shape) == 7
    weak = strengths * 0.05
    assert outliers(singular_values(noise + (u * weak) @ v.T), *shape) == 0


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9, 1.0])
def test_the_median_of_noise_is_that_of_marchenko_and_pastur(ratio):
    n = 700
    m = int(n * ratio)
    squares = singular_values(torch.randn(m, n)) ** 2 / n
    assert np.median(squares) == pytest.approx(marchenko_pastur_median(m / n), rel=0.02)


@pytest.mark.parametrize("shape", [(16, 16), (64, 96), (256, 256), (200, 1600)], ids=str)
def test_singular_values_of_noise_lie_where_its_law_says(shape):
    law = noise_singular_values(*shape)
    draws = [singular_values(torch.randn(shape)) for _ in range(20)]
    drawn = np.mean(draws, 0)
    assert law.shape == drawn.shape and (np.diff(law) <= 0).all()
    np.testing.assert_allclose(law, drawn, atol=0.03 * law[0])
    np.testing.assert_array_equal(noise_singular_values(*shape[::-1]), law)
    found, spectra = spectrum_of(law, *shape), [spectrum_of(one, *shape) for one in draws]
    assert found.effective_rank == pytest.approx(np.mean([one.effective_rank for one in spectra]), rel=0.03)
    assert found.stable_rank == pytest.approx(np.mean([one.stable_rank for one in spectra]), rel=0.06)
    assert found.outliers == 0


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_a_planted_power_law_is_found_with_its_error(alpha):
    u = np.random.default_rng(1).random(3000)
    x = (1 - u) ** (-1 / (alpha - 1))
    found = power_law(x)
    assert abs(found.alpha - alpha) < 4 * found.error and found.error < 0.2 * alpha
    assert found.error == pytest.approx((found.alpha - 1) / math.sqrt(found.tail)) and found.distance < 0.06


def test_the_tail_begins_where_the_power_law_does():
    rng = np.random.default_rng(0)
    body, tail = rng.uniform(0.1, 1.0, 1000), (1 - rng.random(1000)) ** (-1 / 1.5)
    found = power_law(np.concatenate([body, tail]))
    assert 0.85 < found.xmin < 2 and found.alpha == pytest.approx(2.5, abs=0.25)
    assert power_law(np.arange(1.0, 6.0)).tail == 0 and math.isnan(power_law(np.arange(1.0, 6.0)).alpha)


def test_power_law_by_its_definition():
    """Against loops over every tail, as slow as they come."""
    x = np.sort(np.random.default_rng(3).pareto(1.7, 60) + 0.5)
    best = None
    for i in range(len(x) - 9):
        tail = x[i:]
        alpha = 1 + len(tail) / np.log(tail / tail[0]).sum()
        fit = 1 - (tail / tail[0]) ** (1 - alpha)
        n = len(tail)
        d = max(max(abs((j + 1) / n - fit[j]), abs(j / n - fit[j])) for j in range(n))
        if best is None or d < best[0]:
            best = d, alpha, tail[0], n
    found = power_law(x)
    assert (found.distance, found.alpha, found.xmin, found.tail) == pytest.approx(best)


def test_zeros_and_poison():
    found = weight_spectrum(torch.zeros(20, 30))
    assert math.isnan(found.stable_rank) and found.outliers == 0 and found.norm == 0
    with pytest.raises(ValueError, match="weight: holds NaN"):
        weight_spectrum(torch.full((3, 3), float("nan")))
    with pytest.raises(ValueError, match="weight: expected a matrix"):
        weight_spectrum(torch.zeros(3))
    with pytest.raises(TypeError, match="weight: expected a floating-point"):
        weight_spectrum(torch.zeros(3, 3, dtype=torch.int64))


def test_shards_of_a_checkpoint_are_read_tensor_by_tensor(tmp_path):
    weights = {f"layers.{i}.w": torch.randn(20 + i, 30).bfloat16() for i in range(4)}
    extra = {"bias": torch.randn(30), "small": torch.randn(3, 30), "ids": torch.zeros(20, 20, dtype=torch.int64)}
    save_file(dict(list(weights.items())[:2]) | extra, tmp_path / "model-00001-of-00002.safetensors")
    save_file(dict(list(weights.items())[2:]), tmp_path / "model-00002-of-00002.safetensors")
    found = dict(spectra_of_checkpoint(tmp_path))
    assert set(found) == set(weights)
    assert all(found[name] == weight_spectrum(weight) for name, weight in weights.items())
    assert set(dict(spectra_of_checkpoint(tmp_path / "model-00002-of-00002.safetensors"))) == set(list(weights)[2:])
    with pytest.raises(ValueError, match="no safetensors file"):
        next(spectra_of_checkpoint(tmp_path / "nothing"))
