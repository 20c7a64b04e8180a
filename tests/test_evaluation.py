"""Distances against fixtures and closed forms, statistics in batches, the judge on images with a known answer."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import lwd.evaluation.distances as distances_module
from lwd.evaluation import (
    FeatureStatistics,
    Judge,
    evaluate_files,
    evaluate_images,
    frechet_distance,
    inception_score,
    memorised_share,
    precision_recall,
    reference_features,
    train_judge,
)
from lwd.files import write_json

FIXTURES = Path(__file__).parent / "fixtures"
seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module", params=["full_rank", "rank_deficient"])
def fixture(request):
    return load_file(FIXTURES / f"metrics_{request.param}.safetensors")


# --- Frechet distance ---------------------------------------------------------------------------------------------


def test_frechet_distance_matches_the_fixture(fixture):
    # The rank-deficient reference value carries 3e-8 of its own square root's error; see the next test.
    distance = frechet_distance(fixture["reference"], fixture["generated"])
    assert distance == pytest.approx(fixture["frechet_distance"].item(), rel=1e-7)


def test_frechet_distance_equals_the_nuclear_norm_form(fixture):
    # tr (A^T A B^T B)^{1/2} = |A B^T|_* with the centred features themselves: no covariance is formed.
    a, b = fixture["reference"].double(), fixture["generated"].double()
    rows = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    expected = (a.mean(0) - b.mean(0)).square().sum() + sum(r.square().sum() for r in rows)
    expected -= 2 * torch.linalg.svdvals(rows[0] @ rows[1].T).sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(("samples_a", "samples_b"), [(7, 9), (7, 300), (2, 40), (39, 41)])
def test_frechet_distance_of_few_wide_features_equals_that_of_their_statistics(samples_a, samples_b):
    # Fewer samples than features: the samples stand in for the covariance, whose root needs care with null directions.
    a, b = normal(0, samples_a, 40), 0.5 + 2 * normal(1, samples_b, 40)
    expected = frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a, FeatureStatistics.of(b)) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_few_wide_features_forms_no_covariance():
    # In 60,000 dimensions one would be 29 GB. Constant per row: the rows' own 1-d problem, times the width.
    width = 60_000
    a, b = (x[:, None].expand(-1, width) for x in (torch.tensor([0.0, 2.0]), torch.tensor([5.0, 5.0, 8.0])))
    expected = width * ((1 - 6) ** 2 + (math.sqrt(2) - math.sqrt(3)) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@given(seed=seeds, null=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_frechet_distance_of_commuting_covariances(seed, null):
    # Shared eigenvectors: |mu_a - mu_b|^2 + sum_i (sqrt(p_i) - sqrt(q_i))^2, singular covariances included.
    q = torch.linalg.qr(normal(seed, 6, 6)).Q
    p, r = normal(seed + 1, 2, 6).exp()
    p[:null] = 0
    means = normal(seed + 2, 2, 6)
    a = FeatureStatistics(means[0], q @ torch.diag(p) @ q.T, 10)
    b = FeatureStatistics(means[1], q @ torch.diag(r) @ q.T, 20)
    expected = (means[0] - means[1]).square().sum() + (p.sqrt() - r.sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


@given(seed=seeds, samples=st.integers(2, 40), width=st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_frechet_distance_is_symmetric_and_unchanged_by_a_common_shift_and_rotation(seed, samples, width):
    a, b = normal(seed, samples, width), 0.5 + 2 * normal(seed + 1, samples + 3, width)
    distance = frechet_distance(a, b)
    assert math.isfinite(distance)
    assert distance >= 0
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-9)
    q = torch.linalg.qr(normal(seed + 2, width, width)).Q
    assert frechet_distance(a @ q + 3, b @ q + 3) == pytest.approx(distance, rel=1e-8)


@pytest.mark.parametrize("shape", [(300, 12), (7, 40), (2, 5)])
def test_frechet_distance_of_a_set_to_itself_is_zero(shape):
    a = 5 + normal(0, *shape)
    assert 0 <= frechet_distance(a, a) < 1e-10
    assert frechet_distance(a, a + 2) == pytest.approx(4 * shape[1], rel=1e-9)


def test_frechet_distance_of_constant_features():
    a, b = torch.ones(5, 3), torch.full((4, 3), 3.0)
    assert frechet_distance(a, a) == 0
    assert frechet_distance(a, b) == pytest.approx(12)
    assert frechet_distance(np.ones((5, 3)), b.numpy()) == pytest.approx(12)


def test_frechet_distance_of_a_decaying_spectrum():
    # Eigenvalues down to 1e-20: Cholesky alone would lose the small ones or stop.
    p = torch.logspace(0, -20, 60, dtype=torch.float64)
    q = torch.linalg.qr(normal(1, 60, 60)).Q
    cov = q @ torch.diag(p) @ q.T
    a = FeatureStatistics(torch.zeros(60), cov, 100)
    b = FeatureStatistics(torch.zeros(60), 4 * cov, 100)
    assert frechet_distance(a, b) == pytest.approx(p.sum().item(), rel=1e-6)


SPECTRA = {
    "slow": torch.arange(1, 301, dtype=torch.float64) ** -0.5,
    "power": torch.arange(1, 301, dtype=torch.float64) ** -1.0,
    "steep": torch.arange(1, 301, dtype=torch.float64) ** -2.0,
    "steps": torch.where(torch.arange(300) < 150, 1.0, 1e-4).double(),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("basis", ["mixed", "rising", "falling"])
def test_eigenvalue_shortcut_knows_its_own_error(spectrum, basis):
    # The shortcut squares singular values. Where that costs digits, its estimate says so, and the distance must not
    # take it: every result equals the nuclear norm's, whichever way it was found.
    deviations = SPECTRA[spectrum].flip(0) if basis == "rising" else SPECTRA[spectrum]
    mix = torch.linalg.qr(normal(9, 300, 300)).Q if basis == "mixed" else torch.eye(300, dtype=torch.float64)
    a, b = (FeatureStatistics.of((normal(seed, 1200, 300) * deviations) @ mix) for seed in (1, 2))
    factors = [torch.linalg.cholesky(x.cov) for x in (a, b)]
    product = factors[0].T @ factors[1]
    exact = float(torch.linalg.svdvals(product).sum())
    log_det = sum(float(2 * f.diagonal().log().sum()) for f in factors)
    shortcut, error = distances_module._sum_of_roots(product, log_det)
    assert not abs(shortcut - exact) > error + 1e-13
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * exact
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    if (spectrum, basis) in {("slow", "mixed"), ("power", "falling")}:
        assert 2 * error < 1e-6 * expected  # not vacuous: taken here,
    if spectrum == "steps":
        assert 2 * error > 1e-6 * expected  # and refused here


def test_shortcut_is_not_taken_for_singular_covariances(monkeypatch):
    monkeypatch.setattr(distances_module, "_sum_of_roots", lambda *_: pytest.fail("shortcut"))
    a = normal(0, 300, 300)  # 299 dimensions: as many samples as features, and a square factor
    assert frechet_distance(a, FeatureStatistics.of(2 * normal(1, 900, 300))) > 0
    assert frechet_distance(a, 3 * normal(2, 40, 300)) > 0


def test_frechet_distance_refuses_bad_features():
    a = normal(0, 10, 4)
    bad = a.clone()
    bad[2, 1], bad[2, 3], bad[7, 0] = math.nan, math.inf, math.nan
    with pytest.raises(ValueError, match=r"'b' hold 3 values that are NaN or infinite, in 2 of 10 samples"):
        frechet_distance(a, bad)
    with pytest.raises(ValueError, match="4 features per sample and b 3"):
        frechet_distance(a, a[:, :3])
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        frechet_distance(a, a[:1])
    with pytest.raises(ValueError, match=r"\[samples, features\]"):
        frechet_distance(a, a[:, 0])
    with pytest.raises(ValueError, match="squares overflow"):
        frechet_distance(a, a * 1e160)


def test_frechet_distance_refuses_what_is_no_covariance():
    # Without the check the distance would come out negative, be clamped, and read as a perfect score.
    cov = torch.diag(torch.tensor([3.0, 1.0, -2.0]))
    with pytest.raises(ValueError, match="covariance of 'b' has the eigenvalue -2 beside 3"):
        frechet_distance(normal(0, 9, 3), FeatureStatistics(torch.zeros(3), cov, 9))
    cov[2, 2] = -1e-6  # what rounding leaves
    stored = FeatureStatistics(torch.zeros(3), cov, 9)
    assert frechet_distance(stored, stored) == pytest.approx(0, abs=1e-12)


def test_memory_mapped_features(tmp_path, recwarn):
    a, b = normal(0, 20, 4).numpy(), normal(1, 20, 4).numpy()
    np.save(tmp_path / "a.npy", a)
    assert frechet_distance(np.load(tmp_path / "a.npy", mmap_mode="r"), b) == frechet_distance(a, b)
    assert not recwarn.list


# --- statistics ---------------------------------------------------------------------------------------------------


@given(seed=seeds, cuts=st.lists(st.integers(0, 50), max_size=4), offset=st.sampled_from([0.0, 1e6]))
@settings(max_examples=25, deadline=None)
def test_streamed_statistics_equal_direct_ones(seed, cuts, offset):
    x = normal(seed, 50, 5) + offset
    edges = [0, *sorted(cuts), 50]
    batches = [x[i:j] for i, j in itertools.pairwise(edges)]
    streamed, merged = FeatureStatistics.empty(5), FeatureStatistics.empty(5)
    for batch in batches:
        streamed.update(batch)
        part = FeatureStatistics.empty(5)
        part.update(batch)
        merged = merged.merge(part)
    for statistics in (streamed, merged):
        assert statistics.count == 50
        torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(statistics.cov, torch.cov(x.T), rtol=1e-9, atol=1e-9)


def test_merging_statistics_given_as_mean_and_covariance():
    x = normal(0, 30, 3)
    parts = [FeatureStatistics(p.mean(0), torch.cov(p.T), len(p)) for p in (x[:11], x[11:])]
    merged = parts[0].merge(parts[1])
    torch.testing.assert_close(merged.cov, torch.cov(x.T))
    assert parts[0].count == 11  # the parts are left alone


def test_statistics_keep_their_own_mean():
    mean = torch.ones(2, dtype=torch.float64)
    statistics = FeatureStatistics(mean, torch.eye(2), 5)
    mean.zero_()
    assert statistics.mean.tolist() == [1, 1]


def test_statistics_round_trip_and_damaged_file(tmp_path):
    statistics = FeatureStatistics.of(normal(0, 20, 4))
    path = statistics.save(tmp_path / "statistics.safetensors")
    loaded = FeatureStatistics.load(path)
    assert loaded.count == 20
    assert torch.equal(loaded.mean, statistics.mean)
    torch.testing.assert_close(loaded.cov, statistics.cov, rtol=1e-15, atol=0)
    assert frechet_distance(loaded, normal(1, 9, 4)) == pytest.approx(
        frechet_distance(statistics, normal(1, 9, 4)), rel=1e-12
    )
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"statistics.safetensors .* damaged"):
        FeatureStatistics.load(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="does not hold feature statistics"):
        FeatureStatistics.load(path)
    with pytest.raises(FileNotFoundError):
        FeatureStatistics.load(tmp_path / "absent")


def test_statistics_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="square covariance"):
        FeatureStatistics(torch.zeros(3), torch.zeros(3, 2), 5)
    with pytest.raises(ValueError, match=r"symmetric; entries .* differ by 0\.5"):
        FeatureStatistics(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 5)
    statistics = FeatureStatistics.empty(3)
    with pytest.raises(ValueError, match="batch has 2 features, the statistics 3"):
        statistics.update(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="3 and 2 features"):
        statistics.merge(FeatureStatistics.empty(2))
    with pytest.raises(ValueError, match="these statistics have 0"):
        _ = statistics.cov


# --- precision and recall -----------------------------------------------------------------------------------------


def test_precision_recall_matches_the_fixture(fixture):
    result = precision_recall(fixture["reference"], fixture["generated"])
    assert result.precision == fixture["precision"].item()
    assert result.recall == fixture["recall"].item()


def test_precision_recall_on_a_line():
    # Reference 0, 1, 2, 10 with k = 1: radii 1, 1, 1, 8, so it covers [-1, 3] and [2, 18].
    # Generated 2.5, 4, 20, 21: radii 1.5, 1.5, 1, 1, so it covers [1, 5.5] and [19, 22].
    reference = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    generated = torch.tensor([[2.5], [4.0], [20.0], [21.0]])
    assert precision_recall(reference, generated, k=1) == (0.5, 0.5)


def direct_precision_recall(reference, generated, k):
    def covered(points, support):
        radii = torch.stack([(support - x).norm(dim=1).sort().values[k] for x in support])  # [0] is the point itself
        return [(((support - x).norm(dim=1)) <= radii).any().item() for x in points]

    return np.mean(covered(generated, reference)), np.mean(covered(reference, generated))


@given(seed=seeds, k=st.integers(1, 4), max_elements=st.integers(1, 400), offset=st.sampled_from([0.0, 1e3]))
@settings(max_examples=25, deadline=None)
def test_blocked_precision_recall_equals_direct(seed, k, max_elements, offset):
    reference, generated = normal(seed, 23, 4) + offset, 1.5 * normal(seed + 1, 17, 4) + offset
    expected = direct_precision_recall(reference, generated, k)
    assert precision_recall(reference, generated, k, max_elements=max_elements) == expected


@given(seed=seeds, max_elements=st.sampled_from([1, 30, 200, 1 << 20]))
@settings(max_examples=15, deadline=None)
def test_float32_distances_give_the_same_shares(seed, max_elements):
    reference, generated = normal(seed, 60, 8) + 3, 1.3 * normal(seed + 1, 90, 8) + 3
    reference[7:10] = reference[7]  # exact repetitions too
    assert precision_recall(reference, generated, distances="float32", max_elements=max_elements) == precision_recall(
        reference.float(), generated.float()
    )


def half_precision_recall(reference: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    """ADM's arithmetic in NumPy: every array float16, sums of products in float32."""

    def distances(u, v):
        u, v = u.astype(np.float16), v.astype(np.float16)
        norms = [np.sum((x * x).astype(np.float32), axis=1).astype(np.float16) for x in (u, v)]
        products = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
        return np.maximum(norms[0][:, None] - np.float16(2) * products + norms[1], np.float16(0))

    radii = [np.sort(distances(x, x), axis=1)[:, k] for x in (reference, generated)]
    across = distances(reference, generated)
    precision = (across <= radii[0][:, None]).any(axis=0).mean()
    return float(precision), float((across <= radii[1]).any(axis=1).mean())


