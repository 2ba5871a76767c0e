"""Speed and memory against what a user would pick instead, on the same weights and inputs, and against the limits
of the machine: `peers.py` holds both sides, this file the measurements. The CPU is measured only.

Each pair is checked to do the same work; then the two run in turn, and medians are compared. Each of ROWS runs in
a process of its own, with glibc told to keep freed memory (else every step of both sides pays for fresh pages).
Peaks of memory are measured in further processes, with freed memory given back at once. Weights are random.

    python tests/benchmark.py [--only NAME...] [--quick] [--json FILE]
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import peers
import torch
import torch.nn.functional as F
import toy
import transformers
from ablations import KEEP_FREED
from peers import DTYPES, FOLDER, SHAPES, SIZES, build, check, make_sample, our_side, timed
from PIL import Image
from torch import Tensor

import evaluate
import grpo
import model as qwen
import sft
from data import Encoder, prefetch
from model import Row, Segment

QUICK = bool(os.environ.get("BENCHMARK_QUICK"))
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}  # fixed: left alone, glibc raises it to 32 MB
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
HAS_TRL = all(importlib.util.find_spec(name) for name in ("trl", "datasets", "accelerate"))
ALONE = qwen.Ranks(0, 1, torch.device("cpu"), torch.float32)
COLUMNS = ("work", "ours", "peer", "unit", "ratio", "goal", "met", "compared")


# ------------------------------------------------------------------------------------------------ measuring


def result(work: str, ours: float | None, peer: float | None, unit: str, goal: str, compared: str) -> dict:  # fmt: skip
    """One line of the table; ratio is ours / peer, and the goal a bound on it such as ">= 4" (or empty)."""
    ratio, met = None if peer is None else ours / peer, None
    if goal and ratio is not None:
        relation, bound = goal.split()
        met = ratio >= float(bound) if relation == ">=" else ratio <= float(bound)
    return dict(zip(COLUMNS, (work, ours, peer, unit, ratio, goal, met, compared)))


def medians(times: tuple[list, list]) -> tuple[float, float, str]:
    """Median seconds of both sides, and a note how far their runs spread."""
    spread = " / ".join(f"{(max(r) - min(r)) / 2 / statistics.median(r):.0%}" for r in times)
    return *map(statistics.median, times), f"{len(times[0])} runs each, spread +-{spread}"


def race(ours: Callable, peer: Callable, repeats: int = 5, budget: float = 40.0):
    """The medians of both, run in turn for `budget` seconds; the first round warms up, if there is time for more
    than two, and there is no second if the first took 50 seconds."""
    times, began, rounds = ([], []), time.perf_counter(), 3 if QUICK else repeats + 1
    while len(times[0]) < rounds and (spent := time.perf_counter() - began) < max(budget, 50):
        if len(times[0]) > 1 and spent > budget:
            break
        for work, record in zip((ours, peer), times):
            record.append(timed(work))
    return medians(tuple(record[len(record) > 2 :] for record in times))


def give_back() -> None:
    """Return freed memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak_memory(work: Callable[[], object]) -> float:
    """MB that `work` needs at most, above what is resident before it."""

    def resident(field: str) -> float:
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    give_back()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    work()
    return resident("VmHWM") - before


def child(*arguments, malloc: dict = GIVE_BACK) -> Iterator[str]:
    """What this file prints as results when it is run with --child and the arguments, in a fresh process."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | malloc
    command = [sys.executable, "-W", "ignore", __file__, "--child", *map(str, arguments)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        yield from (line[1:] for line in process.stdout if line.startswith("\x1e"))
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))}: exit status {process.returncode}")


def memory_of(*arguments) -> float:
    """peak_memory of one of MEMORY's works, called with the arguments, in a fresh process."""
    give_back()  # else what this process keeps and what the other needs may be more than there is
    return float(list(child("memory", *arguments))[0])


@cache
def machine() -> dict:
    """What this machine does at best: GFLOP/s of a matrix product per dtype, GB/s of reading memory."""
    limits, size, block = {}, 2048, torch.ones(1 << 26)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, size, size).to(dtype)
        limits[dtype] = 2e-9 * size**3 / min(timed(lambda: a @ b) for _ in range(4))
    return limits | {"bandwidth": 1e-9 * block.nbytes / min(timed(block.sum) for _ in range(6))}


# ------------------------------------------------------------------------------------------------ sampling


