"""Messages: round trips, precision, and the refusal of everything that is not a message."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from fediod_med.errors import ProtocolError
from fediod_med.protocol import QUERY_KINDS, REPLY_FIELDS, Query, Reply, pack, unpack

HEADER = {"type": "query", "kind": "answer", "round": 3, "run_id": "run-1", "settings": {}}


def volume(seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn((2, 4, 5, 3, 6), generator=torch.Generator().manual_seed(seed))


def message(tensors: dict[str, Tensor], header: Any = HEADER) -> bytes:
    return save(tensors, metadata={"fediod_message": json.dumps(header)})


def fine() -> dict[str, Tensor]:
    return {"x": torch.ones(2, dtype=torch.float16), "x/scale": torch.tensor(2.0)}


def query() -> Query:
    return Query("answer", "run-1", 3, {"x": volume()}, {"adversarial": True, "note": "a", "rate": 0.5, "count": 2})


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e5, 1e30])
def test_floats_keep_their_relative_precision_at_every_size(scale: float) -> None:
    x = volume(scale=scale)
    received = unpack(pack(Query("answer", "r", 1, {"x": x}))).tensors["x"]
    peak = x.abs().max()
    normal = x.abs() > 2**-14 * peak
    assert received.dtype == torch.float32
    assert ((received - x).abs()[normal] <= 2**-11 * x.abs()[normal] * 1.01).all()
    assert ((received - x).abs() <= 2**-11 * peak).all()


def test_tiny_gradients_survive() -> None:
    """fp16 alone would flush 1e-9 to zero."""
    g = torch.full((1, 4, 2, 2, 2), 1e-9)
    assert torch.allclose(unpack(pack(Query("pull_back", "r", 1, {"logit_gradient": g}))).tensors["logit_gradient"], g)


def test_zeros_and_empty_tensors_travel() -> None:
    for x in (torch.zeros(2, 3), torch.zeros(0, 4)):
        assert torch.equal(unpack(pack(Query("answer", "r", 1, {"x": x}))).tensors["x"], x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.int32])
def test_integers_travel_unchanged(dtype: torch.dtype) -> None:
    x = torch.tensor([[0, 1, 100], [0, 1, 99]]).to(dtype).t()
    received = unpack(pack(Query("answer", "r", 1, {"x": x}))).tensors["x"]
    assert received.dtype == dtype and torch.equal(received, x)


def test_query_and_reply_come_back_as_they_were() -> None:
    sent = query()
    received = unpack(pack(sent))
    assert isinstance(received, Query)
    assert (received.kind, received.run_id, received.round) == ("answer", "run-1", 3)
    assert received.settings == sent.settings and type(received.settings["adversarial"]) is bool
    reply = unpack(pack(Reply("describe", "hospital-a", 0, {"class_counts": torch.tensor([4, 3, 2, 1])})))  # test only
    assert isinstance(reply, Reply)
    assert (reply.kind, reply.site, reply.round) == ("describe", "hospital-a", 0)


def test_packing_twice_gives_the_same_bytes_and_packing_again_changes_nothing() -> None:
    once = pack(query())
    assert once == pack(query())
    assert torch.equal(unpack(pack(unpack(once))).tensors["x"], unpack(once).tensors["x"])


def test_no_graph_travels() -> None:
    x = volume().requires_grad_(True)
    received = unpack(pack(Query("answer", "r", 1, {"x": x * 2})))
    assert not received.tensors["x"].requires_grad
    assert received.tensors["x"].data_ptr() != x.data_ptr()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = volume()
    x[0, 0, 0, 0, 0] = bad
    with pytest.raises(ProtocolError, match="finite"):
        pack(Query("answer", "r", 1, {"x": x}))
    with pytest.raises(ProtocolError, match="finite"):
        pack(Query("answer", "r", 1, {"x": torch.tensor([1e300], dtype=torch.float64)}))
    with pytest.raises(ProtocolError, match="finite"):
        unpack(message({"x": torch.tensor([bad]).half(), "x/scale": torch.tensor(1.0)}))
    with pytest.raises(ProtocolError, match="finite"):
        unpack(message({"x": torch.ones(1).half(), "x/scale": torch.tensor(bad)}))


@pytest.mark.parametrize(
    "message_",
    [
        Query("answer", "r", 1, {"x": torch.ones(1), "scan": torch.ones(1)}),
        Query("answer", "r", 1),
        Query("pull_back", "r", 1, {"x": torch.ones(1)}),
        Query("weights", "r", 1),
        Query("answer", "r", 1, {"x": torch.ones(1)}, {"paths": ["/data"]}),  # type: ignore[dict-item]
        Query("answer", "r", 1, {"x": torch.ones(1, dtype=torch.complex64)}),
        Reply("answer", "a", 1, {"probs": torch.ones(1), "weights": torch.ones(1)}),
        Reply("answer", "a", 1, {}),
        Reply("answer", "a", 1, {"probs": torch.ones(1), "realism": torch.ones(1)}),
        Reply("pull_back", "a", 1, {}),
        Reply("describe", "a", 1, {}),
        Reply("anything", "a", 1, {}),
    ],
    ids=lambda m: f"{type(m).__name__}-{m.kind}-{'+'.join(m.tensors)}",
)
def test_undeclared_and_missing_contents_are_refused(message_: Query | Reply) -> None:
    with pytest.raises(ProtocolError):
        pack(message_)


def test_an_answer_without_a_discriminator_is_whole() -> None:
    assert set(unpack(pack(Reply("answer", "a", 1, {"probs": torch.ones(1)}))).tensors) == {"probs"}


@pytest.mark.parametrize(
    "tensors",
    [
        {"x": torch.ones(2)},
        {"x": torch.ones(2, dtype=torch.float64)},
        {"x": torch.ones(2, dtype=torch.bfloat16)},
        {"x": torch.ones(2, dtype=torch.float16)},
        {"x": torch.ones(2, dtype=torch.float16), "x/scale": torch.ones(1)},
        {"x": torch.ones(2, dtype=torch.float16), "x/scale": torch.ones((), dtype=torch.float64)},
        {**fine(), "weights": torch.ones(2, dtype=torch.int8)},
        {**fine(), "weights/scale": torch.ones(5000)},
        {"x": torch.ones(2, dtype=torch.int8), "x/scale": torch.ones(5000)},
        {},
    ],
    ids=[
        "fp32",
        "fp64",
        "bf16",
        "no scale",
        "long scale",
        "fp64 scale",
        "undeclared",
        "stray scale",
        "int scale",
        "none",
    ],
)
def test_received_tensors_that_pack_would_not_have_written_are_refused(tensors: dict[str, Tensor]) -> None:
    """Nothing can ride along, not even under the name of a scale."""
    with pytest.raises(ProtocolError):
        unpack(message(tensors))


@pytest.mark.parametrize(
    "header",
    [
        {},
        [],
        None,
        7,
        "query",
        {**HEADER, "type": "order"},
        {**HEADER, "kind": "weights"},
        {**HEADER, "round": "three"},
        {**HEADER, "round": float("inf")},
        {**HEADER, "round": None},
        {**HEADER, "settings": [1, 2]},
        {**HEADER, "settings": "abc"},
        {**HEADER, "settings": {"a": [1]}},
        {**HEADER, "settings": {"a": None}},
        {key: value for key, value in HEADER.items() if key != "run_id"},
        {key: value for key, value in HEADER.items() if key != "settings"},
        {key: value for key, value in HEADER.items() if key != "type"},
        {"type": "reply", "kind": "pull_back", "round": 1},
    ],
    ids=str,
)
def test_headers_that_are_not_ours_are_refused(header: Any) -> None:
    assert isinstance(unpack(message(fine())), Query)
    with pytest.raises(ProtocolError):
        unpack(message(fine(), header))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_truncated_messages_are_refused(data: st.DataObject) -> None:
    whole = pack(Query("answer", "run-1", 3, {"x": torch.arange(12.0)}, {"adversarial": True}))
    with pytest.raises(ProtocolError):
        unpack(whole[: data.draw(st.integers(0, len(whole) - 1))])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_messages_are_refused_or_still_messages(data: st.DataObject) -> None:
    whole = bytearray(pack(Query("answer", "run-1", 3, {"x": torch.arange(12.0)}, {"adversarial": True})))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        received = unpack(bytes(whole))
    except ProtocolError:
        return
    assert all(torch.isfinite(t).all() for t in received.tensors.values())


def test_a_pickle_is_not_a_message(tmp_path: Any) -> None:
    path = tmp_path / "message.pt"
    torch.save({"x": torch.ones(2)}, path)
    with pytest.raises(ProtocolError):
        unpack(path.read_bytes())


def test_every_kind_of_query_has_a_reply() -> None:
    assert set(QUERY_KINDS) == set(REPLY_FIELDS)


def test_what_may_leave_a_hospital_is_this_and_nothing_else() -> None:
    """A change here is a change of the privacy analysis."""
    assert {kind: sorted(fields) for kind, fields in REPLY_FIELDS.items()} == {
        "describe": ["class_counts"],
        "answer": ["probs", "realism", "x_gradient"],
        "pull_back": ["x_gradient"],
    }