def test_half_precision_distances_are_adms():
    # Norms of about 600 as in Inception's features, where half precision counts in steps of 0.5.
    reference, generated = (0.5 + 0.2 * normal(seed, 300, 2000).abs().float() for seed in (0, 1))
    expected = half_precision_recall(reference.numpy(), generated.numpy(), 3)
    result = precision_recall(reference, generated, distances="float16", max_elements=5000)
    # Sums of products come in another order with other threads, and a last bit of half precision moves a sample or two.
    assert tuple(result) == pytest.approx(expected, abs=2.5 / 300)
    unrounded = precision_recall(reference, generated)
    assert abs(result.precision - unrounded.precision) > 5 / 300  # the rounding is what one sees


def test_half_precision_refuses_to_overflow():
    a = 300 * torch.ones(10, 1)
    with pytest.raises(ValueError, match="squared norms above 16000; use float32"):
        precision_recall(a, a, distances="float16")
    with pytest.raises(ValueError, match="one of float64, float32, float16"):
        precision_recall(a, a, distances="half")


def test_precision_recall_computes_each_distance_once():
    # 7 x 7 samples in tiles of 3: 6 tiles within each set (of 9), 9 across.
    calls: list[tuple[int, int]] = []
    a = normal(0, 7, 2)
    precision_recall(a, a, max_elements=9, progress=lambda *x: calls.append(x))
    assert calls == [(i + 1, 21) for i in range(21)]


