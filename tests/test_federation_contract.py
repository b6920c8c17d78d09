"""What every federation must do, and the split gradient: over hospitals it equals one graph."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fediod_med.distillation.generating import softmax_pull_back
from fediod_med.ensemble import merge, site_shares
from fediod_med.errors import ProtocolError
from fediod_med.federation.critic import PlainCritic
from fediod_med.federation.embedded import EmbeddedFederation
from fediod_med.federation.node import SiteNode
from fediod_med.losses import mask_cross_entropy, prediction_entropy, teacher_divergence
from fediod_med.networks import build_segmenter
from fediod_med.privacy.gate import Gate
from fediod_med.protocol import Query, Reply, SiteFailure, pack, unpack

CPU = torch.device("cpu")
SITES = ("north", "south", "west")
COUNTS = torch.tensor([[9.0, 4, 5, 6], [3.0, 3, 1, 0], [6.0, 0, 6, 2]])
SHAPE = (2, 4, 16, 16, 16)


@pytest.fixture
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as on a CPU without bfloat16 instructions, so that two routes can be compared closely."""
    monkeypatch.setattr("fediod_med.devices._cpu_has_bf16", lambda: False)


def nodes(folder: Path) -> dict[str, SiteNode]:
    made = {}
    for index, name in enumerate(SITES):
        torch.manual_seed(index)
        made[name] = SiteNode(
            name,
            build_segmenter("unet", width=4, depth=2),
            (torch.arange(9)[:, None] < COUNTS[index]).float(),
            critic=PlainCritic(
                name,
                [torch.randn(4, 18, 16, 16)],
                state_dir=folder / name,
                seed=1,
                device=CPU,
                width=4,
                layers=1,
            ),
            gate=Gate.unprotected(name),
            device=CPU,
        )
    return made


