"""What several ranks share: the choice of device and compute type, the end of all when one rank
fails, signals, and the order of their collectives.

Two-rank runs go through torchrun on the CPU (gloo, FSDP2). Of eight ranks one at a time runs, in a fake
process group.

    python -m pytest tests/test_ranks.py
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import toy
from test_sft import ROOT, flags, metrics, same, weights
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import augment
import evaluate
import grpo
import model as qwen
import sft
from data import TARGET, Encoder, InputError, cli, end_process, read_samples, write_samples

STAGES = {"sft": sft, "grpo": grpo}
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy world of 12 exchanges with a word of reasoning, and an untrained tiny model."""
    folder = tmp_path_factory.mktemp("world")
    toy.make_world(folder, sizes={"train": 4, "val": 1, "test": 1})
    toy.build_checkpoint(folder / "base", **toy.TINY)
    short = [replace(s, reasoning="fine") for s in read_samples([str(folder / "train.jsonl")])]
    write_samples(folder / "train.jsonl", short)
    return folder


@pytest.fixture
def config(world, tmp_path):
    """config(stage, name, **fields): a run of 3 short steps of sft or grpo in tmp_path/name."""

    def make(stage="sft", name="out", **fields):
        usual = dict(
            model=str(world / "base"),
            data=[str(world / "train.jsonl")],
            out=str(tmp_path / name),
            instruction=str(world / "instruction.txt"),
            freeze=[],
            device="cpu",
            lr=1e-2,
        )
        if stage == "sft":
            usual |= dict(batch_size=4, epochs=1)
        else:
            usual |= dict(rollout_batch=4, update_batch=2, group=2, max_new_tokens=4)
        return STAGES[stage].Config(**usual | fields)

    return make


@pytest.fixture(autouse=True)
def handlers():
    """The process has its own signal handlers again after a test that changes them."""
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in usual.items():
        signal.signal(number, handler)


# ---- choosing devices, dtypes


@pytest.fixture
def cuda(monkeypatch):
    """As if there were two GPUs; returns what was asked of them."""
    asked = []

    def set_device(device):
        if device.index is None:  # as torch.cuda.set_device says it
            raise ValueError(f"Expected a torch.device with a specified index, but got:{device}")
        if device.index > 1:
            raise RuntimeError(
                "CUDA error: invalid device ordinal\nCUDA kernel errors might be reported later"
            )
        asked.append(("current", str(device)))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: asked.append(("used", str(device))))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield asked
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.fixture
def group(monkeypatch):
    """As if torchrun had started this process as rank 3 of 4, with GPU 1 on its machine; the group it joins."""
    joined = {}
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, **how: joined.update(backend=backend, **how),
    )
    monkeypatch.setattr(qwen.atexit, "register", lambda function: joined.update(at_exit=function))
    return joined


