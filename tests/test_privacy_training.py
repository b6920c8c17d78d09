from __future__ import annotations

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare
from torch import nn

from fediod_med.checkpoints import load_state, save_state
from fediod_med.errors import PrivacyError
from fediod_med.networks import build_segmenter
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.noise import OsNoise, SeededNoise
from fediod_med.privacy.optimizer import PatientOptimizer
from fediod_med.privacy.row_loss import per_row_dice_ce
from fediod_med.privacy.trainable import select_trainable
from fediod_med.privacy.training import Checkpoints, PrivateSchedule, PrivateTrainer, rate, train_private


class Planned(SeededNoise):
    """Noise as scripted: silent normals; uniforms that let exactly the given patients pass, step by step."""

    def __init__(self, draws, count):
        super().__init__(0)
        self.draws, self.count = list(draws), count

    def normal(self, shape):
        return np.zeros(shape)

    def uniform(self, shape):
        found = np.ones(self.count)
        found[list(self.draws.pop(0))] = 1e-9
        return found


class Linear(nn.Module):
    """One weight vector; the loss of a row is minus its product with the weights, so gradients are the rows."""

    def __init__(self, size=2):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return x @ self.weight


def minus(logits, label):
    return -logits


def schedule_of(*, sigma=1.0, q=0.5, steps=3, **settings):
    return PrivateSchedule(Mechanism(sigma, q, steps), **{"optimizer": "sgd", "learning_rate": 1.0, **settings})


def rows(*vectors):
    image = torch.tensor(vectors, dtype=torch.float32)
    return image, torch.zeros(len(image))


def first_gradient(patients, schedule, draws=((0, 1, 2, 3),), **arguments):
    """The noiseless mean gradient of one step from zero weights."""
    network = Linear()
    trainer = PrivateTrainer(
        network, schedule, patients=len(patients), per_row_loss=minus, source=Planned(draws, len(patients))
    )
    trainer.step(lambda index: patients[index], **arguments)
    # SGD's first step is the gradient times the rate of a warm-up of one step, which is the peak.
    return (network.weight / schedule.learning_rate).tolist()


FOUR = [rows((1, 0)), rows((0, 1)), rows((0, 0)), rows((0.5, 0))]


def test_a_step_is_the_clipped_sum_over_the_declared_number():
    assert first_gradient(FOUR, schedule_of(q=0.5)) == pytest.approx([1.5 / 2, 1 / 2])
    assert first_gradient(FOUR, schedule_of(q=0.5), draws=((0,),)) == pytest.approx([1 / 2, 0])
    assert first_gradient(FOUR, schedule_of(q=0.5), draws=((),)) == [0, 0]


def test_a_patient_counts_once_however_many_crops_it_has():
    """Sensitivity: with or without the patient of eight crops, the sum moves by at most C."""
    crowded = [rows(*[(9, 0)] * 8), *FOUR[1:]]
    with_it = np.array(first_gradient(crowded, schedule_of(q=0.5, clip_norm=0.5)))
    without = np.array(first_gradient(crowded, schedule_of(q=0.5, clip_norm=0.5), draws=((1, 2, 3),)))
    assert np.linalg.norm(with_it - without) * (0.5 * 4) == pytest.approx(0.5)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_changing_one_patient_moves_the_sum_by_at_most_twice_c_and_leaves_the_others_alone(optimizer):
    network = build_segmenter("unet", width=4, depth=2)
    images = torch.randn(3, 2, 4, 8, 8, 8)
    label = torch.randint(0, 4, (3, 2, 8, 8, 8))

    def sum_of(chosen, images):
        trainer = PrivateTrainer(
            copy.deepcopy(network),
            schedule_of(q=1 / 3, clip_norm=0.1, optimizer=optimizer),
            patients=3,
            per_row_loss=per_row_dice_ce,
            source=Planned([chosen], 3),
        )
        seen = []
        assert isinstance(trainer.optimizer, PatientOptimizer)
        trainer.optimizer.attach_step_hook(
            lambda o: seen.append(torch.cat([p.grad.flatten() for p in o.params]).double())
        )
        trainer.step(lambda i: (images[i], label[i]))
        return seen[0]

    altered = images.clone()
    altered[1] = 50 * torch.randn(2, 4, 8, 8, 8)
    before, after = sum_of((0, 1, 2), images), sum_of((0, 1, 2), altered)
    assert 0 < float((before - after).norm()) <= 0.2 + 1e-6
    # Whoever else is drawn, a patient's own share is the same.
    share = sum_of((0, 1, 2), altered) - sum_of((1, 2), altered)
    torch.testing.assert_close(share, sum_of((0,), images), atol=1e-7, rtol=0)


