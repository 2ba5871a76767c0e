"""Reasoning SFT (R-SFT), Eq. (3), and the training plumbing that grpo.py shares.

In:  a base checkpoint directory or hub id, and JSONL files of samples with reasoning.
Out: DIR, a checkpoint directory; DIR/run.json, DIR/metrics.jsonl, DIR/checkpoints/ (the last two).

The loss is the mean over all target tokens (reasoning, labels and the stop token) of the global
batch. Samples are packed side by side into rows; none sees another. State is weights, optimizer and
step: what a step trains on is a function of (seed, step), so a resumed run needs its checkpoint
only.

Deviations from the paper's release: packing; the loss is averaged over tokens, not over
micro-batches; samples over the length limit are left out and counted, not cut.

    torchrun --nproc-per-node 4 sft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data data/train.jsonl
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import transformers
from torch import Tensor

from data import (
    Encoder,
    InputError,
    Row,
    Sample,
    append_records,
    as_input_error,
    changed_inputs,
    check_inputs,
    check_output,
    cli,
    drop_records_after,
    halved,
    inputs_digest,
    is_sealed,
    lock_output,
    naming,
    option,
    pack,
    prefetch,
    progress,
    read_json,
    read_samples,
    regular_files,
    seal,
    sync,
    write_atomic,
)
from model import QwenVL, Ranks, choose_dtype, full, load, locate, outline, save, shard, start_ranks

# The metrics on the screen.
SHOWN = "loss lr grad_norm trained_tokens_per_second mfu seconds validation_loss"
RECENT = 100  # steps whose mean time predicts the time left


@dataclass(frozen=True)
class Config:
    model: str = option(
        "Qwen/Qwen2.5-VL-3B-Instruct", "checkpoint or hub id", group="what it reads and writes"
    )
    data: list[str] = option(["data/train.jsonl"], "JSONL files of samples with reasoning")
    validation: list[str] = option([], "JSONL files for the validation loss")
    out: str = option("out/sft", "directory of the run and its checkpoint")
    fresh: bool = option(False, "start over, discarding the run in --out")
    instruction: str | None = option(None, "file whose text replaces the system instruction")
    min_pixels: int | None = option(None, "smallest image area; default: the checkpoint's")
    max_pixels: int | None = option(768 * 768, "largest image area; default: LLaMA-Factory's")
    skip_bad: bool = option(False, "set bad rows aside instead of stopping")

    epochs: float = option(3.0, "passes over the data, may be fractional", group="how long")
    steps: int | None = option(None, "stop after this step; the same command without it goes on")
    eval_every: int = option(100, "steps between validation losses")
    save_every: int = option(100, "steps between checkpoints")

    batch_size: int = option(192, "samples per optimizer step, over all ranks", group="how")
    lr: float = option(5e-5, "peak learning rate")
    warmup: int = option(0, "steps of linear warm-up before the cosine decay to zero")
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_norm: float = option(1.0, "gradient norm is clipped to this")
    freeze: list[str] = option(
        ["vision", "merger"], "parts that do not train, as released; of vision, merger, decoder"
    )
    max_tokens: int = option(2048, "longest sample in tokens; longer ones are left out and counted")
    seed: int = option(0, "of the data order")

    pack_tokens: int = option(
        8192, "tokens per forward pass (ours: sets memory, not results)", group="memory and device"
    )
    checkpointing: bool = option(True, "recompute activations in the backward pass")
    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of computation; not of weights")

    @property
    def to_save_memory(self) -> str:
        """What to try when memory runs out. A row holds at least the longest sample."""
        shorter = halved("--pack-tokens", self.pack_tokens, self.max_tokens)
        fewer = shorter or halved("--max-tokens", self.max_tokens)
        return f"{fewer}, or more ranks (torchrun --nproc-per-node)"


# ---------------------------------------------------------------------- the method


def cosine(step: int, total: int, warmup: int, peak: float) -> float:
    """Learning rate of step 0 .. total - 1: linear warm-up, then a cosine from the peak to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def with_targets(paths: list[str], cfg: Config, ranks: Ranks) -> list[Sample]:
    """The files' samples that have a target: reasoning and every label. The rest are counted on the
    screen. InputError, now rather than hours later, if some reasoning is unfit for a target."""
    samples, files = read_samples(paths, cfg.skip_bad), ", ".join(paths)
    kept = [sample for sample in samples if sample.is_complete]
    left_out = len(samples) - len(kept)
    if left_out and ranks.rank == 0:
        print(f"{left_out} of {len(samples)} samples lack reasoning or a label, and are left out")
    if not kept:
        hint = "`python data.py synthesize` writes the reasoning of labelled samples"
        raise InputError(f"{files}: no sample has reasoning and labels; {hint}")
    with as_input_error(files, InputError):
        for sample in kept:
            Encoder.target_text(sample)
    return kept


