"""Reasoning SFT (R-SFT), Eq. (3), and the training run that grpo.py shares.

In:  a base checkpoint directory or hub id, and JSONL files of samples with reasoning.
Out: DIR, a checkpoint directory; DIR/run.json, DIR/metrics.jsonl, DIR/checkpoints/ (the last two).

The loss is the mean over all target tokens (reasoning, labels and the stop token) of the global
batch. The state is weights, optimizer and step: (seed, step) determines the samples of a step.

Deviations from the release: samples are packed side by side into rows, none attends to another;
the loss is averaged over tokens, not over micro-batches; over-long samples are left out, not cut.

    torchrun --nproc-per-node 4 sft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data data/train.jsonl
"""

import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.distributed import checkpoint as dcp

import data
from data import Encoder, Flags, InputError, Sample, option, pack, prefetch, progress, say
from model import QwenVL, Ranks, Row, Segment, full, load, save, shard, start_ranks

# The metrics on the screen.
SHOWN = "loss lr grad_norm trained_tokens_per_second seconds validation_loss"
ZERO = torch.zeros(1, dtype=torch.long)
# A rank runs this row when only other ranks have rows left: one token, not supervised, no image.
SPARE_ROW = Row(ZERO, ZERO.expand(3, 1), (Segment(0, 1),), ZERO.bool(), torch.zeros(0, 1176))

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # by dcp, in one process


@dataclass(frozen=True)
class SFTFlags(Flags):
    model: str = option("Qwen/Qwen2.5-VL-3B-Instruct", "checkpoint or hub id")
    data: list[str] = option(["data/train.jsonl"], "JSONL files of samples with reasoning")
    validation: list[str] = option([], "JSONL files for the validation loss")
    out: str = option("out/sft", "directory of the run and its checkpoint")
    fresh: bool = option(False, "start over, discarding the run in --out")
    max_pixels: int | None = option(768 * 768, "largest image area; default: LLaMA-Factory's")
    epochs: float = option(3.0, "passes over the data, may be fractional")
    steps: int | None = option(None, "stop after this step; the same command without it goes on")
    eval_every: int = option(100, "steps between validation losses")
    save_every: int = option(100, "steps between checkpoints")

    batch_size: int = option(192, "samples per optimizer step, over all ranks")
    lr: float = option(5e-5, "peak learning rate")
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_norm: float = option(1.0, "gradient norm is clipped to this")
    freeze: list[str] = option(["vision", "merger"], "of vision, merger, decoder; or none")
    max_tokens: int = option(2048, "longest sample in tokens; longer ones are left out and counted")

    pack_tokens: int = option(8192, "tokens per forward pass (ours: sets memory, not results)")
    checkpointing: bool = option(True, "recompute activations in the backward pass")


# ---------------------------------------------------------------------- the method


def cosine(step: int, total: int, peak: float) -> float:
    """Learning rate of step 1 .. total: a cosine from the peak towards zero, as released."""
    return peak * 0.5 * (1 + math.cos(math.pi * (step - 1) / total))


def packed_rows(samples: list[Sample], encoder: Encoder, pack_tokens: int) -> list[Row]:
    """Samples as packed rows of at most pack_tokens tokens; a longer sample is a row of its own."""
    rows = list(prefetch(encoder.example, samples))
    bins = pack(rows, pack_tokens)
    return [Row.join(*(rows[i] for i in chosen)) for chosen in bins]


def sft_loss(model: QwenVL, row: Row) -> Tensor:
    """Eq. (3) of a row: minus the sum of log P(R, Y | Q, X, S) over its target tokens."""
    logprobs, _ = model(row)  # [S], of the supervised tokens
    return -logprobs.sum()


def batch_loss(model: QwenVL, rows: list[Row], ranks: Ranks) -> tuple[float, int]:
    """Eq. (3) of a batch: the mean loss over the target tokens of all ranks, and the number of
    these tokens. `rows` is this rank's share. Adds the gradients, except under no_grad. Neither
    packing nor the number of ranks changes the loss."""
    targets = int(ranks.reduce(sum(int(row.supervised.sum()) for row in rows)))
    total = 0.0
    for row in lockstep(rows, SPARE_ROW, ranks):
        loss = sft_loss(model, row) / targets
        backward(loss, ranks)
        total += loss.item()
    return ranks.reduce(total), targets


