"""Memory: the estimates of memory.py against what real steps allocate; one line when memory runs out, or cannot
suffice; the copy to sample from is gone before the update.

What is compared: estimates come from shapes alone (mean lengths, full rows), measurements from torch's own record of
its allocator (torch.profiler) while sft.train_step, grpo.update_policy and grpo.rollout work on real samples of the toy
world, packed as the stages pack them: rows not quite full, lengths as they come. Both are of the CPU's kernels: what a
card's kernels take for themselves is in neither.

    python -m pytest tests/test_memory.py
"""

import gc
import json
import os
import re
import subprocess
import sys
import weakref
from types import SimpleNamespace
from unittest import mock

import memory
import pytest
import reference_varlen  # noqa: F401  (registers its kernel)
import torch
import toy
from memory import ALONE, GIB, Traffic
from test_sft import ROOT
from torch.profiler import ProfilerActivity, profile

import augment
import data
import evaluate
import grpo
import model as qwen
import sft
from data import InputError, read_samples

SMALL = dict(
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    vision_config=dict(depth=2, fullatt_block_indexes=[1]),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    toy.make_world(folder, sizes={"train": 30, "val": 1, "test": 1})
    toy.build_checkpoint(folder / "base", **SMALL)
    toy.build_checkpoint(folder / "tiny", **toy.TINY)
    return folder


def config_of(kind, world, **fields):
    """The stage's Config for the world's files."""
    usual = {"model": str(world / "base"), "data": [str(world / "train.jsonl")], "device": "cpu"}
    return kind(**usual | {"instruction": str(world / "instruction.txt")} | fields)


# ---------------------------------------------------------------- estimated and measured


def measured(work) -> int:
    """The most bytes that torch's allocator held during the work, beside those that it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def weights_and_moments(model) -> int:
    """Bytes that are there before a step."""
    return 4 * sum(p.numel() * (3 if p.requires_grad else 1) for p in model.parameters())


def within(estimate: float, measurement: float, tolerance: float = 0.1) -> bool:
    """Whether the estimate is that close to the measurement."""
    return abs(estimate / measurement - 1) <= tolerance


@pytest.mark.parametrize("dtype, freeze", [("float32", ["vision", "merger"]), ("bfloat16", [])])
def test_sft_step_takes_what_is_estimated(world, dtype, freeze):
    """The whole step, and what of it is not weights, gradients and moments: activations, head, clipping."""
    cfg = config_of(sft.Config, world, pack_tokens=1024, dtype=dtype, freeze=freeze)
    model, encoder, compute = sft.load_for_training(cfg, ALONE)
    samples = [s for s in read_samples(cfg.data) if s.reasoning and s.image]  # as the table assumes
    rows, _ = sft.packed_rows(samples, encoder, cfg)
    rows = sorted(rows, key=len)[-2:]  # the fullest last, when the gradients are there
    optimizer = sft.make_optimizer(model, 1e-6, 0.0)

    def step() -> None:
        sft.train_step(model, optimizer, rows, 1.0, 1e-6, 1.0, compute, ALONE)

    step()  # makes the moments
    measurement = weights_and_moments(model) + measured(step)
    supervised = sum(int(row.supervised.sum()) for row in rows)
    segments = sum(len(row.segments) for row in rows)
    traffic = Traffic(
        (sum(map(len, rows)) - supervised) // segments, supervised // segments, toy.SIDE
    )
    estimate = memory.update("sft", model.config, cfg, traffic, 1, compute)
    assert within(sum(estimate.values()), measurement)
    assert within(estimate["work"], measurement - estimate["resident"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grpo_update_takes_what_is_estimated(world, dtype):
    """The clipped update of one mini-batch after the other, with the old log-probabilities before them."""
    cfg = config_of(
        grpo.Config, world, group=8, rollout_batch=4, update_batch=4, pack_tokens=920, dtype=dtype
    )
    model, encoder, compute = sft.load_for_training(cfg, ALONE)
    random, groups = torch.Generator().manual_seed(0), []
    for position, sample in enumerate(read_samples(cfg.data)[: cfg.rollout_batch]):
        lengths = torch.randint(20, 80, (cfg.group,), generator=random).tolist()
        ids = [torch.randint(10, 400, (length,), generator=random).tolist() for length in lengths]
        completions = [qwen.Completion(x, -torch.rand(len(x), generator=random), True) for x in ids]
        advantages = torch.randn(cfg.group, generator=random)
        groups.append(
            grpo.Group(position, sample, encoder.prompt(sample), completions, [], [], advantages)
        )
    optimizer = sft.make_optimizer(model, 1e-6, 0.0)

    def step() -> None:
        grpo.update_policy(model, optimizer, groups, encoder, cfg, 0.2, compute, ALONE)

    step()
    measurement = weights_and_moments(model) + measured(step)
    answers = [len(completion.ids) for group in groups for completion in group.completions]
    prompts = [len(group.prompt) for group in groups]
    traffic = Traffic(sum(prompts) // len(prompts), sum(answers) // len(answers), toy.SIDE)
    estimate = memory.update("grpo", model.config, cfg, traffic, 1, compute)
    assert within(sum(estimate.values()), measurement)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollout_takes_what_is_estimated(world, dtype):
    """As many completions as run at once, all up to the limit (stop tokens are unlikely): the caches' worst case."""
    prompts = 8 if dtype == torch.float32 else 1  # the reference kernel of the other is slow
    cfg = config_of(grpo.Config, world, group=8, max_new_tokens=64, max_branches=8 * prompts)
    encoder = data.Encoder(cfg.model, cfg.instruction)
    policy = qwen.load(cfg.model, "cpu", dtype)
    samples = read_samples(cfg.data)[:prompts]
    longest = max(len(encoder.prompt(sample)) for sample in samples)
    # In half precision attention is that of a card: the plain formula copies keys in float32.
    with mock.patch.object(qwen, "has_varlen", lambda x: x.dtype == torch.bfloat16):
        peak = measured(lambda: grpo.rollout(policy, encoder, dict(enumerate(samples)), cfg, 0))
    estimate = memory.rollout(
        policy.config, cfg, Traffic(longest, 30, toy.SIDE), cfg.group, longest, 0, dtype
    )
    weights = sum(p.nbytes for p in policy.parameters())
    assert estimate["fixed"] == weights
    prefill, decode = (
        estimate["prefill"] + estimate["prompts"],
        estimate["decode"] + estimate["caches"],
    )
    assert within(
        weights + max(prefill, decode), weights + peak
    )  # all prompts are admitted before the first step


ONE_OF_FOUR = """# The first of four ranks, whose collectives do nothing: its memory is that of a real one.
import os, sys
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
import memory, sft, model as qwen
from test_memory import measured

torch.set_num_threads(1)
torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
traffic, ranks = memory.Traffic(60, 42, 56), qwen.Ranks(0, 4, torch.device("cpu"))
cfg = sft.Config(model=sys.argv[1], device="cpu", dtype="bfloat16", pack_tokens=1024)
model, encoder, compute = sft.load_for_training(cfg, ranks)
optimizer, row = sft.make_optimizer(model, 1e-6, 0.0), traffic.sft_row(model.config, cfg)
for parameter in optimizer.param_groups[0]["params"]:
    parameter.grad = torch.zeros_like(parameter)
optimizer.step()

def step():
    sft.train_step(model, optimizer, [row], 1.0, 1e-6, 1.0, compute, memory.ALONE)

estimate = memory.update("sft", model.config, cfg, traffic, 4, compute)
resident = sum(4 * sft.local(p).numel() * (4 if p.requires_grad else 1) for p in model.parameters())
print(estimate["resident"] / resident, sum(estimate.values()) / (resident + measured(step)), flush=True)
os._exit(0)
"""


def test_sharded_step_takes_no_more_than_is_estimated(tmp_path):
    """The arithmetic of FSDP2, against a rank on the CPU. That gathers no block ahead, as a card does, and needs a
    little less: the estimate may be up to 15 % above."""
    sizes = dict(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        vocab_size=4096,
        rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
    )
    folder = toy.build_checkpoint(tmp_path / "base", **sizes)
    command = [sys.executable, "-c", ONE_OF_FOUR, str(folder)]
    paths = {"PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests"))}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | paths
    )
    assert done.returncode == 0, done.stderr[-2000:]
    resident, whole = map(float, done.stdout.split()[-2:])
    assert resident == pytest.approx(1, abs=0.01)
    assert 1 <= whole <= 1.15


