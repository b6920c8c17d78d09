"""The public-anatomy simulator: anatomy, growth, rendering, cohorts on disk."""

from __future__ import annotations

import ast
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fediod_med.data import phantoms
from fediod_med.data.phantoms import (
    PUBLIC_PRIOR,
    TISSUES,
    Anatomy,
    Grid,
    Profile,
    TissueMap,
    fisher_kpp_step,
    grow,
    hospital_profiles,
    load_anatomy,
    mass_effect,
    render,
    simulate,
    tumour_classes,
    write_cohort,
)
from fediod_med.errors import SettingsError
from fediod_med.labels import get_scheme, to_classes


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return load_anatomy(Grid())


@pytest.fixture(scope="module")
def cases(anatomy: Anatomy) -> list[TissueMap]:
    return [grow(anatomy, seed) for seed in range(12)]


def block(size: float) -> np.ndarray:
    array = np.zeros((2, 1, 1), dtype=np.float32)
    array[0] = size
    return array


# --- growth equation --------------------------------------------------------------------------------------------------


def test_one_step_equals_the_equation_on_two_voxels():
    u = block(0.5)
    even = fisher_kpp_step(u, np.ones_like(u), 1.0, dt=0.1, spacing=1.0)
    np.testing.assert_allclose(even.ravel(), [0.5 + 0.1 * (0.25 - 0.5), 0.1 * 0.5], rtol=1e-6)
    # Harmonic mean of 1 and 3 is 1.5; at 2 mm the flux falls by 4.
    uneven = fisher_kpp_step(u, np.array([1, 3], dtype=np.float32).reshape(2, 1, 1), 0.0, dt=0.1, spacing=2.0)
    np.testing.assert_allclose(uneven.ravel(), [0.5 - 0.1 * 1.5 * 0.5 / 4, 0.1 * 1.5 * 0.5 / 4], rtol=1e-6)


def test_nothing_enters_tissue_without_diffusivity():
    stepped = fisher_kpp_step(block(0.5), block(1.0), 0.0, dt=0.1, spacing=1.0)
    np.testing.assert_array_equal(stepped.ravel(), np.float32([0.5, 0.0]))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_diffusion_alone_keeps_the_sum_and_growth_adds_it(seed: int):
    rng = np.random.default_rng(seed)
    u = rng.random((5, 6, 7)).astype(np.float32)
    d = rng.random((5, 6, 7)).astype(np.float32)
    still = fisher_kpp_step(u, d, 0.0, dt=0.15, spacing=1.0)
    assert still.sum(dtype=np.float64) == pytest.approx(u.sum(dtype=np.float64), rel=1e-5)
    assert still.min() >= 0 and still.max() <= 1
    grown = fisher_kpp_step(u, d, 0.2, dt=0.15, spacing=1.0)
    added = 0.15 * 0.2 * (u * (1 - u)).sum(dtype=np.float64)
    assert grown.sum(dtype=np.float64) - still.sum(dtype=np.float64) == pytest.approx(added, rel=1e-4)


def test_front_moves_at_the_speed_of_the_theory():
    diffusivity = np.full((400, 1, 1), 1.0, dtype=np.float32)
    u = np.zeros_like(diffusivity)
    u[:10] = 1
    fronts = []
    for step in range(1, 2001):
        u = fisher_kpp_step(u, diffusivity, 0.05, dt=0.2, spacing=1.0)
        if step in (1000, 2000):
            fronts.append(np.count_nonzero(u > 0.5))
    speed = (fronts[1] - fronts[0]) / 200
    assert speed == pytest.approx(2 * np.sqrt(0.05), rel=0.1)  # 2 sqrt(D rho), reached from below


# --- mass effect ------------------------------------------------------------------------------------------------------


def test_mass_effect_pushes_a_marker_away_from_the_tumour():
    axis = np.arange(-40, 41, dtype=np.float32)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))
    inside = np.ones(points.shape[1:], dtype=np.float32)
    moved = mass_effect(points, np.zeros(3, dtype=np.float32), 15.0, 0.5, inside)
    # The tissue that sat at 10 mm is found where the source coordinate equals 10 mm.
    found = axis[np.abs(moved[0, :, 40, 40] - 10).argmin()]
    expected = 10.0
    for _ in range(50):
        expected = 10 / (1 - 0.5 * np.exp(-((expected / 24) ** 2)))
    assert expected > 13
    assert found == pytest.approx(expected, abs=1)
    assert (np.diff(moved[0, :, 40, 40]) > 0).all()  # one-to-one
    np.testing.assert_array_equal(mass_effect(points, np.zeros(3), 15.0, 0.0, inside), points)
    np.testing.assert_array_equal(mass_effect(points, np.zeros(3), 15.0, 0.5, 0 * inside), points)


