"""Qwen2.5-VL in plain PyTorch: architecture, log-probabilities, generation, checkpoints, ranks.

In:  a Hugging Face checkpoint (directory or hub id), and rows of tokens and images (data.Row).
Out: log-probabilities of supervised tokens (training), completions (generation), a checkpoint.

Every forward pass runs over one flat row of tokens, with no batch dimension and no padding. The row
is cut into segments. A segment attends causally to itself and, if it has a prefix, to all of the
segment that is its prefix. A `row` has what data.Row has: ids [T], positions [3, T], segments,
supervised [T], pixels [P, 1176], grids (images only, so their time is 1), and join(*rows). It lies
on the CPU, and what depends on its content is worked out there: the host waits for the device to
copy what a forward pass needs, a fixed number of times: before the layers, or in the first of them.

T  tokens of a row          D  hidden size           N  prompts that are being answered
S  supervised tokens        H  heads                 B  branches: completions being generated
P  patches of images        K  key-value heads       R  rows of a cache: one per prompt or branch
V  vocabulary               d  size of a head        C  capacity of a cache, tokens per row

    python -c "import model as m; print(m.outline(m.locate('Qwen/Qwen2.5-VL-3B-Instruct')))"
"""

import atexit
import hashlib
import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from torch.utils.checkpoint import checkpoint


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or computed with; the message says where."""


# ---------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. The published 3B config leaves most fields to these defaults."""

    hidden_size: int
    out_hidden_size: int
    depth: int = 32
    num_heads: int = 16
    intermediate_size: int = 3420
    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2  # patches along the edge of a cell, which becomes one image token
    window_size: int = 112  # pixels
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)