def packed_rows(samples: list[Sample], encoder: Encoder, cfg: Config) -> tuple[list[Row], int]:
    """Samples as packed rows of at most pack_tokens tokens, and how many samples are over
    max_tokens and left out."""
    rows = list(prefetch(encoder.example, samples))
    short = [row for row in rows if len(row) <= cfg.max_tokens]
    too_long = len(rows) - len(short)
    if not short:  # every rank must run something: the shortest, with no token that counts
        row = min(rows, key=len)
        short = [replace(row, supervised=torch.zeros_like(row.supervised))]
    bins = pack(short, cfg.pack_tokens)
    return [Row.join(*(short[i] for i in chosen)) for chosen in bins], too_long


def sft_loss(model: QwenVL, row: Row, compute: torch.dtype) -> Tensor:
    """Eq. (3) of a row, summed over its target tokens: - sum of log P(R, Y | Q, X, S)."""
    with compute_in(compute, model):
        logprobs, _ = model(row)  # [S], of the supervised tokens
    return -logprobs.sum()


def train_step(
    model, optimizer, rows: list[Row], tokens: float, lr: float, max_norm: float, compute, ranks
) -> dict[str, float]:
    """One optimizer step on the rows of all ranks. Returns the metrics.

    rows: those of this rank; tokens: target tokens of the global batch. The loss is divided by
    them, however rows are packed and shared among ranks.
    """
    metrics = {"lr": lr, "target_tokens": int(tokens)}
    if tokens == 0:  # every sample of the batch is over --max-tokens
        return metrics | {"loss": 0.0, "grad_norm": 0.0, "skipped": 1}
    total = 0.0
    for row, is_real in lockstep(rows, ranks):
        loss = sft_loss(model, row, compute) * is_real / tokens  # Eq. (3)
        backward(loss, ranks)
        total += loss.item()
    grad_norm = optimizer_step(optimizer, lr, max_norm)
    skipped = int(not math.isfinite(grad_norm))
    return metrics | {"loss": ranks.reduce(total), "grad_norm": grad_norm, "skipped": skipped}


@torch.no_grad()
def validation_loss(model, encoder, samples: list[Sample], cfg: Config, compute, ranks) -> float:
    """Mean loss per target token over all validation samples; NaN if all are over --max-tokens."""
    total, tokens = 0.0, 0.0
    starts = range(0, len(samples), cfg.batch_size)  # all images at once would fill the memory
    for start in progress(starts, len(starts), "validation batches", ranks.rank == 0):
        batch = samples[start : start + cfg.batch_size]
        share = batch[ranks.rank :: ranks.world]  # this rank's; perhaps empty in the last batch
        rows, _ = packed_rows(share or batch[:1], encoder, cfg)
        for row, is_real in lockstep(rows, ranks):
            counts = is_real and bool(share)
            total += counts * sft_loss(model, row, compute).item()
            tokens += counts * int(row.supervised.sum())
    total, tokens = ranks.reduce(total), ranks.reduce(tokens)
    return total / tokens if tokens else math.nan


