"""The estimates of memory.py against what real steps of small models allocate on a CPU, which takes the
ways of a card: variable-length attention, by reference_varlen.py, and chunks of 1,024 tokens.

python -m pytest tests/test_memory.py
"""

from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace
from unittest import mock

import memory
import pytest
import reference_varlen  # noqa: F401  (registers its kernel)
import torch
from memory import COMPUTE, Config, Traffic, VisionConfig, sizes
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

import grpo
import model as qwen
import sft

VISION = VisionConfig(64, 128, 2, 4, 128, fullatt_block_indexes=(1,))
SMALL = Config(512, 128, 352, 3, 4, 4, (4, 6, 6), True, 9, VISION)
TRAFFIC = Traffic(prompt=60, answer=42, side=56)
ALONE = qwen.Ranks(0, 1, torch.device("cpu"), COMPUTE)


def measured(work) -> int:
    """The most bytes that the allocator held during the work, beside those that it held before."""
    as_on_a_card = mock.patch.object(torch.Tensor, "is_cuda", True, create=True)
    with as_on_a_card, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = record.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def training(flags, config=SMALL, ranks=ALONE):
    """A small model that trains, and its optimizer with moments."""
    model = qwen.QwenVL(config)
    sft.freeze(model, flags.freeze)
    model.checkpointing = model.visual.checkpointing = flags.checkpointing
    return model, sft.make_optimizer(qwen.shard(model, ranks), 1e-6, 0.0)


def peak_of(model, step) -> int:
    """The most bytes during a step, with this rank's float32 weights and moments."""
    kept = [(getattr(p, "_local_tensor", p).numel(), p.requires_grad) for p in model.parameters()]
    return sum(n * (12 if trains else 4) for n, trains in kept) + measured(step)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("freeze", [["vision", "merger"], ["none"]])
def test_sft_step_takes_what_is_estimated(freeze, checkpointing):
    flags = sft.SFTFlags(pack_tokens=1024, freeze=freeze, checkpointing=checkpointing)
    model, optimizer = training(flags)
    rows = [memory.packed_row(SMALL, TRAFFIC, flags)] * 2  # the second when gradients are there
    peak = peak_of(model, lambda: sft.train_step(model, optimizer, rows, 1e-6, 1.0, ALONE))
    resident, work = memory.update(SMALL, TRAFFIC, flags, world=1)
    assert work == pytest.approx(peak - resident, rel=0.02)


def test_grpo_update_takes_what_is_estimated():
    """Lengths as they come, and rows not quite full, as a stage packs them."""
    flags = grpo.GRPOFlags(group=8, rollout_batch=4, update_batch=4, pack_tokens=920)
    model, optimizer = training(flags)
    prompt, groups = memory.prompt_row(SMALL, TRAFFIC), []
    for position in range(flags.rollout_batch):
        drawn = [qwen.Completion([10] * n, [-1.0] * n) for n in range(20, 68, 6)]
        groups.append(grpo.Group(position, None, prompt, drawn, [], [], torch.randn(flags.group)))
    encoder = SimpleNamespace(banned_ids=memory.BANNED)
    step = lambda: grpo.update_policy(model, optimizer, groups, encoder, flags, 0.2, ALONE)
    estimate = sum(memory.update(SMALL, TRAFFIC, flags, world=1))
    assert estimate == pytest.approx(peak_of(model, step), rel=0.1)


def test_rollout_takes_what_is_estimated():
    """As many completions as run at once, all up to the limit: the cache's worst case. When it grows, a layer of
    before is there twice."""
    flags = grpo.GRPOFlags(max_new_tokens=32, max_branches=16)
    model, rows = qwen.QwenVL(SMALL).to(COMPUTE), [memory.prompt_row(SMALL, TRAFFIC)] * 2
    peak = measured(lambda: list(qwen.generate(model, enumerate(rows), 8, 32, flags.temperature)))
    found = memory.rollout(SMALL, TRAFFIC, flags, n=8)
    growing = 2 * found["prompts"] / SMALL.num_hidden_layers
    work = max(found["decode"], growing) + found["cache"]
    work = max(found["prefill"] + found["prompts"], work)
    assert found["weights"] + work == pytest.approx(COMPUTE.itemsize * sizes(model) + peak, rel=0.1)


def test_sharded_step_takes_no_more_than_is_estimated():
    """The arithmetic of FSDP2, against the first of four ranks, whose collectives do nothing. On a CPU
    it gathers no block ahead, as a card does: the estimate may be up to 15 % above."""
    config = replace(SMALL, vocab_size=4096, num_hidden_layers=24)
    flags = sft.SFTFlags(pack_tokens=1024)
    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    model, optimizer = training(flags, config, qwen.Ranks(0, 4, ALONE.device, COMPUTE))
    rows = [memory.packed_row(config, TRAFFIC, flags)] * 2
    peak = peak_of(model, lambda: sft.train_step(model, optimizer, rows, 1e-6, 1.0, ALONE))
    torch.distributed.destroy_process_group()
    assert peak <= sum(memory.update(config, TRAFFIC, flags, world=4)) <= 1.15 * peak


def test_table_says_what_fits(monkeypatch):
    parameters = [sizes(memory.outline(config)) for config in memory.MODELS.values()]
    assert parameters == [3_754_622_976, 8_292_166_656]  # those of the published models
    monkeypatch.setattr(memory, "TYPICAL", TRAFFIC)
    for card_size, bold in ((8, ""), (4 + 1000 / memory.GIB, "**")):
        monkeypatch.setitem(memory.CARDS, "80 GB", card_size)
        assert memory.cell(SMALL, "sft", "80 GB", 1, {}).startswith(f"{bold}0.")
