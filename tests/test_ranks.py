"""What several ranks share: one process and two train as one, device and compute type, the end of all
when one rank fails, signals, and the order of their collectives.

Two-rank runs go through torchrun on the CPU (gloo, FSDP2). Of eight ranks one at a time runs, in a
fake process group.

    python -m pytest tests/test_ranks.py
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import test_sft as helpers
import torch
from test_sft import ENVIRONMENT, metrics, same_runs, wait, weights, words
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo
import model as qwen
import sft
from data import TARGET, Encoder, read_samples, write_samples

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STAGES = {"sft": (sft, sft.SFTFlags), "grpo": (grpo, grpo.GRPOFlags)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return helpers.tiny_world(tmp_path_factory.mktemp("world"), short=True)


@pytest.fixture
def run_flags(world, tmp_path):
    """run_flags(stage, name, **fields): a run of 3 short steps of sft or grpo in tmp_path/name."""

    def make(stage="sft", name="out", **fields):
        usual = dict(rollout_batch=4, update_batch=2, group=2, max_new_tokens=4)
        usual = dict(batch_size=4, epochs=1) if stage == "sft" else usual
        return helpers.small_run(STAGES[stage][1], world, tmp_path / name, **usual | fields)

    return make


def on_two(folder: Path, script: str, *arguments: str) -> tuple[int, str]:
    """The exit status of torchrun with two ranks of a script, and what it and its ranks say."""
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--shutdown-timeout=120", "script.py", *arguments]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log)
    return wait(process), (folder / "log").read_text()


DRIVER = """# Runs a stage several times in the processes of one torchrun.
import functools, importlib, json, sys
import data, sft

sft.start_ranks = functools.cache(sft.start_ranks)  # a process joins its group once
stage, name = importlib.import_module(sys.argv[1]), sys.argv[2]

def main(flags):
    for fields in json.loads(sys.argv[3]):
        stage.main(type(flags)(**fields))

