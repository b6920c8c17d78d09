"""The audit of a run: it sees a teacher that learnt by heart, is silent without one, tells how little it knows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss
from torch import nn

from fediod_med.audit_figures import write_audit_figures
from fediod_med.auditing import (
    AUDIT_FILE,
    OneRunAudit,
    RunFiles,
    audit_run,
    discriminator_score,
    loss_score,
    mislabelled_phantoms,
    one_run_audit,
    run_files,
    statements,
)
from fediod_med.checkpoints import Provenance, save_weights
from fediod_med.data.nifti.writing import write_volumes
from fediod_med.data.phantoms import Grid, load_anatomy, write_cohort
from fediod_med.data.sampler import PublicSampler
from fediod_med.data.transforms import preprocessing
from fediod_med.errors import InputError, SettingsError
from fediod_med.networks import PatchDiscriminator, build_segmenter
from fediod_med.sites import Site

CPU = torch.device("cpu")
SPACING = 8.0
GRID = Grid((24, 24, 24), SPACING)
NETWORK: dict[str, Any] = {"backbone": "unet", "width": 8, "depth": 3, "in_channels": 4, "out_channels": 4}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and wait for it where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def phantom_site(folder: Path, name: str, *, patients: int, seed: int) -> Site:
    """A phantom hospital whose every second patient is held out."""
    write_cohort(folder / "data", count=patients, seed=seed, grid=GRID, prefix=name.upper())
    return Site(
        folder=folder,
        site_name=name,
        layout="brats2018",
        label_scheme="brats2018",
        dataset_dir="data",
        folds=2,
        fold=1,
        spacing=SPACING,
        roi=24,
        width=NETWORK["width"],
        depth=NETWORK["depth"],
    )


def volumes(site: Site, *, members: bool) -> list[dict[str, Any]]:
    """Preprocessed training or held-out patients."""
    steps = preprocessing(spacing=site.spacing, with_label=True)
    chosen = site.subjects()[0 if members else 1]
    return [steps({"subject": subject, "scheme": site.label_scheme}) for subject in chosen]


def fit(items: Sequence[dict[str, Any]], *, steps: int, seed: int = 0) -> nn.Module:
    """Train on whole volumes, one a step in turn, without augmentation, rehearsal or noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_segmenter(**NETWORK)
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        criterion = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
        for step in range(steps if items else 0):
            item = items[step % len(items)]
            image, label = (torch.as_tensor(item[key])[None] for key in ("image", "label"))
            optimizer.zero_grad()
            criterion(network(image.float()), label).backward()
            optimizer.step()
    return network.eval()


def save(path: Path, network: nn.Module, sites: Sequence[str], *, epsilon: float | None = None) -> Path:
    mode = "none" if epsilon is None else "dp-sgd"
    entry = {"mode": mode, "epsilon": epsilon, "delta": None if epsilon is None else 1e-5}
    provenance = Provenance(
        kind="teacher",
        network=NETWORK,
        spacing=SPACING,
        label_scheme="brats2018",
        sites=tuple(sites),
        privacy=dict.fromkeys(sites, entry),
        trained_on="phantoms",
        seed=0,
        settings={"roi": 24},
    )
    save_weights(path, network.state_dict(), provenance)
    return path


def write_synthetic(folder: Path, images: Sequence[Any]) -> None:
    for index, image in enumerate(images):
        affine = np.diag([SPACING, SPACING, SPACING, 1.0])
        write_volumes(folder / "synthetic" / f"synthetic-{index:02d}.nii.gz", np.asarray(image), affine)
        write_volumes(folder / "synthetic" / f"synthetic-{index:02d}_labels.nii.gz", np.asarray(image)[0], affine)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> list[Site]:
    """Two hospitals: eight patients and four, half of each held out."""
    folder = tmp_path_factory.mktemp("hospitals")
    return [
        phantom_site(folder / "north", "north", patients=8, seed=1),
        phantom_site(folder / "south", "south", patients=4, seed=2),
    ]


