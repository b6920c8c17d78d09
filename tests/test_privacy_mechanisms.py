from __future__ import annotations

import dataclasses
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from fediod_med.errors import PrivacyError
from fediod_med.privacy import mechanisms, noise
from fediod_med.privacy.mechanisms import Mechanism, clip_joint, clip_rows, presence_rows
from fediod_med.privacy.policy import (
    PrivacyPolicy,
    count_part,
    parse_policy,
    read_policy,
    release_part,
    sample_release_part,
    training_part,
    universe_id,
    write_policy,
)

ONE = Mechanism(1.0, 1.0, 1)


def test_sensitivities_are_those_of_the_derivations():
    assert mechanisms.patient_sum_sensitivity(3.0) == 3.0
    assert mechanisms.release_sensitivity(3.0) == 6.0
    assert mechanisms.presence_sensitivity() == 1.0
    assert mechanisms.per_sample_sensitivity(3.0, 16) == 24.0


def test_sensitivities_are_reached_by_the_worst_neighbours():
    """The worst pair each mechanism admits, after its own clipping, lies exactly as far apart as its sensitivity."""
    big, C, B = np.full(5, 1e9), 0.7, 9
    flip = clip_joint(big, C) - clip_joint(-big, C)
    assert np.linalg.norm(flip) == pytest.approx(mechanisms.release_sensitivity(C))
    samples = np.tile(big, (B, 1))
    flips = clip_rows(samples, C) - clip_rows(-samples, C)
    assert np.linalg.norm(flips) == pytest.approx(mechanisms.per_sample_sensitivity(C, B))
    patients = np.random.default_rng(0).normal(size=(4, 5)) * 1e3
    null = patients.copy()
    null[2] = 0
    moved = clip_rows(patients, C).sum(axis=0) - clip_rows(null, C).sum(axis=0)
    assert np.linalg.norm(moved) == pytest.approx(mechanisms.patient_sum_sensitivity(C))
    counts = presence_rows([[1, 1, 1, 1], [0, 1, 0, 1]]).sum(axis=0) - presence_rows([[0] * 4, [0, 1, 0, 1]]).sum(
        axis=0
    )
    assert np.linalg.norm(counts) == pytest.approx(mechanisms.presence_sensitivity())


@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(width=64)), st.floats(1e-3, 1e3))
def test_nothing_escapes_the_clip(vector, clip_norm):
    clipped = clip_joint(vector, clip_norm)
    assert np.isfinite(clipped).all()
    assert np.linalg.norm(clipped) <= clip_norm * (1 + 1e-12)


def test_clip_keeps_what_fits_and_the_direction_of_what_does_not():
    assert clip_joint([0.3, -0.4], 1.0).tolist() == [0.3, -0.4]
    assert clip_joint([3.0, -4.0], 1.0).tolist() == pytest.approx([0.6, -0.8])
    assert clip_joint([math.nan, math.inf, 0.5], 1.0).tolist() == [0.0, 0.0, 0.5]
    assert clip_joint(np.array([3.0, 4.0], dtype=np.float16), 1.0).dtype == np.float64


def test_presence_must_be_bits():
    with pytest.raises(PrivacyError, match="0 and 1"):
        presence_rows([[0, 2]])


def test_normals_follow_the_normal_distribution():
    z = noise.standard_normal(100_000)
    assert z.dtype == np.float64 and np.isfinite(z).all()
    assert stats.kstest(z, "norm").pvalue > 1e-6
    assert stats.kstest(noise.uniforms(100_000), "uniform").pvalue > 1e-6


@pytest.mark.parametrize("word", [b"\x00", b"\xff"])
def test_extreme_bits_give_finite_numbers(monkeypatch, word):
    monkeypatch.setattr(os, "urandom", lambda count: word * count)
    assert 12 < abs(noise.standard_normal(1)[0]) < 12.6 or abs(noise.standard_normal(1)[0]) < 1e-15
    assert 0 < noise.uniforms(1)[0] < 1


