"""A hospital of mode `dp-sgd` over the engine: paid once, verified by itself, stated by the centre."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from fediod_med.privacy.ledger import LEDGER
from fediod_med.site_gate import open_gate
from fediod_med.sites import load_site
from tests.flare_kits import PATIENCE_S, audit, fediod, make_kits, reasons, record, start_all, status_of, submission
from tests.flare_parties import parties, write_hospitals

pytest.importorskip("nvflare", reason="the extra `federation` is not installed")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(20 * PATIENCE_S)]

DP_SGD = (  # four patients and two steps: enough to charge, too little to learn
    "epsilon: 8.0\nprivate_steps: 2\nsubspace: 2\ndiscriminator_steps: 2\ncrops: 1\nrehearsal: 0.0\nfolds: 2\n"
)


def test_a_hospital_of_dp_sgd_is_charged_once_and_stated_beside_one_without_privacy(
    tmp_path: Path,
) -> None:
    """Two jobs at the engine, so that the hospital's second process must find what the first has paid for."""
    names = ["north", "south"]
    write_hospitals(tmp_path, names, privacy={"south": DP_SGD}, cases=4)
    south = tmp_path / "sites" / "south"
    (south / "models" / "model.safetensors").unlink()
    trained = subprocess.run(
        fediod("site", "train", "south", "--sites", tmp_path / "sites", "--device", "cpu", "--quiet"),
        capture_output=True,
        text=True,
        check=False,
        timeout=5 * PATIENCE_S,
    )
    assert trained.returncode == 0 and "Trained privately" in trained.stdout, trained.stdout + trained.stderr
    kits = make_kits(tmp_path, names)
    rules = kits / "south" / "local" / "privacy.json"
    strict = json.loads(rules.read_text(encoding="utf-8"))
    strict["scopes"][0]["task_result_filters"][0]["args"]["floor_mode"] = "dp-sgd"
    rules.write_text(json.dumps(strict), encoding="utf-8")
    with parties(tmp_path / "logs") as started:
        start_all(started, kits, names)
        words = submission(kits, "private", names, rounds=4, segment=2)
        done = subprocess.run(words, capture_output=True, text=True, timeout=10 * PATIENCE_S, check=False)
        assert done.returncode == 0, done.stdout + done.stderr + started.log("server")[-3000:]
    assert len(record(kits, "private")["segments"]) == 2

    ledger = [json.loads(line) for line in (south / "privacy" / LEDGER).read_text(encoding="utf-8").splitlines()]
    assert sorted(line["body"]["kind"] for line in ledger if line["event"] == "train") == ["discriminator", "teacher"]
    assert [line["body"]["query"] for line in ledger if line["event"] == "charge"] == ["counts"]
    verified = subprocess.run(fediod("privacy", "verify", south), capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stdout + verified.stderr

    gate = open_gate(load_site(south))
    spent = gate.spent_epsilon()
    assert spent is not None and 0 < spent <= 8.0 and gate.head is not None
    summary = json.loads((kits / "server" / "runs" / "private" / "summary.json").read_text(encoding="utf-8"))
    stated = summary["privacy"]["south"]
    assert (stated["mode"], stated["budget"]) == ("dp-sgd", 8.0)
    assert stated["epsilon"] == pytest.approx(spent, abs=1e-9)
    assert stated["ledger_head"] == {"sequence": gate.head.sequence, "hash": gate.head.hash}
    assert summary["privacy"]["north"]["mode"] == "none" and summary["privacy"]["north"]["epsilon"] is None
    assert summary["privacy_statement"].startswith("NOT PRIVATE (north)")
    assert {line.get("mode") for line in audit(kits, "south") if line["event"] == "sent"} <= {"dp-sgd", None}
    assert not reasons(kits, "south")

    told = status_of(kits, "private")
    assert "round 4 of 4, 2 segments" in told
    rows = {row.split("\u2502")[1].strip(): row for row in told.splitlines() if row.count("\u2502") >= 5}
    assert "NOT PRIVATE" in rows["north"] and f"dp-sgd, epsilon {spent:.4g} spent" in rows["south"]
    for name in names:
        for way, place in (("down", -3), ("up", -2)):
            assert rows[name].split("\u2502")[place].strip() == f"{summary['bytes'][way][name] / 1e6:.1f}"