def test_bytes_of_weights_gradients_and_moments():
    """16 for a parameter that trains, 4 for a frozen one."""
    model = memory.build(
        memory.MODELS["3B"], sft.Config(freeze=["vision", "merger"]), device="meta"
    )
    vision, whole = memory.sizes(model.visual), memory.sizes(model)
    assert memory.optimizer_bytes(model) == 16 * (whole - vision) + 4 * vision
    assert (round(whole / 1e9, 3), round(vision / 1e9, 3)) == (3.755, 0.669)


# ---------------------------------------------------------------- the table


@pytest.fixture
def table(world, tmp_path, monkeypatch):
    """table(*words) -> the cells whose names hold the words, for a tiny model and short samples."""
    config = qwen.Config.from_json(json.loads((world / "tiny" / "config.json").read_text()))
    monkeypatch.setattr(memory, "MODELS", {"3B": config})
    monkeypatch.setattr(memory, "TYPICAL", Traffic(600, 200, toy.SIDE))

    def run(*only: str) -> list[dict]:
        monkeypatch.setattr(
            sys, "argv", ["memory.py", "--json", str(tmp_path / "table.json"), "--only", *only]
        )
        memory.main()
        return json.loads((tmp_path / "table.json").read_text())

    return run


def test_table_of_what_fits(table, capsys):
    [cell] = table("sft, 8 x")
    assert cell["stage"] == "sft" and cell["fits"] and 0 < cell["peak"] < 1
    cells = table("1 x 24")
    assert [cell["stage"] for cell in cells] == ["augment", "evaluate"]
    assert all(cell["fits"] and 0 < cell["peak"] < 1 for cell in cells)
    printed = capsys.readouterr().out
    assert (
        "| 3B, 8 x 80 GB | 0.0 | - |" in printed and "**" not in printed and "\n- " not in printed
    )