def test_profile_with_mass_effect_changes_the_healthy_tissue(anatomy: Anatomy):
    still = grow(anatomy, 3, Profile("still", mass_effect=(0.0, 0.0), tumour_ml=(120.0, 120.0)))
    pushed = grow(anatomy, 3, Profile("pushed", mass_effect=(0.5, 0.5), tumour_ml=(120.0, 120.0)))
    moved = np.abs(still.ventricle - pushed.ventricle)
    assert moved.sum() > 0.02 * still.ventricle.sum()


# --- anatomy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [Grid(), Grid((64, 76, 64), 3.0), Grid((26, 26, 26), 8.0)])
def test_anatomy_holds_the_whole_brain_at_every_spacing(grid: Grid):
    anatomy = load_anatomy(grid)
    volumes = anatomy.fractions.sum((1, 2, 3), dtype=np.float64) * grid.spacing**3 / 1000
    assert volumes.sum() == pytest.approx(1890, rel=0.01)  # ml, the MNI152 head mask
    assert 800 < volumes[1] < 1100 and 550 < volumes[2] < 850 and volumes[0] > 100
    cover = anatomy.fractions.sum(0)
    assert anatomy.fractions.min() >= 0
    assert cover.max() < 1.01
    faces = np.concatenate([np.take(cover, i, axis).ravel() for axis in range(3) for i in (0, -1)])
    assert faces.max() < 0.05
    assert 10 < anatomy.ventricle.sum() * grid.spacing**3 / 1000 < 80


@pytest.mark.parametrize("grid", [Grid(), Grid((50, 70, 40), 2.5)])
def test_affine_is_ras_and_centred_on_the_head(grid: Grid):
    affine = grid.affine()
    assert nib.aff2axcodes(affine) == ("R", "A", "S")
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), grid.spacing)
    middle = affine @ [*((np.array(grid.shape) - 1) / 2), 1]
    np.testing.assert_allclose(middle[:3], phantoms.HEAD_CENTRE)


def test_a_structure_keeps_its_world_position_between_grids():
    centres = []
    for grid in (Grid(), Grid((64, 76, 64), 3.0)):
        ventricle = load_anatomy(grid).ventricle
        index = np.array([(np.indices(grid.shape)[k] * ventricle).sum() / ventricle.sum() for k in range(3)])
        centres.append((grid.affine() @ [*index, 1])[:3])
    np.testing.assert_allclose(*centres, atol=1.5)
    assert abs(centres[0][0]) < 1  # the average brain is symmetric


def test_impossible_grids_and_profiles_are_refused():
    for shape, spacing in (((48, 48, 0), 4.0), ((48, 48, 48), 0.0), ((4, 4, 4), 4.0)):
        with pytest.raises(SettingsError, match="grid"):
            Grid(shape, spacing)
    with pytest.raises(SettingsError, match="means"):
        Profile("short", means=((1.0,),))


# --- label maps -------------------------------------------------------------------------------------------------------


def test_same_seed_same_patient_other_seed_other_patient(anatomy: Anatomy):
    a, b, c = simulate(anatomy, 5), simulate(anatomy, 5), simulate(anatomy, 6)
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.tissues, b.tissues)
    assert (a.tissues != c.tissues).mean() > 0.01


def test_labels_and_shares_agree(cases: list[TissueMap]):
    for case in cases:
        assert case.tissues.dtype == np.uint8 and case.tissues.max() < len(TISSUES)
        np.testing.assert_allclose(case.fractions.sum(0), 1, atol=1e-4)
        assert case.fractions.min() >= -1e-6
        brain = case.tissues > 0
        np.testing.assert_array_equal(brain, case.fractions[0] < 0.9999)
        tumour = case.fractions[4:].sum(0)
        assert (tumour[tumour_classes(case.tissues) > 0] > 0.25).all()
        assert (tumour[tumour_classes(case.tissues) == 0] <= 0.75).all()
        assert np.all(case.density[~brain] == 0)


def test_tumour_lies_inside_the_brain_and_grows_where_cells_are(cases: list[TissueMap]):
    for case in cases:
        tumour = tumour_classes(case.tissues) > 0
        assert tumour.any()
        assert (case.fractions[0][tumour] < 0.9).all()
        assert case.density[tumour].mean() > 10 * case.density[(case.tissues > 0) & ~tumour].mean()


def test_core_is_surrounded_by_oedema_and_denser_than_it(cases: list[TissueMap]):
    for case in cases:
        classes = tumour_classes(case.tissues)
        core, oedema = np.isin(classes, (1, 3)), classes == 2
        assert core.any() and oedema.any()
        assert case.density[core].mean() > case.density[oedema].mean()


