"""A private run from site file to summary: what is charged, what is refused, what survives, and what verifies."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fediod_med.checkpoints import load_segmenter, load_state, read_provenance, save_weights, weights_digest
from fediod_med.claims import check_claim, find_claims
from fediod_med.data.phantoms import Grid, hospital_profiles, write_cohort
from fediod_med.data.sampler import PublicSampler
from fediod_med.distillation.settings import Schedule
from fediod_med.errors import BudgetExceeded, InputError, PrivacyError, ProtocolError, SettingsError
from fediod_med.federation.critic import PlainCritic, PrivateCritic
from fediod_med.federation.critic_design import CriticDesign
from fediod_med.federation.embedded import EmbeddedFederation
from fediod_med.federation.node import SiteNode
from fediod_med.hospitals import Hospital, announcement, open_hospital, open_node
from fediod_med.networks import build_segmenter
from fediod_med.privacy import noise, training
from fediod_med.privacy.accounting import rdp_epsilon
from fediod_med.privacy.discriminator import DiscriminatorPlan
from fediod_med.privacy.gate import Gate, Sealed
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.records import Head
from fediod_med.protocol import Query, Reply, SiteFailure, pack, unpack
from fediod_med.runs.distill import run_distillation
from fediod_med.site_gate import open_gate, site_policy
from fediod_med.sites import Site, load_site, load_sites
from fediod_med.teacher import train_teacher

CPU = torch.device("cpu")
TINY = Schedule(rounds=4, student_steps=1, checkpoint_every=2)
SIZE = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phantom hospitals of four patients; one patient of h0 came twice."""
    root = tmp_path_factory.mktemp("hospitals")
    for number, profile in enumerate(hospital_profiles()[:2]):
        folder = root / f"h{number}"
        write_cohort(folder, count=4, seed=number, grid=Grid((32, 32, 32), 6.0), profile=profile, prefix=f"H{number}")
    return root


def site_files(root: Path, data: Path, **settings: str) -> Path:
    """Site files with a budget, below `root`."""
    privacy = {
        "epsilon": "8.0",
        "private_steps": "2",
        "subspace": "2",
        "discriminator_steps": "2",
        "crops": "1",
        "rehearsal": "0.0",
    } | settings
    for name in ("h0", "h1"):
        (root / name).mkdir(parents=True)
        (root / name / "site.yaml").write_text(
            f"site_name: {name}\nlayout: brats2018\nlabel_scheme: brats2018\ndataset_dir: {data / name}\nfolds: 2\n"
            "spacing: 6.0\nroi: 32\nepochs: 1\nsteps_per_epoch: 1\nbackbone: unet\nwidth: 16\n"
            + "".join(f"{key}: {value}\n" for key, value in privacy.items())
        )
    return root


