"""What leaves a hospital over the engine: exactly the fields, dtypes and sizes that its own file names."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save

from fediod_med.errors import ProtocolError, SettingsError
from fediod_med.federation.flare.egress import (
    check_account,
    check_envelope,
    check_payload,
    default_rules,
    read_rules,
)
from fediod_med.protocol import Query, Reply, pack, unpack

RULES = read_rules(default_rules(batch=2, size=8), "privacy.json")
VOLUME = (2, 4, 8, 8, 8)
HEADER = {"type": "reply", "kind": "answer", "site": "north", "round": 3}
PLAIN = {"payload": b"", "mode": "none", "sequence": None, "hash": None, "epsilon": None}
PRIVATE = {"payload": b"", "mode": "dp-sgd", "sequence": 4, "hash": "a" * 64, "epsilon": 2.5}


def raw(tensors: dict[str, torch.Tensor], header: dict[str, Any] | None = None, **metadata: str) -> bytes:
    return save(tensors, metadata={"fediod_message": json.dumps(header or HEADER), **metadata})


def answer(**extra: torch.Tensor) -> dict[str, torch.Tensor]:
    fields = {"probs": torch.rand(VOLUME), "realism": torch.rand(2), "x_gradient": torch.rand(VOLUME)}
    made = {name: tensor.half() for name, tensor in fields.items()}
    return made | {f"{name}/scale": torch.ones(()) for name in fields} | extra


def test_a_declared_reply_may_leave() -> None:
    payload = raw(answer())
    found = check_payload(payload, RULES, site="north")
    assert (found.kind, found.round, found.size) == ("answer", 3, len(payload))


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (raw(answer(scan=torch.ones(3).half(), **{"scan/scale": torch.ones(())})), "undeclared"),
        (raw(answer(), HEADER | {"note": "P-0017"}), "undeclared header fields"),
        (raw(answer(), note="P-0017"), "undeclared header fields"),
        (raw(answer(), HEADER | {"site": "south"}), "a reply of north"),
        (raw(answer(realism=torch.ones(2, dtype=torch.int64))), "scale|dtype"),
        (raw(answer(realism=torch.ones(64).half())), "at most 2 values, found 64"),
        (raw(answer() | {"probs": torch.ones(4, 4, 8, 8, 8).half()}), "at most 4096 values, found 8192"),
        (raw(answer() | {"probs": torch.ones(VOLUME)}), "fp16"),
        (pack(Query("answer", "run", 3, {"x": torch.ones(VOLUME)})), "a reply of north"),
        (b"scan bytes", "message"),
        ("text", "expected bytes"),
    ],
)
def test_anything_else_is_refused_with_its_reason(payload: object, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        check_payload(payload, RULES, site="north")


def test_an_integer_where_fp16_was_declared_is_a_wrong_dtype() -> None:
    """`protocol` allows integers; the hospital's rules do not."""
    tensors = answer(realism=torch.ones(2, dtype=torch.int16))
    del tensors["realism/scale"]
    payload = raw(tensors)
    assert unpack(payload).kind == "answer"
    with pytest.raises(ProtocolError, match=r"answer\.realism: expected dtype F16, found I16"):
        check_payload(payload, RULES, site="north")


def test_compact_replies_may_leave_unless_the_hospital_says_otherwise() -> None:
    probs = torch.softmax(torch.randn(VOLUME), dim=1)
    fields = {"probs": probs, "realism": torch.rand(2), "x_gradient": torch.randn(VOLUME)}
    payload = pack(Reply("answer", "north", 3, fields), encoding="compact")
    assert check_payload(payload, RULES, site="north").size == len(payload)
    rules = default_rules(batch=2, size=8)
    rules["answer"]["probs"]["dtypes"] = ["F16"]
    with pytest.raises(ProtocolError, match=r"answer\.probs: expected dtype F16, found U8"):
        check_payload(payload, read_rules(rules, "privacy.json"), site="north")


def test_a_hospital_may_let_out_less_than_the_protocol_has() -> None:
    narrow = default_rules(batch=2, size=8)
    del narrow["pull_back"], narrow["answer"]["realism"]
    rules = read_rules(narrow, "privacy.json")
    with pytest.raises(ProtocolError, match="undeclared field 'realism"):
        check_payload(raw(answer()), rules, site="north")
    pulled = raw(
        {"x_gradient": torch.ones(3).half(), "x_gradient/scale": torch.ones(())}, HEADER | {"kind": "pull_back"}
    )
    assert check_payload(pulled, RULES, site="north").kind == "pull_back"
    with pytest.raises(ProtocolError, match="no such reply"):
        check_payload(pulled, rules, site="north")


@pytest.mark.parametrize(
    "fields",
    [
        {"weights": {}},
        {"answer": {"scan": {"dtypes": ["F16"], "max_values": 1}}},
        {"answer": {"probs": {"dtypes": ["F16"]}}},
        {"answer": {"probs": {"dtypes": ["F16"], "max_values": "all"}}},
        {"answer": ["probs"]},
    ],
)
def test_rules_name_fields_that_replies_have(fields: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"privacy\.json"):
        read_rules(fields, "privacy.json")


@pytest.mark.parametrize(
    ("envelope", "floor"),
    [
        (PLAIN, "dp-sgd"),
        (PRIVATE | {"mode": "gradient"}, "dp-sgd"),
        (PRIVATE | {"mode": "strong"}, "none"),
        (PLAIN | {"note": "x"}, "none"),
        (PLAIN | {"epsilon": 1.0}, "none"),
        (PRIVATE | {"hash": "P-0017"}, "none"),
        (PRIVATE | {"epsilon": float("nan")}, "none"),
        (PRIVATE | {"sequence": True}, "none"),
    ],
)
def test_what_travels_beside_a_payload_has_a_fixed_form(envelope: dict[str, Any], floor: str) -> None:
    check_envelope(PLAIN, floor_mode="none")
    check_envelope(PRIVATE, floor_mode="gradient")
    with pytest.raises(ProtocolError):
        check_envelope(envelope, floor_mode=floor)


@pytest.mark.parametrize(
    "extra",
    [
        {"patient_ids": "P-0017"},
        {"patients": "P-0017"},
        {"epsilon": "2"},
        {"statement": "x" * 5000},
        {"ledger_head": {"sequence": 1, "hash": "no"}},
        {"mode": None},
    ],
)
def test_a_privacy_record_has_a_fixed_form(extra: dict[str, Any]) -> None:
    record = {"mode": "dp-sgd", "epsilon": 2.5, "patients": 9, "ledger_head": {"sequence": 1, "hash": "b" * 64}}
    check_account(record)
    with pytest.raises(ProtocolError):
        check_account(record | extra)