def test_precision_recall_of_identical_disjoint_and_repeated_sets():
    a = normal(0, 30, 6)
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, a + 1e3) == (0, 0)
    repeated = a[:3].repeat(5, 1) + 1e4  # every radius is 0, and equal samples are inside
    assert precision_recall(repeated, repeated) == (1, 1)


def test_precision_recall_refuses_bad_input():
    a = normal(0, 10, 4)
    with pytest.raises(ValueError, match="k = 10 with 10 reference"):
        precision_recall(a, a, k=10)
    with pytest.raises(ValueError, match="k = 3 with 3 generated"):
        precision_recall(a, a[:3])
    with pytest.raises(ValueError, match="k = 0"):
        precision_recall(a, a, k=0)
    with pytest.raises(ValueError, match="4 features per sample and generated 3"):
        precision_recall(a, a[:, :3])
    with pytest.raises(ValueError, match="generated features hold 40 values"):
        precision_recall(a, a * math.nan)


# --- inception score ----------------------------------------------------------------------------------------------


def test_inception_score_matches_the_fixture(fixture):
    # 6,200 rows: the last chunk of 1,200 counts as much as the first of 5,000.
    score = inception_score(fixture["probabilities"])
    assert score == pytest.approx(fixture["inception_score"].item(), rel=1e-12)