def main(cfg: Config) -> None:
    """Train, log, checkpoint; leave the model at cfg.out."""
    ranks = start_ranks(cfg.device)
    if cfg.batch_size < ranks.world:
        raise InputError(f"--batch-size {cfg.batch_size} is less than one for each rank")
    with prepared(cfg, ranks):
        train(cfg, ranks)


def train(cfg: Config, ranks: Ranks) -> None:
    """The run in the folder cfg.out, which no other run writes to, from its last checkpoint on."""
    samples = with_targets(cfg.data, cfg, ranks)
    validation = with_targets(cfg.validation, cfg, ranks) if cfg.validation else []
    model, encoder, compute = load_for_training(cfg, ranks)
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    run = Run(cfg, ranks, samples + validation)
    total = max(1, round(cfg.epochs * len(samples) / cfg.batch_size))
    done = run.restore(model, optimizer)
    last = max(done, min(total, cfg.steps or total))

    def batch(step: int) -> tuple[list[Row], int]:
        start = (step - 1) * cfg.batch_size
        indices = data_order(len(samples), start, cfg.batch_size, cfg.seed)
        return packed_rows([samples[i] for i in indices[ranks.rank :: ranks.world]], encoder, cfg)

    steps = range(done + 1, last + 1)
    on_cpu = ranks.device.type == "cpu"  # where the step itself wants every core
    batches = map(batch, steps) if on_cpu else prefetch(batch, steps, workers=1)
    began = time.perf_counter()  # of the step, with the time it waits for its batch
    with StopSignal(ranks) as stop:
        for step, (rows, too_long) in zip(steps, batches):
            # 1. Update the model on the batch, Eq. (3).
            tokens = ranks.reduce(sum(int(row.supervised.sum()) for row in rows))
            lr = cosine(step - 1, total, cfg.warmup, cfg.lr)
            metrics = train_step(model, optimizer, rows, tokens, lr, cfg.max_norm, compute, ranks)
            metrics["seconds"] = time.perf_counter() - began
            metrics["too_long"] = int(ranks.reduce(too_long))
            metrics |= training_speed(model, rows, metrics["seconds"], ranks)
            # 2. Evaluate, report, and save.
            if validation and (step % cfg.eval_every == 0 or step == last):
                held_out = validation_loss(model, encoder, validation, cfg, compute, ranks)
                metrics["validation_loss"] = held_out
            run.log(step, metrics, SHOWN, last)
            stopped = stop.agreed()
            if step % cfg.save_every == 0 or step == last or stopped:
                run.checkpoint(step, model, optimizer)
            if stopped:
                sys.exit(128 + stopped)
            began = time.perf_counter()
    run.finish(last, total, model, optimizer, encoder, compute)


# ---------------------------------------------------------------------- shared with grpo.py


def load_for_training(cfg, ranks: Ranks) -> tuple[QwenVL, Encoder, torch.dtype]:
    """The model (float32 master weights, sharded over the ranks), encoder, and compute dtype."""
    compute = choose_dtype(cfg.dtype, ranks.device)
    if ranks.device.type == "cuda":
        card = torch.cuda.get_device_properties(ranks.device).total_memory
        check_fits(outline(locate(cfg.model)), cfg.freeze, ranks.world, card)
    model = load(cfg.model)
    freeze(model, cfg.freeze)
    model.checkpointing = model.visual.checkpointing = cfg.checkpointing
    encoder = Encoder(cfg.model, cfg.instruction, cfg.min_pixels, cfg.max_pixels)
    return shard(model, ranks, compute), encoder, compute


def freeze(model: QwenVL, names: list[str]) -> None:
    """Let all parts train but those of --freeze."""
    parts = {"vision": model.visual, "merger": model.visual.merger, "decoder": model.model}
    if not set(names) <= parts.keys():
        raise InputError(f"--freeze {' '.join(names)}: choose from {', '.join(parts)}")
    for name, part in parts.items():  # the merger, a part of the vision tower, comes after it
        part.requires_grad_(name not in names)
    model.head.requires_grad_("decoder" not in names)  # the embeddings, or a matrix beside them