def sampling(name: str, new: int, goals: dict[str, str], budget: float) -> Iterator[dict]:
    """16 branches of one prompt against generate's num_return_sequences=16."""
    (mine, encoder), theirs = our_side(name), peers.their_model(name)
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": new}
    banned, weights = encoder.banned_ids, list(mine.model.parameters())  # the head is tied
    for shape, goal in goals.items():
        sample, stamps = make_sample(encoder, *SHAPES[shape]), []
        row, inputs = encoder.prompt(sample), peers.their_inputs(name, [sample], encoder)
        check(inputs["input_ids"][0].tolist() == row.ids.tolist(), "other prompt tokens")
        check(torch.allclose(row.pixels, inputs["pixel_values"], atol=1e-5), "other pixels")
        if name == "tiny":  # in float32
            [(_, (greedy,))] = qwen.generate(mine, [(0, row)], 1, 48, 0.0, banned=banned)
            want = theirs.generate(**inputs, do_sample=False, max_new_tokens=48)[0, len(row) :]
            check(greedy.ids == want.tolist(), f"greedy tokens {greedy.ids} and {want.tolist()}")

        def ours() -> None:
            stamps.append([])
            watch = lambda tokens: stamps[-1].append(time.perf_counter())
            prompts, options = [(0, row)], {"banned": banned, "watch": watch}
            [(_, completions)] = qwen.generate(mine, prompts, 16, new, 1.0, **options)
            check([len(c.ids) for c in completions] == [new] * 16, "a completion of ours is short")

        def peer() -> None:
            out = theirs.generate(**inputs, **how, do_sample=True, num_return_sequences=16)
            check(tuple(out.shape) == (16, len(row) + new), f"generate returned {out.shape}")

        a, b, note = race(ours, peer, budget=budget)
        work, tokens = f"sample 16 x {new} tokens, {name}, {shape}", 16 * new
        note = f"generate, temperature 1, no stop token; ours bans image tokens, generate does not; {note}"
        yield result(work, tokens / a, tokens / b, "tokens/s", goal, note)
        counted = stamps[1:] or stamps  # where rounds are long, there is one
        steps = [1000 * (end - start) for run in counted for start, end in zip(run, run[1:])]
        megabytes, speed = 1e-6 * sum(p.nbytes for p in weights), machine()["bandwidth"]
        rate = machine()[DTYPES[name]]
        arithmetic = 32e-6 * sum(p.numel() for p in weights) / rate
        note = f"reading {megabytes:.0f} MB of weights at {speed:.1f} GB/s; "
        note += f"multiplying with them at {rate:.0f} GFLOP/s takes {arithmetic:.2g} ms"
        work, goal = f"decode step of 16 branches, {name}, {shape}", "<= 1.5" * (name == "mid")
        yield result(work, statistics.median(steps), megabytes / speed, "ms", goal, note)


