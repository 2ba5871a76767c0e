"""Speed and memory against what a user would pick instead, on the same weights and inputs, and against the limits
of the machine: `peers.py` holds both sides, this file the measurements. The CPU is measured only.

Each pair is checked to do the same work; then the two run in turn, and medians are compared. Each of ROWS runs in
a process of its own, with glibc told to keep freed memory (else every step of both sides pays for fresh pages).
Peaks of memory are measured in further processes, with freed memory given back at once. Weights are random.

    python tests/benchmark.py [--only NAME...] [--quick]
"""

import argparse
import ctypes
import gc
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import peers
import torch
import toy
import transformers
from ablations import KEEP_FREED
from peers import DTYPES, FOLDER, SHAPES, SIZES, build, make_sample, our_side, timed
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import evaluate
import model as qwen
import sft
from data import Encoder, prefetch

QUICK = bool(os.environ.get("BENCHMARK_QUICK"))
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}  # fixed: left alone, glibc raises it to 32 MB


# ------------------------------------------------------------------------------------------------ measuring


def result(work: str, ours: float, peer: float, unit: str, goal: str, compared: str) -> str:
    """One line of the table; ratio is ours / peer, and the goal a bound on it such as ">= 4" (or empty)."""
    ratio, met = ours / peer, "-"
    if goal:
        relation, bound = goal.split()
        is_met = ratio >= float(bound) if relation == ">=" else ratio <= float(bound)
        met = "yes" if is_met else "**no**"
    ours, peer, ratio = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (ours, peer, ratio))
    return f"| {work} | {ours} | {peer} | {unit} | {ratio} | {goal or '-'} | {met} | {compared} |"


def race(ours: Callable, peer: Callable, prepare: Callable = lambda: None):
    """Median seconds of both, run in turn and each after `prepare`, and a note how far their runs spread.
    Rounds begin within 45 seconds; the first warms up, and counts only if there are no more than two."""
    times, began = ([], []), time.perf_counter()
    for _ in range(3 if QUICK else 6):
        if time.perf_counter() - began > 45:
            break
        for work, record in zip((ours, peer), times):
            prepare()
            record.append(timed(work))
    counted = [record[len(record) > 2 :] for record in times]
    spread = " / ".join(f"{(max(r) - min(r)) / 2 / statistics.median(r):.0%}" for r in counted)
    return *map(statistics.median, counted), f"{len(counted[0])} runs each, spread +-{spread}"


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


def fresh(malloc: dict, *arguments: str, **how) -> subprocess.CompletedProcess:
    """Run `child` with the arguments in a fresh process, under these settings of the allocator."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | malloc
    command = [sys.executable, "-W", "ignore", __file__, "--child", *arguments]
    return subprocess.run(command, env=env, text=True, **how)


def memory_of(*arguments: str) -> float:
    """peak_memory of one of MEMORY's works, called with the arguments, in a fresh process."""
    give_back()  # else what this process keeps and what the other needs may be more than there is
    return float(fresh(GIVE_BACK, "memory", *arguments, check=True, stdout=subprocess.PIPE).stdout)


@cache
def machine() -> dict:
    """What this machine does at best: GFLOP/s of a matrix product per dtype, GB/s of reading memory."""
    limits, size, block = {}, 2048, torch.ones(1 << 26)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, size, size).to(dtype)
        limits[dtype] = 2e-9 * size**3 / min(timed(lambda: a @ b) for _ in range(4))
    return limits | {"bandwidth": 1e-9 * block.nbytes / min(timed(block.sum) for _ in range(6))}


# ------------------------------------------------------------------------------------------------ sampling


