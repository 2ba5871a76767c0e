"""The peak memory of every stage, known before a card is rented: from tensors without contents, at
the real sizes.

In:  the default flags of the stages and the sizes of the 3B and the 7B model; no weights, no card.
Out: a table of GiB on each card, for one card and several, and what fits.

Forward and backward passes and `generate` run as the code stands, in bfloat16, with weights that have
a shape and no contents (FakeTensorMode), while a Ledger counts the bytes that are alive. Arithmetic
adds what such a run cannot show:
- weights, gradients and AdamW's moments: 16 bytes for a parameter that trains, 4 for a frozen one;
- several ranks (FSDP2): these bytes / ranks, and what is whole for a time (see `update`);
- sampling: the cache, at its worst case or as far as the sampler's share of free memory allows.
Not in it: what the kernels of a card take for themselves, and that CUDA's autocast computes norms in
float32.

    python tests/memory.py      # some two minutes
"""

import gc
import math
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as qwen
import sft
from augment import AugmentFlags
from evaluate import EvaluateFlags
from grpo import GRPOFlags
from model import Config, QwenVL, Row, Segment, VisionConfig
from sft import SFTFlags

# The published configurations.
MROPE, IMAGE = (16, 24, 24), 151655
MODELS = {
    "3B": Config(151936, 2048, 11008, 36, 16, 2, MROPE, True, IMAGE, VisionConfig(1280, 2048)),
    "7B": Config(152064, 3584, 18944, 28, 28, 4, MROPE, False, IMAGE, VisionConfig(1280, 3584)),
}
GIB = 2**30
CARDS = {"80 GB": 79.1, "24 GB": 22.0}  # GiB that such cards report, the smallest of their kinds
CONTEXT = 1.0  # GiB of a card that CUDA and NCCL take
RESERVE = {True: 4.0, False: 2.0}  # GiB that stay free, training or not: CONTEXT, allocator's gaps
COMPUTE = torch.bfloat16
BANNED = (0, 1, 2)  # ids that are never sampled; how many there are hardly matters


