"""Bootstrap intervals of differences between arms: known answers, coverage, what pairing gives."""

import numpy as np
import pytest

from rematch.evaluate.metrics import hit_at, hits_at, paired_interval


def correlated_hits(rng, tasks, queries, p_a=0.6, p_b=0.5):
    """Hits of two arms that find the same queries easy; the difference is ``p_a - p_b``."""
    ease = rng.random((tasks, queries))
    noise = 0.1 * rng.random((tasks, queries))
    return ease < p_a, (ease + noise) % 1 < p_b


def test_hits_are_counted_query_by_query():
    ranks = [np.array([1, 7]), np.array([2]), np.array([6])]
    assert hits_at(ranks, 1).tolist() == [True, False, False]
    assert hits_at(ranks, 5).tolist() == [True, True, False]
    assert 100 * hits_at(ranks, 5).mean() == hit_at(ranks, 5)


@pytest.mark.parametrize("runs", [None, 3])
def test_equal_arms_and_constant_differences_have_no_width(runs):
    rng = np.random.default_rng(0)
    shape = (40,) if runs is None else (runs, 40)
    hits = [rng.random(shape) < 0.5 for _ in range(4)]
    assert paired_interval(hits, hits) == (0, 0, 0)
    ones, zeros = [np.ones(shape)] * 4, [np.zeros(shape)] * 4
    assert paired_interval(ones, zeros) == pytest.approx((100, 100, 100))
    assert paired_interval(zeros, ones) == pytest.approx((-100, -100, -100))


def test_tasks_count_the_same_however_many_queries_they_have():
    """A task of 10 queries and one of 1,000, all won and all equal."""
    a, b = [np.ones(10), np.zeros(1000)], [np.zeros(10), np.zeros(1000)]
    assert paired_interval(a, b) == pytest.approx((50, 50, 50))


def test_one_run_has_the_interval_of_the_normal_approximation():
    """Half the width is 1.96 standard errors of a mean of independent task means."""
    rng = np.random.default_rng(1)
    a = [rng.random(q) < 0.7 for q in (200, 300, 400)]
    b = [rng.random(q) < 0.5 for q in (200, 300, 400)]
    difference = [x.astype(float) - y for x, y in zip(a, b, strict=True)]
    error = 100 / 3 * np.sqrt(sum(d.var() / len(d) for d in difference))
    mean, low, high = paired_interval(a, b)
    assert mean == pytest.approx(100 * np.mean([d.mean() for d in difference]))
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert (high + low) / 2 == pytest.approx(mean, abs=0.1 * error)
    _, low_80, high_80 = paired_interval(a, b, level=0.8)
    assert (high_80 - low_80) / 2 == pytest.approx(1.2816 * error, rel=0.05)


def test_95_of_100_intervals_hold_the_true_difference():
    """400 experiments; the tolerance is three standard errors of a share of 0.95, and 0.01 for
    what a percentile bootstrap of 180 queries may miss.
    """
    covered = 0
    for experiment in range(400):
        rng = np.random.default_rng(experiment)
        a, b = correlated_hits(rng, tasks=3, queries=60)
        _, low, high = paired_interval(a, b, resamples=600, seed=experiment)
        covered += low <= 10 <= high
    assert covered / 400 == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / 400) ** 0.5 + 0.01)


def test_intervals_over_runs_hold_the_true_difference():
    """Ten runs of each arm, which differ by six points from run to run in all tasks alike; an
    interval that took the runs for one would hold it far too rarely.
    """
    covered, covered_by_queries_alone = 0, 0
    for experiment in range(200):
        rng = np.random.default_rng(experiment)
        levels = 0.5 + 0.06 * rng.standard_normal((2, 10, 1)) + [[[0.1]], [[0.0]]]
        ease = rng.random((4, 50))
        arms = [[ease_of_task < level for ease_of_task in ease] for level in levels]
        _, low, high = paired_interval(*arms, resamples=400, seed=experiment)
        covered += low <= 10 <= high
        means = [[hits.mean(axis=0) for hits in arm] for arm in arms]
        _, low, high = paired_interval(*means, resamples=400, seed=experiment)
        covered_by_queries_alone += low <= 10 <= high
    assert 0.89 <= covered / 200 <= 1
    assert covered_by_queries_alone < covered - 20


def test_runs_are_drawn_alike_for_all_tasks():
    """The first run wins every task and the second none: Δ of a resample is 0, 50 or 100."""
    a = [np.array([[1] * 20, [0] * 20])] * 6
    b = [np.zeros((2, 20))] * 6
    assert paired_interval(a, b) == pytest.approx((50, 0, 100))


def test_pairs_make_the_interval_narrow():
    rng = np.random.default_rng(2)
    a, b = correlated_hits(rng, tasks=4, queries=200)
    shuffled = [rng.permutation(hits) for hits in b]
    paired, unpaired = paired_interval(a, b), paired_interval(a, shuffled)
    assert paired.mean == pytest.approx(unpaired.mean)
    assert paired.high - paired.low < 0.7 * (unpaired.high - unpaired.low)


def test_the_seed_decides():
    rng = np.random.default_rng(3)
    a, b = correlated_hits(rng, tasks=2, queries=50)
    first, again, other = (paired_interval(a, b, resamples=100, seed=s) for s in (4, 4, 5))
    assert first == again
    assert first.mean == other.mean
    assert first != other


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "0 and 0 tasks"),
        ([[1]], [[1], [0]], "1 and 2 tasks"),
        ([[1, 0]], [[1]], r"task 0: .* \(1, 2\) and \(1, 1\)"),
        ([[]], [[]], "task 0"),
        ([[1], [[1], [0]]], [[1], [[1], [0]]], "1, 2 runs"),
    ],
)
def test_arms_that_do_not_fit_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_interval(a, b)