def train_step(model, optimizer, rows: list[Row], lr: float, max_norm: float, ranks) -> dict:
    """One optimizer step on a batch. `rows` is this rank's share. Returns the metrics."""
    loss, targets = batch_loss(model, rows, ranks)
    grad_norm = optimizer_step(optimizer, lr, max_norm)
    metrics = {"loss": loss, "target_tokens": targets, "lr": lr, "grad_norm": grad_norm}
    return metrics | {"skipped": int(not math.isfinite(grad_norm))}


@torch.no_grad()
def validation_loss(model, encoder, samples: list[Sample], flags: SFTFlags, ranks) -> float:
    """Eq. (3) of all samples, one batch at a time: the images of all would not fit into memory."""
    total, targets = 0.0, 0
    for start in range(0, len(samples), flags.batch_size):
        share = samples[start : start + flags.batch_size][ranks.rank :: ranks.world]
        loss, count = batch_loss(model, packed_rows(share, encoder, flags.pack_tokens), ranks)
        total, targets = total + loss * count, targets + count
    return total / max(targets, 1)


def main(flags: SFTFlags) -> None:
    """Train, log, checkpoint; leave the model at flags.out."""
    with started(flags) as ranks:
        train(flags, ranks)


def train(flags: SFTFlags, ranks: Ranks) -> None:
    """Begin the run in the folder flags.out, or resume it from its last checkpoint."""
    model, encoder = load_for_training(flags, ranks)
    select = partial(usable_samples, flags, ranks, encoder.example, flags.max_tokens, complete=True)
    samples, left_out = select(flags.data)
    validation, left_out_too = select(flags.validation)
    total = total_steps(flags.epochs, len(samples), flags.batch_size)
    optimizer = make_optimizer(model, flags.lr, flags.weight_decay)
    run = Run(flags, ranks, samples + validation, left_out + left_out_too)
    done = run.restore(model, optimizer)
    last = max(done, min(total, flags.steps or total))

    with stop_signal(ranks) as stop:
        for step in range(done + 1, last + 1):
            # 1. Update the model on the batch, Eq. (3).
            began = time.perf_counter()
            indices = data_order(len(samples), step, flags.batch_size, flags.seed)
            share = [samples[i] for i in indices[ranks.rank :: ranks.world]]
            rows = packed_rows(share, encoder, flags.pack_tokens)
            lr = cosine(step, total, flags.lr)
            metrics = train_step(model, optimizer, rows, lr, flags.max_norm, ranks)
            metrics["seconds"] = time.perf_counter() - began
            tokens = ranks.reduce(sum(map(len, rows)))
            metrics["trained_tokens_per_second"] = tokens / metrics["seconds"]
            # 2. Evaluate, report, and save.
            if validation and (step % flags.eval_every == 0 or step == last):
                loss = validation_loss(model, encoder, validation, flags, ranks)
                metrics["validation_loss"] = loss
            run.log(step, metrics, SHOWN, last)
            stopped = stop()
            if step % flags.save_every == 0 or step == last or stopped:
                run.checkpoint(step)
            if stopped:
                sys.exit(128 + stopped)
    run.finish(last, total, model, optimizer, encoder)


# ---------------------------------------------------------------------- shared with grpo.py


def usable_samples(
    flags, ranks: Ranks, encode: Callable, most: int, paths: list[str], complete: bool
) -> tuple[list[Sample], list[str]]:
    """The files' samples with a label (if `complete`, with all labels and reasoning) and at most
    `most` tokens, and lines that say what is left out. Each rank encodes its share once, to count
    the tokens: a damaged image ends the run now, and not at hour five."""
    samples, bad_rows = data.read_samples(paths, flags.skip_bad)
    if complete:
        usable = [s for s in samples if s.is_complete]
    else:
        usable = [s for s in samples if s.request_label or s.response_label]
    share = range(ranks.rank, len(usable), ranks.world)
    rows = prefetch(encode, (usable[i] for i in share))
    rows = progress(rows, len(share), "samples", ranks.rank == 0)
    short = ranks.gather([i for row, i in zip(rows, share) if len(row) <= most])
    target = "reasoning or a label" if complete else "a label"
    summary = (
        f"{', '.join(paths)}: {len(short)} samples; left out: {len(bad_rows)} bad rows, "
        f"{len(samples) - len(usable)} lacking {target}, "
        f"{len(usable) - len(short)} of more than {most} tokens"
    )
    if paths and ranks.rank == 0:
        say(summary)
    return [usable[i] for i in sorted(short)], [summary, *bad_rows] if paths else []