def test_table_names_the_flag_where_something_does_not_fit(table, monkeypatch, capsys):
    """On cards on which half as long rows just fit, half as many branches, or several ranks."""
    usual = {stage: table(stage, "1 x 80")[0]["peak"] for stage in ("sft", "evaluate")}
    half = sum(
        memory.update(
            "sft", memory.MODELS["3B"], sft.Config(pack_tokens=4096), memory.TYPICAL, 1
        ).values()
    )
    assert half < 0.7 * usual["sft"] * GIB
    monkeypatch.setattr(memory, "CARDS", {"80 GB": 4 + 1.1 * half / GIB})
    [cell] = table("sft, 1 x 80")
    assert not cell["fits"] and cell["advice"] == "--pack-tokens 4096"
    monkeypatch.setattr(memory, "CARDS", {"24 GB": 2 + 0.7 * usual["evaluate"]})
    monkeypatch.setattr(qwen, "CACHE_SHARE", 1.0)
    [cell] = table("evaluate, 1 x 24")
    assert not cell["fits"] and cell["advice"] == "--max-branches 128"
    assert (
        f"- 3B evaluate, 1 x 24 GB: {cell['peak']:.1f} GiB; --max-branches 128"
        in capsys.readouterr().out
    )


# ---------------------------------------------------------------- out of memory


FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.50 GiB is "
    "free. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True"
)
MORE_RANKS = ", or more ranks (torchrun --nproc-per-node)"


@pytest.mark.parametrize(
    "stage, broken, flags, advice",
    [
        (sft, "train_step", "", "--pack-tokens 4096 (now 8192)" + MORE_RANKS),
        (sft, "train_step", "--pack-tokens 3000", "--pack-tokens 2048 (now 3000)" + MORE_RANKS),
        (sft, "train_step", "--pack-tokens 2048", "--max-tokens 1024 (now 2048)" + MORE_RANKS),
        (grpo, "update_policy", "", "--pack-tokens 8192 (now 16384), or more ranks"),
        (
            grpo,
            "update_policy",
            "--pack-tokens 6144",
            "--max-new-tokens 1536 (now 3072), or more ranks",
        ),
        (grpo, "generate", "", "--max-branches 128 (now 256), or more ranks"),
        (
            grpo,
            "evaluate_samples",
            "--validation train.jsonl",
            "--max-branches 128 (now 256), or more ranks",
        ),
        (
            evaluate,
            "generate",
            "",
            "--max-branches 128 (now 256) or --max-pixels 589824 (now the checkpoint's)",
        ),
        (augment, "generate", "--max-branches 4 --max-pixels 4000", "--max-pixels 2000 (now 4000)"),
        (evaluate, "load", "", "a larger card: the weights alone do not fit"),
    ],
)
def test_out_of_memory_is_one_line_that_names_the_flag(
    world, tmp_path, monkeypatch, capsys, stage, broken, flags, advice
):
    """At the first step of each stage, with the defaults (and shapes that no default hides)."""

    def run_out(*_, **__):
        raise torch.OutOfMemoryError(FULL)

    small = {sft: "--batch-size 2", grpo: "--group 2 --rollout-batch 2 --update-batch 2"}.get(
        stage, ""
    )
    usual = (
        f"--model {world / 'tiny'} --data train.jsonl --out {tmp_path / 'out'} --device cpu {small}"
    )
    monkeypatch.chdir(world)
    monkeypatch.setattr(stage, broken, run_out)
    if stage is grpo and broken == "update_policy":
        monkeypatch.setattr(
            stage,
            "generate",
            lambda model, prompts, n, *_, **__: (
                (key, [qwen.Completion([5, 6], torch.zeros(2), True)] * n) for key, _ in prompts
            ),
        )
    monkeypatch.setattr(sys, "argv", [stage.__name__, *usual.split(), *flags.split()])
    with pytest.raises(SystemExit) as end:
        data.cli(stage.Config, stage.main)
    told = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert told[-1] == f"error: out of memory: try {advice} ({FULL.partition(' If')[0]})"
    assert sum("error" in line for line in told) == 1