def check_fits(model: QwenVL, frozen: list[str], world: int, card: int) -> None:
    """InputError if cards of `card` bytes, one for each of `world` ranks, do not even hold 16 bytes
    for a parameter that trains (float32 weight, gradient, two moments), and 4 for a frozen one."""
    freeze(model, frozen)
    needed = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters()) / world
    if needed > card:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        raise InputError(
            f"training {trained:.3g} parameters on {world} rank{'s' * (world > 1)} needs at least "
            f"{needed / 2**30:.0f} GiB a card for float32 weights, gradients and moments, the card "
            f"has {card / 2**30:.0f}: use more ranks (torchrun --nproc-per-node), or --freeze"
        )


def compute_in(dtype: torch.dtype, model: QwenVL):
    """Context in which float32 weights compute in `dtype`; a sharded model does so by itself."""
    if dtype == torch.float32 or model.sharded:
        return nullcontext()
    return torch.autocast(model.head.device.type, dtype, cache_enabled=False)


def make_optimizer(model: QwenVL, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, with betas 0.9 and 0.999, over the parameters that train."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InputError("--freeze leaves nothing to train")
    return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)


def data_order(items: int, start: int, count: int, seed: int) -> list[int]:
    """Indices start .. start + count of the endless training order, which shuffles each epoch."""
    first, last = start // items, (start + count - 1) // items
    order = []
    for epoch in range(first, last + 1):
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order += torch.randperm(items, generator=generator).tolist()
    return order[start - first * items :][:count]


def lockstep(batches: list, ranks: Ranks) -> Iterator[tuple[object, bool]]:
    """This rank's batches (at least one), each with True, for as many turns as any rank needs.

    Sharded ranks must meet in every forward and backward pass, also when one has fewer batches: it
    then repeats its last one, with False, for a loss that is multiplied by zero.
    """
    for turn in range(int(ranks.reduce(len(batches), "max"))):
        is_real = turn < len(batches)
        yield batches[turn if is_real else -1], is_real


def backward(loss: Tensor, ranks: Ranks) -> None:
    """Add the gradients of a rank's share of the loss. The loss is a sum over the ranks, and FSDP
    takes the mean of their gradients: hence the factor."""
    if loss.requires_grad:  # not so for a row without an image when the decoder is frozen
        (loss * ranks.world).backward()


