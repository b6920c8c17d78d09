"""Several processes distil what one does: the same gradients, one set of questions, one writer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fediod_med import parallel
from fediod_med.checkpoints import load_state, load_weights
from fediod_med.data.phantoms import Grid, hospital_profiles, write_cohort
from fediod_med.data.sampler import PublicSampler
from fediod_med.distillation.learning import REHEARSAL_DRAWS
from fediod_med.errors import SettingsError, WorkerError
from fediod_med.networks import STUDENT, Generator, build_segmenter, one_hot
from fediod_med.parallel import ALONE, Workers, joined, own_device
from tests.parallel_parties import (
    HALF,
    SCENARIOS,
    SITES,
    SIZE,
    findings,
    launch_variables,
    public_sampler,
    read,
    run,
    start_two,
    take_part,
    together,
)

CPU = torch.device("cpu")

# Float32 sums in another order differ by some 1e-7 of their parts; a generator's last layer sums over all voxels with
# much cancellation, which leaves 1e-5 of the result. A message rounds volumes to fp16, steps of 2**-11: where two
# processes differ in the last bit of a volume, the hospitals may be asked about volumes one such step apart.
ROUNDING, HALF_PRECISION = 1e-4, 2**-7


@dataclass(frozen=True, repr=False)  # a failing test would print every tensor
class Pair:
    """What one process found alone, what two found together, and where the two left their files."""

    alone: Mapping[str, Any]
    first: Mapping[str, Any]
    second: Mapping[str, Any]
    folder: Path
    sampler: PublicSampler


@pytest.fixture(scope="module", params=["threads", pytest.param("processes", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("parallel")
    sampler = public_sampler()
    alone = {name: findings(*run(sampler, root / "alone" / name, **s)) for name, s in SCENARIOS.items()}
    folder = root / "two"
    folder.mkdir()
    (root / "alone" / "whole-half").rename(folder / "of-one")  # what one process left after half the rounds
    if request.param == "threads":
        assert together(2, lambda workers: take_part(workers, sampler, folder)) == [None, None]
    else:
        assert start_two(folder) == ["", ""], "a process printed"
    alone["resumed"] = findings(*run(sampler, folder / "whole-half", resume=True))  # what two left after half
    return Pair(alone, *read(folder), folder, sampler)


def apart(a: Tensor, b: Tensor) -> float:
    """Relative to the first."""
    return float((a - b).norm() / a.norm())


def tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors(value)


def answers(found: Mapping[str, Any], sampler: PublicSampler) -> Tensor:
    """What the student says about phantoms that no run has drawn."""
    student = build_segmenter("unet", width=8, depth=2)
    student.load_state_dict(found["state"]["student"])
    with torch.no_grad():
        return torch.softmax(student.eval()(sampler.draw(REHEARSAL_DRAWS - 1, 2).base), dim=1)


def corrections(found: Mapping[str, Any], sampler: PublicSampler) -> Tensor:
    """What the generator adds to such phantoms."""
    generator = Generator("conditional", size=SIZE, width=4)
    generator.load_state_dict(found["state"]["generator"])
    public = sampler.draw(REHEARSAL_DRAWS - 1, 2)
    z = torch.randn((2, generator.latent), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        change: Tensor = generator(z, one_hot(public.tissues, 7), public.base) - public.base
    return change


# --- the same result --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whole", "one-step", "idle", "phantoms"])
def test_two_processes_find_the_gradients_of_one(pair: Pair, name: str) -> None:
    """A batch of three volumes is dealt 2 and 1; in `idle` the round's only volume leaves the second without any."""
    assert apart(pair.alone[name]["student_gradient"], pair.first[name]["student_gradient"]) < ROUNDING
    if name != "phantoms":
        assert apart(pair.alone[name]["generator_gradient"], pair.first[name]["generator_gradient"]) < ROUNDING