def test_class_map_follows_the_tissue_table():
    np.testing.assert_array_equal(tumour_classes(np.arange(7, dtype=np.uint8)), [0, 0, 0, 0, 1, 2, 3])


def test_volumes_are_plausible(cases: list[TissueMap]):
    for case in cases:
        ml = np.bincount(case.tissues.ravel(), minlength=7) * case.grid.spacing**3 / 1000
        assert 1100 < ml[1:].sum() < 2300
        low, high = PUBLIC_PRIOR.tumour_ml
        assert 0.4 * low < ml[4:].sum() < 1.15 * high
    assert np.std([np.count_nonzero(tumour_classes(c.tissues)) for c in cases]) > 100


def test_requested_volume_is_met(anatomy: Anatomy):
    profile = Profile(
        "fixed", tumour_ml=(80.0, 80.0), core_share=(0.5, 0.5), necrosis_share=(0.4, 0.4), non_enhancing=0.0
    )
    found = np.array(
        [np.bincount(tumour_classes(grow(anatomy, s, profile).tissues).ravel(), minlength=4) for s in range(6)]
    )
    ml = found[:, 1:] * 0.064
    assert np.median(ml.sum(1)) == pytest.approx(80, rel=0.15)
    assert np.median((ml[:, 0] + ml[:, 2]) / ml.sum(1)) == pytest.approx(0.5, abs=0.1)
    assert np.median(ml[:, 0] / (ml[:, 0] + ml[:, 2])) == pytest.approx(0.4, abs=0.12)


def test_the_same_patient_at_two_grids_has_the_same_kind_of_tumour():
    profile = Profile("fixed", tumour_ml=(60.0, 60.0))
    for grid in (Grid(), Grid((96, 112, 96), 2.0)):
        case = grow(load_anatomy(grid), 2, profile)
        ml = np.count_nonzero(tumour_classes(case.tissues)) * grid.spacing**3 / 1000
        assert ml == pytest.approx(60, rel=0.2)
        assert render(case, 2, profile).shape == (4, *grid.shape)


# --- scans ------------------------------------------------------------------------------------------------------------


def test_scan_is_positive_inside_and_exactly_zero_outside(cases: list[TissueMap]):
    for seed, case in enumerate(cases[:5]):
        image = render(case, seed)
        assert image.dtype == np.float32 and image.shape == (4, *case.grid.shape)
        assert np.isfinite(image).all()
        for sequence in image:
            np.testing.assert_array_equal(sequence > 0, case.tissues > 0)
            assert sequence.min() == 0


def test_other_render_seeds_scan_the_same_map_differently(cases: list[TissueMap]):
    before = cases[0].fractions.copy()
    a, b = render(cases[0], 1), render(cases[0], 2)
    brain = cases[0].tissues > 0
    for s in range(4):
        assert abs(np.corrcoef(a[s][brain], b[s][brain])[0, 1]) < 0.98
    np.testing.assert_array_equal(cases[0].fractions, before)
    np.testing.assert_array_equal(a, render(cases[0], 1))


def test_contrasts_are_those_of_the_sequences(anatomy: Anatomy):
    """Fluid bright on T2 and dark on FLAIR and T1; enhancement on T1c alone; oedema bright on FLAIR."""
    profile = Profile(
        "mean", tumour_ml=(150.0, 150.0), non_enhancing=0.0, necrosis_share=(0.3, 0.5), core_share=(0.4, 0.6)
    )
    ranks = []
    for seed in range(8):
        case = grow(anatomy, seed, profile)
        image = render(case, seed, profile)
        mean = np.array([[image[s][(case.fractions[t] > 0.8)].mean() for t in (1, 2, 3, 5, 6)] for s in range(4)])
        ranks.append(mean / mean[:, 2:3])
    t1c, t1, t2, flair = np.median(ranks, axis=0)
    csf, grey, white, oedema, enhancing = range(5)
    assert t2[csf] > t2[grey] > t2[white] < t2[oedema]
    assert flair[csf] < flair[white] < flair[oedema]
    assert t1[csf] < t1[grey] < t1[white] and t1[oedema] < 1
    assert t1c[enhancing] > 1.1 > t1[enhancing]


# --- hospitals --------------------------------------------------------------------------------------------------------