def test_draws_are_poisson_and_not_batches_of_a_fixed_size():
    """Sizes of 400 draws follow Bin(12, .25), empty ones included; shuffled batches would all have size 3."""
    sizes, who = [], np.zeros(12)
    trainer = PrivateTrainer(Linear(), schedule_of(q=0.25, steps=400), patients=12, per_row_loss=minus)
    for _ in range(400):
        seen: list[int] = []

        def draw(index, seen=seen):
            seen.append(index)
            return rows((1, 0))

        trainer.step(draw)
        assert len(set(seen)) == len(seen)
        sizes.append(len(seen))
        who[seen] += 1
    cells = [np.isin(sizes, group).sum() for group in ((0, 1), (2,), (3,), (4,), range(5, 13))]
    chances = [binom.pmf(list(group), 12, 0.25).sum() for group in ((0, 1), (2,), (3,), (4,), range(5, 13))]
    assert chisquare(cells, 400 * np.array(chances)).pvalue > 1e-6
    assert 0 in sizes
    assert np.abs(who - 100).max() < 5.5 * np.sqrt(400 * 0.25 * 0.75)  # every patient alike


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_two_runs_differ_and_the_weights_carry_the_promised_noise(optimizer):
    """Without patients drawn, one SGD step from zero is noise of std lr * sigma * C / (q n)."""
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        np.random.seed(3)
        network = Linear(20_000)
        settings = schedule_of(sigma=3.0, q=1e-9, steps=1, clip_norm=0.5, optimizer=optimizer)
        train_private(network, range(10), schedule=settings, draw=lambda _: rows(()), per_row_loss=minus)
        found.append(network.weight.detach().clone())
    assert not torch.equal(*found)
    assert abs(float(torch.corrcoef(torch.stack(found))[0, 1])) < 0.05
    if optimizer == "sgd":
        for weight in found:
            assert float(weight.std()) == pytest.approx(3.0 * 0.5 / (1e-9 * 10), rel=0.03)


def test_the_schedule_has_exactly_its_steps():
    steps: list[tuple[int, int]] = []
    train_private(
        Linear(),
        FOUR,
        schedule=schedule_of(steps=5),
        draw=lambda patient: patient,
        per_row_loss=minus,
        on_step=lambda *at: steps.append(at),
    )
    assert steps == [(i, 5) for i in range(1, 6)]


def test_no_step_beyond_the_charge():
    trainer = PrivateTrainer(Linear(), schedule_of(steps=1), patients=4, per_row_loss=minus)
    trainer.step(FOUR.__getitem__)
    with pytest.raises(PrivacyError, match="all 1 charged steps are done"):
        trainer.step(FOUR.__getitem__)


def test_the_average_and_not_the_last_step_is_returned():
    network = Linear()
    settings = schedule_of(q=1.0, steps=2, average=0.25)
    average = train_private(
        network,
        FOUR,
        schedule=settings,
        draw=lambda patient: patient,
        per_row_loss=minus,
        source=Planned([range(4), range(4)], 4),
    )
    first = 1.5 / 4
    last = first + (first + 0.9 * first) * rate(1, 2)
    assert network.weight[0].item() == pytest.approx(last)
    assert isinstance(average, Linear) and not average.training
    assert average.weight[0].item() == pytest.approx(0.75 * 0.25 * first + 0.25 * last)


def test_frozen_parameters_stay_as_they_are():
    network = build_segmenter("unet", width=4, depth=2)
    before = copy.deepcopy(network.state_dict())
    select_trainable(network, "head")
    train_private(
        network,
        range(2),
        schedule=schedule_of(q=1.0, steps=1),
        draw=lambda _: (torch.randn(1, 4, 8, 8, 8), torch.zeros(1, 8, 8, 8)),
        per_row_loss=per_row_dice_ce,
    )
    for name, p in network.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad


def test_public_rows_are_mixed_in_and_cost_nothing():
    asked: list[tuple[int, int]] = []

    def public(number, count):
        asked.append((number, count))
        return rows((0, 8), (0, 8))

    mixed = schedule_of(q=0.5, public_weight=0.25)
    assert first_gradient(FOUR, mixed, public=public) == pytest.approx([0.75 * 0.75, 0.75 * 0.5 + 0.25])
    assert asked == [(1, 2)]
    first_gradient(FOUR, schedule_of(q=0.5), public=public)
    assert asked == [(1, 2)]  # weight 0: not even drawn


