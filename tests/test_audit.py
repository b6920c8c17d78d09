"""The statistics of the audit: published values, second routes, and bounds that must not overstate."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from fediod_med.errors import PrivacyError
from fediod_med.privacy.audit import (
    audit_ceiling,
    clopper_pearson,
    epsilon_lower_bound,
    largest_auc,
    mu_lower_bound,
    one_run_epsilon,
    one_run_p_value,
)
from fediod_med.privacy.audit_scores import (
    auc,
    auc_interval,
    auc_p_value,
    membership_epsilon,
    nearest_neighbour_test,
    roc,
    tpr_at_fpr,
)
from fediod_med.privacy.one_run import fair_coins, one_run_audit
from fediod_med.privacy.volume_distance import VolumeMatcher

# --- counts -----------------------------------------------------------------------------------------------------------


def test_clopper_pearson_has_its_closed_forms_at_the_ends() -> None:
    assert clopper_pearson(0, 10) == pytest.approx((0, 1 - 0.025**0.1))
    assert clopper_pearson(10, 10) == pytest.approx((0.025**0.1, 1))
    assert clopper_pearson(8, 10) == pytest.approx((0.44390, 0.97479), abs=1e-5)  # the textbook example


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.9])
def test_clopper_pearson_covers_every_rate(rate: float) -> None:
    from scipy.stats import binom

    covered = sum(
        float(binom.pmf(k, 15, rate))
        for k in range(16)
        if clopper_pearson(k, 15)[0] <= rate <= clopper_pearson(k, 15)[1]
    )
    assert covered >= 0.95


@pytest.mark.parametrize(("n", "expected"), [(20, 1.6), (50, 2.6), (100, 3.3), (200, 4.0), (500, 4.9), (1000, 5.6)])
def test_a_perfect_attack_cannot_show_more_than_the_ceiling(n: int, expected: float) -> None:
    assert round(audit_ceiling(n), 1) == expected
    assert audit_ceiling(n) == pytest.approx(math.log(0.025 ** (1 / n) / (1 - 0.025 ** (1 / n))))


def test_the_epsilon_bound_falls_with_delta_and_is_never_negative() -> None:
    assert epsilon_lower_bound(90, 100, 10, 100, delta=0.2) < epsilon_lower_bound(90, 100, 10, 100, delta=0)
    assert epsilon_lower_bound(10, 100, 90, 100, delta=0) == 0
    assert epsilon_lower_bound(1, 1, 0, 1, delta=0) == 0


def test_the_epsilon_bound_uses_the_clearer_of_the_two_errors() -> None:
    # Half of the members found without any false accusation, and its mirror image: all found, half wrongly accused.
    few_accused = epsilon_lower_bound(50, 100, 0, 100, delta=0)
    none_missed = epsilon_lower_bound(100, 100, 50, 100, delta=0)
    assert few_accused == pytest.approx(none_missed)
    assert few_accused == pytest.approx(math.log(clopper_pearson(50, 100)[0] / clopper_pearson(0, 100)[1]))


@pytest.mark.parametrize(("mu", "share"), [(0.719, 0.84), (1.0, 0.88), (2.0, 0.93)])
def test_the_mu_bound_recovers_what_2000_trials_can_show(mu: float, share: float) -> None:
    found = round(2000 * float(norm.cdf(mu / 2)))
    assert mu_lower_bound(found, 2000, 2000 - found, 2000) / mu == pytest.approx(share, abs=0.005)


def test_the_mu_bound_is_zero_without_evidence() -> None:
    assert mu_lower_bound(0, 5, 5, 5) == 0
    assert mu_lower_bound(3, 10, 3, 10) == 0


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("delta", [0.0, 0.05])
def test_the_largest_auc_is_the_area_under_the_trade_off(epsilon: float, delta: float) -> None:
    x = np.linspace(0, 1, 200_001)
    curve = np.minimum.reduce([np.exp(epsilon) * x + delta, 1 - np.exp(-epsilon) * (1 - delta - x), np.ones_like(x)])
    assert largest_auc(epsilon, delta) == pytest.approx(np.trapezoid(curve, x), abs=1e-6)
    assert largest_auc(epsilon, 0.0) == pytest.approx(1 / (1 + math.exp(-epsilon)))
    assert largest_auc(900.0, delta) == pytest.approx(1)


# --- one run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "expected"), [(20, 1.8), (50, 2.8), (100, 3.5), (200, 4.2), (500, 5.1)])
def test_one_run_with_every_guess_right(m: int, expected: float) -> None:
    assert round(one_run_epsilon(m, m, m, delta=1e-5), 1) == expected
    # Without delta: the root of q^m = 0.05.
    q = 0.05 ** (1 / m)
    assert one_run_epsilon(m, m, m) == pytest.approx(math.log(q / (1 - q)))


@pytest.mark.parametrize(("m", "expected"), [(100, 1.6), (1000, 2.0)])
def test_one_run_with_nine_of_ten_guesses_right(m: int, expected: float) -> None:
    assert round(one_run_epsilon(m, m, m * 9 // 10, delta=1e-5), 1) == expected


def test_one_run_p_value_by_enumeration() -> None:
    m, r, v, epsilon, delta = 6, 5, 4, 0.7, 0.01
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    near = max(sum(mass[v - i : v]) / i for i in range(1, v + 1))
    assert one_run_p_value(m, r, v, epsilon, delta) == pytest.approx(sum(mass[v:]) + 2 * m * delta * near)


def test_one_run_shows_nothing_for_guesses_like_coins() -> None:
    assert one_run_epsilon(100, 100, 50, delta=1e-5) == 0
    assert one_run_epsilon(10, 4, 4) == 0  # 4 right of 4 happen by chance once in 16
    assert one_run_epsilon(10, 5, 5) > 0
    assert one_run_epsilon(50, 50, 50, delta=0.1) == 0  # delta of 1/10 may publish canaries outright


def test_one_run_does_not_overstate_randomised_response(rng: np.random.Generator) -> None:
    """Each canary's bit is told truly with probability e^eps / (1 + e^eps): exactly eps-DP, the hardest case."""
    epsilon, m = 1.0, 60
    keep = 1 / (1 + math.exp(-epsilon))

    def bound() -> float:
        coins = (rng.random(m) < 0.5).tolist()
        told = [coin if rng.random() < keep else not coin for coin in coins]

        def score(_: object, canary: int) -> float:
            return told[canary] + 1e-3 * rng.random()

        return one_run_audit(list, range(m), score_fn=score, delta=0.0, coins=lambda _: coins).epsilon_lower_bound

    bounds = [bound() for _ in range(300)]
    assert np.mean(np.array(bounds) > epsilon) <= 0.05
    assert np.mean(bounds) > 0.3  # and it is not silent either