def test_inception_score_extremes():
    certain = torch.eye(7).repeat(3, 1)
    assert inception_score(certain) == pytest.approx(7)  # zeros included
    assert inception_score(torch.full((5, 4), 0.25)) == pytest.approx(1)
    assert inception_score(certain, chunk=14) == pytest.approx(7)
    by_class = torch.eye(2).repeat_interleave(4, dim=0)
    assert inception_score(by_class, chunk=4) == pytest.approx(1)  # why samples are to be shuffled


def test_inception_score_refuses_logits():
    with pytest.raises(ValueError, match="softmax"):
        inception_score(normal(0, 5, 3))
    with pytest.raises(ValueError, match="got 0"):
        inception_score(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="chunk"):
        inception_score(torch.eye(3), chunk=0)


def test_memorised_share_of_copies_and_of_new_samples():
    training, new = normal(0, 400, 8), normal(1, 400, 8)
    assert memorised_share(training, training) == 1
    assert memorised_share(training, new) == pytest.approx(0.5, abs=0.08)
    assert memorised_share(training, new, batch=7) == memorised_share(training, new)
    assert memorised_share(training, torch.cat([training[:100], new[:300] + 100])) == 0.25
    with pytest.raises(ValueError, match="at least 2"):
        memorised_share(training[:1], new)