@pytest.mark.parametrize(
    "name, chosen", [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")]
)
def test_one_process_uses_one_gpu_by_its_index(cuda, name, chosen):
    ranks = qwen.start_ranks(name)
    assert ranks == qwen.Ranks(0, 1, torch.device(chosen))
    assert cuda == [("current", chosen), ("used", chosen)]


def test_each_of_several_ranks_uses_the_gpu_of_its_number_on_the_machine(cuda, group):
    assert qwen.start_ranks("auto") == qwen.Ranks(3, 4, torch.device("cuda:1"))
    assert cuda == [("current", "cuda:1"), ("used", "cuda:1")]
    assert group["backend"] == "nccl" and group["timeout"].total_seconds() <= 3600


def test_several_ranks_on_the_cpu(group):
    assert qwen.start_ranks("cpu") == qwen.Ranks(3, 4, torch.device("cpu"))
    assert group["backend"] == "gloo"


@pytest.mark.parametrize(
    "name, message", [("cuda:5", "invalid device ordinal"), ("gpu", "Expected one of")]
)
def test_a_device_that_cannot_be_used_is_one_line(cuda, name, message):
    with pytest.raises(OSError, match=f"^device {name} cannot be used here: .*{message}[^\n]*$"):
        qwen.start_ranks(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_auto_is_another_device_and_cuda_one_line():
    assert qwen.start_ranks("auto").device.type in ("cpu", "mps")
    with pytest.raises(OSError, match="^device cuda cannot be used here: [^\n]*$"):
        qwen.start_ranks("cuda")


def test_attention_by_cudnn_is_off_on_cuda(cuda):
    torch.backends.cuda.enable_cudnn_sdp(True)
    qwen.start_ranks("cpu")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    qwen.start_ranks("cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_compute_type_follows_the_device_unless_it_is_given(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for capability, auto in (
        ((9, 0), torch.bfloat16),
        ((8, 0), torch.bfloat16),
        ((7, 5), torch.float32),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert qwen.choose_dtype("auto", gpu) == auto
    assert qwen.choose_dtype("auto", cpu) == qwen.choose_dtype("float32", gpu) == torch.float32
    assert qwen.choose_dtype("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(OSError, match="--dtype bfloat16: this card has no kernels for it"):
        qwen.choose_dtype("bfloat16", gpu)  # of the last capability above


# ---- one rank fails

FAILING = """# A stage in which one rank fails at one place, and nobody leaves the process group when asked to.
import importlib, os, sys, time
import torch
import data, model

torch.distributed.destroy_process_group = lambda *group: time.sleep(600)
stage, place, rank, kind = sys.argv[1:5]
del sys.argv[1:5]
owner, name = {
    "reading": (data.Encoder, "example" if stage == "sft" else "prompt"),
    "rollout": (data.Encoder, "decode"),
    "update": (torch.optim.AdamW, "step"),
    "checkpoint": (torch, "save"),
    "saving": (model, "save_file"),
}[place]

def fail(*args, **kwargs):
    raise {"input": data.InputError, "disk": OSError, "bug": RuntimeError}[kind]("broken\\nhere")

if os.environ["RANK"] == rank:
    setattr(owner, name, fail)
stage = importlib.import_module(stage)
data.cli(stage.Config, stage.main)
"""


def launch(folder: Path, ranks: int, *command: str) -> subprocess.Popen:
    """torchrun in the background; what it and its ranks say goes to folder/log."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # The timeout is for what a signal leaves to be done. After a failure it is 30 seconds all the same.
    options = [f"--nproc-per-node={ranks}", "--shutdown-timeout=120"]
    with open(folder / "log", "w") as log:
        words = [*start, *options, *command]
        return subprocess.Popen(words, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log)


def wait(process: subprocess.Popen, seconds: float) -> int:
    """The exit status; a process that takes longer is a failure, and leaves no process behind."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun takes its workers along
        process.wait()
        raise


@pytest.mark.parametrize(
    "stage, place, rank, kind",
    [
        ("sft", "reading", 1, "input"),
        ("grpo", "rollout", 1, "bug"),
        ("sft", "update", 0, "bug"),
        ("grpo", "checkpoint", 1, "disk"),
        ("sft", "saving", 0, "disk"),
    ],
)
def test_when_one_rank_fails_all_end_and_its_message_is_told(
    config, tmp_path, stage, place, rank, kind
):
    (tmp_path / "failing.py").write_text(FAILING)
    arguments = [stage, place, str(rank), kind, *flags(config(stage, steps=1))]
    assert wait(launch(tmp_path, 2, "failing.py", *arguments), 150) == 1  # torchrun's own status
    text = (tmp_path / "log").read_text()
    torchruns_own = 'Traceback (most recent call last):\n  File "<frozen runpy>"'
    said, _, report = text.partition(torchruns_own)
    if kind == "bug":
        assert f"rank {rank}:\nTraceback" in said and said.count("Traceback") == 1
        assert "RuntimeError: broken\nhere\n" in said
    else:
        assert re.search(f"^error: rank {rank}: .*broken here", said, re.MULTILINE)
        assert "Traceback" not in said
    status = 1 if kind == "bug" else 2
    cause = report[report.index("Root Cause") :]
    assert re.search(rf"rank *: {rank} .*\n *exitcode *: {status} ", cause)
    others = [line for line in said.splitlines() if line.startswith(f"error: rank {1 - rank}")]
    assert set(others) <= {f"error: rank {1 - rank}: another rank has ended; its message says why"}


@pytest.mark.parametrize(
    "error, status, said",
    [
        (InputError("two\nlines"), 2, "error: rank 5: two lines\n"),
        (KeyboardInterrupt(), 130, ""),
        (KeyError("bug"), 1, r"rank 5:\nTraceback (?s:.*)KeyError: 'bug'\n"),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), 1, "LOST"),
        (
            torch.distributed.DistBackendError(
                "NCCL error\nncclRemoteError: A call failed possibly due to a network "
                "error or a remote process exiting prematurely."
            ),
            1,
            "LOST",
        ),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), 1, "LOST"),
        (
            RuntimeError(
                "[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3600000ms for recv"
            ),
            1,
            r"rank 5:\nTraceback (?s:.*)Timed out waiting .*\n",
        ),
    ],
)
def test_how_one_of_several_ranks_ends(monkeypatch, capsys, error, status, said):
    def main(cfg):
        raise error

    monkeypatch.setattr(sys, "argv", ["stage"])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        cli(sft.Config, main)
    assert end.value.code == status
    lost = "error: rank 5: another rank has ended; its message says why\n"
    assert re.fullmatch(said.replace("LOST", lost), capsys.readouterr().err)


