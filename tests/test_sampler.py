"""The public sampler: batches fixed by the step, crops inside the volume, classes that follow tissues."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fediod_med.data.phantoms import TISSUES, Anatomy, Grid, load_anatomy, tumour_classes
from fediod_med.data.sampler import PublicSampler, centre_window, training_grid, upright
from fediod_med.errors import SettingsError


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return load_anatomy(Grid((24, 24, 24), 8.0))


@pytest.fixture(scope="module")
def sampler(anatomy: Anatomy) -> PublicSampler:
    return PublicSampler(spacing=8, roi=12, count=3, seed=1, anatomy=anatomy)


def test_the_same_step_gives_the_same_batch(sampler: PublicSampler, anatomy: Anatomy) -> None:
    again = PublicSampler(spacing=8, roi=12, count=3, seed=1, anatomy=anatomy)
    sampler.draw(9, 2)
    first, second = sampler.draw(4, 3), again.draw(4, 3)
    assert torch.equal(first.base, second.base) and torch.equal(first.tissues, second.tissues)
    assert not torch.equal(first.base, sampler.draw(5, 3).base)
    assert not torch.equal(
        first.base, PublicSampler(spacing=8, roi=12, count=3, seed=2, anatomy=anatomy).draw(4, 3).base
    )


def test_a_pool_made_in_parts_draws_as_the_whole(sampler: PublicSampler, anatomy: Anatomy) -> None:
    parts = [
        PublicSampler(spacing=8, roi=12, count=count, seed=1, first=first, anatomy=anatomy)
        for first, count in ((0, 1), (1, 2))
    ]
    images, tissues = zip(*(volume for part in parts for volume in zip(*part.pool(), strict=True)), strict=True)
    joined = PublicSampler.of_pool(images, tissues, roi=12, seed=1)
    assert len(joined) == 3
    for step in range(1, 6):
        one, other = sampler.draw(step, 2), joined.draw(step, 2)
        assert torch.equal(one.base, other.base) and torch.equal(one.tissues, other.tissues)
        assert torch.equal(one.phantoms, other.phantoms)


def test_batches_are_the_draws_in_order(sampler: PublicSampler) -> None:
    for step, batch in enumerate(sampler.batches(3, 2), start=1):
        assert torch.equal(batch.base, sampler.draw(step, 2).base)


def test_batches_are_plain_tensors_of_the_stated_kind(sampler: PublicSampler) -> None:
    """A MetaTensor would slow every step and could not be read back from a checkpoint."""
    batch = sampler.draw(1, 2)
    assert type(batch.base) is type(batch.tissues) is type(batch.classes) is torch.Tensor
    assert batch.base.shape == (2, 4, 12, 12, 12) and batch.base.dtype == torch.float32
    assert batch.tissues.shape == batch.classes.shape == (2, 12, 12, 12)
    assert batch.tissues.dtype == batch.classes.dtype == torch.int64


def test_classes_follow_tissues_and_the_image_is_zero_outside_the_brain(sampler: PublicSampler) -> None:
    for step in range(1, 9):
        batch = sampler.draw(step, 2)
        assert np.array_equal(batch.classes.numpy(), tumour_classes(batch.tissues.numpy().astype(np.uint8)))
        assert int(batch.tissues.max()) < len(TISSUES)
        outside = (batch.tissues == 0)[:, None].expand_as(batch.base)
        assert (batch.base[outside] == 0).all()
        assert (batch.base[~outside] != 0).float().mean() > 0.99


def test_volumes_are_z_scored_inside_the_brain(sampler: PublicSampler) -> None:
    assert len(sampler) == 3
    for image, classes in sampler.volumes():
        assert image.shape == (4, 24, 24, 24) and classes.shape == (24, 24, 24) and classes.any()
        for channel in image.float():
            inside = channel[channel != 0]
            assert abs(inside.mean()) < 0.01 and abs(inside.std() - 1) < 0.01


def test_every_crop_is_a_flipped_part_of_a_volume(sampler: PublicSampler) -> None:
    volumes = [image.float() for image, _ in sampler.volumes()]
    crop = next(b for b in (sampler.draw(step, 1).base[0] for step in range(1, 50)) if (b != 0).float().mean() > 0.5)
    flips = [crop.flip([a + 1 for a in range(3) if bits >> a & 1]) for bits in range(8)]
    windows = [v.unfold(1, 12, 1).unfold(2, 12, 1).unfold(3, 12, 1) for v in volumes]
    centres = [(w[..., 6, 6, 6], flip) for w in windows for flip in flips]
    assert any(((centre == flip[:, 6, 6, 6].view(4, 1, 1, 1)).all(dim=0)).any() for centre, flip in centres)


def test_about_half_of_the_crops_are_centred_on_tumour(sampler: PublicSampler, anatomy: Anatomy) -> None:
    """Against crops at random places: a tumour voxel lies in the middle far more often."""

    def share(of: PublicSampler) -> float:
        middles = [of.draw(step, 8).classes[:, 5:7, 5:7, 5:7].flatten(1).any(dim=1).float() for step in range(1, 26)]
        return float(torch.cat(middles).mean())

    assert 0.4 < share(sampler) < 0.75
    whole = PublicSampler(spacing=8, roi=24, count=3, seed=1, anatomy=anatomy)
    assert whole.draw(1, 4).classes.flatten(1).any(dim=1).all()


def test_a_crop_larger_than_the_volume_is_padded_with_background(anatomy: Anatomy) -> None:
    padded = PublicSampler(spacing=8, roi=32, count=1, seed=1, anatomy=anatomy)
    plain = PublicSampler(spacing=8, roi=24, count=1, seed=1, anatomy=anatomy)
    image, classes = next(padded.volumes())
    small, small_classes = next(plain.volumes())
    assert image.shape == (4, 32, 32, 32)
    assert torch.equal(image[:, 4:28, 4:28, 4:28], small) and torch.equal(classes[4:28, 4:28, 4:28], small_classes)
    assert image.count_nonzero() == small.count_nonzero()
    batch = padded.draw(1, 2)
    assert batch.base.shape == (2, 4, 32, 32, 32) and batch.tissues.shape == (2, 32, 32, 32)


def test_progress_is_reported(anatomy: Anatomy) -> None:
    seen: list[tuple[int, int]] = []
    PublicSampler(spacing=8, roi=8, count=2, seed=0, anatomy=anatomy, progress=lambda i, n: seen.append((i, n)))
    assert seen == [(1, 2), (2, 2)]


def test_an_empty_pool_is_refused(anatomy: Anatomy) -> None:
    with pytest.raises(SettingsError, match="at least one phantom"):
        PublicSampler(spacing=8, roi=8, count=0, seed=0, anatomy=anatomy)


@pytest.mark.parametrize("spacing", [1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
def test_the_training_grid_holds_a_head_in_multiples_of_eight(spacing: float) -> None:
    grid = training_grid(spacing)
    assert all(edge % 8 == 0 for edge in grid.shape)
    assert all(edge * spacing >= 192 for edge in grid.shape)


def test_a_pool_that_was_kept_draws_as_the_one_that_was_made(sampler: PublicSampler) -> None:
    kept = PublicSampler.of_pool(*sampler.pool(), roi=12, seed=1)
    for step in (1, 7):
        assert torch.equal(kept.draw(step, 2).base, sampler.draw(step, 2).base)
        assert torch.equal(kept.draw(step, 2).classes, sampler.draw(step, 2).classes)


def test_an_upright_batch_lies_as_the_phantoms_do(sampler: PublicSampler) -> None:
    """Each upright crop is found unchanged in the very phantom it names; mirrored ones among them are not."""
    images, tissues = sampler.pool()
    mirrored = 0
    for step in range(1, 5):
        drawn = sampler.draw(step, 2)
        batch = drawn.upright()
        assert not batch.mirrored.any()
        mirrored += int(drawn.mirrored.any(dim=1).sum())
        for i, number in enumerate(batch.phantoms.tolist()):
            windows = tissues[number].unfold(0, 12, 1).unfold(1, 12, 1).unfold(2, 12, 1).flatten(0, 2)
            at = (windows.long() == batch.tissues[i]).flatten(1).all(dim=1).nonzero().flatten()
            scans = images[number].unfold(1, 12, 1).unfold(2, 12, 1).unfold(3, 12, 1).flatten(1, 3)
            assert any(torch.equal(scans[:, j].float(), batch.base[i]) for j in at)
    assert mirrored > 4


def test_uprighting_twice_and_without_mirroring_changes_nothing(sampler: PublicSampler) -> None:
    once = sampler.draw(3, 4).upright()
    assert torch.equal(once.upright().base, once.base)
    x = torch.arange(2 * 8.0).reshape(2, 2, 2, 2)
    turned = upright(x, torch.tensor([[True, False, False], [False, False, True]]))
    assert torch.equal(turned[0], x[0].flip(0)) and torch.equal(turned[1], x[1].flip(2))


def test_the_middle_of_the_brain_not_of_the_grid() -> None:
    image = torch.zeros(4, 20, 20, 20)
    image[1, 2:6, 10:14, 16:20] = 1
    assert centre_window(image, 6) == (slice(1, 7), slice(9, 15), slice(14, 20))
    assert centre_window(torch.zeros(4, 8, 8, 8), 4) == (slice(2, 6),) * 3