def sampling(name: str, new: int, goals: dict[str, str]) -> Iterator[str]:
    """16 branches of one prompt against generate's num_return_sequences=16. Ours also bans image tokens."""
    (mine, encoder), theirs = our_side(name), peers.their_model(name)
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": new}
    banned, weights = encoder.banned_ids, list(mine.model.parameters())  # the head is tied
    for shape, goal in goals.items():
        sample, stamps = make_sample(encoder, *SHAPES[shape]), []
        row, inputs = encoder.prompt(sample), peers.their_inputs(name, [sample], encoder)
        assert inputs["input_ids"][0].tolist() == row.ids.tolist(), "other prompt tokens"
        assert torch.allclose(row.pixels, inputs["pixel_values"], atol=1e-5), "other pixels"
        if name == "tiny":  # in float32
            [(_, (greedy,))] = qwen.generate(mine, [(0, row)], 1, 48, 0.0, banned=banned)
            want = theirs.generate(**inputs, do_sample=False, max_new_tokens=48)[0, len(row) :]
            assert greedy.ids == want.tolist(), f"greedy tokens {greedy.ids} and {want.tolist()}"

        def ours() -> None:
            stamps.append([])
            watch = lambda tokens: stamps[-1].append(time.perf_counter())
            prompts, options = [(0, row)], {"banned": banned, "watch": watch}
            [(_, completions)] = qwen.generate(mine, prompts, 16, new, 1.0, **options)
            assert [len(c.ids) for c in completions] == [new] * 16, "a completion of ours is short"

        def peer() -> None:
            out = theirs.generate(**inputs, **how, do_sample=True, num_return_sequences=16)
            assert tuple(out.shape) == (16, len(row) + new), f"generate returned {out.shape}"

        a, b, note = race(ours, peer)
        work, tokens = f"sample 16 x {new} tokens, {name}, {shape}", 16 * new
        note = f"generate, temperature 1, no stop token; {note}"
        yield result(work, tokens / a, tokens / b, "tokens/s", goal, note)
        steps = [1000 * (end - start) for run in stamps for start, end in zip(run, run[1:])]
        megabytes, speed = 1e-6 * sum(p.nbytes for p in weights), machine()["bandwidth"]
        rate = machine()[DTYPES[name]]
        arithmetic = 32e-6 * sum(p.numel() for p in weights) / rate
        note = f"reading {megabytes:.0f} MB of weights at {speed:.1f} GB/s; "
        note += f"multiplying with them at {rate:.0f} GFLOP/s takes {arithmetic:.2g} ms"
        work, goal = f"decode step of 16 branches, {name}, {shape}", "<= 1.5" * (name == "mid")
        yield result(work, statistics.median(steps), megabytes / speed, "ms", goal, note)


def evaluation() -> Iterator[str]:
    """200 prompts, greedy; preprocessing is part of both sides' work."""
    (mine, encoder), theirs = our_side("tiny"), peers.their_model("tiny")
    rng, lengths, samples, limit = random.Random(0), {}, [], 256
    count = 40 if QUICK else 200
    for i in range(count):
        tokens, height, width = rng.randint(150, 300), rng.randint(4, 8), rng.randint(4, 8)
        samples.append(make_sample(encoder, tokens, 28 * height, 28 * width, seed=i))
    stops = encoder.stop_ids = list(range(0, 4096, 50))  # outputs end at widely different lengths

    def length(ids: list[int]) -> int:
        return next((n for n, token in enumerate(ids, 1) if token in stops), len(ids))

    def ours(slots: int = 256) -> None:
        flags = {"max_new_tokens": limit, "max_branches": slots}
        found = evaluate.evaluate_samples(mine, encoder, samples, **flags)
        lengths["ours"] = [prediction["n_tokens"] for prediction in found]

    def peer() -> None:
        lengths["peer"], how = [], {"max_new_tokens": limit, "eos_token_id": stops}
        for start in range(0, count, 16):
            inputs = peers.their_inputs("tiny", samples[start : start + 16], encoder)
            out = theirs.generate(**inputs, **how, do_sample=False)
            lengths["peer"] += map(length, out[:, inputs["input_ids"].shape[1] :].tolist())

    a, b, note = race(ours, peer)
    other = sum(mine != theirs for mine, theirs in zip(lengths["ours"], lengths["peer"]))
    assert other <= count // 100, f"{other} of {count} greedy outputs differ in length"
    first, *_, last = statistics.quantiles(lengths["ours"], n=10)
    note = f"generate in left-padded batches of 16; {other} outputs of another length; deciles of length {first:.0f} to {last:.0f}; {note}"
    yield result(f"evaluate {count} prompts, tiny", count / a, count / b, "prompts/s", ">= 4", note)
    refilled = timed(lambda: ours(16))
    yield result("the same, 16 slots refilled", count / refilled, count / b, "prompts/s", "", note)