def test_one_run_sees_a_training_that_remembers_everything() -> None:
    found = one_run_audit(
        set, range(50), score_fn=lambda model, canary: float(canary in model), claimed_epsilon=1.0, coins=_alternating
    )
    assert (found.inserted, found.guesses, found.correct) == (25, 50, 50)
    assert found.epsilon_lower_bound == found.ceiling and round(found.ceiling, 1) == 2.8
    assert found.contradicts_claim


def test_one_run_may_abstain_where_it_is_unsure() -> None:
    # Scores tell the truth at both ends only; the middle 30 of 50 are noise of the wrong sign.
    def score(model: set[int], canary: int) -> float:
        sign = 1 if canary in model else -1
        return 2.0 * sign if canary < 20 else -1.0 * sign

    all_guesses = one_run_audit(set, range(50), score_fn=score, coins=_alternating)
    sure = one_run_audit(set, range(50), score_fn=score, guesses=20, coins=_alternating)
    assert (sure.correct, sure.guesses) == (20, 20)
    assert sure.epsilon_lower_bound > 1.5 > all_guesses.epsilon_lower_bound == 0


def test_one_run_trains_on_inserted_canaries_only_and_with_fresh_coins() -> None:
    seen: list[list[int]] = []
    for _ in range(2):
        one_run_audit(lambda given: seen.append(list(given)), range(64), score_fn=lambda _, canary: float(canary))
    assert seen[0] != seen[1]  # equal once in 2^64
    assert all(0 < len(given) < 64 for given in seen)
    assert sorted(set(fair_coins(100))) == [False, True]


@pytest.mark.parametrize(
    ("guesses", "coins", "score", "message"),
    [(0, None, 0.0, "guesses"), (9, None, 0.0, "guesses"), (4, [True], 0.0, "coins"), (4, None, math.nan, "finite")],
)
def test_one_run_refuses_what_makes_no_sense(
    guesses: int, coins: list[bool] | None, score: float, message: str
) -> None:
    with pytest.raises(PrivacyError, match=message):
        one_run_audit(
            list,
            range(8),
            score_fn=lambda *_: score,
            guesses=guesses,
            coins=_alternating if coins is None else lambda _: coins,
        )


def _alternating(count: int) -> list[bool]:
    return [bool(i % 2) for i in range(count)]


# --- scores -----------------------------------------------------------------------------------------------------------