def words_of(tail: np.ndarray) -> list[bytes]:
    """First and second words from which `standard_normal` makes magnitudes of these upper tail probabilities."""
    scaled = 2 * tail * 2.0**52
    first = np.floor(scaled).astype(np.uint64)
    second = np.floor((scaled - np.floor(scaled)) * 2.0**64).astype(np.uint64)
    return [(first << np.uint64(12) | np.uint64(1)).tobytes(), second.tobytes()]  # bit 0: positive


@pytest.mark.parametrize("magnitude", [3.0, 5.0, 6.6, 7.0, 8.0, 9.0, 10.0, 10.9])
def test_every_multiple_of_the_grid_can_occur_in_the_tail(monkeypatch, magnitude):
    """A value that one world can release and its neighbour cannot would betray the world."""
    grid = 2.0**-21
    multiples = np.arange(round(magnitude / grid), round(magnitude / grid) + 3000)
    drawn = words_of(stats.norm.sf(multiples * grid))
    monkeypatch.setattr(os, "urandom", lambda count: drawn.pop(0))
    assert np.array_equal(np.rint(noise.standard_normal(multiples.size) / grid), multiples)
    assert drawn == []


@pytest.mark.parametrize(
    ("magnitude", "apart"), [(3.0, 2.0**-43), (6.0, 2.0**-43), (8.0, 2.0**-43), (10.0, 2.0**-43), (11.0, 2.0**-28)]
)
def test_neighbouring_magnitudes_of_the_tail_lie_close_together(monkeypatch, magnitude, apart):
    first, second = (np.frombuffer(word, dtype=np.uint64) for word in words_of(stats.norm.sf(np.array([magnitude]))))
    second = np.minimum(second, np.uint64(2**64 - 1000)) + np.arange(1000, dtype=np.uint64)
    drawn = [np.repeat(first, 1000).tobytes(), second.tobytes()]
    monkeypatch.setattr(os, "urandom", lambda count: drawn.pop(0))
    z = noise.standard_normal(1000)
    assert z[0] == pytest.approx(magnitude, abs=1e-6)
    # Steps of the words themselves; where these are finer, of float64.
    assert (np.abs(np.diff(z)) < apart).all()


def test_tails_follow_the_normal_distribution():
    z = noise.standard_normal((2000, 1000))
    rare = np.abs(z) > -stats.norm.ppf(2.0**-9)
    assert rare.sum() == pytest.approx(z.size / 256, abs=6 * math.sqrt(z.size / 256))
    assert (z[rare] > 0).mean() == pytest.approx(0.5, abs=3 / math.sqrt(rare.sum()))
    assert stats.kstest(2.0**9 * stats.norm.sf(np.abs(z[rare])), "uniform").pvalue > 1e-6


def test_a_forked_or_reseeded_process_never_repeats_noise():
    np.random.seed(0)  # must have no effect
    first = noise.standard_normal(8)
    np.random.seed(0)
    assert not np.array_equal(first, noise.standard_normal(8))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, noise.standard_normal(8).tobytes())
        os._exit(0)
    here = noise.standard_normal(8)
    there = np.frombuffer(os.read(read, 64))
    os.waitpid(child, 0)
    os.close(read)
    os.close(write)
    assert not np.array_equal(here, there)


def test_grid_noise_has_the_promised_deviation_and_stays_on_the_grid():
    std = 3.0
    grid = noise.grid_for(std)
    value = np.full(20_000, 0.123456789)
    noisy = noise.grid_gaussian(value, std, grid)
    assert std / 2**21 < grid <= std / 2**20
    assert np.array_equal(noisy / grid, np.rint(noisy / grid))
    low, high = stats.chi2.ppf([1e-7, 1 - 1e-7], len(value))
    assert low < ((noisy - value) ** 2).sum() / std**2 < high


@pytest.mark.parametrize("grid", [0.01, 0.3, 2.0**-9, 0.0])
def test_grids_that_are_too_coarse_or_no_power_of_two_are_refused(grid):
    with pytest.raises(PrivacyError, match="grid"):
        noise.grid_gaussian([0.0], 1.0, grid)


def test_values_beyond_the_grid_are_refused():
    with pytest.raises(PrivacyError, match="clip them"):
        noise.grid_gaussian([1e300], 1.0, 2.0**-20)