data.cli(getattr(stage, name), main, [])
"""


def train_on_two(folder: Path, stage: str, runs: list) -> None:
    fields = json.dumps([asdict(flags) for flags in runs])
    status, said = on_two(folder, DRIVER, stage, type(runs[0]).__name__, fields)
    assert status == 0, said[-3000:]


# ---- one process and two


def test_sft_on_two_ranks_is_that_on_one(run_flags, world, tmp_path):
    # A batch of 3, one row a sample: rank 0 has two rows and rank 1 one, and at some turn the text
    # row meets a row with an image. Only rank 0 has a validation sample. A batch of 1 leaves rank 1
    # without a row. The last two runs change the number of ranks on the way.
    mixed = dict(data=[str(world / "mixed.jsonl")], batch_size=3, pack_tokens=1, epochs=4)
    mixed |= dict(validation=[str(world / "val.jsonl")], eval_every=1)
    names = ("one", "two", "halted", "shrinking", "growing")
    one, two, halted, shrinking, growing = (run_flags("sft", name, **mixed) for name in names)
    few = dict(freeze=["vision", "merger"], batch_size=1, steps=2)
    frozen = run_flags("sft", "frozen", **mixed | few)
    sft.main(replace(growing, steps=2))
    first_halves = [replace(flags, steps=2) for flags in (halted, shrinking)]
    train_on_two(tmp_path, "sft", [two, frozen, *first_halves, halted, growing])
    sft.main(one)
    sft.main(shrinking)
    assert same_runs(two, halted)
    started, trained = weights(one.model), weights(one.out)
    for other in (two, shrinking, growing):
        for alone, both in zip(metrics(one.out), metrics(other.out), strict=True):
            assert both == pytest.approx(alone, rel=1e-3)
        for name, tensor in weights(other.out).items():  # within a fraction of the distance gone
            gone = (trained[name] - started[name]).abs().max()
            assert (trained[name] - tensor).abs().max() < 0.05 * gone, name
    for name, tensor in weights(frozen.out).items():
        assert torch.equal(started[name], tensor) == name.startswith("visual."), name


def test_grpo_on_two_ranks_is_that_on_one(run_flags, tmp_path):
    # Each update has two groups on one rank and one on the other, in rows of about a group.
    uneven = dict(rollout_batch=6, update_batch=3, group=4, max_new_tokens=24, pack_tokens=150)
    names = ("one", "two", "halted")
    one, two, halted = (run_flags("grpo", name, lr=1e-3, floor=0.1, **uneven) for name in names)
    train_on_two(tmp_path, "grpo", [two, replace(halted, steps=1), halted])
    grpo.main(one)
    first, both = ((Path(flags.out) / "rollouts.jsonl").read_text() for flags in (one, two))
    # Later outputs are sampled from weights that differ in last bits.
    assert first.splitlines()[:6] == both.splitlines()[:6]
    alone, shared = metrics(one.out)[0], metrics(two.out)[0]
    for name in ("reward", "tokens", "zero_std_groups", "loss", "grad_norm", "approx_kl"):
        assert shared[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    assert shared["logprob_diff_max"] < 1e-4 and same_runs(two, halted)


# ---- choosing devices and types


@pytest.fixture
def cuda(monkeypatch):
    """As if there were two GPUs; returns those that were made current."""
    current, zeros = [], torch.zeros

    def set_device(device):
        if device.index > 1:
            raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might")
        current.append(str(device))

    where = lambda device: "cpu" if device.type == "cuda" else device
    on_cpu = lambda *size, device: zeros(*size, device=where(device))
    found = lambda check_available: torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", found)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "zeros", on_cpu)
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()
    yield current
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    torch.set_float32_matmul_precision(before[1])


def as_torchrun(patch: pytest.MonkeyPatch, rank: int, world: int, local_rank: int) -> None:
    """As if torchrun had started this process."""
    values = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local_rank, "TORCHELASTIC_RUN_ID": 1}
    for name, value in values.items():
        patch.setenv(name, str(value))


def test_one_process_uses_one_gpu_and_what_it_can_compute_in(cuda, capsys, monkeypatch):
    ranks = qwen.start_ranks("auto", "auto")
    assert ranks == qwen.Ranks(0, 1, torch.device("cuda:0"), torch.bfloat16) and cuda == ["cuda:0"]
    assert capsys.readouterr().out == "1 x cuda, computing in bfloat16\n"
    assert qwen.start_ranks("cpu", "auto").compute == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert qwen.start_ranks("cuda", "auto").compute == torch.float32
    with pytest.raises(qwen.InputError, match="--dtype bfloat16: this card has no kernels for it"):
        qwen.start_ranks("cuda", "bfloat16")


@pytest.mark.parametrize("device, backend", [("cuda:1", "nccl"), ("cpu", "gloo")])
def test_each_of_several_ranks_uses_the_gpu_of_its_number(cuda, monkeypatch, device, backend):
    as_torchrun(monkeypatch, 3, 4, 1)
    joined, group = [], torch.distributed
    monkeypatch.setattr(group, "init_process_group", lambda name, **how: joined.append(name))
    ranks = qwen.start_ranks(device.partition(":")[0], "float32")
    assert ranks == qwen.Ranks(3, 4, torch.device(device), torch.float32) and joined == [backend]


@pytest.mark.parametrize(
    "device, message",
    [
        ("cuda", "device cuda cannot be used: CUDA error: invalid device ordinal"),
        ("meta", "device meta cannot be used: "),
    ],
)
def test_what_cannot_be_used_is_told(cuda, monkeypatch, device, message):
    as_torchrun(monkeypatch, 5, 8, 5)  # there are two GPUs
    with pytest.raises(qwen.InputError, match=message):
        qwen.start_ranks(device, "auto")


# ---- one rank fails

FAILING = """# A stage in which one rank fails at one place.
import importlib, os, sys
import data