def on_cuda(monkeypatch, gib: float) -> qwen.Ranks:
    """A single rank on a card of that size, as far as load_for_training asks before it loads."""
    card = SimpleNamespace(total_memory=int(gib * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return qwen.Ranks(0, 1, torch.device("cuda", 0))


def test_training_that_cannot_fit_is_refused_before_loading(world, monkeypatch):
    loaded = []
    monkeypatch.setattr(sft, "load", lambda *_: loaded.append(1))
    cfg = config_of(sft.Config, world)
    with pytest.raises(
        InputError,
        match="on 1 rank needs at least 0 GiB a card for float32 weights, gradients and ",
    ):
        sft.load_for_training(cfg, on_cuda(monkeypatch, 0.001))
    assert not loaded
    with pytest.raises(AttributeError):  # what `load` gave
        sft.load_for_training(cfg, on_cuda(monkeypatch, 1))
    assert loaded


def test_least_memory_of_training():
    """7B on one card of 80 GB, and where it fits; with a frozen decoder the same card is large enough."""
    with torch.device("meta"):
        model = qwen.QwenVL(memory.MODELS["7B"])
    said = (
        "training 8.29e+09 parameters on 1 rank needs at least 124 GiB a card for float32 weights, gradients and "
        "moments, the card has 79: use more ranks (torchrun --nproc-per-node), or --freeze"
    )
    with pytest.raises(InputError, match=re.escape(said)):
        sft.check_fits(model, [], 1, int(79.1 * GIB))
    with pytest.raises(InputError, match=re.escape("on 2 ranks needs at least 62 GiB")):
        sft.check_fits(model, [], 2, 40 * GIB)
    sft.check_fits(model, [], 2, int(79.1 * GIB))
    sft.check_fits(model, ["decoder"], 1, int(79.1 * GIB))


# ---------------------------------------------------------------- the copy to sample from


def test_sampling_copy_is_gone_during_the_update(world, tmp_path, monkeypatch):
    """With a compute type of its own the policy is a copy: no copy lives while the update runs, and validation
    still has one."""
    copies, alive, validated = [], [], []
    replica, update_policy, validate = grpo.replica, grpo.update_policy, grpo.validate

    def replicated(model, dtype):
        policy = replica(model, dtype)
        assert policy is not model
        copies.append(weakref.ref(policy))
        return policy

    def updating(*args):
        gc.collect()
        alive.append(sum(copy() is not None for copy in copies))
        return update_policy(*args)

    def validating(policy, *args):
        validated.append(policy is not None)
        return validate(policy, *args)

    for name, function in (
        ("replica", replicated),
        ("update_policy", updating),
        ("validate", validating),
    ):
        monkeypatch.setattr(grpo, name, function)
    files = [str(world / "train.jsonl")]
    grpo.main(
        config_of(
            grpo.Config,
            world,
            model=str(world / "tiny"),
            out=str(tmp_path),
            dtype="bfloat16",
            validation=[str(world / "val.jsonl")],
            eval_every=1,
            group=2,
            rollout_batch=2,
            update_batch=2,
            max_new_tokens=3,
            steps=2,
            data=files,
        )
    )
    assert alive == [0, 0] and validated == [True] * 3