def test_auc_counts_pairs_and_halves_ties() -> None:
    assert auc([3, 2], [1, 2]) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert auc([1], [2]) == 0


def test_auc_is_the_area_under_the_roc(rng: np.random.Generator) -> None:
    members, others = rng.integers(0, 6, 40).tolist(), rng.integers(0, 5, 25).tolist()
    fpr, tpr = roc(members, others)
    assert np.trapezoid(tpr, fpr) == pytest.approx(auc(members, others))
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)


def test_the_interval_stays_wide_where_few_patients_separate_by_chance() -> None:
    low, high = auc_interval([2, 3], [0, 1])
    assert high == 1 and low < 0.5  # 1 chance in 6
    assert auc_interval(range(8, 16), range(8))[0] > 0.7
    assert auc_interval([0, 1], [2, 3]) == pytest.approx((1 - high, 1 - low))  # mirrored


def test_the_interval_solves_its_equation() -> None:
    members, others = [5, 6, 7, 1.5], [1, 2, 3]
    area, (low, high) = auc(members, others), auc_interval(members, others)
    for t in (low, high):
        spread = 1 + 2.5 * ((1 - t) / (2 - t) + t / (1 + t))
        assert abs(area - t) == pytest.approx(1.959964 * math.sqrt(t * (1 - t) * spread / 12), abs=1e-6)


@pytest.mark.parametrize(("members", "others"), [(4, 4), (9, 3), (20, 20)])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_the_interval_covers(members: int, others: int, shift: float, rng: np.random.Generator) -> None:
    true = float(norm.cdf(shift / math.sqrt(2)))
    hits = 0
    for _ in range(400):
        low, high = auc_interval(rng.normal(shift, 1, members).tolist(), rng.normal(0, 1, others).tolist())
        hits += low <= true <= high
    assert hits / 400 > 0.92  # nominal .95, three standard errors below


def test_the_p_value_is_exact_for_few_scores() -> None:
    assert auc_p_value([4, 5, 6], [1, 2, 3]) == pytest.approx(1 / 20)
    assert auc_p_value([1, 1], [1, 1]) == 1


def test_true_positives_at_few_false_ones() -> None:
    others = [float(i) for i in range(200)]
    found = tpr_at_fpr([197.5, 198.5, 250, 3], others, fpr=0.01)
    assert found.false_positives_allowed == 2
    assert found.tpr == 0.75  # above 197, the third largest
    assert tpr_at_fpr([197.5, 250], others[:50], fpr=0.01).false_positives_allowed == 0
    assert tpr_at_fpr([49.0], others[:50]).tpr == 0  # a tie with a non-member is no discovery


def test_the_membership_bound_is_chosen_on_one_half_and_taken_on_the_other() -> None:
    bound = membership_epsilon(range(1000, 1100), range(100), delta=1e-5)
    assert (bound.members, bound.non_members) == (50, 50)
    assert bound.epsilon == pytest.approx(bound.ceiling) == pytest.approx(audit_ceiling(50, delta=1e-5))
    assert membership_epsilon([1.0], [0.0, 0.1], delta=0).ceiling == 0


def test_the_membership_bound_does_not_overstate_noise(rng: np.random.Generator) -> None:
    shown = [
        membership_epsilon(rng.normal(size=30).tolist(), rng.normal(size=30).tolist(), delta=0, seed=i).epsilon > 0
        for i in range(200)
    ]
    assert np.mean(shown) <= 0.05


@pytest.mark.parametrize("bad", [[], [math.nan, 1.0], [math.inf]])
def test_scores_that_are_none_are_refused(bad: list[float]) -> None:
    with pytest.raises(PrivacyError, match="score"):
        auc(bad, [0.0])


@pytest.mark.parametrize(
    "call",
    [
        lambda: clopper_pearson(3, 2),
        lambda: clopper_pearson(0, 0),
        lambda: clopper_pearson(1, 2, confidence=1.0),
        lambda: epsilon_lower_bound(1, 2, 1, 2, delta=1.0),
        lambda: one_run_epsilon(5, 6, 5),
        lambda: one_run_epsilon(5, 5, 5, delta=-0.1),
        lambda: one_run_p_value(5, 5, 5, -1.0, 0.0),
        lambda: largest_auc(-1.0, 0.0),
        lambda: tpr_at_fpr([1.0], [0.0], fpr=0.0),
    ],
)
def test_numbers_out_of_range_are_refused(call) -> None:
    with pytest.raises(PrivacyError, match="expected"):
        call()


# --- distances --------------------------------------------------------------------------------------------------------