def test_in_a_subspace_patients_move_the_weights_along_public_gradients_only():
    asked: list[tuple[int, int]] = []

    def public(number, count):
        asked.append((number, count))
        return rows((0, 3))

    schedule = schedule_of(q=0.5, steps=5, subspace=1, refresh=2)
    # Projected on (0, 1): coefficients 0, 1, 0, 0; over the declared 2.
    assert first_gradient(FOUR, schedule, public=public) == pytest.approx([0, 0.5])
    assert asked == [(6, 1)]  # beyond the numbers of the steps
    long = [rows((3, 4))]
    # Projection first (0, 4), then the clip to 1: with the clip first it would be .8.
    assert first_gradient(long, schedule, draws=((0,),), public=public) == pytest.approx([0, 1 / 0.5])


def test_the_basis_is_renewed_at_intervals_and_after_an_interruption():
    asked: list[int] = []

    def public(number, count):
        asked.append(number)
        return rows((0, 3))

    schedule = schedule_of(q=1.0, steps=5, subspace=1, refresh=2)

    def fresh(steps):
        return PrivateTrainer(Linear(), schedule, patients=1, per_row_loss=minus, source=Planned([(0,)] * steps, 1))

    trainer = fresh(5)
    for _ in range(5):
        trainer.step(lambda index: rows((1, 1)), public)
    assert asked == [6, 7, 8]
    asked.clear()
    first = fresh(1)
    first.step(lambda index: rows((1, 1)), public)
    second = fresh(4)
    second.load_state_dict(first.state_dict())
    for _ in range(4):
        second.step(lambda index: rows((1, 1)), public)
    assert asked == [6, 6, 7, 8]
    # Public gradients alone span the basis, so the ends agree.
    assert torch.allclose(second.network.weight, trainer.network.weight)


def test_a_subspace_without_public_rows_is_refused():
    with pytest.raises(PrivacyError, match="public crops for the subspace"):
        first_gradient(FOUR, schedule_of(subspace=1))


def test_an_interrupted_training_continues_with_its_own_steps_and_ends_where_the_other_ends(tmp_path):
    def train(network, checkpoints, stop=None, draws=6):
        def on_step(step, steps):
            if step == stop:
                raise KeyboardInterrupt

        return train_private(
            network,
            FOUR,
            schedule=schedule_of(q=1.0, steps=6, optimizer="adam", learning_rate=0.1),
            draw=lambda patient: patient,
            per_row_loss=minus,
            checkpoints=checkpoints,
            on_step=on_step,
            source=Planned([range(4)] * draws, 4),
        )

    whole = train(Linear(), None)
    rest = Checkpoints(tmp_path / "state.pt", save_state, load_state, every=2, permit="a")
    with pytest.raises(KeyboardInterrupt):
        train(Linear(), rest, stop=5)
    assert load_state(rest.path)["trainer"]["done"] == 4
    resumed = train(Linear(), rest, draws=2)  # a third draw would fail
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict())
    # Finished: started again it returns the same weights and touches nobody.
    torch.testing.assert_close(train(Linear(), rest, draws=0).state_dict(), whole.state_dict())
    with pytest.raises(PrivacyError, match="expected a state of permit 'b', found 'a'"):
        train(Linear(), dataclasses.replace(rest, permit="b"))


def test_a_state_of_other_settings_is_refused():
    one = PrivateTrainer(Linear(), schedule_of(steps=5), patients=4, per_row_loss=minus)
    two = PrivateTrainer(Linear(), schedule_of(steps=6), patients=4, per_row_loss=minus)
    with pytest.raises(PrivacyError, match="belongs to other settings"):
        two.load_state_dict(one.state_dict())


def test_the_digest_covers_every_setting():
    base = schedule_of()
    others = [
        schedule_of(sigma=1.1), schedule_of(q=0.4), schedule_of(steps=4), schedule_of(clip_norm=2.0),
        schedule_of(learning_rate=0.5), schedule_of(optimizer="adam"), schedule_of(physical_batch=2),
        schedule_of(public_weight=0.5), schedule_of(average=0.5), schedule_of(precision="bfloat16"),
        schedule_of(extra={"init": "prior"}), schedule_of(subspace=3), schedule_of(refresh=4),
    ]  # fmt: skip
    assert len({s.digest() for s in [base, *others]}) == 1 + len(others) == 1 + len(dataclasses.fields(base)) + 2
    assert base.digest() == schedule_of().digest()


