"""The peak memory of every stage, known before a card is rented: from tensors without contents, at the real sizes.

In:  the default flags of the stages and the sizes of the 3B and the 7B model; no weights, no card.
Out: a table of GiB on each card, for one card and several, what fits, and the flag to turn where something does not.

A stage's own functions (sft.backward, sft.optimizer_step, sft.sft_loss, grpo.policy_loss, model.generate) run on fake tensors, which have a shape
and no contents, while a Ledger counts the bytes that are alive. That gives weights, gradients, moments, activations
of a packed row and the head, as the code stands. Arithmetic adds what such a run cannot show:
- several ranks (FSDP2): 16 bytes for every trained parameter / ranks, and what is whole for a time: the root group,
  three blocks as gathered, two blocks' gradients on their way to being reduced (see `sharded_update`);
- sampling: the caches, at their worst case or as far as the sampler's share of the free memory allows.

What is assumed: every prompt has a picture of the largest size and 1,200 tokens, an answer has 300; rows are as full
as --pack-tokens allows. Attention on a card takes another kernel than here; none of them keeps the scores.

    python tests/memory.py [--only 3B grpo] [--json FILE]
"""

import argparse
import gc
import json
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import augment  # noqa: E402  (the repository is importable only from here on)
import evaluate  # noqa: E402
import grpo  # noqa: E402
import model as qwen  # noqa: E402
import sft  # noqa: E402
from data import Row, Segment  # noqa: E402

GIB = 2**30
CARDS = {"80 GB": 79.1, "24 GB": 22.0}  # GiB that such cards report, the smallest of their kinds
CONTEXT = 1.0  # GiB of a card that CUDA and NCCL take
RESERVE = {
    "training": 4.0,
    "sampling": 2.0,
}  # GiB of a card that stay free: the context, and the allocator's gaps
ALONE = qwen.Ranks(0, 1, torch.device("cpu"))
PREFILL = qwen.PREFILL_TOKENS
BANNED = (0, 1, 2)  # ids that are never sampled; how many there are hardly matters
aten = torch.ops.aten


def published(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int, words: int, tied: bool
) -> qwen.Config:
    """The configuration of a published checkpoint."""
    return qwen.Config.from_json({
        "model_type": "qwen2_5_vl", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": words,
        "tie_word_embeddings": tied, "image_token_id": 151655, "video_token_id": 151656, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"hidden_size": 1280, "out_hidden_size": hidden},
    })  # fmt: skip


MODELS = {
    "3B": published(36, 2048, 11008, 16, 2, 151936, True),
    "7B": published(28, 3584, 18944, 28, 4, 152064, False),
}


def remembered(function: Callable) -> Callable:
    """The function, called once for arguments of the same repr: a fake run takes seconds, and cells share them."""
    results = {}

    @wraps(function)
    def call(*args):
        key = repr(args)
        if key not in results:
            results[key] = function(*args)
        return results[key]

    return call


# ------------------------------------------------------------------------------------------------ counting bytes


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that tensors made under it keep alive: `now`, and `peak` since reset().

    Floating-point tensors become fake: they have no contents and take no memory. Integers and booleans stay real,
    and small, so that all that shapes depend on (which tokens are supervised, where an image lies) is known.
    Integers that depend on what is fake (sampled tokens) are zero; a fake number that is asked for is one.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if function is aten._local_scalar_dense.default and isinstance(inputs[0], FakeTensor):
            return 1.0
        if function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (
                args[0],
                [index if index is None else places(index) for index in args[1]],
                *args[2:],
            )
        if not any(isinstance(x, FakeTensor) or is_faked(x) for x in inputs):
            result = self.run(function, args, kwargs, known=bool(inputs))
        else:
            result = self.run_fake(function, args, kwargs)
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.count(x)
        return result

    def run(self, function, args, kwargs, known: bool):
        """An operation on integers, or one that makes a tensor of nothing (known=False)."""
        if not known and any(
            is_faked(x) for x in tree_leaves(self.run_fake(function, args, kwargs))
        ):
            return self.run_fake(function, args, kwargs)
        result = function(*args, **kwargs)
        return tree_map_only(
            Tensor, lambda x: self.fake.from_tensor(x) if is_faked(x) else x, result
        )

    def run_fake(self, function, args, kwargs):
        """An operation of which an input is fake: the shapes of its results."""
        with self.fake:
            result = function(*args, **kwargs)
        return tree_map_only(
            FakeTensor, lambda x: x if is_faked(x) else torch.zeros(x.shape, dtype=x.dtype), result
        )

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return

        def freed(_) -> None:
            del self.alive[key]
            self.now -= size

        self.alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

    def reset(self) -> int:
        """Forget the peak so far; returns what is alive."""
        self.peak = self.now
        return self.now