# ------------------------------------------------------------------------------ counting bytes


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are alive: `now`, and `peak` since reset."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.alive:
                storage = x.untyped_storage()
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def free(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.now -= size

    def reset(self) -> int:
        """Forget the peak so far; returns what is alive."""
        gc.collect()
        self.peak = self.now
        return self.now


@contextmanager
def card() -> Iterator[Ledger]:
    """A block in which fake tensors pass for those of a card, and the Ledger that counts. A number
    that the host asks for is zero. Tensors of the host stay real: shapes depend on them."""
    zeros = lambda x: torch.zeros(x.shape).tolist()
    with mock.patch.multiple(FakeTensor, is_cuda=True, tolist=zeros, create=True):
        with Ledger() as ledger:
            yield ledger


def outline(config: Config, freeze: tuple[str, ...] = ()) -> QwenVL:
    """The model as shapes only, with what is frozen."""
    with torch.device("meta"):
        model = QwenVL(config)
    sft.freeze(model, freeze)
    return model


def build(config: Config, dtype: torch.dtype, freeze: tuple[str, ...] = ()) -> QwenVL:
    """The model with weights that have no contents."""
    model = outline(config, freeze).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return model.to_empty(device="cpu")


def sizes(module: torch.nn.Module, trained: bool = False) -> int:
    """Numbers in the module's parameters, or in those of them that train."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


# ------------------------------------------------------------------------------ what is worked on


@dataclass(frozen=True)
class Traffic:
    """What the samples are like."""

    prompt: int = 1200  # tokens, those of the picture included
    answer: int = 300  # tokens of an SFT target, or of a completion
    side: int = 756  # pixels of the square picture (SFT's default of --max-pixels); 0: none


TYPICAL = Traffic()


def prompt_row(config: Config, traffic: Traffic, tokens: int = 0) -> Row:
    """A prompt (of so many tokens), nothing of it supervised."""
    tokens, patches = tokens or traffic.prompt, traffic.side // config.vision.patch_size
    ids = torch.full((tokens,), 5)
    ids[1 : 1 + (patches // config.vision.spatial_merge_size) ** 2] = config.image_token_id
    grids = ((1, patches, patches),) if patches else ()
    nothing, pixels = torch.zeros(tokens, dtype=torch.bool), torch.zeros(patches**2, 1176)
    positions = torch.arange(tokens).expand(3, -1)
    return Row(ids, positions, (Segment(0, tokens),), nothing, pixels, grids)


def packed_row(config: Config, traffic: Traffic, flags) -> Row:
    """What the stage packs into one forward pass, as full as --pack-tokens allows: samples side by
    side, or prompts, each with its G completions."""
    group = getattr(flags, "group", 1)
    parts = max(1, round(flags.pack_tokens / (traffic.prompt + group * traffic.answer)))
    length = flags.pack_tokens // parts
    if isinstance(flags, GRPOFlags):
        answer = (length - traffic.prompt) // group
        row = prompt_row(config, traffic).extend([[5] * answer] * group)
    else:
        row = prompt_row(config, traffic, length)
        row = replace(row, supervised=torch.arange(length) >= length - traffic.answer)
    return Row.join(*[row] * parts)


# ------------------------------------------------------------------------------ training


@cache
def row_work(config: Config, traffic: Traffic, flags, sharded: bool) -> int:
    """Bytes that forward and backward of a row take beside float32 weights, gradients and moments;
    sharded: beside the weights in the compute type, whose gradients are gone with their block."""
    with card() as ledger:
        model = build(config, COMPUTE if sharded else torch.float32, flags.freeze)
        model.checkpointing = model.visual.checkpointing = flags.checkpointing
        model.compute, model.sharded = COMPUTE, sharded
        drop = lambda parameter: setattr(parameter, "grad", None)  # FSDP2 has reduced it
        for parameter in (p for p in model.parameters() if p.requires_grad):
            if sharded:
                parameter.register_post_accumulate_grad_hook(drop)
            else:
                parameter.grad = torch.zeros_like(parameter)
        row = packed_row(config, traffic, flags)
        before = ledger.reset()
        logprobs, _ = model(row, getattr(flags, "temperature", 1.0), BANNED)
        (-logprobs.sum()).backward()
        return ledger.peak - before


def update(config: Config, traffic: Traffic, flags, world: int) -> tuple[int, int]:
    """Bytes of an optimizer step on each of `world` ranks: resident (weights, gradients, moments),
    and work. FSDP2 has whole, in the compute type: the root group, and three blocks (the one at work,
    the next, and the buffer that it is gathered into). Reduced in float32: the gradients of two blocks
    while the backward pass runs and, when the activations are gone, those of the root group."""
    flags = replace(flags, freeze=tuple(flags.freeze), data=(), validation=())  # to be hashed
    model = outline(config, flags.freeze)
    resident = -(-(4 * sizes(model) + 12 * sizes(model, trained=True)) // world)
    work = row_work(config, traffic, flags, sharded=world > 1)
    if world > 1:
        blocks = [*model.visual.blocks, *model.model.layers]
        root = sizes(model) - sum(map(sizes, blocks))
        trained_blocks = [sizes(block, trained=True) for block in blocks]
        trained_root = sizes(model, trained=True) - sum(trained_blocks)
        backward = work + 2 * 4 * max(trained_blocks)
        end = (COMPUTE.itemsize + 4) * trained_root
        work = COMPUTE.itemsize * (root + 3 * max(map(sizes, blocks))) + max(backward, end)
    return resident, work


# ------------------------------------------------------------------------------ sampling


def cache_bytes(config: Config, branches: int, tokens: int) -> int:
    """Bytes of the keys and values of so many branches of so many tokens."""
    of_a_layer = 2 * config.num_key_value_heads * config.head_dim * COMPUTE.itemsize
    slot = (tokens // qwen.CACHE_STEP + 1) * qwen.CACHE_STEP
    return branches * slot * of_a_layer * config.num_hidden_layers


@cache
def sampling_work(
    config: Config, traffic: Traffic, prompts: int, n: int, temperature: float, top_p: float
) -> tuple[int, int]:
    """Bytes that sampling takes beside weights, the head in float32 and the cache, with so many prompts:
    until the first tokens are drawn, and in the step after that."""
    with card() as ledger:
        model, row = build(config, COMPUTE), prompt_row(config, traffic)
        before, peaks = ledger.reset(), []

        def watch(tokens) -> None:
            peaks.append(ledger.peak - before)
            ledger.reset()

        how = dict(banned=BANNED, max_branches=prompts * n, watch=watch)
        rows = enumerate([row] * prompts)
        for _ in qwen.generate(model, rows, n, 2, temperature, top_p, **how):
            pass
    known = 4 * model.head.numel() + cache_bytes(config, prompts * n, traffic.prompt)
    return peaks[0] - known, peaks[1] - known


def rollout(config: Config, traffic: Traffic, flags, n: int) -> dict[str, int]:
    """Bytes while sampling n completions a prompt: weights, with the head once more in float32; work of
    prefill and decode beside the cache; the cache after the prefill, and with all that the branches may
    write; and the least cache: of the branches of one prompt, the longest."""
    model, prompts = outline(config), max(1, flags.max_branches // n)
    how = n, flags.temperature, flags.top_p
    together = min(prompts, math.ceil(qwen.PREFILL_TOKENS / traffic.prompt))
    short = Traffic(prompt=16, side=0)  # all branches, over prompts that hardly take a place
    own, longest = flags.max_new_tokens, getattr(flags, "max_prompt_tokens", 3072)
    return {
        "weights": COMPUTE.itemsize * sizes(model) + 4 * model.head.numel(),
        "prefill": sampling_work(config, traffic, together, *how)[0],
        "decode": sampling_work(config, short, prompts, *how)[1],
        "prompts": cache_bytes(config, prompts * n, traffic.prompt),
        "cache": cache_bytes(config, prompts * n, traffic.prompt + own),
        "least": cache_bytes(config, n, longest + own),
    }


# ------------------------------------------------------------------------------ the table

STAGES = {"sft": SFTFlags, "augment": AugmentFlags, "grpo rollout": GRPOFlags}
STAGES |= {"grpo update": GRPOFlags, "evaluate": EvaluateFlags}
PLACES = (("80 GB", 1), ("80 GB", 2), ("80 GB", 4), ("80 GB", 8), ("24 GB", 1))
# What the README recommends for several large cards.
FASTER = dict(checkpointing=False, pack_tokens=8192), ", `--no-checkpointing --pack-tokens 8192`"


def sampling(config: Config, flags, training: float, card_size: float) -> tuple[float, float]:
    """Peak in GiB, and the same with the cache at its worst case. It takes up to model.CACHE_SHARE of
    the memory that is free before, but always holds one prompt. Work comes on top; when branches are
    dropped a layer of the cache is there three times. training: its GiB."""
    n = getattr(flags, "group", getattr(flags, "samples", 1))
    found = {name: size / GIB for name, size in rollout(config, TYPICAL, flags, n).items()}
    fixed = training + found["weights"]
    share = qwen.CACHE_SHARE * (card_size - CONTEXT - fixed)
    held = max(min(found["cache"], share), found["least"])
    dropping = 2 * held / config.num_hidden_layers
    work = max(found["prefill"], found["decode"], dropping)
    return fixed + work + held, fixed + work + max(held, found["cache"])


def cell(config: Config, stage: str, card_name: str, ranks: int, more: dict) -> str:
    """The peak in GiB, in brackets what the cache would take at most, bold if it does not fit; a
    small card is for inference only, and `more` flags are for training."""
    trains, card_size = stage in ("sft", "grpo update"), CARDS[card_name]
    if card_name == "24 GB" and stage not in ("augment", "evaluate") or more and not trains:
        return "-"
    flags = STAGES[stage](**more)
    if trains:
        peak = wanted = sum(update(config, TYPICAL, flags, ranks)) / GIB
    else:
        # During a rollout there are no gradients: float32 weights and two moments.
        training = 12 * sizes(outline(config)) / ranks / GIB if stage == "grpo rollout" else 0.0
        peak, wanted = sampling(config, flags, training, card_size)
    text = f"{peak:.1f}" + f" ({wanted:.0f})" * (wanted > peak)
    return text if peak <= card_size - RESERVE[trains] else f"**{text}**"


def table() -> Iterator[str]:
    """The lines of the table."""
    yield "| model, cards | " + " | ".join(STAGES) + " |"
    yield "| --- |" + " --: |" * len(STAGES)
    for name, config in MODELS.items():
        places = [(*place, {}, "") for place in PLACES] + [("80 GB", 8, *FASTER)]
        for card_name, ranks, more, text in places:
            cells = [cell(config, stage, card_name, ranks, more) for stage in STAGES]
            yield f"| {name}, {ranks} x {card_name}{text} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    for line in table():
        print(line, flush=True)