def test_hospitals_differ_measurably(anatomy: Anatomy):
    profiles = {p.name: p for p in hospital_profiles()}
    assert len(profiles) >= 4
    whole, enhancing, scale, noise = {}, {}, {}, {}
    for name, profile in profiles.items():
        maps = [grow(anatomy, s, profile) for s in range(6)]
        images = [render(m, s, profile) for s, m in enumerate(maps)]
        counts = np.array([np.bincount(tumour_classes(m.tissues).ravel(), minlength=4)[1:] for m in maps])
        whole[name] = np.median(counts.sum(1)) * 0.064
        enhancing[name] = np.median(counts[:, 2] / np.maximum(counts[:, 0] + counts[:, 2], 1))
        scale[name] = np.median([i[1][m.tissues > 0].mean() for i, m in zip(images, maps, strict=True)])
        noise[name] = np.median(
            [
                np.diff(i[1], axis=0)[np.minimum(m.fractions[3][1:], m.fractions[3][:-1]) > 0.9].std()
                / i[1][m.fractions[3] > 0.9].mean()
                for i, m in zip(images, maps, strict=True)
            ]
        )
    assert enhancing["lower-grade"] < 0.1 < 0.5 < enhancing["academic-3t"]
    assert whole["thick-slices"] > 2 * whole["academic-3t"]
    assert noise["community-1t"] > 2 * noise["academic-3t"]
    assert scale["lower-grade"] > 20 * scale["inverted-contrast"]


# --- cohorts on disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "suffixes", "top"),
    [("brats2018", ("t1ce", "t1", "t2", "flair", "seg"), 4), ("brats2023", ("t1c", "t1n", "t2w", "t2f", "seg"), 3)],
)
def test_cohort_round_trips_from_disk(tmp_path: Path, layout: str, suffixes: tuple[str, ...], top: int):
    grid = Grid((40, 48, 40), 4.5)
    profile = hospital_profiles()[0]
    folders = write_cohort(tmp_path, count=2, seed=4, grid=grid, profile=profile, prefix="NORTH", layout=layout)
    joint = "_" if layout == "brats2018" else "-"
    if layout == "brats2018":
        assert [f.relative_to(tmp_path).as_posix() for f in folders] == [
            "HGG/Brats18_NORTH_1_1",
            "HGG/Brats18_NORTH_2_1",
        ]
    else:
        assert all(f.name.startswith("BraTS-GLI-") and f.name.endswith("-000") for f in folders)
    assert len(set(folders)) == 2
    for i, folder in enumerate(folders):
        seed = int(np.random.SeedSequence([4, i]).generate_state(1)[0])
        phantom = simulate(load_anatomy(grid), seed, profile)
        *scans, seg = (nib.load(folder / f"{folder.name}{joint}{suffix}.nii.gz") for suffix in suffixes)
        values = np.asarray(seg.dataobj)
        assert seg.get_data_dtype() == np.uint8 and values.max() == top
        np.testing.assert_array_equal(to_classes(values, get_scheme(layout), folder.name), phantom.classes)
        for s, scan in enumerate(scans):
            data = np.asarray(scan.dataobj)
            assert scan.get_data_dtype() == np.int16 and data.min() == 0
            np.testing.assert_array_equal(data > 0, phantom.tissues > 0)
            np.testing.assert_allclose(data, phantom.image[s], atol=1.001)
        for image in (*scans, seg):
            np.testing.assert_allclose(image.affine, grid.affine(), atol=1e-4)
            assert image.shape == grid.shape
            assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
            np.testing.assert_allclose(image.header.get_zooms(), 4.5)


def test_longer_cohort_begins_with_the_shorter_one(tmp_path: Path):
    profile = next(p for p in hospital_profiles() if p.name == "lower-grade")
    short = write_cohort(tmp_path / "a", count=1, seed=9, profile=profile, prefix="SOUTH")
    long = write_cohort(tmp_path / "b", count=2, seed=9, profile=profile, prefix="SOUTH")
    assert [f.parent.name for f in long] == ["LGG", "LGG"]
    for path in sorted(short[0].iterdir()):
        a, b = (np.asarray(nib.load(f / path.name).dataobj) for f in (short[0], long[0]))
        np.testing.assert_array_equal(a, b)


def test_unknown_layout_and_bad_prefix_are_refused(tmp_path: Path):
    with pytest.raises(SettingsError, match="brats2018, brats2023"):
        write_cohort(tmp_path, count=1, seed=0, prefix="A", layout="brats1999")
    with pytest.raises(SettingsError, match="prefix"):
        write_cohort(tmp_path, count=1, seed=0, prefix="../A")
    assert not any(tmp_path.iterdir())


def test_nothing_but_the_public_anatomy_is_read():
    """The module opens files of the anatomy package only, and reads no cohort."""
    tree = ast.parse(Path(phantoms.__file__).read_text(encoding="utf-8"))
    loads = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "load"]
    assert len(loads) == 1
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {n for n in names if n and n.startswith("fediod_med")} == {"fediod_med.errors", "fediod_med.labels"}