# --- judge and scores on small data -------------------------------------------------------------------------------


def squares(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright 16x16 square in one of three corners: the corner is the class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 80, (count, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 3
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = ((0, 0), (0, 16), (16, 0))[label]
        image[row : row + 16, column : column + 16] += 120 if label else 60
    return images, labels


@pytest.fixture(scope="module")
def judge():
    return train_judge(*squares(192, 0), seed=3, steps=25, batch_size=48)


def test_judge_learns_separable_classes(judge):
    images, labels = squares(90, 1)
    probabilities = judge.probabilities(images)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(90))
    assert torch.equal(probabilities.argmax(1), labels)
    features = judge.features(images)
    assert features.dtype == torch.float32
    assert features.shape == (90, 128)
    torch.testing.assert_close(judge.features(images[4:5]), features[4:5])


def test_judge_is_deterministic_and_leaves_the_random_state_alone():
    images, labels = squares(24, 0)
    calls: list[tuple[int, int]] = []
    torch.manual_seed(7)
    first = train_judge(images, labels, seed=1, steps=3, batch_size=16, progress=lambda *x: calls.append(x))
    after = torch.rand(1)
    second = train_judge(images, labels, seed=1, steps=3, batch_size=16)
    other = train_judge(images, labels, seed=2, steps=3, batch_size=16)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(1))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(first.features(images), second.features(images))
    assert not torch.equal(first.features(images), other.features(images))