@pytest.fixture(scope="module")
def run(sites: list[Site], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose networks have learnt nothing, and whose synthetic volumes are fresh phantoms."""
    folder = tmp_path_factory.mktemp("run")
    names = [site.site_name for site in sites]
    for name in names:
        save(folder / "teachers" / name / "model.safetensors", fit([], steps=0), [name], epsilon=3.0)
    save(folder / "student.safetensors", fit([], steps=0, seed=1), names, epsilon=3.0)
    fresh = PublicSampler(spacing=SPACING, roi=24, count=3, seed=9, anatomy=load_anatomy(GRID))
    write_synthetic(folder, [image.float() for image, _ in fresh.volumes()])
    return folder


@pytest.fixture(scope="module")
def silent_audit(sites: list[Site], run: Path) -> dict[str, Any]:
    """The audit of that run."""
    names = [site.site_name for site in sites]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        judge = PatchDiscriminator(width=4, layers=1)
    return audit_run(
        sites,
        files=run_files(run, names),
        out=run / "audit",
        reference=save(run / "reference.safetensors", fit([], steps=0, seed=2), []),
        discriminators={"north": discriminator_score(judge, device=CPU)},
        one_run={"teacher:north": OneRunAudit(20, 11, 20, 19, 1.2, 1.8, 1e-5, 0.95, 1.0, True)},
        figures=write_audit_figures,
        device="cpu",
    )


def test_every_target_is_attacked_by_patient(silent_audit: dict[str, Any]) -> None:
    sizes = {(a["target"], a["attack"]): (a["members"], a["non_members"]) for a in silent_audit["attacks"]}
    losses = ("loss", "loss against reference")
    expected = {("teacher:north", a): (4, 4) for a in losses} | {("teacher:south", a): (2, 2) for a in losses}
    expected |= {("student", a): (6, 6) for a in losses}
    expected |= {("student:north", a): (4, 4) for a in losses} | {("student:south", a): (2, 2) for a in losses}
    assert sizes == expected | {("discriminator:north", "realism score"): (4, 4)}


def test_networks_that_never_saw_a_patient_show_no_membership(silent_audit: dict[str, Any]) -> None:
    for attack in silent_audit["attacks"]:
        assert attack["auc_interval"][0] <= 0.5 <= attack["auc_interval"][1], attack["target"]
        assert not attack["contradicts_claim"]
        assert attack["claim"] == {"epsilon": 3.0, "delta": 1e-5}
        assert attack["epsilon"]["epsilon"] <= attack["epsilon"]["ceiling"] < 1  # few patients, and it says so
    assert silent_audit["nearest_neighbour"]["p_value"] > 0.05
    assert (silent_audit["nearest_neighbour"]["synthetic"], silent_audit["nearest_neighbour"]["patients"]) == (3, 6)


def test_sentences_state_numbers_of_patients_ceiling_and_claim(silent_audit: dict[str, Any]) -> None:
    told = silent_audit["statements"]
    first = next(line for line in told if line.startswith("teacher:north, loss:"))
    assert "4 training against 4 held-out patients" in first
    assert "a perfect attack on as many would show" in first
    assert "claimed 3, not contradicted" in first
    assert "Few patients" in first
    assert any("6 training patients" in line and "bounds no epsilon" in line for line in told)
    assert any("19 of 20 guesses right" in line and "CONTRADICTED" in line for line in told)
    assert silent_audit["alarms"] == ["teacher:north, canaries"]


def test_the_file_holds_the_result_and_no_patient(silent_audit: dict[str, Any], run: Path, sites: list[Site]) -> None:
    text = (run / "audit" / AUDIT_FILE).read_text(encoding="utf-8")
    assert json.loads(text) == silent_audit
    for part in (part for site in sites for part in site.subjects()):
        assert not [subject.subject_id for subject in part if subject.subject_id in text]
    assert "not differentially private" in text
    assert {p.name for p in (run / "audit" / "figures").iterdir()} == {"auc.png", "roc.png", "epsilon.png"}


def test_a_copied_training_patient_among_the_synthetic_volumes_is_found(sites: list[Site], tmp_path: Path) -> None:
    copies = [item["image"].as_tensor() for item in volumes(sites[0], members=True)]
    write_synthetic(tmp_path, [torch.roll(copy, (1, -1, 0), (1, 2, 3)).flip(1) for copy in copies])
    found = audit_run(
        sites[:1],
        files=RunFiles({}, None, tuple(sorted((tmp_path / "synthetic").glob("synthetic-??.nii.gz")))),
        out=tmp_path,
        device="cpu",
    )["nearest_neighbour"]
    assert found["share_nearer_train"] == 1
    assert found["median"][0] < 0.05 < found["median"][1]
    assert found["p_value"] == pytest.approx(1 / 70)  # the least that four against four can give


def test_an_overfitted_teacher_is_seen(tmp_path: Path) -> None:
    """Eight patients learnt by heart without noise: the whole interval lies above guessing."""
    site = phantom_site(tmp_path / "east", "east", patients=16, seed=3)
    members = volumes(site, members=True)
    weights = save(tmp_path / "model.safetensors", fit(members, steps=320), ["east"])
    result = audit_run([site], files=RunFiles({"east": weights}), out=tmp_path / "audit", device="cpu")
    (attack,) = result["attacks"]
    assert (attack["target"], attack["members"], attack["non_members"]) == ("teacher:east", 8, 8)
    assert attack["auc_interval"][0] > 0.5
    assert attack["p_value"] < 0.01
    assert attack["claim"] is None and not attack["contradicts_claim"]  # it promised nothing
    assert "tells training patients from others" in result["statements"][0]


def test_a_promise_that_training_by_heart_breaks_raises_an_alarm(tmp_path: Path) -> None:
    """The statistics alone: perfect separation of 60 against 60 under a claim of .1."""
    from fediod_med.auditing import _attack

    found = _attack("t", "loss", range(60, 120), range(60), {"epsilon": 0.1, "delta": 1e-5}, **SETTINGS)
    assert found["contradicts_claim"]
    assert not _attack("t", "loss", range(60, 120), range(60), {"epsilon": 8, "delta": 1e-5}, **SETTINGS)[
        "contradicts_claim"
    ]


SETTINGS: dict[str, Any] = {"delta": 1e-5, "confidence": 0.95, "seed": 0}


def test_canaries_in_one_training_show_a_teacher_without_noise() -> None:
    pool = PublicSampler(spacing=16.0, roi=16, count=24, seed=4)
    canaries = mislabelled_phantoms(pool, seed=5)

    def score(network: nn.Module, canary: dict[str, Any]) -> float:
        return loss_score(network, canary["image"], canary["label"], roi=16, device=CPU)

    def coins(count: int) -> list[bool]:
        return np.random.default_rng(6).integers(0, 2, count).astype(bool).tolist()

    learnt = one_run_audit(
        lambda chosen: fit(chosen, steps=240), canaries, score_fn=score, claimed_epsilon=0.1, coins=coins
    )
    assert learnt.correct >= 20
    assert learnt.epsilon_lower_bound > 0.5 and learnt.contradicts_claim
    blind = one_run_audit(lambda _: fit([], steps=0), canaries, score_fn=score, coins=coins)
    assert blind.epsilon_lower_bound == 0


def test_mislabelled_canaries_are_fixed_by_their_seed_and_unexplained_by_the_image() -> None:
    pool = PublicSampler(spacing=16.0, roi=16, count=3, seed=4)
    first, again, other = (mislabelled_phantoms(pool, seed=seed) for seed in (1, 1, 2))
    for item, same, different, (image, classes) in zip(first, again, other, pool.volumes(), strict=True):
        assert torch.equal(item["image"], image.float())
        assert torch.equal(item["label"], same["label"]) and not torch.equal(item["label"], different["label"])
        assert item["label"].shape == (1, *classes.shape) and item["label"].dtype == torch.uint8
        assert bool((item["label"] > 0).any()) and int(item["label"].max()) <= 3
        assert not torch.equal(item["label"][0], classes)


def test_the_loss_score_is_higher_for_the_truth() -> None:
    truth = torch.randint(0, 4, (1, 8, 8, 8), generator=torch.Generator().manual_seed(0))

    class Oracle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 20 * nn.functional.one_hot(x[:, 0].long(), 4).movedim(-1, 1).float()

    image = truth.float().expand(4, -1, -1, -1)
    right = loss_score(Oracle(), image, truth, roi=8, device=CPU)
    wrong = loss_score(Oracle(), image, (truth + 1) % 4, roi=8, device=CPU)
    assert right == pytest.approx(0, abs=1e-3)
    assert wrong < -5


def test_the_discriminator_score_is_its_mean_logit() -> None:
    judge = PatchDiscriminator(width=4, layers=1).eval()
    volume = torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = float(judge(volume).mean())
    assert discriminator_score(judge, device=CPU)(volume) == pytest.approx(expected)


def test_a_run_folder_is_read_as_it_is_written(run: Path) -> None:
    files = run_files(run, ["north", "south", "absent"])
    assert sorted(files.teachers) == ["north", "south"]
    assert files.student == run / "student.safetensors"
    assert [path.name for path in files.synthetic] == [f"synthetic-{i:02d}.nii.gz" for i in range(3)]
    with pytest.raises(InputError, match="expected teachers"):
        run_files(run / "teachers", ["absent"])


def test_without_held_out_patients_there_is_nothing_to_compare(sites: list[Site], run: Path, tmp_path: Path) -> None:
    whole = dataclasses.replace(sites[1], folds=1, fold=0)
    files = run_files(run, ["north", "south"])
    with pytest.raises(SettingsError, match="south: no held-out patients"):
        audit_run([whole], files=files, out=tmp_path, device="cpu")
    result = audit_run([sites[0], whole], files=dataclasses.replace(files, synthetic=()), out=tmp_path, device="cpu")
    assert result["skipped"] == ["south: no held-out patients; set folds: 2 or more"]
    assert {attack["target"] for attack in result["attacks"]} == {"teacher:north", "student", "student:north"}
    assert result["nearest_neighbour"] is None


def test_settings_of_another_run_are_refused(sites: list[Site], run: Path, tmp_path: Path) -> None:
    files = run_files(run, ["north"])
    coarser = dataclasses.replace(sites[0], spacing=12.0)
    with pytest.raises(SettingsError, match="teacher:north: works at 8 mm"):
        audit_run([coarser], files=dataclasses.replace(files, synthetic=()), out=tmp_path, device="cpu")
    with pytest.raises(SettingsError, match=r"synthetic-00.*8\.0"):
        audit_run([coarser], files=files, out=tmp_path, device="cpu")


def test_the_weakest_promise_counts_for_the_student(sites: list[Site], run: Path, tmp_path: Path) -> None:
    network = fit([], steps=0)
    path = save(tmp_path / "student.safetensors", network, ["north", "south"], epsilon=2.0)
    half = dataclasses.replace(
        Provenance(**{**_provenance(path), "privacy": {**_provenance(path)["privacy"], "south": {"epsilon": None}}})
    )
    save_weights(path, network.state_dict(), half)
    result = audit_run(sites, files=RunFiles({}, path), out=tmp_path, device="cpu")
    claims = {attack["target"]: attack["claim"] for attack in result["attacks"]}
    assert claims == {"student": None, "student:north": {"epsilon": 2.0, "delta": 1e-5}, "student:south": None}
    assert statements(result) == result["statements"]


def _provenance(path: Path) -> dict[str, Any]:
    from fediod_med.checkpoints import read_provenance

    found = read_provenance(path)
    return {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