def test_poisson_draws_each_patient_on_its_own():
    sizes = np.array([len(noise.poisson_draw(20, 0.3)) for _ in range(2000)])
    assert abs(sizes.mean() - 6) < 6 * math.sqrt(4.2 / 2000)
    # A shuffled batch of fixed size has variance 0, Poisson sampling n q (1 - q) = 4.2.
    assert 3 < sizes.var() < 6
    assert len(noise.poisson_draw(5, 1.0)) == 5 and len(noise.poisson_draw(5, 0.0)) == 0


def test_seeded_noise_says_that_it_is_insecure():
    assert noise.SeededNoise(1).insecure and not noise.OsNoise().insecure
    assert np.array_equal(noise.SeededNoise(1).normal(3), noise.SeededNoise(1).normal(3))


def policy(**changes) -> PrivacyPolicy:
    parts = {"counts": count_part(ONE, dim=4), "answer": release_part(Mechanism(2.0, 1.0, 9), clip_norm=0.5, dim=3)}
    values = {
        "site": "a", "mode": "gradient", "epsilon": 8.0, "delta": 1e-5, "patients": 20, "universe": "ab", "parts": parts
    }  # fmt: skip
    return PrivacyPolicy(**{**values, **changes})


def test_policy_survives_its_file_byte_for_byte(tmp_path):
    write_policy(tmp_path / "policy.json", policy())
    assert (tmp_path / "policy.json").read_bytes() == policy().canonical()
    assert read_policy(tmp_path / "policy.json") == policy()
    assert policy().digest() != policy(delta=2e-5).digest()


def test_edited_or_missing_policies_are_refused(tmp_path):
    with pytest.raises(PrivacyError, match="found nothing"):
        read_policy(tmp_path / "policy.json")
    for data in (
        policy().canonical() + b" ",
        b"{}",
        b"[]",
        b"\xff",
        policy().canonical().replace(b'"a"', b'"a","x":1'),
    ):
        with pytest.raises(PrivacyError, match="expected"):
            parse_policy(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "dp"}, "mode"),
        ({"mode": "none"}, "mode none"),
        ({"epsilon": None}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"patients": 0}, "patients"),
        ({"parts": {}}, "parts"),
        ({"parts": {"teacher": training_part(ONE, clip_norm=1.0)}}, "parts"),
        ({"adjacency": "replace one"}, "null replacement"),
    ],
)
def test_inconsistent_policies_are_refused(changes, message):
    with pytest.raises(PrivacyError, match=message):
        policy(**changes)


@pytest.mark.parametrize(
    ("kind", "part", "message"),
    [
        ("answer", dataclasses.replace(release_part(ONE, clip_norm=1.0), sensitivity=1.0), "sensitivity: expected 2.0"),
        (
            "answer",
            dataclasses.replace(sample_release_part(ONE, clip_norm=1.0, rows=4), sensitivity=2.0),
            "expected 4.0",
        ),
        ("counts", dataclasses.replace(count_part(ONE, dim=4), clip_norm=2.0), "clip_norm"),
        ("answer", release_part(Mechanism(1.0, 0.5, 1), clip_norm=1.0), "sample rate 1"),
        ("answer", training_part(ONE, clip_norm=1.0), "clipping"),
        ("answer", release_part(ONE, clip_norm=0.0), "clip_norm"),
    ],
)
def test_policies_cannot_state_less_noise_than_they_charge(kind, part, message):
    with pytest.raises(PrivacyError, match=message):
        policy(parts={kind: part})


def test_universe_depends_on_the_patients_alone():
    key = bytes(32)
    assert universe_id(["b", "a", "a"], key) == universe_id(["a", "b"], key)
    assert universe_id(["a", "b"], key) != universe_id(["ab"], key)
    assert universe_id(["a"], key) != universe_id(["a"], b"1" * 32)


@settings(max_examples=30)
@given(st.lists(st.text(max_size=5), max_size=6))
def test_universe_ids_can_be_file_names(names):
    assert universe_id(names, b"k").isalnum()