def test_a_rank_ends_also_when_nobody_reads_its_output(monkeypatch):
    def broken(*arguments):
        raise BrokenPipeError

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(sys.stdout, "flush", broken)
    with pytest.raises(SystemExit) as end:
        end_process(2, "error: rank 5: broken here\n")
    assert end.value.code == 2


# ---- signals


@pytest.mark.parametrize(
    "stage, number, status", [("sft", signal.SIGTERM, 143), ("grpo", signal.SIGINT, 130)]
)
def test_a_signal_ends_the_step_and_the_same_command_goes_on(
    config, monkeypatch, stage, number, status
):
    whole, stopped = config(stage, "whole"), config(stage, "stopped")
    STAGES[stage].main(whole)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        log = sft.Run.log
        patch.setattr(
            sft.Run, "log", lambda *arguments: (log(*arguments), os.kill(os.getpid(), number))
        )
        STAGES[stage].main(stopped)
    assert end.value.code == status and [line["step"] for line in metrics(stopped.out)] == [1]
    assert [path.name for path in Path(stopped.out, "checkpoints").iterdir()] == ["step-000001"]
    assert not Path(stopped.out, "model.safetensors").exists()
    STAGES[stage].main(stopped)
    assert metrics(stopped.out) == metrics(whole.out) and len(metrics(whole.out)) == 3
    assert same(weights(stopped.out), weights(whole.out))


def test_a_second_signal_ends_at_once_and_a_repeated_one_does_not(monkeypatch):
    now, ended = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", ended.append)
    with sft.StopSignal(qwen.Ranks(0, 1, torch.device("cpu"))) as stop:
        assert stop.agreed() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # from the scheduler, and by way of torchrun
        assert stop.agreed() == signal.SIGTERM and not ended
        now[0] += 10
        os.kill(os.getpid(), signal.SIGINT)
    assert ended == [130]