stage, flags, name, rank, kind = sys.argv[1:6]
del sys.argv[1:6]
stage = importlib.import_module(stage)

def fail(*args, **kwargs):
    raise {"input": data.InputError, "disk": OSError, "bug": RuntimeError}[kind]("broken\\nhere")

if os.environ["RANK"] == rank:
    setattr(data.Encoder if hasattr(data.Encoder, name) else stage.sft.dcp, name, fail)
data.cli(getattr(stage, flags), stage.main)
"""


@pytest.mark.parametrize(
    "stage, name, rank, kind",
    [("sft", "example", 1, "input"), ("grpo", "decode", 0, "bug"), ("grpo", "save", 1, "disk")],
)
def test_when_one_rank_fails_all_end_and_its_message_is_told(
    run_flags, tmp_path, stage, name, rank, kind
):
    flags, one_line = run_flags(stage, steps=1), f"\nerror: rank {rank}: broken here\n"
    arguments = [stage, type(flags).__name__, name, str(rank), kind, *words(flags)]
    status, log = on_two(tmp_path, FAILING, *arguments)
    said, _, cause = log.partition("Root Cause")
    assert status == 1 and re.search(rf"rank *: {rank} ", cause)  # torchrun's own status
    assert ("RuntimeError: broken\nhere\n" if kind == "bug" else one_line) in said
    assert re.search(rf"exitcode *: {1 if kind == 'bug' else 2} ", cause)


# ---- signals


@pytest.mark.parametrize("stage, number", [("sft", signal.SIGTERM), ("grpo", signal.SIGINT)])
def test_a_signal_ends_the_step_and_the_same_command_goes_on(
    run_flags, monkeypatch, capfd, stage, number
):
    main, whole, stopped = STAGES[stage][0].main, run_flags(stage, "a"), run_flags(stage, "b")
    main(whole)
    log = sft.Run.log
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sft.Run, "log", lambda *a: (log(*a), os.kill(os.getpid(), number)))
        main(stopped)
    assert end.value.code == 128 + number
    assert [line["step"] for line in metrics(stopped.out)] == [1]
    told = "stopping after this step, with a checkpoint; Ctrl-\\ ends at once\n"
    assert capfd.readouterr().err == told
    assert not Path(stopped.out, "model.safetensors").exists()
    main(stopped)
    assert same_runs(whole, stopped) and len(metrics(whole.out)) == 3


ONE_SIGNAL = """# A run that is stopped by a signal to rank 1 alone.
import os, signal
import data, sft