@pytest.mark.parametrize("name", ["two-generator-steps", "paper"])
def test_every_layer_of_the_generator_gets_the_gradient_of_one_process(pair: Pair, name: str) -> None:
    expected, found = pair.alone[name]["generator_gradient"], pair.first[name]["generator_gradient"]
    assert (expected != 0).float().mean() > 0.5
    assert apart(expected, found) < HALF_PRECISION


def test_two_processes_end_with_the_student_and_generator_of_one(pair: Pair) -> None:
    """Compared by what they say: Adam makes a whole step, up or down, of a gradient that is rounding alone, but the
    weights it moves so (a bias before a normalisation) change nothing.
    """
    for look in (answers, corrections):
        expected = look(pair.alone["whole"], pair.sampler)
        assert apart(expected, look(pair.first["whole"], pair.sampler)) < ROUNDING
    assert apart(answers(pair.alone["one-step"], pair.sampler), answers(pair.first["whole"], pair.sampler)) > 0.01


def test_two_processes_select_the_student_and_learn_the_weights_of_one(pair: Pair) -> None:
    alone, first = (found["chosen"]["state"] for found in (pair.alone, pair.first))
    assert first["best"]["round"] == alone["best"]["round"]
    assert first["best"]["loss"] == pytest.approx(alone["best"]["loss"], rel=1e-3)
    assert alone["log_weights"].abs().max() > 1e-3
    assert torch.allclose(first["log_weights"], alone["log_weights"], atol=1e-4)


def test_both_processes_hold_the_same_to_the_last_bit(pair: Pair) -> None:
    """They started from different weights; all that a checkpoint holds is the first's."""
    for name in (*SCENARIOS, "resumed"):
        first, second = (list(tensors(found[name]["state"])) for found in (pair.first, pair.second))
        assert len(first) == len(second) > 20
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name
        assert pair.first[name]["state"]["history"] == pair.second[name]["state"]["history"]


def test_a_run_is_resumed_by_another_number_of_processes(pair: Pair) -> None:
    """By two from the checkpoint of one, and by one from that of two."""
    expected = answers(pair.alone["whole"], pair.sampler)
    for found in (pair.first["resumed"], pair.alone["resumed"]):
        assert found["rounds"] == [HALF + 1, HALF + 2] and found["state"]["round"] == HALF + 2
        assert apart(expected, answers(found, pair.sampler)) < ROUNDING
        assert len(found["state"]["replay"]) == HALF + 2


GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is false"),
    pytest.mark.filterwarnings("default"),  # what drivers and NCCL have to say is for the reader of the log
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_single_process_of_torchrun_finds_what_one_does_without(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exchanges of a group of one: over gloo to the last bit, over NCCL up to what a GPU's sums leave open."""
    (variables,) = launch_variables(1)
    for name, value in {**variables, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    sampler = public_sampler()
    with joined(device) as (workers, own):
        assert workers.group is not None and workers.size == 1
        assert own == ("cpu" if device == "cpu" else "cuda:0")
        where = torch.device(own)
        found = findings(*run(sampler, tmp_path / "launched", workers=workers, device=where, **SCENARIOS["one-step"]))
    assert not dist.is_initialized()
    alone = findings(*run(sampler, tmp_path / "alone", device=where, **SCENARIOS["one-step"]))
    for name in ("student_gradient", "generator_gradient"):
        assert apart(alone[name], found[name]) <= (0 if device == "cpu" else HALF_PRECISION)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_two_processes_find_the_gradients_of_one_on_a_gpu(device: str, tmp_path: Path) -> None:
    """They share the card, which NCCL refuses: what lies on it travels over gloo."""
    sampler, where = public_sampler(), torch.device(device)
    # Kernels are chosen by the size of a batch, and TensorFloat-32 would keep 2**-11 only.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        arguments = {"device": where, **SCENARIOS["one-step"]}
        alone = findings(*run(sampler, tmp_path / "alone", **arguments))
        both = together(2, lambda workers: findings(*run(sampler, tmp_path / "two", workers=workers, **arguments)))
    for name in ("student_gradient", "generator_gradient"):
        assert apart(alone[name], both[0][name]) < HALF_PRECISION
        assert torch.equal(both[0][name], both[1][name])


# --- one asks, one writes ---------------------------------------------------------------------------------------------


def test_each_hospital_is_asked_once_a_round_as_by_one_process(pair: Pair) -> None:
    for name in SCENARIOS:
        asked = pair.first[name]["asked"]
        assert asked == pair.alone[name]["asked"] and len(asked) == len({*asked})
        assert pair.second[name]["asked"] == []
    assert [kind for site, kind, _ in pair.first["whole"]["asked"] if site == SITES[0]].count("answer") == 4


def test_the_first_alone_reports_and_writes(pair: Pair) -> None:
    assert pair.first["whole"]["rounds"] == [1, 2, 3, 4] and pair.first["whole"]["snapshots"]
    assert pair.second["whole"]["rounds"] == pair.second["whole"]["snapshots"] == []
    written = {p.relative_to(pair.folder / "whole") for p in (pair.folder / "whole").rglob("*") if p.is_file()}
    alone = pair.folder.with_name("alone") / "whole"
    assert written == {p.relative_to(alone) for p in alone.rglob("*") if p.is_file()}
    assert not list(pair.folder.rglob("never.pt"))


def test_a_process_that_could_never_have_a_volume_is_refused(pair: Pair) -> None:
    for found in (pair.first, pair.second):
        kind, message = found["too-many"]
        assert kind == "SettingsError"
        assert "at most 1" in message and "--student-batch" in message


def test_a_failed_round_stops_both_and_leaves_them_together(pair: Pair) -> None:
    assert pair.first["silent"][0] == "ProtocolError" and "south" in pair.first["silent"][1]
    kind, message = pair.second["silent"]
    assert kind == "WorkerError" and pair.first["silent"][1] in message
    assert pair.first["after"] == pair.second["after"] == "still together"


@pytest.mark.slow
def test_a_process_that_dies_is_noticed_by_the_other(tmp_path: Path) -> None:
    (tmp_path / "of-one").mkdir()
    run(public_sampler(), tmp_path / "of-one")
    start_two(tmp_path)
    ended = load_state(tmp_path / "ended.pt")
    assert ended["error"][0] == "WorkerError" and "another process" in ended["error"][1]
    assert ended["device"] == "cpu"


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 2), (2, 3), (7, 3), (8, 4)])
def test_shares_cover_a_batch_in_order_and_differ_by_one_at_most(count: int, size: int) -> None:
    volumes = list(range(count))
    shares = [volumes[Workers(rank, size).share(count)] for rank in range(size)]
    assert [v for share in shares for v in share] == volumes
    assert len(shares[0]) - len(shares[-1]) <= 1 and shares[0]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_gathered_shares_are_the_batch(count: int) -> None:
    """Also where a process has no share, and cannot know the shape of a volume."""
    batch = torch.randn(count, 2, 3, requires_grad=True)

    def work(workers: Workers) -> Tensor:
        own: Tensor = batch[workers.share(count)]
        return workers.gather(own if len(own) else None, count, CPU)

    for found in together(3, work):
        assert torch.equal(found, batch) and not found.requires_grad


def test_summed_gradients_count_what_is_missing_as_zero() -> None:
    def work(workers: Workers) -> list[Any]:
        everyone, first, nobody = (nn.Parameter(torch.zeros(1)) for _ in range(3))
        frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        everyone.grad = torch.tensor([float(workers.rank + 1)])
        if workers.lead:
            first.grad = torch.tensor([5.0])
        workers.sum_gradients(nn.ParameterList([everyone, first, nobody, frozen]))
        return [None if p.grad is None else p.grad.item() for p in (everyone, first, nobody)]

    assert together(2, work) == [[3.0, 5.0, None]] * 2


def test_what_the_first_found_reaches_all_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PIECE", 1000)
    value = {"x": torch.randn(700), "n": [1, 2.5, None, True, "word"], "counts": torch.tensor([3, 4])}
    first, second = together(2, lambda workers: workers.led(lambda: value))
    assert first is value and second["n"] == value["n"]
    assert torch.equal(second["x"], first["x"]) and second["counts"].dtype == torch.int64