def test_signals_do_what_they_did_when_the_steps_are_done_or_fail(config, monkeypatch):
    usual = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    sft.main(config(steps=1))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == usual
    monkeypatch.setattr(sft, "sft_loss", lambda *inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sft.main(config(steps=1, fresh=True))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == usual


ONE_SIGNAL = """# A run that is never stopped, and one that is stopped by a signal to rank 1 alone and goes on.
import functools, json, os, signal, sys
import sft

sft.start_ranks = functools.cache(sft.start_ranks)  # a process joins its group once
whole, stopped = [sft.Config(**fields) for fields in json.loads(sys.argv[1])]
sft.main(whole)
log = sft.Run.log

def log_and_signal(self, *arguments):
    log(self, *arguments)
    if self.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)

sft.Run.log = log_and_signal
try:
    sft.main(stopped)
except SystemExit as end:
    print(f"rank {os.environ['RANK']} ends with {end.code}", flush=True)
sft.Run.log = log
sft.main(stopped)
"""


def test_all_ranks_stop_after_the_same_step(config, tmp_path):
    (tmp_path / "stopping.py").write_text(ONE_SIGNAL)
    whole, stopped = config(name="whole"), config(name="stopped")
    arguments = json.dumps([asdict(cfg) for cfg in (whole, stopped)])
    assert wait(launch(tmp_path, 2, "stopping.py", arguments), 150) == 0
    said = (tmp_path / "log").read_text()
    assert "rank 0 ends with 143" in said and "rank 1 ends with 143" in said
    assert metrics(stopped.out) == metrics(whole.out) and len(metrics(whole.out)) == 3
    assert same(weights(stopped.out), weights(whole.out))


def test_torchrun_passes_the_signal_on_and_waits_for_the_checkpoint(config, tmp_path):
    cfg = config("grpo", epochs=1000)
    process = launch(tmp_path, 2, str(ROOT / "grpo.py"), *flags(cfg))
    log = Path(cfg.out, "metrics.jsonl")
    began = time.monotonic()
    while not log.exists() and time.monotonic() < began + 120:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert wait(process, 120) == 1  # torchrun's own status
    *_, checkpoint = sorted(Path(cfg.out, "checkpoints").iterdir())
    steps = [torch.load(part, weights_only=True)["step"] for part in checkpoint.glob("*.pt")]
    assert steps == 2 * [metrics(cfg.out)[-1]["step"]]


HANGING = """# A stage that hangs at its sixth output.
import importlib, pathlib, signal, sys, time
import data, evaluate

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job that a script has put into the background
evaluate.PACK_TOKENS = 1  # no output waits for others
decode, seen = data.Encoder.decode, []

def decode_or_hang(self, ids):
    seen.append(ids)
    if len(seen) == 6:
        pathlib.Path("hangs").touch()
        time.sleep(60)
    return decode(self, ids)

data.Encoder.decode = decode_or_hang
stage = importlib.import_module(sys.argv.pop(1))
data.cli(stage.Config, stage.main)
"""


@pytest.mark.parametrize(
    "stage, number, status",
    [
        (evaluate, signal.SIGTERM, -signal.SIGTERM),  # for which a shell says 143
        (augment, signal.SIGINT, 130),
    ],
)
def test_a_signal_ends_evaluate_and_augment_at_once(world, tmp_path, stage, number, status):
    def config(name):
        out = {evaluate: tmp_path / name, augment: tmp_path / name / "rl.jsonl"}[stage]
        return stage.Config(
            model=str(world / "base"),
            data=[str(world / "train.jsonl")],
            out=str(out),
            max_new_tokens=8,
            max_branches=1,
            temperature=1.0,
            device="cpu",
        )

    def predictions(name):
        (found,) = (tmp_path / name).rglob("predictions.jsonl")
        return found.read_text()

    (tmp_path / "hanging.py").write_text(HANGING)
    command = [sys.executable, "hanging.py", stage.__name__, *flags(config("stopped"))]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT)
    while not (tmp_path / "hangs").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    assert wait(process, 50) == status  # it takes a second, but machines are shared
    written = predictions("stopped")
    assert written.endswith("\n") and 1 <= len(written.splitlines()) < 12
    stage.main(config("stopped"))
    stage.main(config("whole"))
    assert predictions("stopped") == predictions("whole")
    assert set(written.splitlines()) <= set(predictions("whole").splitlines())


# ---- the collectives of every rank

WORLD = 8
MOST_ROWS = 4  # of any rank in one update