log = sft.Run.log
stop = lambda run: run.ranks.rank == 1 and os.kill(os.getpid(), signal.SIGTERM)
sft.Run.log = lambda run, *arguments: (log(run, *arguments), stop(run))
data.cli(sft.SFTFlags, sft.main)
"""


def test_all_ranks_stop_after_the_same_step(run_flags, tmp_path):
    flags = run_flags(save_every=100)
    status, log = on_two(tmp_path, ONE_SIGNAL, *words(flags))
    assert status == 1 and set(re.findall(r"exitcode *: (\d+)", log)) == {"143"}
    assert [line["step"] for line in metrics(flags.out)] == [1]
    assert [path.name for path in Path(flags.out).glob("checkpoints/*")] == ["step-000001"]


# ---- the collectives of every rank

WORLD = 8
MOST_ROWS = 4  # of any rank in one update


class Collectives(TorchDispatchMode):
    """A group of 8 ranks of which only one runs, and the log of that one's collectives, which leave its
    own data in the place of the others'. What all have to be told the same is made up."""

    def __init__(self, rank: int, patch: pytest.MonkeyPatch):
        super().__init__()
        self.rank, self.log = rank, []
        start, reduce = torch.distributed.init_process_group, torch.distributed.all_reduce

        def all_reduce(tensor, op):
            reduce(tensor, op)
            if op == torch.distributed.ReduceOp.MAX:
                tensor.clamp_(min=MOST_ROWS)

        as_torchrun(patch, rank, WORLD, rank)
        join = lambda *_, **how: start("fake", rank=rank, world_size=WORLD, store=FakeStore())
        patch.setattr(torch.distributed, "init_process_group", join)
        patch.setattr(torch.distributed, "all_reduce", all_reduce)
        patch.setattr(torch.distributed, "all_gather_object", self.all_gather_object)
        patch.setattr(sft.dcp, "save", self.save)
        patch.setattr(grpo, "compute_metrics", lambda predictions: {})  # of all ranks
        no_signal = lambda ranks: nullcontext(lambda: int(ranks.reduce(0)))
        patch.setattr(sft, "stop_signal", no_signal)
        select = sft.usable_samples  # what the others choose is not known here
        alone = lambda flags, ranks, *rest, **how: select(flags, helpers.ALONE, *rest, **how)
        patch.setattr(sft, "usable_samples", alone)

    def all_gather_object(self, boxes: list, items: list) -> None:
        """The others have the same as this rank."""
        self.log.append("all_gather_object")
        boxes[:] = [items] * WORLD

    def save(self, state: dict, checkpoint_id: Path) -> None:
        """In place of torch's, which waits for the others: what each rank writes."""
        checkpoint_id.mkdir(parents=True)
        for tensor in tree_leaves(state):
            self.log.append(f"save {type(tensor).__name__}{list(tensor.shape)}")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.log.append([str(function), *(f"{x.dtype}{list(x.shape)}" for x in tensors)])
        return function(*args, **kwargs or {})


def collectives_of(rank: int, stage: str, flags) -> list:
    """The log of the whole run of one rank."""
    with pytest.MonkeyPatch.context() as patch:
        # Odd ranks have one right output of two in every group, even ones no group with any spread.
        texts = itertools.cycle(["", TARGET.format("fine", "harmful", "harmful")])
        patch.setattr(Encoder, "decode", lambda encoder, ids: next(texts) if rank % 2 else "")
        with Collectives(rank, patch) as collectives:
            STAGES[stage][0].main(flags)
        torch.distributed.destroy_process_group()
    return collectives.log


@pytest.mark.parametrize(
    "stage, held_out, fields",
    [
        ("sft", 11, dict(batch_size=13, epochs=13 / 24, pack_tokens=1)),
        ("sft", 3, dict(batch_size=24, freeze=["vision"], checkpointing=False)),
        ("sft", 3, dict(batch_size=5, epochs=0.3)),  # three ranks have no sample
        ("grpo", 11, dict(rollout_batch=24, update_batch=12, pack_tokens=1)),
        ("grpo", 3, dict(rollout_batch=8, update_batch=4, epochs=0.4, freeze=["decoder"])),
    ],
)
def test_each_of_8_ranks_issues_the_same_collectives(
    world, run_flags, tmp_path, stage, held_out, fields
):
    samples, _ = read_samples([world / "train.jsonl"])
    text, images = ([s for s in samples if (s.image is None) == bare] for bare in (True, False))
    copies = [replace(s, id=f"{s.id} {i}") for i in range(6) for s in text]
    data, validation = world / "some-images.jsonl", world / "few.jsonl"
    write_samples(data, [*copies[:21], *images[:3]])  # most ranks have no image in a batch
    write_samples(validation, copies[:held_out])  # of 11 three ranks have two, of 3 five have none
    fields |= dict(data=[str(data)], validation=[str(validation)], lr=1e-12)
    fields |= dict(eval_every=1, save_every=1)
    folders = [run_flags(stage, f"rank-{rank}", **fields) for rank in range(WORLD)]
    logs = [collectives_of(rank, stage, flags) for rank, flags in enumerate(folders)]
    assert all(log == logs[0] for log in logs)
    issued = str(logs[0])
    for kind in ("barrier", "allreduce", "allgather", "reduce_scatter", "save DTensor"):
        assert kind in issued