def is_faked(x) -> bool:
    """Whether a tensor is of a kind that has no contents here; float64 is for sums over ranks, which are real."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def places(index: Tensor) -> Tensor:
    """A boolean index as the numbers of its true elements, which a fake operation cannot count."""
    return index.nonzero().squeeze(1) if index.dtype == torch.bool and index.dim() == 1 else index


@contextmanager
def without_contents() -> Iterator[Ledger]:
    """A block in which tensors have no contents, and the Ledger that counts them."""
    caches = [value for value in vars(qwen).values() if hasattr(value, "cache_clear")]
    ledger = Ledger()
    with mock.patch.object(qwen, "HAS_ONEDNN", False, create=True):  # as on a card
        for function in caches:
            function.cache_clear()
        try:
            with ledger:
                yield ledger
        finally:  # no fake tensor may come back to one who computes
            for function in caches:
                function.cache_clear()


# ------------------------------------------------------------------------------------------------ what is worked on


@dataclass(frozen=True)
class Traffic:
    """What the samples are like."""

    prompt: int = 1200  # tokens, those of the picture included
    answer: int = 300  # tokens of an SFT target or of a completion of GRPO
    side: int = 756  # pixels: the largest square picture within the SFT default of --max-pixels; 0: no picture

    def prompt_row(self, config: qwen.Config, tokens: int | None = None) -> Row:
        """A prompt (of so many tokens), nothing of it supervised."""
        tokens, patches = tokens or self.prompt, self.side // config.vision.patch_size
        image_tokens = (patches // config.vision.spatial_merge_size) ** 2
        if image_tokens + 2 > tokens:
            raise ValueError(f"a prompt of {tokens} tokens cannot hold a picture of {image_tokens}")
        ids = torch.full((tokens,), 5)
        ids[1 : 1 + image_tokens] = config.image_token_id
        positions = torch.arange(tokens).expand(3, -1)
        inputs = 3 * config.vision.temporal_patch_size * config.vision.patch_size**2
        grids = ((1, patches, patches),) if patches else ()
        nothing = torch.zeros(tokens, dtype=torch.bool)
        return Row(
            ids, positions, (Segment(0, tokens),), nothing, torch.zeros(patches**2, inputs), grids
        )

    def sft_row(self, config: qwen.Config, cfg) -> Row:
        """A row of samples, as full as --pack-tokens allows."""
        samples = max(1, cfg.pack_tokens // min(self.prompt + self.answer, cfg.max_tokens))
        length = cfg.pack_tokens // samples
        row = self.prompt_row(config, length)
        row = replace(row, supervised=torch.arange(length) >= length - self.answer)
        return row.join(*[row] * (samples - 1))

    def grpo_row(self, config: qwen.Config, cfg) -> Row:
        """A row of prompts, each with its G completions, as full as --pack-tokens allows."""
        prompts = max(1, round(cfg.pack_tokens / (self.prompt + cfg.group * self.answer)))
        length = (cfg.pack_tokens // prompts - self.prompt) // cfg.group
        row = self.prompt_row(config).extend([[5] * length] * cfg.group)
        return row.join(*[row] * (prompts - 1))


# ------------------------------------------------------------------------------------------------ training


def sft_loss(model: qwen.QwenVL, row: Row, cfg, compute: torch.dtype) -> Tensor:
    return sft.sft_loss(model, row, compute)


def grpo_loss(model: qwen.QwenVL, row: Row, cfg, compute: torch.dtype) -> Tensor:
    with sft.compute_in(compute, model):
        logprobs, _ = model(row, cfg.temperature, BANNED)
    return grpo.policy_loss(logprobs, logprobs.detach(), torch.ones_like(logprobs), cfg.clip)[0]


# The row and the loss of each stage that trains.
TRAINING = {"sft": (Traffic.sft_row, sft_loss), "grpo": (Traffic.grpo_row, grpo_loss)}


def build(
    config: qwen.Config, cfg, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> qwen.QwenVL:
    """The model as load_for_training leaves it: what is frozen, and whether activations are recomputed."""
    model = weights(config, dtype, device)
    sft.freeze(model, cfg.freeze)
    model.checkpointing = model.visual.checkpointing = cfg.checkpointing
    return model


def weights(config: qwen.Config, dtype: torch.dtype, device: str = "cpu") -> qwen.QwenVL:
    """A model made in the dtype: fake weights cannot be converted."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return qwen.QwenVL(config)
    finally:
        torch.set_default_dtype(usual)