# ------------------------------------------------------------------------------------------------ updates


def update_memory(side: str) -> float:
    """Of ours, or of the peer at so many copies at a time."""
    ours, theirs, completions, advantages = peers.group_of_16()
    work = partial(peers.our_update, *ours)
    if side != "ours":
        work = partial(peers.their_update, *theirs, micro=int(side))
    work(completions[:1], advantages[:1])()  # loads what the first call loads
    for model, _ in (ours, theirs):
        model.zero_grad(set_to_none=True)
    return peak_memory(work(completions, advantages))


def gradient_error(mine: qwen.QwenVL, theirs) -> float:
    """The largest difference of two gradients, as a share of theirs."""
    errors = []
    for name, parameter in mine.named_parameters():
        name = "model." + name.replace("model.", "language_model.")
        want = theirs.get_parameter(name).grad.view_as(parameter)
        errors.append((parameter.grad - want).abs().max() / want.abs().max())
    return max(errors).item()


def update() -> Iterator[str]:
    """A GRPO update alone: forward and backward of a group."""
    (mine, row), (theirs, inputs), completions, advantages = peers.group_of_16()
    trials = {n: partial(peers.their_update, theirs, inputs, micro=n) for n in (4, 1)}
    micro = min(trials, key=lambda n: timed(trials[n](completions[:4], advantages[:4])))
    ours = peers.our_update(mine, row, completions, advantages)
    peer = trials[micro](completions, advantages)
    a, b, note = race(ours, peer)
    error, total = gradient_error(mine, theirs), sum(map(len, completions))
    assert error < 1e-4, f"gradients differ by {error:.1e}"
    work = "GRPO update, guard, 16 x 50..250 tokens, tiny"
    note = f"transformers on padded copies, {micro} at a time (best of 1 and 4), gradients within {error:.0e}; {note}"
    yield result(work, total / a, total / b, "tokens/s", ">= 7", note)
    memory = memory_of("update", "ours")
    for copies, goal in (("4", "<= 1"), ("16", "")):
        peak, note = memory_of("update", copies), f"the same, {copies} copies at a time"
        yield result("its peak memory", memory, peak, "MB", goal, note)
    rate = 3e-9 * peers.forward_flops(mine, row.extend(completions)) / a
    note = "a product of 2048 x 2048; attention itself is not counted"
    yield result("its matrix arithmetic", rate, machine()[torch.float32], "GFLOP/s", "", note)


def head_of(side: str) -> tuple[Callable[[], None], qwen.QwenVL]:
    """Log-probabilities of 4096 tokens, and their backward, by a model of mid's width without any layers."""
    small = {"num_hidden_layers": 0, "vision_config": {"depth": 0, "hidden_size": 16}}
    raw = toy.checkpoint_config(dict.fromkeys(toy.ADDED, 0), SIZES["mid"] | small)
    torch.manual_seed(0)
    model, places = qwen.QwenVL(qwen.Config.from_json(raw)), torch.arange(4097)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model, ids = model.bfloat16(), torch.randint(1000, 150000, (4097,))
    segments, no_pixels = (qwen.Segment(0, 4097),), torch.zeros(0, 1176)
    row = qwen.Row(ids, places.expand(3, -1), segments, places > 0, no_pixels)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        if side == "ours":
            logprobs = model(row)[0]
        else:
            logits = torch.nn.functional.linear(model.hidden_states(row)[:-1], model.head).float()
            logprobs = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        logprobs.mean().backward()

    return run, model


def head() -> Iterator[str]:
    (ours, mine), (peer, theirs) = head_of("ours"), head_of("peer")
    a, b, note = race(ours, peer)
    error = ((mine.head.grad - theirs.head.grad).norm() / theirs.head.grad.norm()).item()
    assert error < 0.02, f"gradients differ by {error:.1e}"
    how = "linear, float, log_softmax, gather in one piece; both with embedding and norm, bfloat16"
    work = "log-probabilities of 4096 tokens, 152k words"
    yield result(work, a, b, "s", "<= 1.15", f"{how}; {note}")
    peaks = memory_of("head", "ours"), memory_of("head", "peer")
    yield result("its peak memory", *peaks, "MB", "<= 0.125", how)