@dataclass(frozen=True)
class Config:
    """Qwen2.5-VL, from any of the three layouts of config.json that are in the wild."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    mrope_section: tuple[int, ...]
    tie_word_embeddings: bool
    image_token_id: int
    vision: VisionConfig
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 128000  # tokens

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, raw: dict) -> "Config":
        """raw: config.json, flat as published, nested, or nested with rope_parameters."""
        nested = raw.get("text_config") or {}
        text = {**raw, **nested}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        found = (
            raw.get("model_type"),
            text.get("hidden_act", "silu"),
            bool(text.get("use_sliding_window")),
            rope.get("rope_type", rope.get("type", "default")),
        )
        known = ("qwen2_5_vl", "silu", False)
        if found not in [(*known, "default"), (*known, "mrope")]:
            names = "model type, activation, sliding window, rope type"
            raise CheckpointError(f"config.json: {names}: {found}, want {known}, default or mrope")
        tied = raw.get("tie_word_embeddings") or nested.get("tie_word_embeddings")
        vision = build_config(VisionConfig, raw.get("vision_config") or {})
        derived = {**rope, "tie_word_embeddings": bool(tied), "vision": vision}
        config = build_config(cls, {**text, **derived})
        sections, size = config.mrope_section, config.head_dim
        if sum(sections) * 2 != size:
            raise CheckpointError(f"config.json: mrope_section {sections}, head size {size}")
        return config


def build_config(kind: type, values: dict):
    """The dataclass `kind` from those of the values it has fields for."""
    names = [field.name for field in fields(kind) if field.name in values]
    return kind(**{name: values[name] for name in names})


# -------------------------------------------------------------------------------------- attention


def has_varlen(x: Tensor) -> bool:
    """Whether torch has variable-length attention for x: on CUDA, in half precision."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def boundaries(lengths: list[int], device) -> Tensor:
    """[0, l_0, l_0 + l_1, ...], int32: where each sequence of a packed tensor begins and ends."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)


class Run(NamedTuple):
    """Equal neighbours among a row's segments, which one batched call serves: all of one length and
    one prefix. A segment that others extend is a run of its own."""

    first: int  # number of its first segment
    count: int  # segments
    length: int  # tokens of each
    prefix: int | None  # number of the segment that they extend
    mask: Tensor | None  # with a prefix, which keys each query sees [length, prefix's + length]


class KeyLayout(NamedTuple):
    """The keys of all segments one after the other, as variable-length attention takes them."""

    tokens: Tensor | None  # [all keys] the row's token of each; None: they are the row's
    arguments: dict  # of varlen_attn: where queries and keys of each segment end, the longest


class PackedAttention:
    """Attention over one packed row of segments, each of which sees itself and its prefix.

    lengths: tokens of every segment.
    prefixes: for each segment the index of the earlier one that it extends, or None; a prefix
        extends none. Only in causal attention.
    causal: a token sees itself and what stands before it; without, all of its segment (the tower).

    A call takes q [T, H, d], k and v [T, K, d] and returns [T, H, d]. A prompt p of 4 tokens with
    completions a, b, c of 2, 2 and 3 is lengths [4, 2, 2, 3] and prefixes [None, 0, 0, 0]. Each
    segment attends to its prefix and itself; its last query sees the last key:

        queries     p p p p     a a           b b           c c c
        keys        p p p p     p p p p a a   p p p p b b   p p p p c c c

    On CUDA in half precision that is one call for the whole row. Elsewhere it is one for each run
    of equal segments: p; a and b together; c.
    """

    def __init__(self, lengths: list[int], prefixes: list[int | None], causal: bool, device):
        self.lengths, self.prefixes = lengths, prefixes
        self.causal, self.device = causal, device

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int = 0) -> Tensor:
        if has_varlen(q):
            return self._in_one_call(q, k, v)
        return self._run_by_run(q, k, v)

    @cached_property
    def _keys(self) -> KeyLayout:
        tokens = torch.arange(sum(self.lengths)).split(self.lengths)
        keys = list(tokens)
        for i, prefix in enumerate(self.prefixes):
            if prefix is not None:
                keys[i] = torch.cat([tokens[prefix], tokens[i]])
        key_lengths = [len(seen) for seen in keys]
        sizes = {"max_q": max(self.lengths), "max_k": max(key_lengths)}
        sizes["cu_seq_q"] = boundaries(self.lengths, self.device)
        sizes["cu_seq_k"] = boundaries(key_lengths, self.device)
        if key_lengths == self.lengths:
            return KeyLayout(None, sizes)
        return KeyLayout(torch.cat(keys).to(self.device), sizes)

    def _in_one_call(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = self._keys
        if keys.tokens is not None:
            # In float32: so the backward pass adds up in float32 the gradients that all completions
            # send to a token of their prompt.
            k, v = (x.float().index_select(0, keys.tokens).to(x.dtype) for x in (k, v))
        window = (-1, 0) if self.causal else (-1, -1)  # (-1, 0) is causal, aligned to the last key
        return varlen_attn(q, k, v, **keys.arguments, window_size=window, enable_gqa=True)

    @cached_property
    def _runs(self) -> list[Run]:
        extended = set(self.prefixes)

        def kind(i: int) -> tuple:
            return self.lengths[i], self.prefixes[i], i if i in extended else None

        runs = []
        for (length, prefix, _), members in groupby(range(len(self.lengths)), kind):
            first, *others = members
            mask = None
            if prefix is not None:
                seen = self.lengths[prefix]
                mask = torch.ones(length, seen + length, dtype=torch.bool, device=self.device)
                mask = mask.tril(seen)
            runs.append(Run(first, 1 + len(others), length, prefix, mask))
        return runs

    def _run_by_run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = [run.count * run.length for run in self._runs]
        parts = zip(q.split(tokens), k.split(tokens), v.split(tokens))
        keys_values = {}  # of every run, by its first segment: each [count, K, length, d]
        outputs = []
        for run, qkv in zip(self._runs, parts):
            q, k, v = (x.unflatten(0, (run.count, -1)).transpose(1, 2) for x in qkv)
            keys_values[run.first] = k, v
            if run.prefix is not None:
                # The prefix's keys and values stand before those of every segment.
                prefix_k, prefix_v = keys_values[run.prefix]
                k = torch.cat([prefix_k.expand(run.count, -1, -1, -1), k], dim=2)
                v = torch.cat([prefix_v.expand(run.count, -1, -1, -1), v], dim=2)
            causal = self.causal and run.prefix is None
            out = F.scaled_dot_product_attention(
                q, k, v, run.mask, is_causal=causal, enable_gqa=True
            )  # [count, H, length, d]
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)


def rotary_angles(coords: Tensor, size: int, theta: float) -> Tensor:
    """Coordinates [...] times theta^(-2i / size) for i < size / 2: [..., size / 2], float32."""
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=coords.device) / size
    return coords[..., None] * (1.0 / theta**exponents)


def rotation(angles: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, d] for `rotate`, of angles [T, d / 2]: (cos, cos) and (-sin, sin)."""
    cos, sin = angles.cos(), angles.sin()
    cos = torch.cat([cos, cos], dim=-1)
    sin = torch.cat([-sin, sin], dim=-1)
    return cos[:, None], sin[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, d], in float32: with the halves a and b of each head, the
    points (a_i, b_i) are turned by their angles, (a, b) -> (a cos - b sin, b cos + a sin)."""
    x32 = x.float()
    a, b = x32.chunk(2, dim=-1)
    turned = torch.addcmul(x32 * cos, torch.cat([b, a], dim=-1), sin)
    return turned.to(x.dtype)


# ----------------------------------------------------------------------------------------- layers


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the type of x, in and out: master weights are float32, activations half, and on
    CUDA autocast would leave the result in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, size: int, inner: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SelfAttention(nn.Module):
    """Grouped-query attention. `attend` decides what is seen: a packed row, or a cache."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.heads = [config.num_attention_heads, config.num_key_value_heads]  # H, K
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        """x [T, D] -> [T, D]."""
        q_and_k = torch.cat([self.q_proj(x), self.k_proj(x)], dim=-1)
        q_and_k = q_and_k.unflatten(-1, (-1, self.head_dim))  # [T, H + K, d]
        q, k = rotate(q_and_k, cos, sin).split(self.heads, dim=1)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, K, d]
        out = attend(q, k, v, self.index)  # [T, H, d]
        return self.o_proj(out.flatten(-2))


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3 * self.heads, -1))  # [P, 3 * heads, d]
        qk, v = qkv.split((2 * self.heads, self.heads), dim=1)
        q, k = rotate(qk, cos, sin).chunk(2, dim=1)
        return self.proj(attend(q, k, v).flatten(-2))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, 1e-6)
        self.attn = VisionAttention(config)
        self.norm2 = RMSNorm(config.hidden_size, 1e-6)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, attend)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """The patches of a cell [P, size] -> one image token [P / 4, D]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.cell = config.spatial_merge_size**2
        inner = config.hidden_size * self.cell
        self.ln_q = RMSNorm(config.hidden_size, 1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        cells = self.ln_q(x).unflatten(0, (-1, self.cell)).flatten(1)  # [P / 4, 4 * size]
        return self.mlp(cells)


class VisionTower(nn.Module):
    """Patches [P, 1176] of several images to image tokens [P / 4, D], in the order of the patches.

    The input holds an image cell by cell: 2 x 2 patches, which become one token. Most blocks attend
    within windows, and want the cells of a window side by side. An image of 4 x 6 patches, and the
    numbers of its cells; in windows of 2 x 2 cells (published: 4 x 4) the first holds 0 1 3 4:

         0  1 |  4  5 |  8  9
         2  3 |  6  7 | 10 11      cells  0 1 | 2      windows  0 1 3 4 | 2 5
        ------+-------+------             3 4 | 5
        12 13 | 16 17 | 20 21
        14 15 | 18 19 | 22 23
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        patch = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(3, config.hidden_size, patch, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)
        self.checkpointing = False

    def windows(self, grids: Sequence[tuple]) -> list[Tensor]:
        """The cells of every window [n, 3]: their numbers in the input, rows and columns. Within an
        image the windows come largest first, so that equal ones are neighbours."""
        windows, before = [], 0
        merge = self.config.spatial_merge_size
        edge = self.config.window_size // (self.config.patch_size * merge)  # of a window, in cells
        for frames, rows, columns in grids:
            if frames != 1 or rows % merge or columns % merge:
                grid = (frames, rows, columns)
                raise ValueError(f"image grid {grid}: want time 1, sides in multiples of {merge}")
            coords = torch.cartesian_prod(
                torch.arange(rows // merge), torch.arange(columns // merge)
            )  # [cells, 2]
            numbers = torch.arange(before, before + len(coords))
            before += len(coords)
            cells = torch.column_stack([numbers, coords]).unflatten(0, (rows // merge, -1))
            parts = []
            for band in cells.split(edge, dim=0):
                parts += [part.flatten(0, 1) for part in band.split(edge, dim=1)]
            windows += sorted(parts, key=len, reverse=True)
        return windows

    def forward(self, pixels: Tensor, grids: Sequence[tuple]) -> Tensor:
        """pixels [P, 1176], grids of (1, rows, columns) patches -> [P / 4, D]."""
        # 1. Put the cells of a window side by side.
        merge, device = self.config.spatial_merge_size, pixels.device
        windows = self.windows(grids)
        cells = torch.cat(windows)  # [P / 4, 3]
        order = cells[:, 0].to(device)
        pixels = pixels.unflatten(0, (-1, merge**2))  # [P / 4, 4, 1176]
        # 2. Embed the patches: a convolution whose kernel is as large as a patch is a linear map.
        weight = self.patch_embed.proj.weight.flatten(1)  # [size, 1176]
        x = F.linear(pixels[order].flatten(0, 1).to(weight.dtype), weight)  # [P, size]
        # 3. Half of every head turns with the patch's row, half with its column.
        corners = torch.cartesian_prod(torch.arange(merge), torch.arange(merge))  # of a cell [4, 2]
        coords = (cells[:, None, 1:] * merge + corners).flatten(0, 1)  # [P, 2]
        head_dim = self.config.hidden_size // self.config.num_heads
        angles = rotary_angles(coords.to(device), head_dim // 2, 10000.0)  # [P, 2, d / 4]
        cos, sin = rotation(angles.flatten(1))
        # 4. The blocks: attention within windows, in a few of them within whole images.
        lengths = [len(window) * merge**2 for window in windows]  # patches
        in_windows = PackedAttention(lengths, [None] * len(lengths), causal=False, device=device)
        lengths = [rows * columns for _, rows, columns in grids]
        in_images = PackedAttention(lengths, [None] * len(lengths), causal=False, device=device)
        for i, block in enumerate(self.blocks):
            attend = in_images if i in self.config.fullatt_block_indexes else in_windows
            x = run_layer(block, self.checkpointing, x, cos, sin, attend)
        # 5. Merge every cell into a token, and put the tokens back into the order of the input.
        tokens = self.merger(x)
        return torch.empty_like(tokens).index_copy(0, order, tokens)


def run_layer(layer: nn.Module, checkpointing: bool, *inputs) -> Tensor:
    """The layer's output; with checkpointing the backward pass recomputes its activations."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


# -------------------------------------------------------------------------------- the whole model


def scaled_logits(
    hidden: Tensor, head: Tensor, temperature: float, banned: tuple[int, ...]
) -> Tensor:
    """Logits [S, V] of hidden states [S, D], float32, over temperature, without banned ids."""
    logits = F.linear(hidden, head).float()
    if temperature != 1:
        logits = logits / temperature
    # -inf would make the entropy NaN. The ids are few, and no index has to travel to the device.
    for token in banned:
        logits[:, token] = -1e9
    return logits


def token_logprobs(
    hidden: Tensor, targets: Tensor, head: Tensor, temperature: float, banned: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets [S], and of all tokens [S, V]; float32."""
    logprobs = scaled_logits(hidden, head, temperature, banned).log_softmax(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), logprobs


class ChunkedLogprobs(torch.autograd.Function):
    """Log-probabilities [S] of targets [S], and entropies [S] (without gradient), float32.

    Logits exist for `chunk` tokens at a time, never as a whole [S, V]. Like torch.utils.checkpoint
    the backward pass computes every chunk again. Unlike it, it sums the chunks' gradients of the
    head in float32, whatever type the head is in.
    """

    @staticmethod
    def forward(ctx, hidden, targets, head, temperature, banned, chunk: int):
        """hidden [S, D], targets [S], head [V, D]."""
        ctx.save_for_backward(hidden, targets, head)
        ctx.temperature, ctx.banned, ctx.chunk = temperature, banned, chunk
        weight = head.to(hidden.dtype)
        logprobs, entropies = [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            chosen, every = token_logprobs(h, t, weight, temperature, banned)
            logprobs.append(chosen)
            entropies.append(-(every.exp() * every).sum(-1))
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        """grad [S], of the log-probabilities."""
        hidden, targets, head = ctx.saved_tensors
        head_trains = ctx.needs_input_grad[2]
        weight = head.detach().to(hidden.dtype).requires_grad_(head_trains)
        grad_head = torch.zeros_like(head, dtype=torch.float32) if head_trains else None
        grad_hidden = []
        chunks = zip(*(x.split(ctx.chunk) for x in (hidden, targets, grad)))
        for h, t, g in chunks:
            h = h.detach().requires_grad_()
            with torch.enable_grad():
                logprobs = token_logprobs(h, t, weight, ctx.temperature, ctx.banned)[0]
            logprobs.backward(g)
            grad_hidden.append(h.grad)
            if head_trains:
                # In pieces: a CPU first converts all of a tensor that it adds to another type.
                for first in range(0, len(head), 8192):
                    rows = slice(first, first + 8192)
                    grad_head[rows].add_(weight.grad[rows])
                weight.grad = None
        return torch.cat(grad_hidden), None, grad_head, None, None, None


class QwenVL(nn.Module):
    """Vision tower, decoder and head, with the published parameter names."""

    head_chunk = 128  # tokens whose logits exist at a time

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision)
        layers = [DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.model = nn.Module()  # the decoder
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpointing = False  # recompute activations in the backward pass
        self.sharded = False  # set by shard()

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.embed_tokens.weight.device

    @property
    def head(self) -> Tensor:
        """The output matrix [V, D]."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def forward(
        self, row, temperature: float = 1.0, banned: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [S], float32, of the row's supervised tokens in order.

        One function for SFT, old and new policy, Eq. (3) and (7).
        """
        # The token before a token predicts it; a completion's first token its prompt's last. (A
        # prompt's first token, which nothing predicts, is never supervised.)
        before = torch.arange(len(row.ids)) - 1  # [T]
        for start, _, prefix in row.segments:
            if prefix is not None:
                prompt = row.segments[prefix]
                before[start] = prompt.start + prompt.length - 1
        targets = row.supervised.nonzero().squeeze(1)  # [S]
        hidden = self.hidden(row).index_select(0, before[targets].to(self.device))  # [S, D]
        ids = row.ids[targets].to(self.device)
        return ChunkedLogprobs.apply(hidden, ids, self.head, temperature, banned, self.head_chunk)

    def logits(self, row) -> Tensor:
        """Logits [T, V] of every token: for tests and short rows only."""
        return F.linear(self.hidden(row), self.head)

    def hidden(self, row, attend: Callable | None = None) -> Tensor:
        """Final hidden states [T, D] of a packed row; `attend` replaces the row's own attention."""
        if attend is None:
            attend = row_attention(row, self.device)
        x = self.embed(row)
        cos, sin = self.rope(row.positions.to(self.device))
        for layer in self.model.layers:
            x = run_layer(layer, self.checkpointing, x, cos, sin, attend)
        return self.model.norm(x)

    def embed(self, row) -> Tensor:
        """Token embeddings [T, D], with the image tokens replaced by what the vision tower saw."""
        is_image = row.ids == self.config.image_token_id  # [T]
        image_tokens = is_image.nonzero().squeeze(1)
        patches = sum(math.prod(grid) for grid in row.grids)
        features = patches // self.config.vision.spatial_merge_size**2
        if len(image_tokens) != features:
            found = f"{len(image_tokens)} image tokens in the row"
            raise ValueError(f"{found}, but its images give {features} features")
        x = self.model.embed_tokens(row.ids.to(self.device))
        if torch.is_autocast_enabled(self.device.type):
            # The residual stream is in the compute type: on one rank, as FSDP has it on several.
            x = x.to(torch.get_autocast_dtype(self.device.type))
        if row.grids:
            images = self.visual(row.pixels.to(self.device), row.grids)  # [P / 4, D]
            return x.index_copy(0, image_tokens.to(self.device), images.to(x.dtype))
        if self.sharded:
            # Every rank must take part in the tower's collectives: one blank cell, with weight 0.
            blank = torch.zeros(4, 1176, device=self.device)
            images = self.visual(blank, [(1, 2, 2)])
            return x + 0.0 * images.sum()
        return x

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """M-RoPE: cos and sin [T, 1, d] of positions [3, T]. The frequencies are cut into
        mrope_section; each section turns with its own coordinate (time, height, width)."""
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        sections = angles.split(self.config.mrope_section, dim=-1)  # each [3, T, its size]
        turned = [section[i] for i, section in enumerate(sections)]
        return rotation(torch.cat(turned, dim=-1))


def row_attention(row, device) -> PackedAttention:
    """The causal attention of a packed row."""
    lengths = [segment.length for segment in row.segments]
    prefixes = [segment.prefix for segment in row.segments]
    return PackedAttention(lengths, prefixes, True, device)


# ------------------------------------------------------------------------------------- generation


@dataclass
class Completion:
    """One sampled output."""

    ids: list[int]  # with the stop token, when finished
    logprobs: Tensor  # [len(ids)] float32, at the sampling temperature and before top-p
    finished: bool  # False if cut off at max_new_tokens


NUCLEUS_TOKENS = 1024  # The nucleus nearly always lies in so many. Sorting all costs much more.
# Refilling and compacting copy the caches, so both wait until it is worth it:
REFILL_SHARE = 1 / 4  # new prompts are taken when so much of the batch is free,
COMPACT_SHARE = 1 / 8  # and finished branches are dropped when they are so much of the batch.
CACHE_SHARE = 0.6  # of a GPU's free memory for keys and values; the rest is for prefills and logits
PREFILL_TOKENS = 8192  # of prompts, about, that are encoded in one forward pass


@torch.no_grad()
def generate(
    model: QwenVL,
    prompts: Iterable[tuple[int, object]],
    n: int = 1,
    max_new_tokens: int = 3072,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: tuple[int, ...] = (),
    banned: tuple[int, ...] = (),
    seed: int = 0,
    max_branches: int = 256,
    cache_tokens: int | None = None,
    watch: Callable[[list[int]], None] | None = None,
) -> Iterator[tuple[int, list[Completion]]]:
    """Sample n completions of every prompt; yields (key, completions) as prompts finish.

    prompts: (key, row) pairs, taken from the iterable as there is room.
    temperature: 0 is greedy, with log-probabilities at temperature 1.
    stop_ids: a completion ends with the first of these. banned: ids that are never drawn.
    max_branches: completions that run at a time, at least those of one prompt.
    cache_tokens: tokens in the caches, with every completion counted at its longest (None:
        CACHE_SHARE of a GPU's free memory, elsewhere 2^20); a prompt that does not fit runs alone.
    watch: called at every step with the new token of every branch.

    Random numbers are those of (seed, key, number of the completion): what a prompt gets does not
    depend on its neighbours, on batching or on the number of ranks (on CUDA in distribution only:
    kernels choose by shape, last bits differ, and then tokens). CheckpointError if the model's
    logits are not finite.
    """
    if cache_tokens is None:
        cache_tokens = free_cache_tokens(model)
    batch = DecodeBatch(model, prompts, n, max_new_tokens, seed, max_branches, cache_tokens)
    while True:
        # 1. Refill: new prompts take the room of finished ones.
        batch.refill()
        if not batch.branches:
            return
        # 2. Draw every branch's next token. In most steps the host waits for the device only here.
        tokens, logprobs = draw_tokens(batch, temperature, top_p, banned)
        if watch:
            watch(tokens)
        # 3. Record them, and hand out the prompts of which all completions have ended.
        for prompt in batch.record(tokens, logprobs, stop_ids):
            yield prompt.key, [branch.completion for branch in prompt.branches]
        # 4. Compact: drop finished branches.
        batch.compact()
        # 5. Decode: the new tokens go through the layers.
        if batch.branches:
            batch.step()


def free_cache_tokens(model: QwenVL) -> int:
    """How many tokens' keys and values fit: on a GPU into CACHE_SHARE of its free memory."""
    config, device = model.config, model.device
    if device.type != "cuda":
        return 2**20  # the free memory is not known
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    of_a_layer = 2 * config.num_key_value_heads * config.head_dim * model.head.itemsize  # bytes
    return max(1, int(CACHE_SHARE * free) // (config.num_hidden_layers * of_a_layer))


# ---- drawing a token


def draw_tokens(
    batch: "DecodeBatch", temperature: float, top_p: float, banned: tuple[int, ...]
) -> tuple[list[int], list[float]]:
    """The next token of every branch, and its log-probability at the temperature and before top-p;
    both as lists, and the tokens in the batch's state. Temperature 0 takes the most likely one.
    CheckpointError for logits that are not finite."""
    state = batch.state
    logits = scaled_logits(state.hidden, batch.model.head, temperature or 1.0, banned)
    all_logprobs, vocabulary = logits.log_softmax(-1), logits.shape[1]  # [B, V]
    uniform = state.random.gather(1, state.index[:, None]).squeeze(1)  # [B]
    for nucleus_tokens in (min(NUCLEUS_TOKENS, vocabulary), vocabulary):
        found = []
        if temperature == 0:
            token = logits.argmax(-1)
        elif top_p >= 1:
            token = draw(all_logprobs.exp(), uniform)
        else:
            probs, is_found = nucleus(all_logprobs.exp(), top_p, nucleus_tokens)
            token, found = draw(probs, uniform), [is_found.float()]
        chosen = all_logprobs.gather(1, token[:, None]).squeeze(1)
        # One tensor makes one wait; float32 holds every token id exactly.
        tokens, logprobs, *found = torch.stack([token.float(), chosen, *found]).tolist()
        if all(map(all, found)):  # else a distribution is flat: once more, with all tokens
            break
    for branch, logprob in zip(batch.branches, logprobs):
        if not math.isfinite(logprob):
            place = f"prompt {branch.prompt.key}: after {len(branch.ids)} tokens"
            raise CheckpointError(f"{place} the model's logits are no numbers")
    batch.state = state._replace(token=token)
    return [int(token) for token in tokens], logprobs


def nucleus(probs: Tensor, top_p: float, size: int) -> tuple[Tensor, Tensor]:
    """probs [B, V] without the tokens outside the nucleus: the most likely ones whose probabilities
    first reach top_p together, and all as likely as the last of them. It is searched among the
    `size` most likely tokens; the second result says where it was found [B]."""
    top = probs.topk(size, dim=-1).values  # descending
    total = top.cumsum(-1)
    outside = (total - top) >= max(top_p, 1e-9)  # top_p reached before it; the first always stays
    smallest = top.masked_fill(outside, 2.0).amin(-1, keepdim=True)
    return probs.masked_fill(probs < smallest, 0.0), total[:, -1] >= top_p


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """One token [B] of each distribution [B, V], which need not sum to one, by one uniform number
    each [B]: inverse-CDF sampling, so that a branch's tokens depend on its own random stream alone.
    Probabilities that are not numbers give some token, whose log-probability is none either."""
    cumulative = probs.cumsum(-1)
    point = uniform * (1 - 2.0**-20) * cumulative[:, -1]  # strictly inside, whatever the rounding
    token = torch.searchsorted(cumulative, point[:, None], right=True)  # [B, 1]
    token = token.clamp(max=probs.shape[1] - 1)
    # A parallel cumsum is not monotone to the last bit: a token of probability 0 may be hit.
    impossible = probs.gather(1, token) == 0
    return torch.where(impossible, probs.argmax(-1, keepdim=True), token).squeeze(1)


def random_stream(seed: int, key: int, branch: int, length: int) -> Tensor:
    """The uniform numbers [length] of one branch of one prompt, from its three names alone."""
    name = f"{seed} {key} {branch}".encode()
    digest = hashlib.blake2b(name, digest_size=4).digest()  # torch seeds with 32 bits
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.rand(length, generator=generator)


# ---- the batch that is decoded


@dataclass(eq=False)
class Prompt:
    """A prompt that is being answered."""

    key: int  # the caller's name of it
    length: int  # tokens
    running: int  # branches that have not ended
    branches: list["Branch"]  # [n]


@dataclass(eq=False)
class Branch:
    """One completion while it is generated. It goes on after its end, until it is dropped."""

    prompt: Prompt
    ids: list[int]
    logprobs: list[float]
    completion: Completion | None = None  # once it has ended


class DecodeState(NamedTuple):
    """What the device knows of every branch's newest token."""

    hidden: Tensor  # [B, D] that it is drawn from
    token: Tensor  # [B] once it is drawn
    position: Tensor  # [B] in text one number for all three coordinates
    index: Tensor  # [B] its place among the branch's own tokens
    random: Tensor  # [B, max_new_tokens] uniform numbers


class DecodeBatch:
    """B branches of N prompts, sorted by prompt. Each prompt's keys and values exist once; each
    branch adds those of its own tokens. With two branches of one prompt and one of another:

        keys in prompt_cache [N, C, K, d]       in own_cache [B, C, K, d]
          row 0: p p p p .                        row 0: a a .
                                                  row 1: b b b
          row 1: q q q q q                        row 2: c . .

    A branch's query attends to its own row and to its prompt's; `attend` joins the two. The host
    knows every branch's tokens (branches), the device its newest one (state).
    """

    def __init__(self, model: QwenVL, prompts, n, max_new_tokens, seed, max_branches, cache_tokens):
        """The arguments are those of `generate`."""
        self.model, self.n, self.max_new_tokens, self.seed = model, n, max_new_tokens, seed
        self.max_prompts, self.cache_tokens = max(1, max_branches // n), cache_tokens
        self.queue = iter(prompts)
        self.upcoming = next(self.queue, None)  # the first (key, row) that is not in the batch yet
        self.prompts: list[Prompt] = []
        self.branches: list[Branch] = []
        self.state: DecodeState | None = None
        self.prompt_cache, self.own_cache = KVCache(model), KVCache(model)

    def cached_tokens(self, *new_lengths: int) -> int:
        """Tokens in the caches once all branches are as long as they may, with new prompts, too."""
        lengths = [*(prompt.length for prompt in self.prompts), *new_lengths]
        branches = len(self.branches) + len(new_lengths) * self.n
        return len(lengths) * max(lengths, default=0) + branches * self.max_new_tokens

    def refill(self) -> None:
        """Once enough of the batch is free, take prompts from the queue, as many as the caches will
        have room for with all their completions; an empty batch takes one in any case. The order is
        kept: a prompt too long for the room that is left waits, and those behind it do, too."""
        free_prompts = self.max_prompts - math.ceil(len(self.branches) / self.n)
        free_cache = 1 - self.cached_tokens() / self.cache_tokens
        if self.branches and min(free_prompts / self.max_prompts, free_cache) < REFILL_SHARE:
            return
        rows = []  # of new prompts, until they are encoded
        while self.upcoming and free_prompts > 0:
            key, row = self.upcoming
            if self.branches and self.cached_tokens(len(row.ids)) > self.cache_tokens:
                break
            prompt = Prompt(key, len(row.ids), self.n, [])
            prompt.branches += [Branch(prompt, [], []) for _ in range(self.n)]
            self.prompts.append(prompt)
            self.branches += prompt.branches
            rows.append(row)
            if sum(len(row.ids) for row in rows) >= PREFILL_TOKENS:
                self.prefill(rows)
                rows = []
            self.upcoming = next(self.queue, None)
            free_prompts -= 1
        if rows:
            self.prefill(rows)

    def prefill(self, rows: list) -> None:
        """Encode the newest prompts, whose rows these are, so that their branches can start."""
        # 1. One forward pass over all rows, packed, fills the prompts' cache.
        lengths = [len(row.ids) for row in rows]
        row, device = rows[0].join(*rows[1:]), self.model.device
        packed_attention = row_attention(row, device)

        def attend(q, k, v, layer):
            """Attention of the packed row, whose keys and values go to the cache, too."""
            if layer == 0:  # not before: the images' activations need the memory, too
                self.arrange_caches()
            cache = self.prompt_cache.layers[layer]  # [2, N, C, K, d]
            keys, values = cache[:, -len(rows) :]  # [new prompts, C, K, d]
            for i, (new_k, new_v) in enumerate(zip(k.split(lengths), v.split(lengths))):
                keys[i, : lengths[i]] = new_k
                values[i, : lengths[i]] = new_v
            return packed_attention(q, k, v)

        hidden = self.model.hidden(row, attend)  # [T, D]
        # 2. Branches start at the prompts' last tokens. These are text: all coordinates are equal.
        last = (torch.tensor(lengths).cumsum(0) - 1).repeat_interleave(self.n)  # [new branches]
        zeros = torch.zeros_like(last).to(device)
        random = []
        for prompt in self.prompts[-len(rows) :]:
            for i in range(self.n):
                random.append(random_stream(self.seed, prompt.key, i, self.max_new_tokens))
        new = DecodeState(
            hidden=hidden[last.to(device)],
            token=zeros,
            position=(row.positions[0, last] + 1).to(device),
            index=zeros,
            random=torch.stack(random).to(device),
        )
        if self.state:
            new = DecodeState(*map(torch.cat, zip(self.state, new)))
        self.state = new

    def record(self, tokens: list[int], logprobs: list[float], stop_ids) -> Iterator[Prompt]:
        """Note the new token of every branch; yields the prompts whose last branch ends with it."""
        for branch, token, logprob in zip(self.branches, tokens, logprobs):
            branch.ids.append(token)
            branch.logprobs.append(logprob)
            finished = token in stop_ids
            ends = finished or len(branch.ids) == self.max_new_tokens
            if ends and branch.completion is None:
                scores = torch.tensor(branch.logprobs)
                branch.completion = Completion(branch.ids.copy(), scores, finished)
                branch.prompt.running -= 1
                if branch.prompt.running == 0:
                    yield branch.prompt

    def compact(self) -> None:
        """Drop finished branches when they are many, or when one has no room for another token; and
        the prompts of which no branch is left."""
        running = [i for i, branch in enumerate(self.branches) if branch.completion is None]
        full = any(len(branch.ids) == self.max_new_tokens for branch in self.branches)
        if not full and len(running) > (1 - COMPACT_SHARE) * len(self.branches):
            return
        unanswered = [i for i, prompt in enumerate(self.prompts) if prompt.running]
        self.branches = [self.branches[i] for i in running]
        self.prompts = [self.prompts[i] for i in unanswered]
        self.arrange_caches(running, unanswered)
        kept = torch.tensor(running, dtype=torch.long, device=self.model.device)
        self.state = DecodeState(*(values[kept] for values in self.state))

    def arrange_caches(
        self, branches: list[int] | None = None, prompts: list[int] | None = None
    ) -> None:
        """Give every branch and every prompt its row of a cache. branches, prompts: which of the
        rows before stay (None: all); new ones follow them."""
        device, count = self.model.device, len(self.branches)
        self.rows = torch.arange(count, device=device)
        self.own_cache.resize([1] * count, self.own_cache.capacity, branches)
        lengths = [prompt.length for prompt in self.prompts]
        counts = Counter(branch.prompt for branch in self.branches)
        self.prompt_cache.resize(list(counts.values()), max(lengths, default=0), prompts)
        self.prompt_cache.set_lengths(lengths, torch.tensor(lengths, device=device))

    def step(self) -> None:
        """Run every branch's newest token through the decoder: one position further."""
        state, model = self.state, self.model
        lengths = [len(branch.ids) for branch in self.branches]
        if max(lengths) > self.own_cache.capacity:
            capacity = min(max(64, 2 * max(lengths)), self.max_new_tokens)
            self.own_cache.resize([1] * len(lengths), capacity)
        # The layers put the keys of the newest tokens to state.index: index + 1 then count.
        index = state.index + 1
        self.own_cache.set_lengths(lengths, index)
        x = model.model.embed_tokens(state.token)  # [B, D]
        cos, sin = model.rope(state.position.expand(3, -1))
        for layer in model.model.layers:
            x = layer(x, cos, sin, self.attend)
        hidden, position = model.model.norm(x), state.position + 1
        self.state = state._replace(hidden=hidden, position=position, index=index)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Decoding attention: q [B, H, d], k, v [B, K, d] of the newest tokens -> [B, H, d].

        A branch attends to its prompt and to its own tokens in two softmaxes with normalisers Z_p
        and Z_o. One softmax over both is their mean, weighted by Z_p / (Z_p + Z_o), which is
        sigmoid(log Z_p - log Z_o).
        """
        newest = torch.stack([k, v])  # [2, B, K, d]
        self.own_cache.layers[layer][:, self.rows, self.state.index] = newest
        own_out, own_lse = self.own_cache.attend(q, layer)
        prompt_out, prompt_lse = self.prompt_cache.attend(q, layer)
        weight = torch.sigmoid(prompt_lse - own_lse)[..., None]
        # In float32: a part of small weight counts to many digits, too.
        return torch.lerp(own_out.float(), prompt_out.float(), weight).to(q.dtype)


# ---- keys and values, and attention to them


class KVCache:
    """Keys and values of R sequences, the rows, and the attention of B queries, each to one row.

    layers: keys and values of every layer [2, R, C, K, d], in memory as attention reads them: for
    variable-length attention token after token of a row; for the plain formula those of a key head
    together. What lies beyond a row's length never counts.

    The queries of a row are neighbours. In the prompts' cache above, queries 0 and 1 attend to row
    0 and query 2 to row 1: counts [2, 1]. The plain formula wants as many queries for each row, and
    puts these at places 0, 1, 2 of 4.
    """

    def __init__(self, model: QwenVL):
        config, weight = model.config, model.head
        empty = weight.new_zeros(2, 0, 0, config.num_key_value_heads, config.head_dim)
        self.layers, self.capacity = [empty] * config.num_hidden_layers, 0

    def resize(self, counts: list[int], capacity: int, kept: list[int] | None = None) -> None:
        """Make room for a row for each of the counts: of the queries, how many attend to it. Of the
        rows before, those `kept` stay (None: all). Layers are replaced one by one: two whole caches
        never exist. Nothing is copied where rows and capacity stay as they are."""
        rows, device = len(counts), self.layers[0].device
        if kept is not None:
            kept = torch.tensor(kept, dtype=torch.long, device=device)
        for i, old in enumerate(self.layers):
            drops_rows = kept is not None and len(kept) < old.shape[1]
            if drops_rows or (rows, capacity) != old.shape[1:3]:
                self.layers[i] = self.resized(old, rows, capacity, kept)
        self.capacity, self.most_queries = capacity, max(counts, default=0)
        self.query_ends = boundaries(counts, device)
        self.row_ends = boundaries([capacity] * rows, device)
        self.places = None
        if len(set(counts)) > 1 and not has_varlen(self.layers[0]):
            is_used = torch.arange(self.most_queries) < torch.tensor(counts)[:, None]
            self.places = is_used.flatten().nonzero().squeeze(1).to(device)  # [B]

    @staticmethod
    def resized(old: Tensor, rows: int, capacity: int, kept: Tensor | None) -> Tensor:
        """A layer [2, rows, capacity, K, d], whose first rows are those of `old` that are kept."""
        heads, size = old.shape[3:]
        if has_varlen(old):
            new = old.new_zeros(2, rows, capacity, heads, size)
        else:
            new = old.new_zeros(2, rows, heads, capacity, size).transpose(2, 3)
        if kept is not None:
            old = old[:, kept, :capacity]
        new[:, : old.shape[1], : old.shape[2]] = old
        return new

    def set_lengths(self, lengths: list[int], on_device: Tensor) -> None:
        """How many keys of each row count [R], for the host and for the device."""
        self.lengths, self.longest = on_device.int(), max(lengths, default=0)
        self.masked_keys = None
        if len(set(lengths)) > 1 and not has_varlen(self.layers[0]):
            tokens = torch.arange(self.longest, device=on_device.device)
            self.masked_keys = tokens >= on_device.view(-1, 1, 1, 1)  # [R, 1, 1, longest]

    def attend(self, q: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """softmax(q k / sqrt(d)) v of queries q [B, H, d] over keys and values of a layer: [B, H,
        d] in q's type, and the logarithms of the softmaxes' normalisers [B, H], float32."""
        keys, values = self.layers[layer]  # [R, C, K, d]
        if has_varlen(q):
            out, lse = varlen_attn(
                q,
                keys.flatten(0, 1),
                values.flatten(0, 1),
                self.query_ends,
                self.row_ends,
                self.most_queries,
                self.longest,
                return_aux=AuxRequest(lse=True),
                enable_gqa=True,
                seqused_k=self.lengths,
            )
            return out, lse.T
        # Written out, in float32: R rows, Q queries of each, K key heads, G query heads of each.
        rows, _, heads, size = keys.shape
        queries = q.float() * size**-0.5
        if self.places is not None:
            padded = queries.new_zeros(rows * self.most_queries, *q.shape[1:])
            queries = padded.index_copy_(0, self.places, queries)
        queries = queries.view(rows, self.most_queries, heads, -1, size).transpose(1, 2)
        keys = keys[:, : self.longest].transpose(1, 2).float()  # [R, K, t, d]
        values = values[:, : self.longest].transpose(1, 2).float()
        scores = queries.flatten(2, 3) @ keys.mT  # [R, K, Q * G, t]
        if self.masked_keys is not None:
            scores.masked_fill_(self.masked_keys, float("-inf"))
        out = (scores.softmax(-1) @ values).view(queries.shape)  # [R, K, Q, G, d]
        lse = scores.logsumexp(-1).view(queries.shape[:-1])
        out = out.transpose(1, 2).reshape(-1, q.shape[1], size)  # [R * Q, H, d]
        lse = lse.transpose(1, 2).reshape(-1, q.shape[1])
        if self.places is not None:
            out, lse = out[self.places], lse[self.places]
        return out.to(q.dtype), lse


# ------------------------------------------------------------------------------------ checkpoints


def locate(path: str) -> Path:
    """The folder: `path` itself, or the snapshot of a hub id (downloaded if missing)."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    is_hub_id = path.count("/") == 1 and not path.startswith((".", "/"))
    if folder.exists() or not is_hub_id:
        raise CheckpointError(f"{path}: no such checkpoint directory")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = "neither a directory nor a hub id that can be fetched"
        raise CheckpointError(f"{path}: {reason}") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors under their published names, mapped from the files, not read into memory."""
    tensors, files = {}, ["model.safetensors"]
    path = folder / "model.safetensors.index.json"
    try:
        if path.exists():
            files = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        for path in [folder / file for file in files]:
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys():
                    published = name.replace("model.visual.", "visual.")
                    published = published.replace("model.language_model.", "model.")
                    tensors[published] = handle.get_tensor(name)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r})") from error
    return tensors


def outline(folder: Path) -> QwenVL:
    """The model of a checkpoint directory without its weights: shapes only, on the meta device.
    CheckpointError if config.json is missing or does not fit."""
    config = folder / "config.json"
    try:
        with torch.device("meta"):
            return QwenVL(Config.from_json(json.loads(config.read_text())))
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{config}: missing, or does not fit ({error})") from error


def load(path: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> QwenVL:
    """A model from a checkpoint directory or hub id; dtype None keeps the stored one.

    The files are mapped: what needs neither conversion nor a move stays there, and beside the
    mapping one tensor at a time is held twice. CheckpointError names the first tensors that are
    missing, unexpected or misshapen, or one that is not finite.
    """
    folder = locate(path)
    model, tensors = outline(folder), read_tensors(folder)
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # some files repeat the tied matrix
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: {shorten(str(error), 400)}") from error
    for name, parameter in model.named_parameters():
        if not torch.stack(parameter.data.aminmax()).isfinite().all():  # NaN comes through
            raise CheckpointError(f"{folder}: {name} holds NaN or infinite numbers")
        parameter.data = parameter.data.to(device).to(dtype or parameter.dtype)  # converted there
    return model


def save(
    model: QwenVL, folder: str | Path, source: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Write a checkpoint directory in published names; its other files come from `source`.

    dtype None keeps the model's. Sharded models are gathered, so every rank must call; rank 0
    writes. The weights appear under their final name only when complete.
    """
    folder, source = Path(folder), locate(str(source))
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if model.sharded:
        model.reshard()  # a forward without backward leaves the root whole, in the compute type
    state = {}
    for name, parameter in model.named_parameters():
        whole = full(parameter).detach()  # collective
        if writes:
            state[name] = whole.to("cpu", dtype).contiguous()
    if not writes:
        return
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / "model.safetensors", folder / "model.safetensors.partial"
    try:
        save_file(state, partial, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"{final}: the weights cannot be written ({error})") from error
    # Only after the weights, which take long: until then an earlier checkpoint in the folder keeps
    # the config that fits it.
    stored = next(iter(state.values())).dtype
    copy_small_files(source, folder, str(stored).removeprefix("torch."))
    # A reader would take an earlier checkpoint's shards instead, as long as it finds their index.
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    os.replace(partial, final)
    for shard_of_before in folder.glob("model-*-of-*.safetensors"):
        shard_of_before.unlink()


def copy_small_files(source: Path, folder: Path, dtype: str) -> None:
    """Config (with this dtype), tokenizer and preprocessor; not the index, not what a run left."""
    others = (".safetensors.index.json", "run.json")
    for file in source.iterdir():
        is_small = file.suffix in (".json", ".txt", ".jinja") and not file.name.endswith(others)
        if is_small and file.name != "config.json":
            with suppress(shutil.SameFileError):  # the model is saved where it came from
                shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    for part in (config, config.get("text_config") or {}, config.get("vision_config") or {}):
        for key in {"torch_dtype", "dtype"} & part.keys():
            part[key] = dtype
    try:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:  # a full disk, as the system reports it, names no file
        raise CheckpointError(f"{folder}/config.json: cannot be written ({error})") from error


# ---------------------------------------------------------------------------------- several ranks


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; a single process is rank 0 of 1."""

    rank: int
    world: int
    device: torch.device

    def reduce(self, value: float, how: str = "sum") -> float:
        """The sum (or "max") of a number over all ranks."""
        if self.world == 1:
            return float(value)
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        operation = getattr(torch.distributed.ReduceOp, how.upper())
        torch.distributed.all_reduce(tensor, operation)
        return tensor.item()

    def gather(self, items: list) -> list:
        """The lists of all ranks as one, on every rank."""
        lists = [items] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(lists, items)
        return [item for one in lists for item in one]

    def barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()


def choose_device(name: str, local_rank: int | None) -> torch.device:
    """The device of this process, on CUDA its current one: with several ranks the GPU of its number
    on its machine, local_rank. "auto" is CUDA, else MPS, else CPU. OSError if it cannot be used."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            index = device.index or 0  # "cuda" has the index None, which set_device refuses
            device = torch.device("cuda", index if local_rank is None else local_rank)
            if torch.cuda.is_available():
                torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # says why, if it cannot be used
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"device {name} cannot be used here: {reason}") from error
    return device


def start_ranks(name: str = "auto") -> Ranks:
    """Read torchrun's environment, choose the device and, with several ranks, join the group until
    the process ends, and let Ctrl-C end it at once."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(name, int(os.environ["LOCAL_RANK"]) if world > 1 else None)
    on_cuda = device.type == "cuda"
    if on_cuda:
        # cuDNN's attention builds a graph for every new shape, and packed rows hardly repeat one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world > 1:
        # Ranks wait in a collective while another one still generates: outputs differ in length.
        # (In mining and evaluation for all of its share; after an hour the job can be resumed.)
        torch.distributed.init_process_group(
            "nccl" if on_cuda else "gloo",
            timeout=timedelta(hours=1),
            device_id=device if on_cuda else None,
        )
        # At exit, that is after success: an error does not come there (data.end_process).
        atexit.register(leave_group)
        # Ctrl-C ends a rank at once, also one that waits for others: Python's handler would not.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return Ranks(rank, world, device)


def leave_group() -> None:
    """Close the process group after success, and let its threads run: one that still waits for the
    interpreter's lock when the interpreter ends (to drop what the last collective held) aborts the
    process, about one run in twenty on a busy machine."""
    torch.distributed.destroy_process_group()
    time.sleep(0.5)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type for --dtype auto, float32 or bfloat16. auto is bfloat16 on CUDA from compute
    capability 8.0 (A100, RTX 30) on, where variable-length attention has kernels, else float32."""
    on_cuda = device.type == "cuda"
    recent = on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        return torch.bfloat16 if recent else torch.float32
    if name == "bfloat16" and on_cuda and not recent:
        reason = "this card has no kernels for it (they want compute capability 8.0)"
        raise OSError(f"--dtype bfloat16: {reason}; use float32")
    return getattr(torch, name)


def shard(model: QwenVL, ranks: Ranks, compute: torch.dtype) -> QwenVL:
    """The model as it trains: float32 master weights on the rank's device. They are moved and
    converted block by block, so that beside a GPU no float32 copy exists on the host. With several
    ranks (FSDP2) the parameters, gradients and optimizer state of every block are cut over the
    ranks; blocks compute in `compute`; gradients are reduced in float32."""
    model.sharded = ranks.world > 1
    if model.sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        policy = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in sharded_blocks(model):
        for parameter in block.parameters():
            # Not those of blocks within it, which have had their turn.
            if parameter.device != ranks.device or parameter.dtype != torch.float32:
                parameter.data = parameter.data.to(ranks.device).float()
        if model.sharded:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    return model


def full(parameter: Tensor) -> Tensor:
    """The whole of a parameter, gathered if it is sharded."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


@torch.no_grad()
def replica(model: QwenVL, dtype: torch.dtype) -> QwenVL:
    """An unsharded copy of the weights in `dtype` to generate with; of a whole model in that dtype
    the model itself. Every rank must call."""
    if not model.sharded and next(model.parameters()).dtype == dtype:
        return model
    with torch.device("meta"):
        whole = QwenVL(model.config)
    whole = whole.to(dtype).to_empty(device=model.device).eval()
    if not model.sharded:
        whole.load_state_dict(model.state_dict())
        return whole
    for block, target_block in zip(sharded_blocks(model), sharded_blocks(whole)):
        block.unshard()  # one gather for the whole block, in the type it computes in
        for target, parameter in zip(target_block.parameters(), block.parameters(), strict=True):
            if not hasattr(parameter, "full_tensor"):  # which is of a block that has had its turn
                target.copy_(parameter)
        block.reshard()
    return whole


def sharded_blocks(model: QwenVL) -> list[nn.Module]:
    """What is sharded, gathered and freed as one: each layer, and the model for all the rest."""
    return [*model.visual.blocks, *model.model.layers, model]