def evaluation() -> Iterator[dict]:
    """200 prompts, greedy; preprocessing is part of both sides' work."""
    (mine, encoder), theirs = our_side("tiny"), peers.their_model("tiny")
    rng, lengths, samples, limit = random.Random(0), {}, [], 256
    for i in range(40 if QUICK else 200):
        tokens, height, width = rng.randint(150, 300), rng.randint(4, 8), rng.randint(4, 8)
        samples.append(make_sample(encoder, tokens, 28 * height, 28 * width, seed=i))
    prompts, count = enumerate(map(encoder.prompt, samples)), len(samples)
    said = qwen.generate(mine, prompts, 1, limit, 0.0, banned=encoder.banned_ids)
    encoder.stop_ids = peers.choose_stops([c.ids for _, (c,) in said], limit)

    def ours(slots: int = 256) -> None:
        found = evaluate.evaluate_samples(
            mine, encoder, samples, max_new_tokens=limit, max_branches=slots
        )
        lengths["ours"] = [prediction["n_tokens"] for prediction in found]

    def peer() -> None:
        lengths["peer"], how = [], {"max_new_tokens": limit, "eos_token_id": encoder.stop_ids}
        for start in range(0, count, 16):
            inputs = peers.their_inputs("tiny", samples[start : start + 16], encoder)
            out = theirs.generate(**inputs, **how, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :].tolist()
            lengths["peer"] += [peers.length_of(ids, encoder.stop_ids) for ids in new]

    a, b, note = race(ours, peer, 3)
    other = sum(mine != theirs for mine, theirs in zip(lengths["ours"], lengths["peer"]))
    check(other <= count // 100, f"{other} of {count} greedy outputs differ in length")
    first, *_, last = statistics.quantiles(lengths["ours"], n=10)
    note = f"generate in left-padded batches of 16; {other} outputs of another length; deciles of length {first:.0f} to {last:.0f}; {note}"
    work = f"evaluate {count} prompts, tiny"
    yield result(work, count / a, count / b, "prompts/s", ">= 4", note)
    refilled = timed(lambda: ours(16))
    yield result("the same, 16 slots refilled", count / refilled, count / b, "prompts/s", "", note)


# ------------------------------------------------------------------------------------------------ updates


def update_memory(side: str, micro: str = "1") -> float:
    model, prompt, completions, advantages = peers.group_of_16(side)
    work = peers.our_update if side == "ours" else partial(peers.their_update, micro=int(micro))
    work(model, prompt, completions[:1], advantages[:1])()  # loads what the first call loads
    model.zero_grad(set_to_none=True)
    return peak_memory(work(model, prompt, completions, advantages))


def gradient_error(mine: qwen.QwenVL, theirs) -> float:
    """The largest difference of two gradients, as a share of theirs."""
    named = {}
    for name, parameter in theirs.named_parameters():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        named[name] = parameter.grad
    pairs = [(p.grad, named[name].view_as(p)) for name, p in mine.named_parameters()]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def update() -> Iterator[dict]:
    """A GRPO update alone: forward and backward of a group."""
    mine, row, completions, advantages = peers.group_of_16("ours")
    theirs, inputs, *_ = peers.group_of_16("peer")
    few = theirs, inputs, completions[:4], advantages[:4]
    trials = {n: peers.their_update(*few, n) for n in (4, 1)}
    micro, losses = min(trials, key=lambda n: timed(trials[n])), {}
    ours = peers.our_update(mine, row, completions, advantages)
    peer = peers.their_update(theirs, inputs, completions, advantages, micro)
    race_of = (lambda: losses.update(ours=ours()), lambda: losses.update(peer=peer()))
    a, b, note = race(*race_of, budget=30)
    error, total = gradient_error(mine, theirs), sum(map(len, completions))
    same = abs(losses["ours"] - losses["peer"]) < 1e-5 and error < 1e-4
    check(same, f"{losses}, gradients differ by {error:.1e}")
    work = "GRPO update, guard, 16 x 50..250 tokens, tiny"
    note = f"transformers on padded copies, {micro} at a time (best of 1 and 4), gradients within {error:.0e}; {note}"
    yield result(work, total / a, total / b, "tokens/s", ">= 7", note)
    memory = memory_of("update", "ours")
    for copies, goal in ((4, "<= 1"), (16, "")):
        peak, note = memory_of("update", "peer", copies), f"the same, {copies} copies at a time"
        yield result("its peak memory", memory, peak, "MB", goal, note)
    rate = 3e-9 * peers.forward_flops(mine, row.extend(completions)) / a
    note = "a product of 2048 x 2048; attention itself is not counted"
    yield result("its matrix arithmetic", rate, machine()[torch.float32], "GFLOP/s", "", note)


def head_of(side: str) -> tuple[Callable[[], Tensor], qwen.QwenVL]:
    """Log-probabilities of 4096 tokens, and their backward, by a model of mid's width without any layers."""
    small = {"num_hidden_layers": 0, "vision_config": {"depth": 0, "hidden_size": 16}}
    raw = toy.checkpoint_config(dict.fromkeys(toy.ADDED, 0), SIZES["mid"] | small)
    torch.manual_seed(0)
    model, places = qwen.QwenVL(qwen.Config.from_json(raw)), torch.arange(4097)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model, ids = model.bfloat16(), torch.randint(1000, 150000, (4097,))
    positions, segments = places.expand(3, -1), (Segment(0, 4097),)
    row = Row(ids, positions, segments, places > 0, torch.zeros(0, 1176))

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        if side == "ours":
            logprobs = model(row)[0]
        else:
            logits = F.linear(model.hidden(row)[:-1], model.head).float()
            logprobs = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        logprobs.mean().backward()
        return logprobs.detach()

    return run, model


def head() -> Iterator[dict]:
    (ours, mine), (peer, theirs), found = head_of("ours"), head_of("peer"), {}
    a, b, note = race(lambda: found.update(ours=ours()), lambda: found.update(peer=peer()), 3)
    difference = (found["ours"] - found["peer"]).abs().max().item()
    error = ((mine.head.grad - theirs.head.grad).norm() / theirs.head.grad.norm()).item()
    what = f"results differ by {difference:.1e}, gradients by {error:.1e}"
    check(difference < 0.02 and error < 0.02, what)
    how = "linear, float, log_softmax, gather in one piece; both with embedding and norm, bfloat16"
    work = "log-probabilities of 4096 tokens, 152k words"
    yield result(work, a, b, "s", "<= 1.15", f"{how}; {note}")
    peaks = memory_of("head", "ours"), memory_of("head", "peer")
    yield result("its peak memory", *peaks, "MB", "<= 0.125", how)


# ------------------------------------------------------------------------------------------------ against TRL


def trl_row(work: str, kind: str, micros, tokens: int, goal: str, ours: Callable, total: int, steps: int, trial: dict, **how) -> dict:  # fmt: skip
    """A line against a trainer at the micro-batch size that is the quickest in one step, which `trial` may make
    smaller (it replaces some of `how`); total: tokens of a step, as the trainer counts."""
    if not HAS_TRL:
        seconds = statistics.median([timed(ours) for _ in range(3)])
        return result(work, tokens / seconds, None, "tokens/s", goal, "trl not installed")
    run, tried = partial(peers.trl_run, kind), how | trial
    micro = min(micros, key=lambda micro: run(micro=micro, steps=1, **tried)[1][0])
    mine, theirs, logs = run(micro=micro, steps=steps, ours=ours, **how)
    counted = logs[0]["num_tokens"]
    check(counted == total, f"TRL's step has {counted} tokens, not {total}")
    short = min(log.get("completions/min_length", 128) for log in logs)
    check(short == 128, f"a completion of TRL has {short} tokens")
    a, b, note = medians((mine[steps > 2 :], theirs[steps > 2 :]))  # the first of many warms up
    note = f"{kind}Trainer, {micro} at a time (best of {', '.join(map(str, micros))}); {note}"
    return result(work, tokens / a, tokens / b, "tokens/s", goal, note)


def grpo_step() -> Iterator[dict]:
    """A whole GRPO step, rollouts included."""
    sizes = dict(group=16, rollout_batch=2, update_batch=2, max_new_tokens=128, temperature=1.0)
    flags = grpo.GRPOFlags(model=str(build("tiny")), checkpointing=False, **sizes)
    model, encoder = sft.load_for_training(flags, ALONE)
    optimizer = sft.make_optimizer(model, flags.lr, flags.weight_decay)
    same = dict(num_generations=16, max_completion_length=128, beta=0.0)
    same |= dict(encoder=encoder, weight_decay=flags.weight_decay)
    shapes = ("short", ">= 2.5", (4, 8, 32), 4), ("guard", ">= 7", (2, 8), 2)
    for shape, goal, micros, steps in shapes:
        samples = [make_sample(encoder, *SHAPES[shape], seed=seed) for seed in range(2)]

        def ours() -> None:
            policy, prompts = qwen.replica(model, torch.float32), dict(enumerate(samples))
            groups = grpo.rollout(policy, encoder, prompts, flags, random.randrange(1000))
            lengths = {len(c.ids) for group in groups for c in group.completions}
            check(lengths == {128}, "one of our completions is short")
            # Random outputs all earn alike, and groups without spread would not be run.
            groups = [replace(group, advantages=torch.randn(16)) for group in groups]
            grpo.update_policy(model, optimizer, groups, encoder, flags, 0.2, ALONE)

        quarter = {"samples": samples[:1], "num_generations": 8, "batch": 8}
        trial, total = quarter if shape == "guard" else {}, 32 * (SHAPES[shape][0] + 128)
        work = f"GRPO step, 2 x 16 x 128 tokens, tiny, {shape}"
        args = (work, "GRPO", micros, 4096, goal, ours, total, steps, trial)
        yield trl_row(*args, samples=samples, **same)


def sft_step() -> Iterator[dict]:
    """SFT on mixed lengths: preprocessing, forward, backward and the optimizer's step."""
    flags = sft.SFTFlags(model=str(build("tiny")), freeze=["none"], checkpointing=False)
    model, encoder = sft.load_for_training(flags, ALONE)
    optimizer, rng = sft.make_optimizer(model, 1e-6, 0.0), random.Random(0)
    samples, computed = [], []
    for i in range(32):  # three of four with an image
        side = [28 * rng.randint(3, 12) if i % 4 else 0 for _ in range(2)]
        tokens = 50 + 550 * i // 31
        samples.append(make_sample(encoder, tokens, *side, seed=i, answer=min(120, tokens // 4)))
    lengths = [len(encoder.example(sample)) for sample in samples]

    def ours() -> None:
        packed = sft.packed_rows(samples, encoder, flags.pack_tokens)
        computed.append(sum(map(len, packed)))
        sft.train_step(model, optimizer, packed, flags.lr, flags.max_norm, ALONE)

    # TRL's loss is the same mean over targets; its template ends every answer with one more newline
    work = f"SFT, {min(lengths)} to {max(lengths)} tokens, 32 a step, tiny"
    args = (work, "SFT", (2, 4, 8), sum(lengths), ">= 1.5", ours, sum(lengths) + 32, 4, {})
    yield trl_row(*args, samples=samples, encoder=encoder, max_length=None, weight_decay=0.0)
    work, numbers = "tokens that it computes", (computed[-1], sum(lengths))
    yield result(work, *numbers, "tokens", "<= 1.03", "the tokens of the samples")


# ------------------------------------------------------------------------------------------------ files


def loading() -> Iterator[dict]:
    """A checkpoint of 7.5 GB, from the page cache and from the disk."""
    memory = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) / 1e6
    disk = shutil.disk_usage(FOLDER).free / 1e9
    if memory < 14 or disk < 10:
        why = f"skipped: {memory:.0f} GB of memory, {disk:.0f} GB of disk free; wants 14 and 10"
        yield result("load 7.5 GB", None, None, "s", "<= 1.3", why)
        return
    folder, buffer = peers.write_3b(), bytearray(1 << 24)
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)

    def read() -> None:
        for file in files:
            with open(file, "rb", buffering=0) as handle:
                while handle.readinto(buffer):
                    pass

    def evict() -> None:
        for file in files:
            with open(file, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    load = partial(qwen.load, str(folder))
    for state, prepare, rounds in (("from the page cache", read, 5), ("from the disk", evict, 2)):
        times = ([], [])
        for work, record in [(load, times[0]), (read, times[1])] * rounds:
            prepare()
            record.append(timed(work))
        a, b, note = medians(times)
        work, note = f"load {1e-9 * size:.1f} GB {state}", f"reading the files once; {note}"
        yield result(work, a, b, "s", "<= 1.3", note)
    peaks = memory_of("load", folder), size / 2**20
    yield result("its peak memory", *peaks, "MB", "<= 1.1", "size of the files")
    shutil.rmtree(folder)


def images() -> Iterator[dict]:
    """JPEG files to patches."""
    encoder, count = Encoder(str(build("tiny")), max_pixels=768 * 768), 64 if QUICK else 512
    files = [FOLDER / f"photo-{i}.jpg" for i in range(32)]
    for i, file in enumerate(files):
        peers.picture(i, 896 + 8 * i, 2**20 // (896 + 8 * i)).save(file, quality=90)
    bounds = {"min_pixels": encoder.min_pixels, "max_pixels": encoder.max_pixels}
    processor = peers.their_image_processor(build("tiny"), **bounds)

    def theirs(i: int) -> dict:
        return processor(images=Image.open(files[i % 32]), return_tensors="pt")

    ours = lambda: list(prefetch(lambda i: encoder.image(files[i % 32]), range(count)))
    for i in range(4):
        (pixels, grid), want = encoder.image(files[i]), theirs(i)
        check(grid == tuple(want["image_grid_thw"][0].tolist()), "other sizes of images")
        check(torch.allclose(pixels, want["pixel_values"], atol=1e-5), "other patches")
    a, b, note = race(ours, lambda: [theirs(i) for i in range(count)], 3)
    note = f"Qwen2VLImageProcessorPil at 768 x 768, decoding included; {note}"
    work = f"preprocess {count} photos of 1 MP"
    yield result(work, count / a, count / b, "images/s", ">= 2", note)


def growth() -> Iterator[dict]:
    """Our cost per token as one thing grows; the goal allows for attention, which is not linear."""
    mine, encoder = our_side("tiny")
    axes = {"completion tokens": (32, 128, 512), "completions": (4, 16, 64)}
    axes |= {"prompt tokens": (300, 1200, 4800), "pixels of the image's side": (224, 448, 896)}
    usual = dict(zip(axes, (64, 16, 300, 224)))
    for axis, values in axes.items():
        points = {"sampling": [], "update": []}
        for value in values:
            new, group, prompt, side = (usual | {axis: value}).values()
            tokens = max(prompt, side * side // 784 + 200)
            row = encoder.prompt(make_sample(encoder, tokens, side, side))
            answers = [[1000 + i % 3000 for i in range(new)]] * group
            task = mine, [(0, row)], group, new
            works = {"sampling": lambda: list(qwen.generate(*task, banned=encoder.banned_ids))}
            works["update"] = peers.our_update(mine, row, answers, torch.randn(group))
            for what, work in works.items():
                megabytes, count = peak_memory(work), len(row) + group * new
                seconds = timed(work)
                points[what].append((value, 1e6 * seconds / count, 1024 * megabytes / count))
        for what, found in points.items():
            shown = "; ".join(f"{value}: {us:.0f} us, {kb:.0f} KB" for value, us, kb in found)
            work = f"{what}, {values[0]} to {values[-1]} {axis}"
            (_, *first), *_, (_, *last) = found
            for ours, peer, unit in zip(last, first, ("us/token", "KB/token")):
                yield result(work, ours, peer, unit, "<= 1.3", f"the first; {shown}")


ROWS = {
    "sample-tiny": lambda: sampling("tiny", 128, {"short": ">= 2", "guard": ">= 3.5"}, 20),
    "sample-mid": lambda: sampling("mid", 32, {"short": ">= 4", "guard": ">= 5.5"}, 20),
    "evaluate": evaluation,
    "update": update,
    "step": grpo_step,
    "sft": sft_step,
    "head": head,
    "load": loading,
    "images": images,
    "growth": growth,
}
MEMORY = {
    "update": update_memory,
    "head": lambda side: peak_memory(head_of(side)[0]),
    "load": lambda folder: peak_memory(lambda: qwen.load(folder)),
}


def run_child(kind: str, name: str, *arguments: str) -> None:
    """What a fresh process is for: the measurements of one of ROWS, or one of MEMORY."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for found in [MEMORY[name](*arguments)] if kind == "memory" else ROWS[name]():
        print("\x1e" + json.dumps(found), flush=True)


def about() -> str:
    """Machine and versions, for above the table."""
    cpu, limits = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()), machine()
    names = ("torch", "transformers", "trl", "datasets", "accelerate")
    known = [name for name in names if importlib.util.find_spec(name)]
    versions = [f"{name} {importlib.import_module(name).__version__}" for name in known]
    cpu = cpu[1] if cpu else platform.processor()
    speed = (
        f"{limits[torch.float32]:.0f} GFLOP/s in float32, {limits[torch.bfloat16]:.0f} in bfloat16"
    )
    speed = f"{torch.get_num_threads()} threads: {speed}, {limits['bandwidth']:.1f} GB/s"
    return f"{cpu}, {speed}; Python {platform.python_version()}, {', '.join(versions)}"


def cell(value: object) -> str:
    if value is None or isinstance(value, bool | str):
        return {None: "", True: "yes", False: "no"}.get(value, value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="of the rows")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", help="also write the lines to this file")
    args, lines, failed, began = parser.parse_args(), [], [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= QUIET | {"BENCHMARK_FOLDER": folder}
        os.environ["BENCHMARK_QUICK"] = "1" if args.quick else ""
        for name in args.only:
            try:
                for line in child("row", name, malloc=KEEP_FREED):
                    lines.append(json.loads(line))
                    seconds = time.perf_counter() - began
                    print(f"{seconds:.0f} s:", *map(cell, lines[-1].values()), file=sys.stderr)
            except RuntimeError as error:
                failed.append(str(error))
    print(f"{about()}\n{(time.perf_counter() - began) / 60:.0f} minutes\n")
    print(f"| {' | '.join(COLUMNS)} |\n|---|--:|--:|---|--:|---|---|---|")
    for line in lines:
        print(f"| {' | '.join(map(cell, line.values()))} |")
    if args.json:
        Path(args.json).write_text(json.dumps(lines, indent=1) + "\n")
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    run_child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