class Collectives(TorchDispatchMode):
    """A group of 8 ranks of which only one runs, and the log of that one's collectives.

    A collective of the fake group leaves this rank's own data in the place of the others'. What all
    ranks have to be told the same is made up: the largest number of rows of any rank, and what the
    others gather.
    """

    def __init__(self, rank: int, patch: pytest.MonkeyPatch):
        super().__init__()
        self.rank, self.log = rank, []
        start, reduce = torch.distributed.init_process_group, torch.distributed.all_reduce

        def all_reduce(tensor, op):
            reduce(tensor, op)
            if op == torch.distributed.ReduceOp.MAX and tensor > 0:  # 0: no rank has had a signal
                tensor.clamp_(min=MOST_ROWS)

        for name in ("RANK", "LOCAL_RANK"):
            patch.setenv(name, str(rank))
        patch.setenv("WORLD_SIZE", str(WORLD))
        patch.setattr(qwen.atexit, "register", lambda function: None)
        patch.setattr(
            torch.distributed,
            "init_process_group",
            lambda *_, **how: start("fake", rank=rank, world_size=WORLD, store=FakeStore()),
        )
        patch.setattr(torch.distributed, "all_reduce", all_reduce)
        patch.setattr(torch.distributed, "all_gather_object", self.all_gather_object)

    def all_gather_object(self, boxes: list, items: list) -> None:
        """The others have the same as this rank, but for indices: they have the ones beside."""
        self.log.append("all_gather_object")
        for other in range(WORLD):
            boxes[other] = [i + other - self.rank if isinstance(i, int) else i for i in items]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.log.append(
                " ".join([str(function), *(f"{x.dtype}{list(x.shape)}" for x in tensors)])
            )
        return function(*args, **kwargs or {})


def collectives_of(rank: int, stage: str, cfg) -> list[str]:
    """The log of the whole run of one rank."""
    with pytest.MonkeyPatch.context() as patch:
        # Odd ranks have one right output of two in every group, even ones no group with any spread.
        texts = itertools.cycle(["", TARGET.format("fine", "harmful", "harmful")])
        patch.setattr(Encoder, "decode", lambda encoder, ids: next(texts) if rank % 2 else "")
        with Collectives(rank, patch) as collectives:
            STAGES[stage].main(cfg)
        torch.distributed.destroy_process_group()
    return collectives.log


@pytest.mark.parametrize(
    "stage, held_out, fields",
    [
        ("sft", 11, dict(batch_size=13, epochs=13 / 24, pack_tokens=1)),
        ("sft", 3, dict(batch_size=24, freeze=["vision"], checkpointing=False)),
        ("grpo", 11, dict(rollout_batch=24, update_batch=12, pack_tokens=1)),
        (
            "grpo",
            3,
            dict(
                rollout_batch=8,
                update_batch=8,
                epochs=8 / 24,
                freeze=["decoder"],
                checkpointing=False,
            ),
        ),
    ],
)
def test_each_of_8_ranks_issues_the_same_collectives(
    world, config, tmp_path, stage, held_out, fields
):
    samples = read_samples([str(world / "train.jsonl")])
    text, images = (
        [s for s in samples if (s.image is None) == without] for without in (True, False)
    )
    copies = [replace(s, id=f"{s.id} {i}") for i in range(6) for s in text]
    data, validation = world / "some-images.jsonl", world / "few.jsonl"
    write_samples(data, [*copies[:21], *images[:3]])  # most ranks have no image in a batch
    write_samples(validation, copies[:held_out])  # of 11 three ranks have two, of 3 five have none
    logs = []
    for rank in range(WORLD):
        out = tmp_path / f"rank-{rank}"
        cfg = config(
            stage,
            data=[str(data)],
            validation=[str(validation)],
            out=str(out),
            lr=1e-12,
            eval_every=1,
            save_every=1,
            **fields,
        )
        logs.append(collectives_of(rank, stage, cfg))
        assert list(out.rglob(f"rank-{rank}-of-{WORLD}.pt"))
    for log in logs[1:]:
        assert log == logs[0]
    issued = " ".join(logs[0])
    assert all(kind in issued for kind in ("barrier", "allreduce", "allgather", "reduce_scatter"))
    assert (issued.count("all_gather_object") > 1) == (stage == "grpo")  # one lists the checkpoints
