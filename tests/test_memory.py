"""Memory: the estimates of memory.py against what real steps allocate; one line when memory runs out, or cannot
suffice; the copy to sample from is gone before the update.

What is compared: estimates come from shapes alone (mean lengths, full rows), measurements from torch's own record of
its allocator (torch.profiler) while sft.update, grpo.optimise and grpo.roll_out work on real samples of the toy
world, packed as the stages pack them: rows not quite full, lengths and pictures as they come.

    python -m pytest tests/test_memory.py
"""
import gc
import json
import re
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import augment
import data
import evaluate
import grpo
import memory
import model as qwen
import sft
import toy
from data import InputError, read_samples
from memory import ALONE, GIB, Traffic
from test_sft import TINY

SMALL = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=4, vision_config=dict(depth=2, fullatt_block_indexes=[1]))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    toy.make_world(folder, sizes={"train": 30, "val": 1, "test": 1})
    toy.build_checkpoint(folder / "base", **SMALL)
    toy.build_checkpoint(folder / "tiny", **TINY)
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
        sft.update(optimizer, rows, lambda row, real: sft.nll(model, row, compute), 1.0, 1e-6, 1.0, ALONE)

    step()  # makes the moments
    measurement = weights_and_moments(model) + measured(step)
    supervised = sum(int(row.supervised.sum()) for row in rows)
    segments = sum(len(row.segments) for row in rows)
    traffic = Traffic((sum(map(len, rows)) - supervised) // segments, supervised // segments, toy.SIDE)
    estimate = memory.update("sft", model.config, cfg, traffic, 1, compute)
    assert within(sum(estimate.values()), measurement)
    assert within(estimate["work"], measurement - estimate["resident"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grpo_update_takes_what_is_estimated(world, dtype):
    """The clipped update of one mini-batch after the other, with the old log-probabilities before them."""
    cfg = config_of(grpo.Config, world, group=8, rollout_batch=4, update_batch=4, pack_tokens=920, dtype=dtype)
    model, encoder, compute = sft.load_for_training(cfg, ALONE)
    random, groups = torch.Generator().manual_seed(0), []
    for position, sample in enumerate(read_samples(cfg.data)[: cfg.rollout_batch]):
        lengths = torch.randint(20, 80, (cfg.group,), generator=random).tolist()
        ids = [torch.randint(10, 400, (length,), generator=random).tolist() for length in lengths]
        completions = [qwen.Completion(x, -torch.rand(len(x), generator=random), True) for x in ids]
        advantages = torch.randn(cfg.group, generator=random)
        groups.append(grpo.Group(position, sample, encoder.prompt(sample), completions, [], [], advantages))
    optimizer = sft.make_optimizer(model, 1e-6, 0.0)

    def step() -> None:
        grpo.optimise(model, optimizer, groups, encoder, cfg, 0.2, compute, ALONE)

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
    cfg = config_of(grpo.Config, world, group=8, max_new_tokens=64, max_branches=64)
    encoder = data.Encoder(cfg.model, cfg.instruction)
    policy = qwen.load(cfg.model, "cpu", dtype)
    samples = read_samples(cfg.data)[:8]
    longest = max(len(encoder.prompt(sample)) for sample in samples)
    with mock.patch.object(qwen, "HAS_ONEDNN", False, create=True):  # as on a card: no second copy of the weights
        peak = measured(lambda: grpo.roll_out(policy, encoder, dict(enumerate(samples)), cfg, 0))
    estimate = memory.rollout(policy.config, cfg, Traffic(longest, 30, toy.SIDE), cfg.group, longest, 0, dtype)
    weights = sum(p.nbytes for p in policy.parameters())
    assert estimate["fixed"] == weights
    prefill, decode = estimate["prefill"] + estimate["prompts"], estimate["decode"] + estimate["caches"]
    assert within(weights + max(prefill, decode), weights + peak)  # all prompts are admitted before the first step