def test_judge_round_trip_and_damaged_files(judge, tmp_path):
    images, _ = squares(9, 2)
    path = judge.save(tmp_path / "judge.safetensors")
    assert torch.equal(Judge.load(path).probabilities(images), judge.probabilities(images))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"judge.safetensors .* damaged"):
        Judge.load(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="its format is None"):
        Judge.load(path)
    with pytest.raises(FileNotFoundError, match="train_judge"):
        Judge.load(tmp_path / "absent")


def test_judge_refuses_bad_images_and_labels(judge):
    images, labels = squares(6, 0)
    with pytest.raises(ValueError, match=r"uint8 \[N, 32, 32\]"):
        judge.features(images.float())
    with pytest.raises(ValueError, match=r"uint8 \[N, 32, 32\] with N >= 1, got torch.uint8 \[6, 28, 28\]"):
        judge.features(images[:, :28, :28])
    with pytest.raises(ValueError, match=r"\[6, 28, 32\]"):
        train_judge(images[:, :28], labels, seed=0)
    with pytest.raises(ValueError, match=r"int64 \[6\]"):
        train_judge(images, labels[:5], seed=0)
    with pytest.raises(ValueError, match=r"got -1 \.\. 1"):
        train_judge(images, labels - 1, seed=0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        train_judge(images, labels * 0, seed=0)


def test_judge_of_larger_images_in_colour(tmp_path):
    """The class is which colour the square has: to grey the images are alike."""
    _, labels = squares(96, 0)
    images = torch.randint(0, 80, (96, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for image, label in zip(images, labels.tolist(), strict=True):
        image[label, 16:48, 16:48] += 120
    judge = train_judge(images[:60], labels[:60], seed=3, steps=25, batch_size=30)
    assert judge.widths == (16, 16, 48, 96, 128)
    loaded = Judge.load(judge.save(tmp_path / "judge.safetensors"))
    assert torch.equal(loaded.probabilities(images[60:]).argmax(1), labels[60:])
    with pytest.raises(ValueError, match=r"uint8 \[N, 3, 64, 64\] with N >= 1, got torch.uint8 \[96, 64, 64\]"):
        loaded.features(images[:, 0])
    with pytest.raises(
        ValueError, match=r"\[N, S, S\] or \[N, 3, S, S\] with N >= 1, got torch.uint8 \[96, 2, 64, 64\]"
    ):
        train_judge(images[:, :2], labels, seed=0)


def embedded(images: torch.Tensor) -> torch.Tensor:
    """Mean grey level of each quarter."""
    return images.float().reshape(-1, 2, 16, 2, 16).mean(dim=(2, 4)).flatten(1)


def test_evaluate_images_of_the_reference_itself(judge):
    images, labels = squares(60, 1)
    reference = reference_features(images, judge=judge, embedded=embedded)
    scores = evaluate_images(images, labels, judge=judge, embedded=embedded, reference=reference)
    assert all(type(value) is float for value in scores.values())
    assert scores.pop("fd_embedded") == pytest.approx(0, abs=1e-6)
    assert scores.pop("fd_judge") == pytest.approx(0, abs=1e-6)
    assert scores == {"precision": 1, "recall": 1, "accuracy": 1, "k": 3, "images": 60, "reference_images": 60}


def test_evaluate_images_sees_lost_classes_and_wrong_labels(judge):
    images, labels = squares(60, 1)
    reference = reference_features(images, judge=judge, embedded=embedded)
    one_class = images[labels == 1]
    asked = torch.tensor([1, 1, 1, 0]).repeat(5)
    scores = evaluate_images(one_class, asked, judge=judge, embedded=embedded, reference=reference)
    assert scores["accuracy"] == 0.75
    assert scores["precision"] == 1
    assert scores["recall"] == pytest.approx(1 / 3, abs=0.05)
    assert scores["fd_embedded"] == frechet_distance(reference["embedded"], embedded(one_class))
    assert scores["fd_judge"] == frechet_distance(reference["judge"], judge.features(one_class))


def test_evaluate_images_refuses_bad_input(judge):
    images, labels = squares(12, 1)
    reference = reference_features(images, judge=judge, embedded=embedded)
    with pytest.raises(ValueError, match=r"0 \.\. 2, got 1 \.\. 3"):
        evaluate_images(images, labels + 1, judge=judge, embedded=embedded, reference=reference)
    with pytest.raises(ValueError, match=r"lack \['embedded'\]"):
        evaluate_images(images, labels, judge=judge, embedded=embedded, reference={"judge": reference["judge"]})
    reference["embedded"] = reference["embedded"][:-1]
    with pytest.raises(ValueError, match=r"11 \(embedded\) and 12 \(judge\)"):
        evaluate_images(images, labels, judge=judge, embedded=embedded, reference=reference)


def test_evaluate_files_names_the_file_that_is_wrong(judge, tmp_path):
    images, labels = squares(12, 1)
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    np.savez(good, images=images.numpy(), labels=labels.numpy())
    path = judge.save(tmp_path / "judge.safetensors")
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        evaluate_files(tmp_path / "absent.npz", good, path)
    np.savez(bad, images=images.numpy())
    with pytest.raises(ValueError, match=r"bad\.npz is not an npz"):
        evaluate_files(good, bad, path)
    bad.write_bytes(good.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"bad\.npz is not an npz .* damaged"):
        evaluate_files(bad, good, path)


def test_evaluate_files_reads_adms_names_and_samples(judge, tmp_path):
    images, labels = squares(12, 1)
    path = judge.save(tmp_path / "judge.safetensors")
    np.savez(tmp_path / "ours.npz", images=images.numpy(), labels=labels.numpy())
    np.savez(tmp_path / "adm.npz", images.numpy(), labels.numpy())
    expected = evaluate_files(tmp_path / "ours.npz", tmp_path / "ours.npz", path)
    found = evaluate_files(tmp_path / "adm.npz", tmp_path / "ours.npz", path)
    assert found.pop("generated")["name"] == str(tmp_path / "adm.npz")
    del expected["generated"]
    assert found == expected

    drawn = tmp_path / "drawn"
    (drawn / "images").mkdir(parents=True)
    for i, image in enumerate(images.numpy()):
        Image.fromarray(image).save(drawn / "images" / f"{i:06}.png")
    note = {"format": "lwd-samples/1", "images": 12, "form": "png", "classes": [0, 1, 2], "origin": {"run": "runs/x"}}
    with pytest.raises(ValueError, match="so the classes of its images are unknown"):
        evaluate_files(drawn, tmp_path / "ours.npz", path)
    write_json(drawn / "samples.json", note)
    found = evaluate_files(drawn, tmp_path / "ours.npz", path)
    assert found.pop("generated")["origin"] == {"run": "runs/x"}
    assert found == expected
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(drawn / "images" / "000003.png")
    with pytest.raises(ValueError, match=r"got torch.uint8 \[12, 3, 32, 32\]"):
        evaluate_files(drawn, tmp_path / "ours.npz", path)
