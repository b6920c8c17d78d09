"""Weights files: provenance inside, refusals with a reason, and no partial file ever."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fediod_med import __version__
from fediod_med.checkpoints import (
    Provenance,
    current_commit,
    load_into,
    load_segmenter,
    load_state,
    load_weights,
    read_provenance,
    save_state,
    save_weights,
)
from fediod_med.durable import write_atomically
from fediod_med.errors import WeightsError
from fediod_med.networks import BACKBONES, build_segmenter

NETWORK = {"backbone": "unet", "width": 8, "depth": 3, "in_channels": 4, "out_channels": 4}
PROVENANCE = Provenance(
    kind="student",
    network=NETWORK,
    spacing=2.0,
    label_scheme="brats2018",
    sites=("hospital-a", "hospital-b"),
    privacy={"hospital-a": {"mode": "none", "epsilon": None}, "hospital-b": {"mode": "dp", "epsilon": 3.5}},
    trained_on="phantoms",
    seed=7,
    settings={"rounds": 20, "note": "μ"},
    commit="0" * 40,
)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_segmenter_comes_back_with_weights_and_provenance(tmp_path: Path, backbone: str) -> None:
    network = build_segmenter(**{**NETWORK, "backbone": backbone}).eval()
    written = replace(PROVENANCE, network={**NETWORK, "backbone": backbone})
    path = tmp_path / "new" / "folder" / "model.safetensors"
    save_weights(path, network.state_dict(), written)
    loaded, provenance = load_segmenter(path)
    assert provenance == written and read_provenance(path) == written
    assert provenance.version == __version__
    assert not loaded.training
    x = torch.randn(1, 4, 8, 8, 8)
    assert torch.equal(loaded(x), network(x))


def test_half_precision_weights_are_read_as_float32(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(path, build_segmenter(**NETWORK).half().state_dict(), PROVENANCE)
    weights, _ = load_weights(path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    load_segmenter(path)


def test_views_and_shared_tensors_are_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    save_weights(tmp_path / "w.safetensors", {"a": whole.t(), "b": whole, "c": whole[1:]}, PROVENANCE)
    weights, _ = load_weights(tmp_path / "w.safetensors")
    assert torch.equal(weights["a"], whole.t()) and torch.equal(weights["c"], whole[1:])


def test_weights_without_provenance_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(build_segmenter(**NETWORK).state_dict(), path)
    with pytest.raises(WeightsError, match="provenance, found none"):
        load_segmenter(path)


@pytest.mark.parametrize("header", ["[]", "{", "{}", '{"sites": 3}', json.dumps({"kind": "student"})])
def test_broken_provenance_is_refused(tmp_path: Path, header: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1)}, path, metadata={"fediod_provenance": header})
    with pytest.raises(WeightsError, match="cannot be read"):
        read_provenance(path)


def test_absent_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="found nothing"):
        read_provenance(tmp_path / "absent.safetensors")
    for content in (b"", b"PK\x03\x04 not safetensors", bytes(64)):
        (tmp_path / "foreign.safetensors").write_bytes(content)
        with pytest.raises(WeightsError, match="expected safetensors"):
            load_weights(tmp_path / "foreign.safetensors")


def test_another_order_of_sequences_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    wrong = replace(PROVENANCE, sequences=("FLAIR", "T1", "T1c", "T2"))
    save_weights(path, build_segmenter(**NETWORK).state_dict(), wrong)
    with pytest.raises(WeightsError, match=r"sequences.*FLAIR"):
        load_segmenter(path)


def test_weights_of_another_architecture_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weights = build_segmenter("unet", width=16, depth=3).state_dict()
    save_weights(path, weights, PROVENANCE)
    with pytest.raises(WeightsError, match=r"model\.safetensors: the weights do not fit the network.*size mismatch"):
        load_segmenter(path)
    with pytest.raises(WeightsError, match="do not fit"):
        load_into(build_segmenter("segresnet", width=8, depth=3), weights, path)


@pytest.mark.parametrize("network", [{"backbone": "vnet"}, {"backbone": "unet", "layers": 3}, {"width": 8}])
def test_a_network_that_cannot_be_built_is_refused(tmp_path: Path, network: dict) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(path, {"a": torch.ones(1)}, replace(PROVENANCE, network=network))
    with pytest.raises(WeightsError, match="cannot be built"):
        load_segmenter(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"round": 1})

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half of it")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert load_state(path) == {"round": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["state.pt"]


def test_a_write_that_fails_at_first_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        save_weights(tmp_path / "model.safetensors", {"a": 3}, PROVENANCE)  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_state_of_an_optimiser_round_trips(tmp_path: Path) -> None:
    network = build_segmenter(**NETWORK)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.randn(1, 4, 8, 8, 8)).sum().backward()
    optimizer.step()
    save_state(tmp_path / "s.pt", {"optimizer": optimizer.state_dict(), "history": [{"loss": 0.5}], "counts": None})
    state = load_state(tmp_path / "s.pt")
    assert state["history"] == [{"loss": 0.5}] and state["counts"] is None
    before = optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], before)


def test_state_that_would_execute_or_is_damaged_is_refused(tmp_path: Path) -> None:
    torch.save({"path": tmp_path}, tmp_path / "object.pt")  # a pickled object, not plain values
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 and then nothing")
    for name in ("object.pt", "damaged.pt"):
        with pytest.raises(WeightsError, match=name):
            load_state(tmp_path / name)


def test_commit_is_a_hash_or_unknown() -> None:
    commit = current_commit()
    assert commit is None or (len(commit) == 40 and set(commit) <= set("0123456789abcdef"))