def test_an_error_of_the_first_is_raised_on_all() -> None:
    def work(workers: Workers) -> str:
        return workers.led(lambda: str(1 // 0))

    first, second = together(2, work)
    assert isinstance(first, ZeroDivisionError)
    assert isinstance(second, WorkerError) and "division" in str(second)


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv(
        "RANK", "3"
    )  # a cluster's own variable; no run of several processes without an address to meet at
    monkeypatch.setenv("WORLD_SIZE", "8")
    with joined("cuda:7") as (workers, device):
        assert workers == ALONE and device == "cuda:7"
    assert ALONE.lead and ALONE.share(5) == slice(0, 5)


def test_each_process_takes_the_gpu_of_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [own_device("auto", rank) for rank in range(2)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert own_device("cpu", 5) == CPU
    with pytest.raises(SettingsError, match="--nproc-per-node"):
        own_device("cuda", 2)
    with pytest.raises(SettingsError, match="auto, cuda or cpu"):
        own_device("cuda:1", 0)


# --- the command ------------------------------------------------------------------------------------------------------


def distil(folder: Path, out: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    words = ["-m", "fediod_med", "distill", "--sites", folder / "sites", "--out", out, "--device", "cpu", "--quiet"]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, words), "--rounds", "2", "--pool", "3"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parent.parent,
    )


def files(run: Path) -> set[str]:
    """Below a run folder; a run's own id is in the names of the hospitals' states."""
    own = (run / "run_id").read_text()
    return {str(p.relative_to(run)).replace(own, "run") for p in run.rglob("*")}


@pytest.mark.slow
def test_torchrun_distils_as_one_process_does(tmp_path: Path) -> None:
    """From phantom hospitals to the run folder: teachers, both students, pooled training, scores, one table."""
    for number, profile in enumerate(hospital_profiles()[:2]):
        name, grid = f"h{number}", Grid((32, 32, 32), 6.0)
        write_cohort(tmp_path / "data" / name, count=4, seed=number, grid=grid, profile=profile, prefix=f"H{number}")
        (tmp_path / "sites" / name).mkdir(parents=True)
        (tmp_path / "sites" / name / "site.yaml").write_text(
            f"site_name: {name}\nlayout: brats2018\nlabel_scheme: brats2018\ndataset_dir: ../../data/{name}\nfolds: 2\n"
            "spacing: 6.0\nroi: 32\nepochs: 1\nsteps_per_epoch: 1\nbackbone: unet\nwidth: 16\n"
        )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    one, two = distil(tmp_path, tmp_path / "one"), distil(tmp_path, tmp_path / "two", *launcher)
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert two.stderr.count("privacy, h0: NOT PRIVATE") == two.stdout.count("Run folder:") == 1
    assert files(tmp_path / "one") == files(tmp_path / "two")
    records = [json.loads((tmp_path / out / "run.json").read_text())["options"] for out in ("one", "two")]
    assert [record["processes"] for record in records] == [1, 2]
    summaries = [json.loads((tmp_path / out / "summary.json").read_text()) for out in ("one", "two")]
    assert summaries[0]["bytes"] == summaries[1]["bytes"], "a hospital was asked another number of times"

    x = torch.randn((1, 4, 32, 32, 32), generator=torch.Generator().manual_seed(0))
    said = []
    for out in ("one", "two"):
        student = build_segmenter(**STUDENT)
        student.load_state_dict(load_weights(tmp_path / out / "student.safetensors")[0])
        with torch.no_grad():
            said.append(torch.softmax(student.eval()(x), dim=1))
    assert apart(said[0], said[1]) < 0.02  # volumes of 32 are learnt in bfloat16 where the machine has it

    again = distil(tmp_path, tmp_path / "two", *launcher)
    assert again.returncode != 0
    assert again.stderr.count("add --resume") == 1 and "WorkerError" not in again.stderr