@pytest.fixture
def site(tmp_path: Path, data: Path) -> Site:
    return load_site(site_files(tmp_path / "sites", data) / "h0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A finished private run; its site files lie in `sites` beside its folder."""
    root = tmp_path_factory.mktemp("private")
    sites = load_sites(site_files(root / "sites", data, rehearsal="0.5"))
    said: list[str] = []
    run_distillation(
        sites,
        out=root / "run",
        schedule=TINY,
        pool=3,
        data_name="phantoms",
        device="cpu",
        announce=said.append,
    )
    assert [line.split(":")[0] for line in said] == ["h0", "h1"]
    assert all("mode dp-sgd, 2 patients" in line and "budget 8, nothing spent before" in line for line in said)
    return root / "run"


# --- the policy -------------------------------------------------------------------------------------------------------


def test_the_policy_spends_the_budget_on_all_parts_together(site: Site) -> None:
    policy = site_policy(site, patients=2, universe="ab")
    assert set(policy.parts) == {"counts", "teacher", "discriminator"}
    together = rdp_epsilon([part.planned for part in policy.parts.values()], 1e-5)
    assert 8 - 2e-3 < together <= 8
    assert policy.part("teacher").sensitivity == site.clip_norm and policy.part("counts").sensitivity == 1


def test_a_release_of_the_papers_mode_is_charged_at_twice_the_clip_norm(site: Site) -> None:
    gradient = dataclasses.replace(site, privacy_mode="gradient", releases=30, clip_norm=0.5)
    policy = site_policy(gradient, patients=2, universe="ab")
    part = policy.part("answer")
    assert part.sensitivity == 1.0 and part == policy.part("pull_back")
    counts = policy.part("counts").planned
    assert 8 - 2e-3 < rdp_epsilon([counts, dataclasses.replace(part.planned, steps=30)], 1e-5) <= 8


def test_held_out_patients_belong_to_the_universe_and_not_to_n(site: Site) -> None:
    first, second = open_gate(site), open_gate(dataclasses.replace(site, fold=1))
    assert first.policy is not None and second.policy is not None
    assert first.policy.universe == second.policy.universe and first.policy.patients == 2


@pytest.mark.parametrize("patient_ids", ["visits", "subjects"])
def test_ids_that_do_not_tell_visits_apart_need_the_hospitals_word(
    tmp_path: Path, data: Path, patient_ids: str
) -> None:
    """Two visits under unknown names would be two patients, and the promise one for each visit."""
    for folder in sorted((data / "h0").rglob("*_1")):
        target = tmp_path / "data" / "h0" / "HGG" / folder.name.replace("Brats18", "UPENN-GBM")
        target.mkdir(parents=True)
        for file in folder.iterdir():
            shutil.copy(file, target / file.name.replace("Brats18", "UPENN-GBM"))
    site = load_site(site_files(tmp_path / "sites", tmp_path / "data", patient_ids=patient_ids) / "h0")
    if patient_ids == "subjects":
        assert len(site.subjects()[0]) == 2
        return
    with pytest.raises(SettingsError, match="vouch for it with `patient_ids: subjects`"):
        site.subjects()


def test_mode_none_has_no_ledger(site: Site) -> None:
    gate = open_gate(dataclasses.replace(site, privacy_mode="none", epsilon=0.0))
    assert gate.mode == "none" and gate.spent() == [] and gate.spent_epsilon() is None
    assert not (site.folder / "privacy").exists()
    with pytest.raises(PrivacyError, match="has no policy"):
        site_policy(dataclasses.replace(site, privacy_mode="none"), patients=2, universe="ab")


# --- the teacher ------------------------------------------------------------------------------------------------------


def test_a_private_teacher_is_charged_before_it_sees_a_patient_and_carries_its_permit(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = open_gate(site)
    spent_at_first_draw: list[int] = []

    def noted(count: int, rate: float, source: noise.NoiseSource | None = None) -> np.ndarray:
        spent_at_first_draw.append(len(gate.spent()))
        return noise.poisson_draw(count, rate, source)

    monkeypatch.setattr(training, "poisson_draw", noted)
    seen: list[tuple[int, int]] = []
    path = train_teacher(
        site,
        output_dir=tmp_path / "out",
        device="cpu",
        on_step=lambda done, total: seen.append((done, total)),
        gate=gate,
    )
    assert spent_at_first_draw == [1, 1] and seen == [(1, 2), (2, 2)]
    network, provenance = load_segmenter(path)
    permit = gate.permit_for(weights_digest(network.state_dict()))
    terms = provenance.privacy["h0"]
    assert (terms["mode"], terms["epsilon"], terms["permit"]) == ("dp-sgd", 8.0, permit.permit_id)
    assert not list((tmp_path / "out").glob("*.pt"))


def test_an_interrupted_private_training_continues_on_its_charge(site: Site, tmp_path: Path) -> None:
    class StoppedError(Exception):
        """Where a process might die."""

    def stop(done: int, total: int) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        train_teacher(site, output_dir=tmp_path / "out", device="cpu", on_step=stop)
    (state,) = (tmp_path / "out").glob("private-*.pt")
    assert load_state(state)["trainer"]["done"] == 1
    before = open_gate(site).spent()
    seen: list[int] = []
    train_teacher(site, output_dir=tmp_path / "out", device="cpu", on_step=lambda done, total: seen.append(done))
    assert seen == [2] and open_gate(site).spent() == before


def test_an_unfinished_training_without_its_state_does_not_start_over(site: Site, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_teacher(site, output_dir=tmp_path / "out", device="cpu", on_step=stop)
    for state in (tmp_path / "out").glob("*.pt"):
        state.unlink()
    with pytest.raises(PrivacyError, match="its charge is spent"):
        train_teacher(site, output_dir=tmp_path / "out", device="cpu")


def test_a_second_private_training_does_not_fit_the_budget(site: Site, tmp_path: Path) -> None:
    train_teacher(site, output_dir=tmp_path / "one", device="cpu")
    with pytest.raises(BudgetExceeded, match="nothing was computed"):
        train_teacher(dataclasses.replace(site, seed=1), output_dir=tmp_path / "two", device="cpu")
    assert not (tmp_path / "two" / "model.safetensors").exists()


def test_a_private_site_is_not_trained_by_the_plain_configuration(site: Site, tmp_path: Path) -> None:
    from fediod_med.teacher import _run_bundle, _site_values

    with pytest.raises(SettingsError, match=r"train_private\.yaml"):
        _run_bundle("train", {**_site_values(site), "ckpt_dir": str(tmp_path / "out"), "device_name": "cpu"})
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_the_ledger_did_not_pay_for_is_refused(site: Site, tmp_path: Path) -> None:
    path = train_teacher(site, output_dir=tmp_path / "teachers" / "h0", device="cpu")
    network, provenance = load_segmenter(path)
    weights = network.state_dict()
    name = next(iter(weights))
    weights[name] = weights[name] + 1e-3
    save_weights(path, weights, provenance)  # it still says that it is private
    sampler = PublicSampler(spacing=6.0, roi=32, count=1, seed=0)
    with pytest.raises(PrivacyError, match="expected a teacher that the ledger of h0 paid for"):
        open_hospital(
            site,
            open_gate(site),
            out=tmp_path,
            seed=0,
            device="cpu",
            teachers=tmp_path / "teachers",
            sampler=sampler,
            on_epoch=lambda *_: None,
            on_step=lambda *_: None,
        )


@pytest.mark.parametrize("mode", ["dp-sgd", "gradient"])
def test_a_private_hospital_has_the_plain_discriminator_only(site: Site, tmp_path: Path, mode: str) -> None:
    private = dataclasses.replace(site, privacy_mode=mode, releases=8)
    scans = ((torch.randn(4, SIZE, SIZE, SIZE),), (torch.randn(4, SIZE, SIZE, SIZE),))
    gate = open_gate(private)
    teacher = build_segmenter("unet", width=4, depth=2)
    hospital = Hospital(private, gate, teacher, torch.ones(2, 4), scans, ())
    for design in (CriticDesign(scales=2), CriticDesign(joint=True)):
        with pytest.raises(PrivacyError, match=f"h0: expected the plain discriminator in mode {mode}.*one patient"):
            open_node(hospital, out=tmp_path, seed=0, run_id="r", device=CPU, adversarial=True, design=design)
    assert gate.spent() == []  # refused before anything was charged
    open_node(hospital, out=tmp_path, seed=0, run_id="r", device=CPU, adversarial=True, design=CriticDesign())


# --- the node ---------------------------------------------------------------------------------------------------------


def private_critic(
    folder: Path,
    *,
    updates: int = 2,
    permit: str = "p",
    done: int = 0,
    journal: Callable[[int], None] = lambda number: None,
) -> PrivateCritic:
    plan = DiscriminatorPlan(Mechanism(1.0, 0.5, updates))
    scans = [[torch.randn(4, SIZE, SIZE, SIZE)] for _ in range(3)]
    return PrivateCritic(
        "h0",
        scans,
        plan=plan,
        permit=permit,
        done=done,
        journal=journal,
        state_dir=folder,
        device=CPU,
        width=4,
        layers=1,
    )


def answer(number: int, **settings: int | bool) -> Query:
    x = torch.randn((2, 4, SIZE, SIZE, SIZE), generator=torch.Generator().manual_seed(number))
    return Query("answer", "run", number, {"x": x}, {"adversarial": True, **settings})


@pytest.mark.parametrize(
    ("rounds", "expected"), [(4, [1, 1, 2, 2, 2, 2]), (2, [1, 2, 2, 2, 2, 2]), (0, [1, 2, 2, 2, 2, 2])]
)
def test_private_updates_are_spread_over_the_rounds_and_end(tmp_path: Path, rounds: int, expected: list[int]) -> None:
    critic = private_critic(tmp_path)
    made = []
    for number in range(1, 7):
        query = answer(number, rounds=rounds)
        critic.judge(query.tensors["x"], query)
        made.append(critic.updates)
    assert made == expected
    frozen = [p.clone() for p in critic.discriminator.parameters()]
    critic.judge(query.tensors["x"], answer(7))
    assert all(torch.equal(a, b) for a, b in zip(frozen, critic.discriminator.parameters(), strict=True))


def test_a_restart_neither_forgets_nor_repeats_private_updates(tmp_path: Path) -> None:
    count: list[int] = []
    critic = private_critic(tmp_path, updates=3, journal=count.append)
    query = answer(1)
    critic.judge(query.tensors["x"], query)
    assert count == [1]
    again = private_critic(tmp_path, updates=3, done=1)
    assert again.updates == 1
    pairs = zip(critic.discriminator.parameters(), again.discriminator.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    spent = private_critic(tmp_path, updates=3, done=3)  # died inside its third update, before it was saved
    assert spent.updates == 3
    spent.judge(query.tensors["x"], answer(2))
    assert spent.updates == 3
    assert private_critic(tmp_path, updates=3, permit="another").updates == 0
    with pytest.raises(PrivacyError, match="expected the discriminator after 1 private updates, found nothing"):
        private_critic(tmp_path / "elsewhere", updates=3, done=1)


def gradient_node(site: Site, tmp_path: Path) -> tuple[SiteNode, Gate]:
    gate = open_gate(site)
    torch.manual_seed(0)
    judge = PlainCritic(
        "h0", [torch.randn(4, SIZE, SIZE, SIZE)], state_dir=tmp_path, seed=0, device=CPU, width=4, layers=1
    )
    teacher = build_segmenter("unet", width=4, depth=2)
    return SiteNode("h0", teacher, torch.ones(2, 4), critic=judge, gate=gate, device=CPU), gate


def read(sealed: Sealed) -> Reply:
    message = unpack(sealed.payload)
    assert isinstance(message, Reply)
    return message


def test_in_the_papers_mode_every_reply_is_noised_charged_and_replayed(site: Site, tmp_path: Path) -> None:
    node, gate = gradient_node(dataclasses.replace(site, privacy_mode="gradient", releases=4), tmp_path)
    described = read(node.handle(Query("describe", "run", 0))).tensors["class_counts"]
    assert described.shape == (4,) and (described >= 0).all() and not torch.equal(described, torch.full((4,), 2.0))
    query = answer(1, differentiate=True)
    first = node.handle(query)
    charged = gate.spent()
    reply = read(first)
    clean = node._reply(answer(2, differentiate=True)).tensors
    assert set(reply.tensors) == set(clean) == {"probs", "realism", "x_gradient"}
    assert torch.allclose(reply.tensors["probs"].sum(1), torch.ones(2, SIZE, SIZE, SIZE), atol=1e-2)
    assert gate.policy is not None
    part = gate.policy.part("answer")
    noise = part.noise_multiplier * part.sensitivity
    assert 0.9 * noise < reply.tensors["x_gradient"].std() < 1.1 * noise  # the signal has norm C over all of it
    assert node.handle(query).payload == first.payload and gate.spent() == charged
    pulled = Query("pull_back", "run", 1, {"logit_gradient": torch.randn(2, 4, SIZE, SIZE, SIZE)})
    assert read(node.handle(pulled)).tensors["x_gradient"].shape == (2, 4, SIZE, SIZE, SIZE)
    assert rdp_epsilon(gate.spent(), 1e-5) > rdp_epsilon(charged, 1e-5)


def test_a_replayed_answer_can_still_be_pulled_back_after_a_restart(site: Site, tmp_path: Path) -> None:
    paper = dataclasses.replace(site, privacy_mode="gradient", releases=4)
    node, _ = gradient_node(paper, tmp_path)
    query = answer(1, differentiate=True)
    first = node.handle(query).payload
    reborn, _ = gradient_node(paper, tmp_path)
    assert reborn.handle(query).payload == first
    reborn.handle(Query("pull_back", "run", 1, {"logit_gradient": torch.randn(2, 4, SIZE, SIZE, SIZE)}))


def test_a_query_beyond_the_budget_is_refused_before_the_teacher_is_asked(site: Site, tmp_path: Path) -> None:
    node, _ = gradient_node(dataclasses.replace(site, privacy_mode="gradient", releases=2), tmp_path)
    for number in (1, 2):
        node.handle(answer(number))
    node._teacher.forward = lambda x: pytest.fail("the teacher was asked")
    with pytest.raises(BudgetExceeded):
        node.handle(answer(3))


def test_a_private_site_does_not_answer_from_a_teacher_without_a_permit(site: Site) -> None:
    gate = open_gate(site)
    teacher = build_segmenter("unet", width=4, depth=2)
    node = SiteNode("h0", teacher, torch.ones(2, 4), critic=None, gate=gate, device=CPU)
    node._teacher.forward = lambda x: pytest.fail("the teacher was asked")
    with pytest.raises(PrivacyError, match="permit"):
        node.handle(answer(1, adversarial=False))
    with pytest.raises(PrivacyError, match="permit"):
        SiteNode("h0", teacher, torch.ones(2, 4), critic=None, gate=gate, permits=("0" * 64,), device=CPU).handle(
            answer(1, adversarial=False)
        )


def test_a_discriminator_that_nobody_paid_for_judges_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = open_gate(site)
    permit = gate.begin_training("teacher", run_id="r", settings_digest="d")
    gate.finish_training(permit, weights_sha256="w")
    judge = PlainCritic("h0", [torch.zeros(4, SIZE, SIZE, SIZE)], state_dir=tmp_path, seed=0, device=CPU, width=4)
    teacher = build_segmenter("unet", width=4, depth=2)
    node = SiteNode("h0", teacher, torch.ones(2, 4), critic=judge, gate=gate, permits=(permit.permit_id,), device=CPU)
    assert set(read(node.handle(answer(1, adversarial=False))).tensors) == {"probs"}
    monkeypatch.setattr(judge, "judge", lambda x, query: pytest.fail("the discriminator was asked"))
    with pytest.raises(PrivacyError, match="discriminator"):
        node.handle(answer(1))


def test_a_centre_refuses_a_ledger_that_went_backwards(site: Site) -> None:
    class Told:
        """A node whose ledger says what it is told."""

        head = Head(3, "a" * 64)

        def handle(self, query: Query) -> Sealed:
            payload = Gate.unprotected("h0").pass_through(
                lambda: pack(Reply("describe", "h0", 0, {"class_counts": torch.ones(4)})),
                permits=(),
                floor_mode="none",
            )
            return dataclasses.replace(payload, head=self.head)

    node = Told()
    federation = EmbeddedFederation({"h0": node}, heads={"h0": Head(2, "b" * 64)})  # type: ignore[dict-item]

    def ask() -> object:
        return federation.ask({"h0": Query("describe", "run", 0)}, quorum=1, timeout_s=1)["h0"]

    assert isinstance(ask(), Reply) and federation.heads["h0"].sequence == 3
    for worse in (Head(2, "b" * 64), Head(3, "c" * 64), None):
        node.head = worse  # type: ignore[assignment]
        assert isinstance(ask(), SiteFailure) and federation.heads["h0"] == Head(3, "a" * 64)


def test_without_a_discriminator_an_adversarial_query_is_refused(site: Site) -> None:
    gate = Gate.unprotected("h0")
    node = SiteNode(
        "h0", build_segmenter("unet", width=4, depth=2), torch.ones(2, 4), critic=None, gate=gate, device=CPU
    )
    with pytest.raises(ProtocolError, match="asked for its discriminator, but has none"):
        node.handle(answer(1))


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_private_run_pools_nobody_and_asks_before_it_accounts(finished: Path) -> None:
    rows = json.loads((finished / "summary.json").read_text())["rows"]
    assert "pooled" not in rows and {"site:h0", "site:h1", "ensemble", "kd_phantoms", "student"} <= set(rows)
    assert not (finished / "baselines").exists()


def test_a_private_run_on_patients_shows_none_of_them(tmp_path: Path, data: Path) -> None:
    sites = load_sites(site_files(tmp_path / "sites", data, privacy_mode="gradient", releases="40"))
    out = tmp_path / "run"
    run_distillation(sites, out=out, schedule=TINY, pool=3, device="cpu", data_name="patients")
    summary = json.loads((out / "summary.json").read_text())
    # Teachers of mode gradient are not private: nothing they say themselves is shown.
    assert set(summary["rows"]) == {"prior", "kd_phantoms", "student"}
    assert not (out / "scores").exists()
    record = (out / "run.json").read_text()
    ids = [subject.subject_id for site in sites for part in site.subjects() for subject in part]
    assert len(ids) == 8 and not any(name in record for name in ids)
    for claim in find_claims(out):  # every release of the run was charged when the claim was written
        found = check_claim(claim, with_dp_accounting=False)
        assert found.ok and found.by_kind["answer"].charges == 2 * TINY.rounds, found.problems


def test_a_private_run_states_what_each_hospital_spent(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["privacy_statement"].startswith("Differentially private per patient at each of 2 hospitals")
    for name, terms in summary["privacy"].items():
        assert terms["mode"] == "dp-sgd" and 0 < terms["epsilon_prv"] < terms["epsilon"] <= 8
        assert f"per patient of site {name}" in terms["statement"]
    provenance = read_provenance(finished / "student.safetensors")
    assert provenance.privacy["h0"]["epsilon"] == summary["privacy"]["h0"]["epsilon"]
    metadata = json.loads((finished / "bundle" / "configs" / "metadata.json").read_text())
    assert metadata["fediod"]["privacy_banner"].startswith("Differentially private per patient: epsilon at most")
    assert "dp-sgd, epsilon" in (finished / "bundle" / "docs" / "README.md").read_text()
    assert json.loads((finished / "run.json").read_text())["privacy"]["h1"]["mode"] == "dp-sgd"


def test_every_claim_of_a_run_and_of_its_sites_verifies(finished: Path) -> None:
    for claim in (*find_claims(finished), *find_claims(finished.parent / "sites" / "h0")):
        found = check_claim(claim)
        assert found.ok, found.problems
        assert {kind: spent.charges for kind, spent in found.by_kind.items()} == dict.fromkeys(
            ("counts", "teacher", "discriminator"), 1
        )
    (of_site,) = find_claims(finished.parent / "sites" / "h0")
    assert of_site.key is not None and check_claim(of_site).signed


@pytest.mark.parametrize("file", ["ledger.jsonl", "policy.json"])
def test_a_changed_byte_of_a_runs_ledger_or_policy_is_found(finished: Path, tmp_path: Path, file: str) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    path = copy / "privacy" / "h1" / file
    good = path.read_bytes()
    for position in range(0, len(good), 97):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        assert not check_claim(find_claims(copy)[1], with_dp_accounting=False).ok, position
    path.write_bytes(good)
    assert check_claim(find_claims(copy)[1], with_dp_accounting=False).ok


def test_a_claim_smaller_than_its_ledger_or_of_another_mode_is_found(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    summary = json.loads((copy / "summary.json").read_text())
    for key, value in (("epsilon", 1.0), ("mode", "gradient")):
        changed = json.loads(json.dumps(summary))
        changed["privacy"]["h0"][key] = value
        (copy / "summary.json").write_text(json.dumps(changed))
        assert not check_claim(find_claims(copy)[0], with_dp_accounting=False).ok
    summary["privacy"]["h0"] = {"mode": "none", "epsilon": None, "delta": None}
    (copy / "summary.json").write_text(json.dumps(summary))
    assert check_claim(find_claims(copy)[0]).problems == ("NOT PRIVATE, so nothing is promised",)
    with pytest.raises(InputError, match="neither"):
        find_claims(tmp_path)


def test_a_lost_discriminator_is_not_trained_again_on_the_same_charge(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "again"
    shutil.copytree(finished.parent, root)
    shutil.rmtree(root / "run" / "site_state")
    for checkpoint in (root / "run" / "checkpoints").glob("*.pt"):
        checkpoint.unlink()
    with pytest.raises(PrivacyError, match="expected the discriminator after 2 private updates, found nothing"):
        run_distillation(load_sites(root / "sites"), out=root / "run", schedule=TINY, pool=3, device="cpu", resume=True)


def test_another_run_of_the_same_patients_is_paid_from_the_same_budget(finished: Path) -> None:
    sites = load_sites(finished.parent / "sites")
    with pytest.raises(BudgetExceeded):
        run_distillation(sites, out=finished.parent / "second", schedule=TINY, pool=3, device="cpu", seed=5)


def test_a_hospital_is_told_when_noise_will_drown_its_patients(site: Site) -> None:
    drowned = dataclasses.replace(site, private_steps=60)
    gate = open_gate(drowned)
    assert gate.policy is not None
    teacher = gate.policy.part("teacher")
    times = teacher.noise_multiplier * drowned.subspace**0.5 / (teacher.sample_rate * gate.policy.patients)
    assert times > 1
    line = announcement(drowned, gate, TINY, compare=False)
    assert f"noise of a step is {times:.1f} times the largest signal" in line
    calm = dataclasses.replace(drowned, subspace=1)
    assert ("times the largest signal" in announcement(calm, gate, TINY, compare=False)) == (
        times > drowned.subspace**0.5
    )


def test_the_papers_mode_needs_its_releases_planned(site: Site) -> None:
    paper = dataclasses.replace(site, privacy_mode="gradient", releases=5)
    gate = open_gate(paper)
    with pytest.raises(SettingsError, match=r"needs 6 releases, and the site plans 5; set `releases: 6`"):
        announcement(paper, gate, TINY, compare=False)
    line = announcement(paper, gate, dataclasses.replace(TINY, rounds=3), compare=False)
    assert "mode gradient" in line and "5 releases" in line and "sensitivity 2C = 2" in line