@remembered
def whole_update(
    stage: str, config: qwen.Config, cfg, traffic: Traffic, compute: torch.dtype
) -> dict[str, int]:
    """Bytes of a step of one rank from its second row on, when all gradients and moments are there: resident (with
    float32 weights), and work, which is the row's activations, the head, and what clipping and AdamW take."""
    row_of, loss_of = TRAINING[stage]
    with without_contents() as ledger:
        model = build(config, cfg)
        optimizer = sft.make_optimizer(model, 1e-6, cfg.weight_decay)
        trained = optimizer.param_groups[0]["params"]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments
        row = row_of(traffic, config, cfg)
        gc.collect()
        resident = ledger.reset()

        sft.backward(loss_of(model, row, cfg, compute), ALONE)
        sft.optimizer_step(optimizer, 1e-6, cfg.max_norm)
        return {"resident": resident, "work": ledger.peak - resident}


@remembered
def sharded_row(
    stage: str, config: qwen.Config, cfg, traffic: Traffic, compute: torch.dtype
) -> int:
    """Bytes that forward and backward of one row take beside the weights, in the compute type of sharded blocks:
    activations, the head, the gradients of the root group and of one block at a time."""
    row_of, loss_of = TRAINING[stage]
    with without_contents() as ledger:
        model = build(config, cfg, compute)
        model.sharded = True
        for block in blocks(model):
            for parameter in block.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(drop_gradient)
        row = row_of(traffic, config, cfg)
        gc.collect()
        before = ledger.reset()
        loss_of(model, row, cfg, compute).backward()
        return ledger.peak - before


def drop_gradient(parameter: Tensor) -> None:
    """What FSDP2 does with a block's gradient once it is reduced."""
    parameter.grad = None


def blocks(model: qwen.QwenVL) -> list:
    """The modules that model.shard() shards each for itself; what is left is the root group."""
    return [*model.visual.blocks, *model.model.layers]