def test_reduced_precision_gives_nearly_the_same_gradient_in_float32():
    network = build_segmenter("unet", width=8, depth=2)
    image, label = torch.randn(2, 4, 8, 8, 8), torch.randint(0, 4, (2, 8, 8, 8))
    found = []
    for precision in ("float32", "bfloat16"):
        trainer = PrivateTrainer(
            copy.deepcopy(network),
            schedule_of(q=1.0, steps=1, precision=precision),
            patients=1,
            per_row_loss=per_row_dice_ce,
            source=Planned([(0,)], 1),
        )
        seen: list[torch.Tensor] = []
        assert isinstance(trainer.optimizer, PatientOptimizer)
        trainer.optimizer.attach_step_hook(
            lambda o, seen=seen: seen.append(torch.cat([p.grad.flatten() for p in o.params]))
        )
        trainer.step(lambda _: (image, label))
        assert seen[0].dtype == torch.float32
        found.append(seen[0])
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.1
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lamb"}, "optimizer adam or sgd"),
        ({"precision": "float16"}, "loss scale"),
        ({"clip_norm": 0.0}, "clip norm"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"physical_batch": 0}, "physical batch"),
        ({"public_weight": 1.0}, "public weight"),
        ({"average": 0.0}, "average"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(PrivacyError, match=message):
        schedule_of(**settings)


def test_a_network_that_mixes_patients_or_a_site_without_patients_is_refused():
    with pytest.raises(PrivacyError, match="mixes patients"):
        PrivateTrainer(nn.BatchNorm3d(2), schedule_of(), patients=4, per_row_loss=minus)
    with pytest.raises(PrivacyError, match="at least one patient"):
        PrivateTrainer(Linear(), schedule_of(), patients=0, per_row_loss=minus)


def test_the_rate_warms_up_and_falls_to_zero():
    rates = [rate(done, 40) for done in range(40)]
    assert rates[0] == pytest.approx(0.5)
    assert max(rates) == pytest.approx(rates[1])
    assert all(a > b for a, b in itertools.pairwise(rates[1:]))
    assert 0 < rates[-1] < 0.01
    assert rate(0, 1) == 1


# Planted faults: each must make the test named beside it fail.


def shuffled(count, rate, source=None):
    """The fault: batches of a fixed size."""
    return np.random.default_rng().permutation(count)[: round(count * rate)]


def apart(trainer, index_draw):
    """The fault: each crop is clipped as if it were a patient."""

    def step(draw, public=None):
        def crops(index):
            image, label = draw(index)
            for one in range(len(image) - 1):
                index_draw(trainer, image[one : one + 1], label[one : one + 1])
                trainer.optimizer.add_patient()
            return image[-1:], label[-1:]

        return PrivateTrainer.step(trainer, crops, public)

    return step


def test_planted_fixed_batches_are_found(monkeypatch):
    monkeypatch.setattr("fediod_med.privacy.training.poisson_draw", shuffled)
    with pytest.raises(AssertionError):
        test_draws_are_poisson_and_not_batches_of_a_fixed_size()


def test_planted_clipping_of_crops_apart_is_found(monkeypatch):
    made = PrivateTrainer.__init__

    def init(self, *arguments, **settings):
        made(self, *arguments, **settings)
        monkeypatch.setattr(self, "step", apart(self, PrivateTrainer._backward))

    monkeypatch.setattr(PrivateTrainer, "__init__", init)
    with pytest.raises(AssertionError, match=r"4\.0.* == 0\.5"):  # eight crops moved the sum by 8 C
        test_a_patient_counts_once_however_many_crops_it_has()


def test_a_planted_mean_over_the_drawn_is_found(monkeypatch):
    add_patient = PatientOptimizer.add_patient
    drawn = []

    def counted(self):
        drawn.append(1)
        return add_patient(self)

    def by_the_drawn(self):
        for p in self.params:
            p.grad /= max(1, len(drawn))
        drawn.clear()

    monkeypatch.setattr(PatientOptimizer, "add_patient", counted)
    monkeypatch.setattr(PatientOptimizer, "scale_grad", by_the_drawn)
    with pytest.raises(AssertionError):
        test_a_step_is_the_clipped_sum_over_the_declared_number()


def test_planted_noise_from_a_fixed_seed_is_found(monkeypatch):
    monkeypatch.setattr("fediod_med.privacy.training.OsNoise", lambda: SeededNoise(0))
    with pytest.raises(AssertionError):
        test_two_runs_differ_and_the_weights_carry_the_promised_noise("sgd")


def test_planted_noise_of_half_the_deviation_is_found(monkeypatch):
    normal = OsNoise.normal
    monkeypatch.setattr(OsNoise, "normal", lambda self, shape: normal(self, shape) / 2)
    with pytest.raises(AssertionError):
        test_two_runs_differ_and_the_weights_carry_the_promised_noise("sgd")


def test_without_a_fault_the_same_tests_pass():
    """The five above fail by the fault and not by being called from here."""
    test_draws_are_poisson_and_not_batches_of_a_fixed_size()
    test_a_patient_counts_once_however_many_crops_it_has()
    test_a_step_is_the_clipped_sum_over_the_declared_number()
    test_two_runs_differ_and_the_weights_carry_the_promised_noise("sgd")
