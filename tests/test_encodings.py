"""Small replies: what rounding may change, what it may not, and what a reader refuses."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fediod_med.encodings import deflate, inflate, quantise_probabilities, restore_probabilities, to_float8
from fediod_med.errors import ProtocolError
from fediod_med.protocol import Query, Reply, pack, unpack


def answers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Probabilities of a small lesion in a background that is sure."""
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    logits[:, 0] += 30
    if len(shape) > 2:
        inside: tuple[slice | int, ...] = (slice(None), 0, *(slice(1, 3) for _ in shape[2:]))
        logits[inside] -= 30
    return torch.softmax(logits, dim=1)


@pytest.mark.parametrize("shape", [(2, 4, 6, 5, 7), (3, 4, 8, 8), (5, 10), (1, 2, 3, 3, 3)])
def test_probabilities_come_back_within_half_a_step(shape: tuple[int, ...]) -> None:
    probs = answers(shape)
    parts = quantise_probabilities(probs)
    back = restore_probabilities(parts)
    assert back.shape == probs.shape
    assert torch.allclose(back.sum(dim=1), torch.ones(()), atol=1e-6)
    # Half a step for each class, and what the background and the renormalisation make of them.
    assert (back - probs).abs().max() <= 0.5 / 255 * shape[1]
    if len(shape) > 2:
        assert parts["/box"].tolist() == [[1, 3]] * (len(shape) - 2)
        assert parts[""].numel() < probs.numel()


def test_a_volume_of_background_alone_travels_as_nothing() -> None:
    probs = torch.zeros(2, 4, 8, 8, 8)
    probs[:, 0] = 1
    parts = quantise_probabilities(probs)
    assert parts[""].numel() == 0
    assert torch.equal(restore_probabilities(parts), probs)


@given(st.integers(0, 10_000), st.sampled_from([1e-20, 1e-3, 1.0, 1e6]))
@settings(max_examples=30, deadline=None)
def test_gradients_keep_a_sixteenth_of_their_size(seed: int, size: float) -> None:
    gradient = size * torch.randn(500, generator=torch.Generator().manual_seed(seed))
    stored, scale = to_float8(gradient)
    back = stored.float() * scale
    peak = gradient.abs().max()
    large = gradient.abs() > peak * 2**-14
    assert ((back - gradient).abs()[large] <= gradient.abs()[large] * 2**-4 * 1.01).all()
    assert back.abs().max() == pytest.approx(float(peak), rel=1e-5)


def reply(seed: int = 0) -> Reply:
    shape = (2, 4, 12, 12, 12)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1e-6
    return Reply(
        "answer", "a", 1, {"probs": answers(shape), "realism": torch.tensor([0.3, -2.0]), "x_gradient": gradient}
    )


def test_a_compact_reply_says_the_same_in_fewer_bytes() -> None:
    sent = reply()
    small, plain = pack(sent, encoding="compact"), pack(sent)
    assert len(small) < 0.6 * len(plain)
    received = unpack(small)
    assert isinstance(received, Reply) and set(received.tensors) == set(sent.tensors)
    assert torch.allclose(received.tensors["realism"], sent.tensors["realism"], atol=2e-3)
    assert (received.tensors["probs"] - sent.tensors["probs"]).abs().max() <= 4 * 0.5 / 255
    cosine = torch.cosine_similarity(
        received.tensors["x_gradient"].flatten(), sent.tensors["x_gradient"].flatten(), dim=0
    )
    assert cosine > 0.999
    assert pack(received, encoding="compact") == small, "rounding twice changes nothing"


def test_an_unknown_encoding_is_refused() -> None:
    with pytest.raises(ProtocolError, match="expected fp16 or compact, found 'zip'"):
        pack(reply(), encoding="zip")


def test_what_inflates_to_something_else_than_it_says_is_refused() -> None:
    data = deflate(b"x" * 1000)
    assert inflate(data) == b"x" * 1000
    head, size, body = data[:8], data[8:16], data[16:]
    for broken in (
        head + (2**40).to_bytes(8, "little") + body,
        head + (999).to_bytes(8, "little") + body,
        head + (1001).to_bytes(8, "little") + body,
        head + size + body[:-3],
        head + size + body + b"more",
        head + size + b"no zlib",
        head + (10).to_bytes(8, "little") + zlib.compress(b"0" * 10_000_000),
    ):
        with pytest.raises(ProtocolError):
            inflate(broken)


@pytest.mark.parametrize(
    "change",
    [
        {"/shape": torch.tensor([2, 4, 2**20, 2**20, 12])},
        {"/shape": torch.tensor([2, 4, 12, 12])},
        {"/shape": torch.tensor([2, 5, 12, 12, 12])},
        {"/shape": torch.tensor([2.0, 4, 12, 12, 12])},
        {"/box": torch.tensor([[1, 3], [1, 3], [1, 13]])},
        {"/box": torch.tensor([[3, 1], [1, 3], [1, 3]])},
        {"": torch.zeros(2, 3, 2, 2, 2)},
        {"": torch.zeros(2, 3, 2, 2, 1, dtype=torch.uint8)},
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, Tensor]) -> None:
    parts = quantise_probabilities(answers((2, 4, 12, 12, 12))) | change
    with pytest.raises(ProtocolError, match="expected 8-bit values inside a box"):
        restore_probabilities(parts)


def test_a_query_may_ask_for_compact_replies_and_is_itself_fp16() -> None:
    query = Query("answer", "r", 1, {"x": torch.ones(1, 4, 2, 2, 2)}, {"encoding": "compact"})
    received = unpack(pack(query))
    assert isinstance(received, Query) and received.settings["encoding"] == "compact"