def test_copies_of_training_patients_are_found(rng: np.random.Generator) -> None:
    train, holdout = rng.uniform(0.5, 1, (4, 7)), rng.uniform(0.5, 1, (4, 7))
    train[np.arange(4), np.arange(4)] = 0.01
    found = nearest_neighbour_test(train, holdout)
    assert found.share_nearer_train == 1
    assert found.p_value < 0.05
    assert found.smallest_p == 1 / math.comb(14, 7)
    assert found.median[0] == pytest.approx(0.01) and found.first_percentile[1] >= 0.5


def test_no_copies_give_uniform_p_values(rng: np.random.Generator) -> None:
    p_values = [nearest_neighbour_test(rng.random((3, 4)), rng.random((3, 4)), seed=i).p_value for i in range(300)]
    assert np.mean(np.array(p_values) <= 0.1) < 0.16
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.07)


def test_the_larger_side_is_thinned_so_that_more_patients_do_not_look_nearer(rng: np.random.Generator) -> None:
    shares = [
        nearest_neighbour_test(rng.random((5, 30)), rng.random((5, 3)), permutations=50, seed=i).share_nearer_train
        for i in range(200)
    ]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.07)


def test_drawn_permutations_agree_with_all_of_them(rng: np.random.Generator) -> None:
    train, holdout = rng.random((3, 6)) - 0.1, rng.random((3, 6))
    every = nearest_neighbour_test(train, holdout)  # 924 exchanges
    drawn = nearest_neighbour_test(train, holdout, permutations=900)
    assert drawn.p_value == pytest.approx(every.p_value, abs=0.06)
    assert drawn.smallest_p == 1 / 901


@pytest.mark.parametrize("shapes", [((2, 0), (2, 3)), ((2, 3), (2, 0)), ((2, 3), (3, 3))])
def test_distances_that_do_not_match_are_refused(shapes) -> None:
    with pytest.raises(PrivacyError, match="expected"):
        nearest_neighbour_test(np.zeros(shapes[0]), np.zeros(shapes[1]))


def head(rng: np.random.Generator, edges: tuple[int, int, int] = (10, 12, 9)) -> np.ndarray:
    """Two sequences of noise in a box with an empty border."""
    volume = np.zeros((2, 20, 22, 18), dtype=np.float32)
    volume[:, 3 : 3 + edges[0], 4 : 4 + edges[1], 2 : 2 + edges[2]] = rng.normal(size=(2, *edges))
    return volume


def test_a_shifted_or_mirrored_copy_has_distance_zero(rng: np.random.Generator) -> None:
    one, other = head(rng), head(rng)
    matcher = VolumeMatcher([one, other])
    moved = np.roll(one, (3, -2, 1), axis=(1, 2, 3))
    for copy in (one, moved, np.flip(one, (1, 3)), 2.5 * moved, np.pad(one, ((0, 0), (5, 0), (0, 7), (2, 2)))):
        assert matcher.distances(copy) == pytest.approx([0, matcher.distances(one)[1]], abs=1e-4)
    assert matcher.distances(one)[1] > 0.7


def test_a_copy_that_lost_its_edge_is_still_near(rng: np.random.Generator) -> None:
    one = head(rng)
    cut = one.copy()
    cut[:, :6] = 0  # three of ten planes: the bounding boxes no longer agree
    assert VolumeMatcher([one]).distances(cut)[0] == pytest.approx(1 - math.sqrt(0.7), abs=0.05)
    assert VolumeMatcher([one], max_shift=0, mirror=False).distances(cut)[0] > 0.7


def test_the_best_shift_equals_a_search_by_hand(rng: np.random.Generator) -> None:
    one, other = head(rng), head(rng, (8, 12, 11))
    shift = 2
    best = -1.0
    a = np.pad(one[:, 3:13, 4:16, 2:11], ((0, 0), (4, 4), (4, 4), (5, 5)))
    b = np.pad(other[:, 3:11, 4:16, 2:13], ((0, 0), (5, 5), (4, 4), (4, 4)))
    for offset in np.ndindex(5, 5, 5):
        moved = np.roll(b, np.array(offset) - shift, axis=(1, 2, 3))
        best = max(best, float((a * moved).sum() / np.linalg.norm(a) / np.linalg.norm(moved)))
    found = VolumeMatcher([one], max_shift=shift, mirror=False).distances(other)[0]
    assert found == pytest.approx(1 - best, abs=1e-5)


def test_volumes_without_signal_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(PrivacyError, match="signal"):
        VolumeMatcher([np.zeros((2, 4, 4, 4))])
    with pytest.raises(PrivacyError, match="sequences"):
        VolumeMatcher([head(rng)]).distances(head(rng)[:1])