def load_for_training(flags, ranks: Ranks) -> tuple[QwenVL, Encoder]:
    """The model (float32 master weights, sharded over the ranks) and its encoder."""
    model = load(flags.model, ranks.device, torch.float32)
    freeze(model, flags.freeze)
    model.checkpointing = model.visual.checkpointing = flags.checkpointing
    encoder = Encoder(flags.model, flags.instruction, flags.min_pixels, flags.max_pixels)
    return shard(model, ranks), encoder


def freeze(model: QwenVL, names: list[str]) -> None:
    """Freeze the parts that --freeze names; all other parts train."""
    parts = {"vision": model.visual, "merger": model.visual.merger, "decoder": model.model}
    if not set(names) <= {*parts, "none"}:
        raise InputError(f"--freeze {' '.join(names)}: choose from {', '.join(parts)}, or none")
    for name, part in parts.items():  # the merger comes after the vision tower, which holds it
        part.requires_grad_(name not in names)
    model.head.requires_grad_("decoder" not in names)  # tied to the embeddings, or its own matrix


def make_optimizer(model: QwenVL, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, with betas 0.9 and 0.999, over the parameters that train."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InputError("--freeze leaves nothing to train")
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)
    for p in trained:  # as AdamW's first step would: a checkpoint is loaded into these tensors
        step = torch.zeros((), device=p.device)
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": step, **moments}
    return optimizer


def total_steps(epochs: float, samples: int, batch: int) -> int:
    """The steps of a run: whole batches, rounded down. InputError if zero or infinite."""
    steps = epochs * samples / batch + 1e-9  # in floats, 0.29 * 100 is a little less than 29
    if not 1 <= steps < math.inf:
        raise InputError(f"--epochs {epochs} of {samples} samples are not one batch of {batch}")
    return int(steps)


def data_order(items: int, step: int, batch: int, seed: int) -> list[int]:
    """The sample indices of step 1, 2, ...: a slice of an endless order, shuffled every epoch."""
    start = (step - 1) * batch
    first, last = start // items, (start + batch - 1) // items
    order = []
    for epoch in range(first, last + 1):
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order += torch.randperm(items, generator=generator).tolist()
    return order[start - first * items :][:batch]


def lockstep(batches: list, spare, ranks: Ranks) -> list:
    """This rank's batches, filled up with `spare` to the largest number on any rank: sharded ranks
    must meet in every forward and backward pass. No token of `spare` counts, so it adds zero."""
    turns = int(ranks.reduce(len(batches), "max"))
    return batches + [spare] * (turns - len(batches))


def backward(loss: Tensor, ranks: Ranks) -> None:
    """Add the gradients of a rank's share of the loss. The loss is a sum over the ranks, but FSDP
    takes the mean of their gradients: hence the factor ranks.world."""
    if loss.requires_grad:  # false under no_grad, or without an image if only vision trains
        (loss * ranks.world).backward()