def packing() -> Iterator[str]:
    """What an SFT step on mixed lengths computes beside the tokens of its samples: padding, if there were any."""
    encoder, rng, samples = Encoder(str(build("tiny"))), random.Random(0), []
    for i in range(32):  # three of four with an image
        side = [28 * rng.randint(3, 12) if i % 4 else 0 for _ in range(2)]
        tokens = 50 + 550 * i // 31
        samples.append(make_sample(encoder, tokens, *side, seed=i, answer=min(120, tokens // 4)))
    total = sum(len(encoder.example(sample)) for sample in samples)
    computed = sum(map(len, sft.packed_rows(samples, encoder, sft.SFTFlags().pack_tokens)))
    note = "the tokens of the samples"
    yield result("tokens that it computes", computed, total, "tokens", "<= 1.03", note)


# ------------------------------------------------------------------------------------------------ files


def loading() -> Iterator[str]:
    """A checkpoint of 7.5 GB, from the page cache and from the disk."""
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

    for state, prepare in (("from the page cache", read), ("from the disk", evict)):
        a, b, note = race(lambda: qwen.load(str(folder)), read, prepare)
        work, note = f"load {1e-9 * size:.1f} GB {state}", f"reading the files once; {note}"
        yield result(work, a, b, "s", "<= 1.3", note)
    peaks = memory_of("load", str(folder)), size / 2**20
    yield result("its peak memory", *peaks, "MB", "<= 1.1", "size of the files")


def images() -> Iterator[str]:
    """JPEG files to patches."""
    encoder, count = Encoder(str(build("tiny")), max_pixels=768 * 768), 64 if QUICK else 512
    files = [FOLDER / f"photo-{i}.jpg" for i in range(32)]
    for i, file in enumerate(files):
        peers.picture(i, 896 + 8 * i, 2**20 // (896 + 8 * i)).save(file, quality=90)
    processor = Qwen2VLImageProcessorPil.from_pretrained(build("tiny"), max_pixels=768 * 768)
    theirs = lambda i: processor(images=Image.open(files[i % 32]), return_tensors="pt")
    ours = lambda: list(prefetch(lambda i: encoder.image(files[i % 32]), range(count)))
    for i in range(4):
        (pixels, grid), want = encoder.image(files[i]), theirs(i)
        assert grid == tuple(want["image_grid_thw"][0].tolist()), "other sizes of images"
        assert torch.allclose(pixels, want["pixel_values"], atol=1e-5), "other patches"
    a, b, note = race(ours, lambda: [theirs(i) for i in range(count)])
    note = f"Qwen2VLImageProcessorPil at 768 x 768, decoding included; {note}"
    work = f"preprocess {count} photos of 1 MP"
    yield result(work, count / a, count / b, "images/s", ">= 2", note)


def growth() -> Iterator[str]:
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
            sample = lambda: list(qwen.generate(*task, banned=encoder.banned_ids))
            update = peers.our_update(mine, row, answers, torch.randn(group))
            for what, work in (("sampling", sample), ("update", update)):
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
    "sample-tiny": lambda: sampling("tiny", 128, {"short": ">= 2", "guard": ">= 3.5"}),
    "sample-mid": lambda: sampling("mid", 32, {"short": ">= 4", "guard": ">= 5.5"}),
    "evaluate": evaluation,
    "update": update,
    "sft": packing,
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


def child(kind: str, name: str, *arguments: str) -> None:
    """What a fresh process is for: prints the lines of one of ROWS, or what one of MEMORY takes."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for found in [MEMORY[name](*arguments)] if kind == "memory" else ROWS[name]():
        print(found, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="of the rows")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    args, (single, half, bandwidth) = parser.parse_args(), machine().values()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    speeds = f"{single:.0f} GFLOP/s in float32, {half:.0f} in bfloat16, {bandwidth:.1f} GB/s"
    print(f"{torch.get_num_threads()} threads: {speeds}\n")
    print("| work | ours | peer | unit | ratio | goal | met | peer is |")
    print("|---|--:|--:|---|--:|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        os.environ |= {"BENCHMARK_FOLDER": folder, "BENCHMARK_QUICK": "1" if args.quick else ""}
        failed = [name for name in args.only if fresh(KEEP_FREED, "row", name).returncode]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