def sharded_update(
    stage: str, config: qwen.Config, cfg, traffic: Traffic, compute: torch.dtype, world: int
) -> dict[str, int]:
    """Bytes of a step of one of `world` ranks under FSDP2.

    Sharded: float32 weights, gradients and two moments. Whole, in the compute type: the root group from the forward
    to the end of the step, and three blocks (the one at work, the next, which is gathered ahead, and the buffer that
    it is gathered into). Reduced in float32: the gradients of two blocks while the backward pass runs and, when the
    activations are gone, those of the root group.
    """
    model = build(config, cfg, device="meta")
    resident = -(-optimizer_bytes(model) // world)
    root = sizes(model) - sum(sizes(block) for block in blocks(model))
    trained_root = sizes(model, True) - sum(sizes(block, True) for block in blocks(model))
    gathered = compute.itemsize * (root + 3 * max(sizes(block) for block in blocks(model)))
    backward = sharded_row(stage, config, cfg, traffic, compute)
    backward += 2 * 4 * max(sizes(block, True) for block in blocks(model))
    end = (compute.itemsize + 4) * trained_root
    return {"resident": resident, "work": gathered + max(backward, end)}


def sizes(module: torch.nn.Module, trained: bool = False) -> int:
    """Numbers in the module's parameters, or in those of them that train."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def optimizer_bytes(model: qwen.QwenVL, gradients: bool = True) -> int:
    """Bytes of float32 weights and, for what trains, two moments and gradients."""
    return 4 * sizes(model) + (12 if gradients else 8) * sizes(model, True)


def update(
    stage: str, config: qwen.Config, cfg, traffic: Traffic, world: int, compute=torch.bfloat16
) -> dict:
    """Bytes of an optimizer step on each of `world` ranks: resident (weights, gradients, moments) and work."""
    if world > 1:
        return sharded_update(stage, config, cfg, traffic, compute, world)
    return whole_update(stage, config, cfg, traffic, compute)


# ------------------------------------------------------------------------------------------------ sampling


def cache_bytes(
    config: qwen.Config, prompts: int, longest: int, branches: int, new: int, dtype: torch.dtype
) -> int:
    """Bytes of keys and values: prompts padded to the longest, and what the branches may write."""
    token = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    )
    return token * (prompts * longest + branches * new)


@remembered
def sampling_work(
    config: qwen.Config,
    traffic: Traffic,
    prompts: int,
    n: int,
    temperature: float,
    top_p: float,
    dtype: torch.dtype,
) -> tuple[int, int]:
    """Bytes that sampling takes beside weights and caches, with so many prompts: until the first tokens are drawn,
    and in the step after that."""
    with without_contents() as ledger:
        model, row = weights(config, dtype), traffic.prompt_row(config)
        before, peaks = ledger.reset(), []

        def watch(tokens) -> None:
            peaks.append(ledger.peak - before)
            ledger.reset()

        how = {"banned": BANNED, "max_branches": prompts * n, "watch": watch}
        for _ in qwen.generate(model, enumerate([row] * prompts), n, 2, temperature, top_p, **how):
            pass
    first = cache_bytes(config, prompts, traffic.prompt, 0, 0, dtype)
    return peaks[0] - first, peaks[1] - first - cache_bytes(config, 0, 0, prompts * n, 2, dtype)


def rollout(
    config: qwen.Config,
    cfg,
    traffic: Traffic,
    n: int,
    longest: int,
    resident: int = 0,
    dtype=torch.bfloat16,
) -> dict[str, int]:
    """Bytes while sampling n completions a prompt.

    fixed: what was there before, and the weights to sample from; prefill, decode: beside the caches, while prompts
    are encoded, and in a step; prompts: their caches; caches: those at the worst case, with all that the branches
    may write; least: the caches of the least that has to run, one prompt of `longest` tokens with its branches.
    """
    fixed = resident + dtype.itemsize * sizes(weights(config, dtype, "meta"))
    prompts = max(1, cfg.max_branches // n)
    together, how = math.ceil(PREFILL / traffic.prompt), (n, cfg.temperature, cfg.top_p, dtype)
    prefill, _ = sampling_work(config, traffic, min(prompts, together), *how)
    _, decode = sampling_work(
        config, Traffic(prompt=16, side=0), prompts, *how
    )  # all branches of short prompts
    return {
        "fixed": fixed,
        "prefill": prefill,
        "decode": decode,
        "prompts": cache_bytes(config, prompts, traffic.prompt, 0, 0, dtype),
        "caches": cache_bytes(
            config, prompts, traffic.prompt, prompts * n, cfg.max_new_tokens, dtype
        ),
        "least": cache_bytes(config, 1, longest, n, cfg.max_new_tokens, dtype),
    }


# ------------------------------------------------------------------------------------------------ the table


TYPICAL = Traffic()
STAGES = ("sft", "augment", "grpo rollout", "grpo update", "evaluate")
PLACES = (("80 GB", 1), ("80 GB", 4), ("80 GB", 8), ("24 GB", 1))  # kind of card, how many


@dataclass(frozen=True)
class Cell:
    """What a stage needs on a kind of card, in GiB, and what to do if that does not fit."""

    model: str
    stage: str
    card: str
    ranks: int
    peak: float
    wanted: float  # the same, with all caches at their worst case
    parts: dict[str, float]
    fits: bool
    advice: str = ""


def cell_name(model: str, stage: str, card: str, ranks: int) -> str:
    """What --only looks into: "3B grpo update, 8 x 80 GB"."""
    return f"{model} {stage}, {ranks} x {card}"


def training_cell(name: str, stage: str, card: str, ranks: int) -> Cell:
    """SFT, or the update of GRPO."""
    kind, room = stage.split()[0], CARDS[card] - RESERVE["training"]
    cfg = {"sft": sft.Config, "grpo": grpo.Config}[kind]()

    def parts(world: int, **flags) -> dict[str, float]:
        found = update(kind, MODELS[name], replace(cfg, **flags), TYPICAL, world)
        return {key: value / GIB for key, value in found.items()}

    def advice() -> str:
        """The first of these that fits: shorter rows, more ranks."""
        least = cfg.max_tokens if kind == "sft" else cfg.max_prompt_tokens + cfg.max_new_tokens
        tokens = cfg.pack_tokens // 2
        while tokens >= least and parts(ranks)["resident"] < room:
            if sum(parts(ranks, pack_tokens=tokens).values()) <= room:
                return f"--pack-tokens {tokens}"
            tokens //= 2
        enough = [world for world in (2, 4, 8, 16, 32) if sum(parts(world).values()) <= room]
        return (
            f"torchrun --nproc-per-node {enough[0]}"
            if enough
            else "more ranks, on several machines"
        )

    found = parts(ranks)
    peak = sum(found.values())
    return Cell(
        name, stage, card, ranks, peak, peak, found, peak <= room, "" if peak <= room else advice()
    )


def sampling_cell(name: str, stage: str, card: str, ranks: int) -> Cell:
    """A stage that samples. Its caches take what they can use of model.CACHE_SHARE of the memory that is free before,
    but always hold one prompt; the work comes on top: prompts are encoded while the caches of others are full."""
    config = MODELS[name]
    cfg = {"augment": augment.Config, "grpo rollout": grpo.Config, "evaluate": evaluate.Config}[
        stage
    ]()
    n, resident = 1, 0
    if stage == "augment":
        n = cfg.samples
    if stage == "grpo rollout":
        n, resident = (
            cfg.group,
            optimizer_bytes(build(config, cfg, device="meta"), gradients=False) // ranks,
        )
    longest = getattr(cfg, "max_prompt_tokens", 3072)

    def parts(branches: int) -> dict[str, float]:
        found = rollout(config, replace(cfg, max_branches=branches), TYPICAL, n, longest, resident)
        found = {key: value / GIB for key, value in found.items()}
        free = CARDS[card] - CONTEXT - found["fixed"]
        held = max(min(found["caches"], qwen.CACHE_SHARE * free), found["least"])
        work = found["fixed"] + max(found["prefill"], found["decode"])
        return found | {"peak": work + held, "wanted": work + found["caches"]}

    def advice() -> str:
        branches = cfg.max_branches // 2
        while branches >= n and found["fixed"] < room:
            if parts(branches)["peak"] <= room:
                return f"--max-branches {branches}"
            branches //= 2
        return "more ranks, or larger cards" if resident else "a larger card"

    found, room = parts(cfg.max_branches), CARDS[card] - RESERVE["sampling"]
    peak, wanted = found.pop("peak"), found.pop("wanted")
    return Cell(
        name,
        stage,
        card,
        ranks,
        peak,
        wanted,
        found,
        peak <= room,
        "" if peak <= room else advice(),
    )


def cells(only: list[str]) -> Iterator[Cell]:
    """The table's cells whose names hold all words of `only`; 24 GB is for inference only."""
    for name in MODELS:
        for stage in STAGES:
            for card, ranks in PLACES:
                make = training_cell if stage in ("sft", "grpo update") else sampling_cell
                wanted = all(word in cell_name(name, stage, card, ranks) for word in only)
                if wanted and (card != "24 GB" or stage in ("augment", "evaluate")):
                    yield make(name, stage, card, ranks)


def shown(cell: Cell | None) -> str:
    """A cell's text: the peak, in brackets what the caches would take at most, bold if it does not fit."""
    if cell is None:
        return "-"
    text = f"{cell.peak:.1f}" + (f" ({cell.wanted:.0f})" if cell.wanted > cell.peak else "")
    return text if cell.fits else f"**{text}**"


def report(found: list[Cell]) -> str:
    """The table in Markdown, and a line for every cell that does not fit."""
    by = {(c.model, c.card, c.ranks, c.stage): c for c in found}
    lines = ["| model, cards | " + " | ".join(STAGES) + " |", "| --- |" + " --: |" * len(STAGES)]
    for model in MODELS:
        for card, ranks in PLACES:
            row = [by.get((model, card, ranks, stage)) for stage in STAGES]
            if any(row):
                lines.append(f"| {model}, {ranks} x {card} | " + " | ".join(map(shown, row)) + " |")
    sizes = " or ".join(f"{size} ({kind})" for kind, size in CARDS.items())
    lines += ["", f"GiB a card, which has {sizes}; {RESERVE['training']:g} of them stay free in training, and "
              f"{RESERVE['sampling']:g} in sampling. In brackets: if the caches were not limited to what is free. "
              "Bold: does not fit."]  # fmt: skip
    for cell in found:
        if not cell.fits:
            name = cell_name(cell.model, cell.stage, cell.card, cell.ranks)
            lines.append(f"- {name}: {cell.peak:.1f} GiB; {cell.advice}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="*", default=[], help="words that a cell's name holds, as in: 3B grpo 1 x"
    )
    parser.add_argument("--json", help="write all parts of every cell to this file")
    flags = parser.parse_args()
    found = list(cells(flags.only))
    if not found:
        parser.error(
            f"no cell is called {' '.join(flags.only)}; a name is, for example: 3B grpo update, 8 x 80 GB"
        )
    print(report(found))
    if flags.json:
        text = json.dumps([vars(cell) for cell in found], indent=1)
        Path(flags.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