def optimizer_step(optimizer, lr: float, max_norm: float) -> float:
    """Clip the gradients to a norm of max_norm, step, and zero the gradients. Returns the norm
    before clipping, over all ranks. If this norm is not finite, the step is skipped."""
    (group,) = optimizer.param_groups
    for parameter in group["params"]:
        # A missing gradient counts as zeros: AdamW then decays the vision tower even if the batch
        # has no image, as it does when the tower is sharded.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = full(torch.nn.utils.clip_grad_norm_(group["params"], max_norm)).item()
    group["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


# ---------------------------------------------------------------------- a run on disk


@contextmanager
def started(flags) -> Iterator[Ranks]:
    """Check flags and folders, join the other ranks, and lock --out for this run. InputError if
    --out holds files that no run has written, or a run whose checkpoints were removed."""
    data.check_inputs(flags)
    data.check_output(flags.out, [flags.model, *flags.data, *flags.validation])
    folder = Path(flags.out)
    ranks = start_ranks(flags.device, flags.dtype)
    with data.lock(folder) if ranks.rank == 0 else nullcontext():
        names = {path.name for path in folder.glob("[!.]*")}
        if names and "run.json" not in names:
            raise InputError(f"{folder}: holds files, but not of a run; give another --out")
        logged = data.read_records(folder / "metrics.jsonl") if "metrics.jsonl" in names else []
        every = data.read_json(folder / "run.json")["flags"]["save_every"] if logged else 0
        has_saved = "model.safetensors" in names or (logged and logged[-1]["step"] > every)
        if has_saved and not any(folder.glob("checkpoints/step-*")) and not flags.fresh:
            raise InputError(f"{folder}: a run whose checkpoints are gone; {Run.advice}")
        ranks.barrier()  # no rank goes on before rank 0 has the lock
        yield ranks


class Run:
    """A training run in the folder --out, which all nodes share:

    run.json        flags, fingerprint of the inputs, rows that were left out, versions
    metrics.jsonl   a line per step; rollouts.jsonl (of grpo.py) a line per group
    tensorboard/    the same as metrics.jsonl, where TensorBoard is installed
    checkpoints/    step-N, the state after step N: the last two
    """

    # A resumed run may change these flags: when to stop, save and evaluate; what changes results at
    # most by rounding; and paths, since the fingerprint compares the files themselves.
    may_change = {"out", "steps", "fresh", "save_every", "eval_every", "device", "pack_tokens"}
    may_change |= {"max_branches", "checkpointing", "model", "data", "validation", "instruction"}
    logs = ("metrics.jsonl", "rollouts.jsonl")
    advice = "use --fresh to discard it, or another --out"

    def __init__(self, flags, ranks: Ranks, samples: list[Sample], left_out: list[str]):
        """samples: all that the run reads, since their images are inputs, too. InputError if the
        folder holds a run with other flags or inputs, unless flags.fresh discards that run."""
        self.flags, self.ranks, self.folder = flags, ranks, Path(flags.out)
        self.checkpoints = self.folder / "checkpoints"
        self.state = {}  # the tensors of model and optimizer, not copies
        self.done, self.began = 0, time.perf_counter()  # steps done before, and start time
        self.board = None  # TensorBoard's writer
        if ranks.rank == 0:
            if flags.fresh:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
                shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
                for name in ("model.safetensors", *self.logs):
                    (self.folder / name).unlink(missing_ok=True)
            files = {"data": flags.data, "validation": flags.validation}
            files["instruction"] = [flags.instruction] if flags.instruction else []
            inputs = data.fingerprint(flags.model, files, samples)
            record = {"flags": asdict(flags), "fingerprint": inputs, "left_out": left_out}
            record["flags"]["dtype"] = str(ranks.compute)  # what --dtype auto has chosen
            record |= {"torch": torch.__version__, "transformers": transformers.__version__}
            record["device"] = str(ranks.device)
            path = self.folder / "run.json"
            if path.exists() and not flags.fresh:
                before = data.read_json(path)
                names = set(data.changed(before["flags"], record["flags"])) - self.may_change
                names |= set(data.changed(before["fingerprint"], inputs))
                if names:
                    text = f"a run with other {', '.join(sorted(names))}"
                    raise InputError(f"{self.folder}: {text}; {self.advice}")
            data.write_atomic(path, json.dumps(record, indent=2) + "\n")
            self.checkpoints.mkdir(exist_ok=True)
        ranks.barrier()

    def restore(self, model, optimizer) -> int:
        """Load the last checkpoint into model and optimizer; returns the steps done. Drops later
        log lines, as the run writes them again. InputError if the checkpoint is damaged."""
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        moments = {n: optimizer.state[p] for n, p in model.named_parameters() if p.requires_grad}
        self.state = {"model": parameters, "optimizer": moments}
        folders = sorted(self.checkpoints.glob("step-*[0-9]")) if self.ranks.rank == 0 else []
        if newest := self.ranks.gather(folders[-1:]):
            self.done = int(newest[0].name.removeprefix("step-"))
            try:
                dcp.load(self.state, checkpoint_id=newest[0])
            except dcp.CheckpointException as error:
                advice = "remove that folder to go on from the one before, or use --fresh"
                raise InputError(f"{newest[0]}: damaged; {advice}") from error
        if self.ranks.rank == 0:
            for folder in self.checkpoints.glob("*.partial"):
                shutil.rmtree(folder)
            for path in filter(Path.exists, (self.folder / name for name in self.logs)):
                records = data.read_records(path)
                kept = [record for record in records if self.done and record["step"] <= self.done]
                data.write_samples(path, kept)
        self.began = time.perf_counter()
        return self.done

    def checkpoint(self, step: int) -> None:
        """Write the full state after `step` steps. Once all ranks have written, the checkpoint gets
        its final name, and all but the last two checkpoints are removed."""
        partial_folder = self.checkpoints / f"step-{step:06d}.partial"
        try:
            dcp.save(self.state, checkpoint_id=partial_folder)
        except dcp.CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise InputError(f"{partial_folder}: cannot be written: {cause}") from error
        if self.ranks.rank == 0:
            (self.folder / "model.safetensors").unlink(missing_ok=True)  # of an earlier step
            partial_folder.rename(partial_folder.with_suffix(""))
            for folder in sorted(self.checkpoints.glob("step-*[0-9]"))[:-2]:
                shutil.rmtree(folder)
        self.ranks.barrier()

    def log(self, step: int, metrics: dict, shown: str, last: int) -> None:
        """Write all metrics of a step to metrics.jsonl and TensorBoard (if it is installed). Print
        the time left and the metrics that `shown` names."""
        if self.ranks.rank > 0:
            return
        data.append_records(self.folder / "metrics.jsonl", [{"step": step, **metrics}])
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            if self.board is None:  # purge_step hides what an earlier run logged from this step on
                self.board = SummaryWriter(self.folder / "tensorboard", purge_step=step)
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
        parts = [f"step {step}/{last}"]
        if step > self.done:  # at the mean pace so far, including evaluations and checkpoints
            pace = (time.perf_counter() - self.began) / (step - self.done)
            parts.append(f"left {timedelta(seconds=round(pace * (last - step)))}")
        for name in shown.split():
            if name in metrics:
                parts.append(f"{name.replace('_tokens_per_second', '/s')} {metrics[name]:.5g}")
        say("  ".join(parts))

    def finish(self, done: int, total: int, model, optimizer, encoder) -> None:
        """Leave the model in the folder. InputError if no step of the run has trained it."""
        skipped = sum(r.get("skipped", 0) for r in data.read_records(self.folder / "metrics.jsonl"))
        text = f"{self.folder}: {done} of {total} steps done; "
        text += f"updates skipped, as the gradient was not finite: {skipped}"
        if all(state["step"] == 0 for state in optimizer.state.values()):
            raise InputError(f"{text}; so nothing was trained")
        # A model in the folder is that of the last checkpoint. It is not saved again: later stages
        # identify its weights by their modification time.
        if not (self.folder / "model.safetensors").exists():
            save(model, self.folder, self.flags.model, self.ranks.compute, encoder.files())
        if self.ranks.rank == 0:
            say(text)


@contextmanager
def stop_signal(ranks: Ranks) -> Iterator[Callable[[], int]]:
    """In this block, SIGTERM (from a scheduler) and Ctrl-C (SIGINT) only set a flag. Yields a
    function that returns the signal that any rank has received so far, or 0. It returns the same on
    all ranks, so they end after the same step, even if signals reach them at different times."""
    received = [0]

    def note(number: int, frame) -> None:
        received[0] = number
        if ranks.rank == 0:  # not with print: the signal may have interrupted a print
            os.write(2, b"stopping after this step, with a checkpoint; Ctrl-\\ ends at once\n")

    usual = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: int(ranks.reduce(received[0], "max"))
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    data.cli(SFTFlags, main)
