"""The trajectory quantity: by hand against float64, and its breakpoints against the algorithm itself."""

import math

import numpy as np
import pytest
import torch
from helpers.by_hand import measured, sums_of, values_of
from helpers.tiny_models import WIDTH, gpt2

from inflection_fast import find_blocks
from inflection_fast.ops import reference
from inflection_fast.quantities.quantity import ProbeFeatures
from inflection_fast.quantities.trajectory import Trajectory, bends, bhattacharyya_angle, tail_exponent


def rdp(points, tolerance):
    """Ramer-Douglas-Peucker as textbooks have it: indices that are kept."""
    a, b = points[0], points[-1]
    distances = []
    for p in points[1:-1]:
        t = np.clip((p - a) @ (b - a) / max((b - a) @ (b - a), 1e-300), 0, 1)
        distances.append(np.linalg.norm(p - a - t * (b - a)))
    if not distances or max(distances) <= tolerance:
        return [0, len(points) - 1]
    at = int(np.argmax(distances)) + 1
    left, right = rdp(points[: at + 1], tolerance), rdp(points[at:], tolerance)
    return left + [at + i for i in right[1:]]


def test_bends_are_the_tolerances_of_ramer_douglas_peucker():
    rng = np.random.default_rng(0)
    for _ in range(5):
        points = rng.normal(size=(14, 6)).cumsum(0)
        found = bends(points @ points.T)
        size = max(np.linalg.norm(p - q) for p in points for q in points)
        assert np.isnan(found[[0, -1]]).all() and np.isfinite(found[1:-1]).all()
        for tolerance in np.quantile(found[1:-1], [0.1, 0.35, 0.6, 0.85]) + 1e-9:
            kept = [0, *(np.flatnonzero(found > tolerance)), 13]
            assert kept == rdp(points, tolerance * size)


def test_a_straight_path_has_no_bends_and_a_corner_one():
    line = np.linspace([0.0, 0.0], [4.0, 8.0], 7)
    assert np.nanmax(bends(line @ line.T)) < 1e-7
    corner = np.array([[0.0, 0], [1, 0], [2, 0], [2, 1], [2, 2]])
    found = bends(corner @ corner.T)
    assert np.nanargmax(found) == 2 and found[2] == pytest.approx(math.sqrt(2) / math.sqrt(8))


def test_values_equal_the_truth():
    torch.manual_seed(0)
    model = gpt2()
    blocks, quantity = find_blocks(model), Trajectory()
    quantity.prepare(measured(model, blocks))
    features = [torch.randn(200, WIDTH) + 1]
    for _ in range(2):
        features.append(features[-1] + 0.4 * torch.randn(200, WIDTH))
    sums = sums_of(quantity, 3)
    with torch.no_grad():
        quantity.on_probe(sums, ProbeFeatures(tuple(features), (), None, ((0, 1, 2),), (torch.arange(3),)))
    found = values_of(quantity, sums)
    for layer in (1, 2):
        x, y = features[layer - 1].double(), features[layer].double()
        assert found.trajectory_distance[layer] == pytest.approx(((y - x).norm(dim=1) / x.norm(dim=1)).mean().item())
        angle = torch.cosine_similarity(x, y, dim=1).arccos().mean().item()
        assert found.trajectory_angle[layer] == pytest.approx(angle, rel=1e-9)
        assert found.block_cka[layer] == pytest.approx(reference.linear_cka(x, y).item(), abs=1e-6)
        rows = torch.linspace(0, 199, 128).round().long()
        p, q = (model.double().lm_head(model.transformer.ln_f(h[rows])).softmax(-1).detach() for h in (x, y))
        angle = 2 * (p * q).sqrt().sum(-1).clamp(max=1).arccos()
        assert found.transport[layer] == pytest.approx(angle.mean().item(), rel=1e-4)
    for name in ("trajectory_distance", "trajectory_angle", "block_cka", "transport"):
        assert math.isnan(getattr(found, name)[0])
    means = np.stack([f.double().mean(0).numpy() for f in features])
    assert found.trajectory_bend[1] == pytest.approx(bends((means - means[0]) @ (means - means[0]).T)[1])


@pytest.mark.parametrize("alpha", [0.5, 1.5])
def test_contraction_is_the_exponent_of_the_singular_values(alpha):
    torch.manual_seed(0)
    s = torch.arange(1, 41).double() ** -alpha
    u, v = torch.linalg.qr(torch.randn(100, 40).double())[0], torch.linalg.qr(torch.randn(40, 40).double())[0]
    assert tail_exponent((u * s) @ v).item() == pytest.approx(alpha, rel=1e-9)
    assert tail_exponent(torch.full((5, 4), float("nan"))).isnan() and tail_exponent(torch.randn(2, 4)).isnan()


def test_angles_between_distributions():
    z = torch.randn(6, 50)
    assert bhattacharyya_angle(z, z + 3).abs().max() < 1e-3
    far = torch.full((1, 4), -40.0)
    a, b = far.clone(), far.clone()
    a[0, 0] = b[0, 1] = 40.0
    assert bhattacharyya_angle(a, b).item() == pytest.approx(math.pi, abs=1e-3)