def optimizer_step(optimizer: torch.optim.Optimizer, lr: float, max_norm: float) -> float:
    """Clip the gradients to a norm of max_norm, step, and zero them. Returns the norm before
    clipping, over all ranks. Where that is not finite the step is skipped."""
    (group,) = optimizer.param_groups
    for parameter in group["params"]:
        # No gradient counts as zeros: without an image AdamW decays the vision tower all the same,
        # as it does when the tower is sharded.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = full(torch.nn.utils.clip_grad_norm_(group["params"], max_norm)).item()
    group["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


# Dense bfloat16 FLOP/s of a card (NVIDIA's data sheets), by the whole name that CUDA gives it.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10": 125e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def model_flops(model: QwenVL, row: Row, forwards: int = 1) -> float:
    """The FLOPs of the matrices in `forwards` forward passes of a row and one backward pass.

    For every position that it is applied to, a parameter takes 2 in each forward pass and, if it
    trains, 4 in the backward pass. Not counted: attention's own products, norms, the optimizer, and
    what is computed again (checkpointed layers, the head).
    """
    vision, patches = model.visual, len(row.pixels)
    parts = [  # (parameters, positions)
        (vision.patch_embed.parameters(), patches),
        (vision.blocks.parameters(), patches),
        (vision.merger.parameters(), patches / vision.merger.cell),
        (model.model.layers.parameters(), len(row)),
        ([model.head], int(row.supervised.sum())),
    ]
    flops = 0.0
    for parameters, positions in parts:
        for parameter in parameters:
            if parameter.dim() > 1:  # a matrix, no bias or norm
                at_one_position = 2 * forwards + 4 * parameter.requires_grad
                flops += at_one_position * parameter.numel() * positions
    return flops


def training_speed(
    model: QwenVL, rows: list[Row], seconds: float, ranks: Ranks, forwards: int = 1
) -> dict[str, float]:
    """trained_tokens_per_second and, for a known card, mfu, of all ranks together.

    rows: those that this rank ran in these seconds, `forwards` times forward and once backward;
    each token counts once. mfu: the model FLOPs, as a share in [0, 1] of what the cards can do.
    """
    flops = ranks.reduce(sum(model_flops(model, row, forwards) for row in rows))
    tokens = ranks.reduce(sum(len(row) for row in rows))
    speed = {"trained_tokens_per_second": tokens / seconds}
    if ranks.device.type == "cuda":
        peak = PEAK_FLOPS.get(torch.cuda.get_device_name(ranks.device))
        if peak is not None:
            speed["mfu"] = flops / (seconds * peak * ranks.world)
    return speed


# ---------------------------------------------------------------------- a run on disk


@contextmanager
def prepared(cfg, ranks: Ranks) -> Iterator[None]:
    """Check flags and paths before anything is read, then hold --out for this run alone."""
    check_inputs(cfg)
    if 0 in (cfg.epochs, cfg.lr, cfg.max_norm):
        raise InputError("with --epochs 0, --lr 0 or --max-norm 0 nothing trains")
    instruction = [cfg.instruction] if cfg.instruction else []
    files = regular_files([*cfg.data, *cfg.validation, *instruction])
    check_output(cfg.out, [cfg.model, *files], folder=True)
    with lock_output(cfg.out) if ranks.rank == 0 else nullcontext():
        ranks.barrier()  # no rank goes on before rank 0 has the lock
        yield


class Run:
    """A training run in the folder --out, which all nodes share. Only rank 0 writes, but for each
    rank's part of a checkpoint.

    run.json        settings, and digests of the inputs; with other ones the run does not go on
    metrics.jsonl   a line per step; rollouts.jsonl (of grpo.py) a line per group
    tensorboard/    the same as metrics.jsonl, where TensorBoard is installed
    checkpoints/    step-N/rank-R-of-W.pt, the full state after step N, and .sha256: the last two
    """

    # Settings that do not change what is computed, but for roundings.
    may_change = {"out", "steps", "fresh", "save_every", "eval_every", "device", "dtype"}
    may_change |= {"pack_tokens", "max_branches", "checkpointing"}
    logs = ("metrics.jsonl", "rollouts.jsonl")
    advice = "use --fresh to discard the run there, or another --out"

    def __init__(self, cfg, ranks: Ranks, samples: list[Sample]):
        """samples: those that the run reads; their images are inputs, too. InputError if the folder
        holds a run with other settings or inputs, which cfg.fresh discards."""
        self.cfg, self.ranks, self.folder = cfg, ranks, Path(cfg.out)
        self.checkpoints = self.folder / "checkpoints"
        self.times = [time.perf_counter()]  # of the start, and of the end of each recent step
        self.board = None  # TensorBoard's writer
        if ranks.rank == 0:
            if cfg.fresh:
                if self.checkpoints.exists():
                    shutil.rmtree(self.checkpoints)
                for name in ("run.json", "model.safetensors", *self.logs):
                    (self.folder / name).unlink(missing_ok=True)
            files = [*cfg.data, *cfg.validation]
            inputs = inputs_digest(cfg.model, files, cfg.instruction, samples)
            settings = {"config": asdict(cfg), "world": ranks.world, "inputs": inputs}
            settings["compute"] = str(choose_dtype(cfg.dtype, ranks.device))  # "auto" is either
            self._check_same(settings)
            text = json.dumps(settings | versions(), indent=2)
            write_atomic(self.folder / "run.json", text + "\n")
        ranks.barrier()

    def _check_same(self, now: dict) -> None:
        """InputError if this folder holds a run with other settings or inputs."""
        path = self.folder / "run.json"
        if not path.exists() and not self._steps():
            return
        damage = (FileNotFoundError, InputError, LookupError, TypeError, AttributeError)
        with as_input_error(f"{path}: missing or damaged; {self.advice}", *damage):
            before = read_json(path)
            old, new = (
                {**run["config"], "world": run["world"], "compute": run["compute"]}
                for run in (before, now)
            )
            inputs = changed_inputs(before["inputs"], now["inputs"])
        names = sorted(k for k in new.keys() - self.may_change if old.get(k) != new[k])
        changed = [f"{name} {old.get(name)} -> {new[name]}" for name in names]
        changed += [f"other content of {name}" for name in inputs]
        if changed:
            raise InputError(f"{self.folder}: a run with {', '.join(changed)}; {self.advice}")

    def _steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        names = (path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def _at(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def _part(self, folder: Path) -> Path:
        return folder / f"rank-{self.ranks.rank}-of-{self.ranks.world}.pt"

    def _last_whole(self) -> int:
        """The last step whose checkpoint is whole on every rank; 0 if there is no checkpoint yet.
        Damaged ones after it are named on stderr and set aside. InputError if all are damaged."""
        steps = self.ranks.gather(self._steps() if self.ranks.rank == 0 else [])
        damaged = []
        while steps and self.ranks.reduce(not is_sealed(self._part(self._at(steps[-1]))), "max"):
            damaged.append(self._at(steps.pop()))
        names = ", ".join(map(str, damaged))
        if damaged and not steps:
            raise InputError(f"{names}: damaged, with no other left; {self.advice}")
        if damaged and self.ranks.rank == 0:
            print(f"{names}: damaged; going on from step {steps[-1]}", file=sys.stderr)
            for folder in damaged:  # removed with the next checkpoint
                folder.rename(folder.with_name(f"damaged-{folder.name}"))
        return steps[-1] if steps else 0

    def restore(self, model: QwenVL, optimizer) -> int:
        """Load the last whole checkpoint into model and optimizer; returns the steps done."""
        step = self._last_whole()
        if self.ranks.rank == 0:
            for name in self.logs:
                drop_records_after(self.folder / name, step)
        if step == 0:
            return 0
        state = torch.load(self._part(self._at(step)), map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                local(parameter).copy_(state["model"][name])
                for key, value in state["optimizer"].get(name, {}).items():
                    # A moment is sharded as its parameter is; the step count is one number.
                    like = parameter if value.dim() else value
                    moment = torch.empty_like(like, device=parameter.device)
                    local(moment).copy_(value)
                    optimizer.state[parameter][key] = moment
        self.times = [time.perf_counter()]
        return step

    def checkpoint(self, step: int, model: QwenVL, optimizer) -> None:
        """Write the full state after `step` steps. Once it is on the disk, on all ranks, it has its
        final name, and all but the last two checkpoints are removed."""
        partial = self.checkpoints / f"partial-{step:06d}"
        partial.mkdir(parents=True, exist_ok=True)
        if model.sharded:
            model.reshard()  # validation, forward without backward, leaves the root's weights whole
        state = {"step": step, "model": {}, "optimizer": {}}
        for name, parameter in model.named_parameters():
            state["model"][name] = local(parameter.detach())
            if parameter in optimizer.state:
                moments = optimizer.state[parameter].items()
                state["optimizer"][name] = {key: local(value) for key, value in moments}
        write_state(self._part(partial), state)
        self.ranks.barrier()
        if self.ranks.rank == 0:
            logs = [self.folder / name for name in self.logs]
            for path in (partial, *filter(Path.exists, logs)):
                sync(path)
            partial.rename(self._at(step))
            sync(self.checkpoints)
            old = [self._at(earlier) for earlier in self._steps()[:-2]]
            for pattern in ("partial-*", "damaged-*"):
                old += self.checkpoints.glob(pattern)
            for folder in old:
                shutil.rmtree(folder)
        self.ranks.barrier()

    def log(self, step: int, metrics: dict, shown: str, last: int) -> None:
        """A step's metrics: all of them in metrics.jsonl and (where installed) TensorBoard, on the
        screen the time left and those that `shown` names. Step 0 is the evaluation before the first
        step, and says nothing about how long one takes."""
        now = time.perf_counter()
        self.times = [*self.times[-RECENT:], now] if step else [now]
        if self.ranks.rank > 0:
            return
        append_records(self.folder / "metrics.jsonl", [{"step": step, **metrics}])
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            if self.board is None:  # what an earlier run has logged from this step on is not shown
                self.board = SummaryWriter(self.folder / "tensorboard", purge_step=step)
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
        parts = [f"step {step}/{last}"]
        if step:
            # At the mean pace of recent steps, with evaluations and checkpoints in between.
            pace = (now - self.times[0]) / (len(self.times) - 1)
            parts.append(f"left {timedelta(seconds=round(pace * (last - step)))}")
        for name in shown.split():
            if name in metrics:
                short_name = name.replace("_tokens_per_second", "/s")
                digits = ".0f" if abs(metrics[name]) >= 100 else ".3g"
                parts.append(f"{short_name} {metrics[name]:{digits}}")
        print("  ".join(parts), flush=True)

    def finish(self, done: int, total: int, model: QwenVL, optimizer, encoder, compute) -> None:
        """Leave the model in the folder. InputError if no step of the run has trained it."""
        if not optimizer.state:  # AdamW makes it in its first step; checkpoints keep it
            raise InputError(
                f"{self.folder}: every step was skipped, and nothing trained: see grad_norm (not "
                "finite?) and, of SFT, too_long (all over --max-tokens?) in metrics.jsonl"
            )
        save(model, self.folder, self.cfg.model, compute)
        if self.ranks.rank == 0:
            encoder.write(self.folder)
            print(f"{self.folder}: {done} of {total} steps done")


def write_state(path: Path, state: dict) -> None:
    """Write one rank's file of a checkpoint, sealed. OSError names the file."""
    with naming(path), open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # When a write fails, torch mostly raises an error of its own while it handles that.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise  # an error of the device, for example
    seal(path)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor (all of it when it is not sharded)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def versions() -> dict:
    """What a run must name to be repeated: versions, threads, hardware, the commit of this code."""
    git = subprocess.run(  # by a shell: git may be missing
        "git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": git.stdout.strip() or None,
    }


class StopSignal:
    """SIGTERM, as a scheduler sends it, or Ctrl-C (SIGINT), while a loop runs.

    The first one is noted, so that the loop can finish its step, write a checkpoint, and end with
    the exit code 128 + signal. The next one ends the process at once, but not while it waits for
    the device or for other ranks. Within `repeat` seconds it is the same signal, by way of
    torchrun, which kills its workers 30 seconds later, or after its --shutdown-timeout.
    """

    repeat = 2.0

    def __init__(self, ranks: Ranks):
        self.ranks, self.number, self.noted_at = ranks, 0, 0.0

    def _note(self, number: int, frame) -> None:
        if not self.number:
            self.number, self.noted_at = number, time.monotonic()
            if self.ranks.rank == 0:  # not by print, which may be interrupted within itself
                os.write(2, b"stopping after this step; another signal ends the run at once\n")
        elif time.monotonic() - self.noted_at > self.repeat:
            os._exit(128 + number)

    def agreed(self) -> int:
        """The signal that any rank has received so far, or 0; the same on all ranks, so that they
        stop after the same step, though signals reach them at different times."""
        return int(self.ranks.reduce(self.number, "max"))

    def __enter__(self) -> "StopSignal":
        self.usual = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    cli(Config, main)