def volume(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def answer(x: Tensor, number: int = 1, **settings: bool) -> Query:
    return Query("answer", "run", number, {"x": x}, {"adversarial": True, "differentiate": True, **settings})


def objective(probs: Tensor, classes: Tensor) -> Tensor:
    """A sum of the terms that reach the teachers; `(K, B, C, D, H, W)`."""
    pi = site_shares(COUNTS)
    q = merge(probs, COUNTS)
    clarity = (pi * torch.stack([prediction_entropy(p) for p in probs])).sum()
    return mask_cross_entropy(q, classes) + 0.3 * clarity - 0.5 * teacher_divergence(probs, pi)


def good(outcome: Mapping[str, Reply | SiteFailure]) -> list[Mapping[str, Tensor]]:
    assert all(isinstance(reply, Reply) for reply in outcome.values())
    return [reply.tensors for reply in outcome.values() if isinstance(reply, Reply)]


def in_one_graph(sites: Mapping[str, SiteNode], x: Tensor, classes: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_(True)
    probs = torch.stack([torch.softmax(site._teacher(leaf), dim=1) for site in sites.values()])
    (gradient,) = torch.autograd.grad(objective(probs, classes), leaf)
    return gradient


def logit_gradients(probs: Tensor, classes: Tensor) -> list[Tensor]:
    leaves = probs.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(objective(leaves, classes), leaves)
    return [softmax_pull_back(p, g) for p, g in zip(probs, gradient, strict=True)]


@pytest.mark.usefixtures("_float32")
@pytest.mark.parametrize("serialised", [False, True])
def test_the_gradient_split_over_hospitals_equals_one_graph(tmp_path: Path, serialised: bool) -> None:
    """With the nodes themselves exactly; through messages within fp16."""
    sites = nodes(tmp_path)
    federation = EmbeddedFederation(sites)
    # Values fp16 holds exactly, so that both routes see the same volume.
    x = (volume() * 64).round().clamp(-255, 255) / 64
    x[0, 0, 0, 0, 0] = 4.0
    classes = torch.randint(0, 4, (2, 16, 16, 16), generator=torch.Generator().manual_seed(3))

    def ask(queries: Mapping[str, Query]) -> list[Mapping[str, Tensor]]:
        if serialised:
            return good(federation.ask(queries, quorum=3, timeout_s=60))
        return [sites[name]._reply(query).tensors for name, query in queries.items()]

    probs = torch.stack([reply["probs"] for reply in ask(dict.fromkeys(SITES, answer(x)))])
    probs = probs / probs.sum(dim=2, keepdim=True)
    gradients = logit_gradients(probs, classes)
    pulled = ask(
        {name: Query("pull_back", "run", 1, {"logit_gradient": g}) for name, g in zip(SITES, gradients, strict=True)}
    )
    split = torch.stack([reply["x_gradient"] for reply in pulled]).sum(dim=0)
    whole = in_one_graph(sites, x, classes)
    tolerance = 4e-3 if serialised else 1e-5
    assert whole.norm() > 0
    assert (split - whole).norm() <= tolerance * whole.norm()


def test_messages_change_answers_by_fp16_rounding_only(tmp_path: Path) -> None:
    x = unpack(pack(answer(volume()))).tensors["x"]
    raw = nodes(tmp_path / "a")["north"]._reply(answer(x)).tensors
    (sent,) = good(EmbeddedFederation(nodes(tmp_path / "b")).ask({"north": answer(x)}, quorum=1, timeout_s=60))
    for name, tensor in raw.items():
        assert (tensor - sent[name]).abs().max() <= 2e-3 * tensor.abs().max(), name


def test_replies_come_in_the_order_of_the_queries_one_per_site(tmp_path: Path) -> None:
    federation = EmbeddedFederation(nodes(tmp_path))
    assert federation.site_names == SITES
    outcome = federation.ask({name: Query("describe", "run", 0) for name in ("west", "north")}, quorum=2, timeout_s=60)
    assert list(outcome) == ["west", "north"]
    assert [reply.site for reply in outcome.values()] == ["west", "north"]
    for name, tensors in zip(outcome, good(outcome), strict=True):
        assert torch.allclose(tensors["class_counts"], COUNTS[SITES.index(name)], rtol=1e-3)


def test_a_failing_site_is_a_failure_with_a_reason_and_the_others_answer(tmp_path: Path) -> None:
    federation = EmbeddedFederation(nodes(tmp_path))
    queries = dict.fromkeys(SITES, answer(volume()))
    queries["south"] = answer(volume(), number=7)
    outcome = federation.ask(queries, quorum=1, timeout_s=60)
    assert outcome["south"] == SiteFailure("south", 7, "ProtocolError")
    assert isinstance(outcome["north"], Reply) and isinstance(outcome["west"], Reply)


def test_the_reason_of_a_failure_names_no_path_and_no_number_of_the_site(tmp_path: Path) -> None:
    outcome = EmbeddedFederation(nodes(tmp_path)).ask({"south": answer(volume(), number=7)}, quorum=1, timeout_s=60)
    failure = outcome["south"]
    assert isinstance(failure, SiteFailure)
    assert failure.reason.isalpha()


def test_a_query_that_cannot_be_sent_is_the_centres_error(tmp_path: Path) -> None:
    """A generator that has gone NaN is no fault of the hospitals."""
    x = volume()
    x[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ProtocolError, match="finite"):
        EmbeddedFederation(nodes(tmp_path)).ask({"north": answer(x)}, quorum=1, timeout_s=60)


def test_a_reply_that_is_not_finite_fails_its_site(tmp_path: Path) -> None:
    sites = nodes(tmp_path)
    with torch.no_grad():
        next(sites["west"]._teacher.parameters()).fill_(float("nan"))
    outcome = EmbeddedFederation(sites).ask(dict.fromkeys(SITES, answer(volume())), quorum=2, timeout_s=60)
    assert isinstance(outcome["west"], SiteFailure) and isinstance(outcome["north"], Reply)


def test_bytes_are_counted_in_both_directions(tmp_path: Path) -> None:
    federation = EmbeddedFederation(nodes(tmp_path))
    query = answer(volume())
    outcome = federation.ask({"north": query}, quorum=1, timeout_s=60)
    (reply,) = outcome.values()
    assert isinstance(reply, Reply)
    assert federation.bytes_down == {"north": len(pack(query)), "south": 0, "west": 0}
    values = 2 * 4 * 16**3  # x down; probabilities and a gradient up, two bytes each
    assert 2 * values < federation.bytes_down["north"] < 2 * values + 600
    assert 4 * values < federation.bytes_up["north"] < 4 * values + 900


def test_replies_are_made_in_the_node_alone() -> None:
    """`protocol.unpack` restores what a node made; nothing else may construct one."""
    package = Path(__file__).resolve().parent.parent / "fediod_med"
    makers = set()
    for path in package.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] == "Reply":
                makers.add(path.relative_to(package).as_posix())
    assert makers == {"federation/node.py", "protocol.py"}


@pytest.mark.parametrize(
    ("critic", "scans", "readers", "patches", "users"),
    [
        ("PlainCritic", "_volumes", {"__init__", "judge", "real_batch"}, "real_batch", {"_step"}),
        ("PrivateCritic", "_patients", {"__init__", "_patches"}, "_patches", {"judge"}),
    ],
)
def test_the_node_makes_no_reply_from_its_scans(
    critic: str, scans: str, readers: set[str], patches: str, users: set[str]
) -> None:
    """The node has no scans; a critic reads them in one method, whose result goes into its update only."""
    folder = Path(__file__).resolve().parent.parent / "fediod_med" / "federation"
    node = ast.parse((folder / "node.py").read_text(encoding="utf-8"))
    assert not any(
        isinstance(part, ast.Attribute) and part.attr in ("patients", "dataset_dir") for part in ast.walk(node)
    )
    tree = ast.parse((folder / "critic.py").read_text(encoding="utf-8"))
    methods = [m for c in tree.body if isinstance(c, ast.ClassDef) and c.name == critic for m in c.body]

    def mentions(name: str) -> set[str]:
        return {
            method.name
            for method in methods
            if isinstance(method, ast.FunctionDef)
            for part in ast.walk(method)
            if isinstance(part, ast.Attribute) and part.attr == name
        }

    assert mentions(scans) == readers
    assert mentions(patches) == users


def test_only_the_gate_seals_what_leaves() -> None:
    package = Path(__file__).resolve().parent.parent / "fediod_med"
    makers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] == "Sealed"
    }
    assert makers == {"privacy/gate.py"}


@pytest.mark.usefixtures("_float32")
def test_a_mirrored_answer_has_the_gradient_of_its_mean(tmp_path: Path) -> None:
    site = nodes(tmp_path)["north"]
    x = volume()
    probs = site._reply(answer(x, mirrored=True)).tensors["probs"]
    direction = torch.randn(probs.shape, generator=torch.Generator().manual_seed(5))
    query = Query("pull_back", "run", 1, {"logit_gradient": softmax_pull_back(probs, direction)})
    pulled = site._reply(query).tensors["x_gradient"]
    leaf = x.clone().requires_grad_(True)
    mirrors = [[], [2], [3], [4], [2, 3], [2, 4], [3, 4], [2, 3, 4]]
    mean = torch.stack([torch.softmax(site._teacher(leaf.flip(m)), dim=1).flip(m) for m in mirrors]).mean(dim=0)
    assert torch.allclose(probs, mean, atol=1e-5)
    (whole,) = torch.autograd.grad((mean * direction).sum(), leaf)
    assert (pulled - whole).norm() <= 1e-4 * whole.norm()
