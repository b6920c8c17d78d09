"""The hospital's guards as the engine calls them: nothing undeclared passes, and each refusal is written down."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fediod_med.federation.flare.audit import AUDIT_FILE, AuditLog
from fediod_med.federation.flare.egress import default_rules
from fediod_med.protocol import Reply, pack

pytest.importorskip("nvflare", reason="the extra `federation` is not installed")
VOLUME = (1, 4, 8, 8, 8)
PLAIN: dict[str, Any] = {"mode": "none", "sequence": None, "hash": None, "epsilon": None}


def payload() -> bytes:
    fields = {"probs": torch.full(VOLUME, 0.25), "realism": torch.ones(1), "x_gradient": torch.ones(VOLUME)}
    return pack(Reply("answer", "north", 1, fields))


def process(kit: Path, content: object, *, floor: str = "none", code: str = "", **more: object) -> Any:
    """One pass through the guard, in a context like the engine's."""
    from nvflare.apis.fl_constant import ReservedKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
    from nvflare.apis.workspace import Workspace

    from fediod_med.federation.flare.guard import EgressGuard

    for folder in ("startup", "local"):
        (kit / folder).mkdir(parents=True, exist_ok=True)
    workspace = Workspace(str(kit), site_name="north")
    context = FLContext()
    context.set_prop(ReservedKey.ENGINE, SimpleNamespace(get_workspace=lambda: workspace), private=True, sticky=False)
    context.set_prop(ReservedKey.IDENTITY_NAME, "north", private=False, sticky=False)
    shareable = Shareable()
    if content is not None:
        shareable["fediod"] = content
    for name, value in more.items():
        shareable[name] = value
    if code:
        shareable.set_return_code(code)
    return EgressGuard(default_rules(batch=1, size=8), floor).process(shareable, context)


def test_a_declared_reply_passes_alone_and_is_written_down(tmp_path: Path) -> None:
    passed = process(tmp_path, {"payload": payload(), **PLAIN})
    assert passed["fediod"]["payload"] == payload() and set(passed) == {"fediod", "__headers__"}
    (line,) = AuditLog(tmp_path / AUDIT_FILE).lines()
    assert (line["event"], line["kind"], line["round"], line["bytes"]) == ("sent", "answer", 1, len(payload()))


def test_refusals_and_statements_pass_by_name_and_form_only(tmp_path: Path) -> None:
    assert process(tmp_path, {"refused": "BudgetExceeded"})["fediod"] == {"refused": "BudgetExceeded"}
    assert process(tmp_path, {"account": {"mode": "none", "epsilon": None}})["fediod"]["account"]["mode"] == "none"
    assert process(tmp_path, None, code="EXECUTION_EXCEPTION").get_return_code() == "EXECUTION_EXCEPTION"


@pytest.mark.parametrize(
    ("content", "more", "why"),
    [
        ({"payload": payload(), **PLAIN}, {"scan": b"P-0017"}, "undeclared entries"),
        ({"payload": payload(), **PLAIN, "note": "P-0017"}, {}, "undeclared or missing"),
        ({"payload": payload(), **PLAIN}, {"floor": "dp-sgd"}, "dp-sgd or stronger"),
        ({"payload": b"P-0017", **PLAIN}, {}, "fediod message"),
        ({"refused": "P-0017 is broken"}, {}, "known reason"),
        ({"account": {"mode": "none", "patient": "P-0017"}}, {}, "undeclared"),
        ({"account": "P-0017"}, {}, "AttributeError|TypeError|ValueError|ProtocolError"),
        ({"payload": payload(), **PLAIN}, {"code": "EXECUTION_EXCEPTION"}, "no content beside"),
        (None, {"code": "P-0017"}, "neither"),
        (None, {}, "neither"),
        (payload(), {}, "no content beside|expected"),
    ],
)
def test_nothing_else_passes(tmp_path: Path, content: object, more: dict[str, Any], why: str) -> None:
    from nvflare.apis.filter import ContentBlockedException

    with pytest.raises(ContentBlockedException) as refused:
        process(tmp_path, content, **more)
    assert "P-0017" not in str(refused.value)
    (line,) = AuditLog(tmp_path / AUDIT_FILE).lines()
    assert line["event"] == "refused"
    assert re.search(why, str(line["reason"]))


def test_a_header_that_the_engine_did_not_set_does_not_pass(tmp_path: Path) -> None:
    from nvflare.apis.filter import ContentBlockedException

    with pytest.raises(ContentBlockedException):
        process(tmp_path, {"payload": payload(), **PLAIN}, __headers__={"__cookie_jar__": {"scan": b"P-0017"}})


def test_the_job_guard_writes_both_verdicts_beside_the_kit(tmp_path: Path) -> None:
    from fediod_med.federation.flare.job_guard import JobGuard
    from fediod_med.federation.flare.jobs import write_job
    from fediod_med.federation.flare.settings import read_settings

    app = write_job(tmp_path / "job-1", read_settings({"run_id": "r", "sites": ["north"]})) / "app"
    assert JobGuard().validate(str(app)) == ("", {})
    (app / "custom").mkdir()
    (app / "custom" / "x.py").write_text("", encoding="utf-8")
    refused, _ = JobGuard().validate(str(app))
    assert refused == "refused by this site: ProtocolError"
    assert [line["event"] for line in AuditLog(tmp_path / AUDIT_FILE).lines()] == ["accepted job", "refused job"]
