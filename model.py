"""Qwen2.5-VL in plain PyTorch: architecture, checkpoints, token log-probabilities, sampling, sharding.

In:  a Hugging Face checkpoint directory (config.json + safetensors) or a hub id, and packed rows (data.Row).
Out: log-probabilities of supervised tokens (training), completions (sampling), a checkpoint directory.

Every forward runs over one flat row of tokens: no batch dimension and no padding. The row is cut into
segments; a segment attends causally to itself and, if it names a prefix segment, to all of that one.
A `row` is any object with the fields of data.Row: ids [T], positions [3, T], segments, supervised [T],
pixels [P, 1176], grids, and a method join(*rows).

Legend: T tokens, S supervised tokens, D hidden size, H heads, K key-value heads, d head size, V vocabulary,
P patches, N prompts, B branches (completions being sampled). Stills only: a grid's time is always 1.

    python -c "import model; print(model.load('Qwen/Qwen2.5-VL-3B-Instruct').config)"
"""

import atexit
import copy
import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it stands; the message names the file or tensor."""


# ------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. The published 3B config leaves most fields to these defaults."""

    hidden_size: int
    out_hidden_size: int
    depth: int = 32
    num_heads: int = 16
    intermediate_size: int = 3420
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
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
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision: VisionConfig
    max_position_embeddings: int = 128000  # tokens

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, raw: dict) -> "Config":
        """raw: the parsed config.json, flat as published, nested, or nested with rope_parameters."""
        if raw.get("model_type") != "qwen2_5_vl":
            raise CheckpointError(f"config.json: model_type is {raw.get('model_type')!r}, not 'qwen2_5_vl'")
        text = {**raw, **(raw.get("text_config") or {})}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        plain_rope = rope.get("rope_type", rope.get("type", "default")) in ("default", "mrope")
        if text.get("use_sliding_window") or text.get("hidden_act", "silu") != "silu" or not plain_rope:
            raise CheckpointError("config.json: want no sliding window, activation silu, rope type default or mrope")
        derived = {
            "rope_theta": rope.get("rope_theta") or text.get("rope_theta", 1e6),
            "mrope_section": tuple(rope.get("mrope_section", ())),
            "tie_word_embeddings": bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            "rms_norm_eps": text.get("rms_norm_eps", 1e-6),
            "vision": build_config(VisionConfig, raw.get("vision_config") or {}),
        }
        config = build_config(cls, {**text, **derived})
        if sum(config.mrope_section) * 2 != config.head_dim:
            raise CheckpointError(f"config.json: mrope_section {config.mrope_section}, head size {config.head_dim}")
        return config


def build_config(kind: type, values: dict):
    """The dataclass `kind` from those of the values it has fields for."""
    try:
        return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
    except TypeError as error:  # a required field is missing
        raise CheckpointError(f"config.json: {error}") from error


# ------------------------------------------------------------------------------------------------ packed attention


class PackedAttention:
    """Attention over one packed row: segments of the given lengths tile it; each sees itself and its prefix.

    prefixes: for each segment the index of the segment it extends, or None; a prefix itself extends nothing.
    Neighbours alike in length and prefix (vision windows, completions of one length) form a run, one batched
    call. Calls take q [T, H, d] and k, v [T, K, d] and return [T, H, d]. With `keep`, every call's keys and
    values are kept, layer by layer: the prefill of sampling.
    """

    def __init__(self, lengths: list[int], prefixes: list[int | None], causal: bool, device, keep: bool = False):
        self.causal, self.kept = causal, [] if keep else None
        self.runs = []  # (segments, length of each, run of their prefix or None, mask or None)
        shared, run_of, i = {p for p in prefixes if p is not None}, {}, 0
        while i < len(lengths):
            j = i + 1
            while j < len(lengths) and (lengths[j], prefixes[j]) == (lengths[i], prefixes[i]) and not {i, j} & shared:
                j += 1
            prefix, mask = run_of.get(prefixes[i]), None
            if prefix is not None:  # [length, prefix + length], True where a query sees a key
                seen = self.runs[prefix][1]
                mask = torch.ones(lengths[i], seen + lengths[i], dtype=torch.bool, device=device).tril(seen)
            run_of[i] = len(self.runs)
            self.runs.append((j - i, lengths[i], prefix, mask))
            i = j

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int = 0) -> Tensor:
        if self.kept is not None:
            self.kept.append((k, v))
        sizes = [count * length for count, length, _, _ in self.runs]
        q, k, v = (
            [part.unflatten(0, run[:2]).transpose(1, 2) for part, run in zip(x.split(sizes), self.runs)]
            for x in (q, k, v)
        )  # per run: [segments, heads, length, d]
        outs = []
        for i, (count, _, prefix, mask) in enumerate(self.runs):
            keys, values = k[i], v[i]
            if prefix is not None:
                keys, values = (torch.cat([x[prefix].expand(count, -1, -1, -1), x[i]], dim=2) for x in (k, v))
            how = {"is_causal": self.causal and mask is None, "enable_gqa": q[i].shape[1] != keys.shape[1]}
            out = F.scaled_dot_product_attention(q[i], keys, values, mask, **how)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, d] by a `rotation`, cos and sin [T, 1, d], in float32."""
    y = x.float()
    return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def rotation(angles: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, d] of angles [T, d / 2], each used for both halves; the first half of sin negated."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1)[:, None], torch.cat([-sin, sin], dim=-1)[:, None]


@cache
def inverse_frequencies(size: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/size) for i < size/2, float32."""
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)


# ------------------------------------------------------------------------------------------------ layers


HAS_ONEDNN = torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times weight [out, in], plus bias: F.linear, but on the CPU oneDNN's product for float32 and for
    packed weights. torch's own choice there, MKL, is half as fast on AMD processors (180 to 400 GFLOP/s)."""
    float32 = x.is_cpu and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if HAS_ONEDNN and (float32 or weight.is_mkldnn):
        return (OneDNN.apply if torch.is_grad_enabled() else onednn)(x, weight, bias)
    return F.linear(x, weight, bias)


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in oneDNN; weight: plain, or packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNN(torch.autograd.Function):
    """onednn with its gradients, which are products of the same kind."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, weight), needed = ctx.saved_tensors, ctx.needs_input_grad
        grad_x = onednn(grad, weight.T) if needed[0] else None
        grad_weight = None
        if needed[1]:  # with the longer side as columns it is up to 1.8 times as fast
            wide = weight.shape[1] >= weight.shape[0]
            grad_weight = onednn(grad.T, x.T) if wide else onednn(x.T, grad.T).T
        return grad_x, grad_weight, grad.sum(0) if needed[2] else None


class Linear(nn.Linear):
    """nn.Linear, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, size: int, inner: int, bias: bool):
        super().__init__()
        self.gate_proj = Linear(size, inner, bias=bias)
        self.up_proj = Linear(size, inner, bias=bias)
        self.down_proj = Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SelfAttention(nn.Module):
    """Grouped-query attention of the decoder. `attend` decides what is seen: a packed row, or a cache."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v, self.index).flatten(-2))


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


class Decoder(nn.Module):
    """Embedding, layers and final norm, under the published tensor names `model.*`."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # each [P, heads, d]
        return self.proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(-2))


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


class PatchEmbed(nn.Module):
    """A bias-free linear map of a flattened patch, stored under the shape of the published convolution."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.proj = nn.Module()
        shape = (config.hidden_size, 3, config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj.weight = nn.Parameter(torch.empty(shape))

    def forward(self, pixels: Tensor) -> Tensor:
        return linear(pixels.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class PatchMerger(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.cell = config.spatial_merge_size**2
        inner = config.hidden_size * self.cell
        self.ln_q = RMSNorm(config.hidden_size, 1e-6)
        self.mlp = nn.Sequential(Linear(inner, inner), nn.GELU(), Linear(inner, config.out_hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).unflatten(0, (-1, self.cell)).flatten(1))


class VisionTower(nn.Module):
    """Patches [P, 1176] of several images to image tokens [P / 4, D], in the order of the patches."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)
        self.checkpointing = False

    def layout(self, grids: Iterable[tuple[int, int, int]]) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """For images of (1, rows, columns) patches: the order of the 2x2 cells that makes windows contiguous
        [P / 4], every patch's (row, column) in the given order [P, 2], window lengths and image lengths in
        patches. Within an image the windows come largest first, so that equal ones stand side by side."""
        merge = self.config.spatial_merge_size
        side = self.config.window_size // (self.config.patch_size * merge)  # cells along a window's edge
        order, places, windows, images, start = [], [], [], [], 0
        for frames, rows, columns in grids:
            if frames != 1 or rows % merge or columns % merge:
                raise ValueError(f"image grid {(frames, rows, columns)}: want time 1, sides in multiples of {merge}")
            cells = torch.arange(rows * columns // merge**2).view(rows // merge, columns // merge) + start
            tiles = [t.flatten() for band in cells.split(side, 0) for t in band.split(side, 1)]
            tiles.sort(key=len, reverse=True)
            order += tiles
            windows += [len(t) * merge**2 for t in tiles]
            images.append(rows * columns)
            start += cells.numel()
            grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
            grid = grid.view(rows // merge, merge, columns // merge, merge, 2)
            places.append(grid.transpose(1, 2).reshape(-1, 2))
        return torch.cat(order), torch.cat(places), windows, images

    def forward(self, pixels: Tensor, grids: Iterable[tuple[int, int, int]]) -> Tensor:
        """pixels [P, 1176], grids of (1, rows, columns) patches -> [P / 4, D]. Windows are made contiguous once,
        and the order is undone once after the merger."""
        device, cell = pixels.device, self.config.spatial_merge_size**2
        order, places, windows, images = self.layout(grids)
        order, places = order.to(device), places.to(device)
        patches = (order[:, None] * cell + torch.arange(cell, device=device)).flatten()
        x = self.patch_embed(pixels[patches])
        head_dim = self.config.hidden_size // self.config.num_heads
        angles = places[patches, :, None] * inverse_frequencies(head_dim // 2, 10000.0, device)  # [P, 2, d / 4]
        cos, sin = rotation(angles.flatten(1))
        in_windows = PackedAttention(windows, [None] * len(windows), causal=False, device=device)
        in_images = PackedAttention(images, [None] * len(images), causal=False, device=device)
        for i, block in enumerate(self.blocks):
            attend = in_images if i in self.config.fullatt_block_indexes else in_windows
            x = run_layer(block, self.checkpointing, x, cos, sin, attend)
        return torch.empty_like(y := self.merger(x)).index_copy(0, order, y)


def run_layer(layer: nn.Module, checkpointing: bool, *inputs) -> Tensor:
    """The layer's output; with checkpointing its activations are recomputed in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


# ------------------------------------------------------------------------------------------------ the whole model


class TokenLogprobs(torch.autograd.Function):
    """Log-probabilities [S] of targets [S] and entropies [S] (a metric, without gradient), float32, from hidden
    states [S, D] and the head [V, D]; logits are divided by temperature, banned ids have no probability.

    The logits of `chunk` tokens exist at a time; the backward pass computes them again and turns them into their
    own gradient in place: d logprob_i / d logits_i = (one-hot of target_i - softmax_i).
    """

    @staticmethod
    def forward(ctx, hidden, targets, head, temperature: float, banned: tuple[int, ...], chunk: int):
        ctx.options, parts = (temperature, banned, chunk), []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            logits = scaled_logits(h, head, temperature, banned)
            most, chosen = logits.amax(-1), logits.gather(1, t[:, None]).squeeze(1)
            weights = (logits - most[:, None]).exp_()
            sums = weights.sum(-1)
            total = most + sums.log()
            entropy = total - weights.mul_(logits).sum(-1) / sums
            parts.append((chosen - total, entropy, total))
        logprobs, entropy, totals = (torch.cat(x) for x in zip(*parts))
        ctx.save_for_backward(hidden, targets, head, totals)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        hidden, targets, head, totals = ctx.saved_tensors
        temperature, banned, chunk = ctx.options
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[2] else None
        for i in range(0, len(targets), chunk):
            h, t, g = (x[i : i + chunk] for x in (hidden, targets, grad[:, None] / temperature))
            d = scaled_logits(h, head, temperature, banned).sub_(totals[i : i + chunk, None]).exp_().mul_(-g)
            d = d.scatter_add_(1, t[:, None], g).to(h.dtype)
            grad_hidden[i : i + chunk] = linear(d, head.to(h.dtype).T)
            if grad_head is not None:
                grad_head += linear(d.T, h.T)
        return grad_hidden, None, grad_head, None, None, None


def scaled_logits(hidden: Tensor, head: Tensor, temperature: float, banned: tuple[int, ...]) -> Tensor:
    """Logits [S, V], float32, divided by temperature and without banned ids."""
    logits = linear(hidden, head.to(hidden.dtype)).float()
    if temperature != 1:
        logits /= temperature
    if banned:
        logits[:, list(banned)] = -1e9
    return logits


class QwenVL(nn.Module):
    """Vision tower, decoder and head, with the published parameter names."""

    head_chunk = 256  # tokens whose logits exist at a time

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpointing = False  # recompute activations in the backward pass
        self.sharded = False  # set by shard()

    @property
    def head(self) -> Tensor:
        """The output matrix [V, D]."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, row, temperature: float = 1.0, banned: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [S] of the row's supervised tokens, in row order, float32.

        One function for SFT, old and new policy, Eq. (3) and (7). The head runs in chunks of head_chunk tokens, so
        (tokens x vocabulary) logits never exist as a whole.
        """
        hidden = self.hidden(row)
        hidden, targets = hidden[predecessors(row)[row.supervised]], row.ids[row.supervised]
        if torch.is_autocast_enabled(hidden.device.type):  # which does not reach TokenLogprobs.backward
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return TokenLogprobs.apply(hidden, targets, self.head, temperature, banned, self.head_chunk)

    def logits(self, row) -> Tensor:
        """Logits [T, V] of every token: for tests and short rows only."""
        return linear(self.hidden(row), self.head)

    def hidden(self, row, attend=None) -> Tensor:
        """Final hidden states [T, D] of a packed row. `attend` replaces the row's own attention (prefill)."""
        if attend is None:
            attend = row_attention(row)
        x = self.embed(row)
        cos, sin = self.rope(row.positions)
        for layer in self.model.layers:
            x = run_layer(layer, self.checkpointing, x, cos, sin, attend)
        return self.model.norm(x)

    def embed(self, row) -> Tensor:
        """Token embeddings [T, D], with the image tokens replaced by what the vision tower saw."""
        x = self.model.embed_tokens(row.ids)
        places = (row.ids == self.config.image_token_id).nonzero().squeeze(1)
        features = sum(t * h * w for t, h, w in row.grids) // self.config.vision.spatial_merge_size**2
        if len(places) != features:
            raise ValueError(f"{len(places)} image tokens in the row, but its images give {features} features")
        if row.grids:
            return x.index_copy(0, places, self.visual(row.pixels, row.grids).to(x.dtype))
        if self.sharded:  # every rank must take part in the tower's collectives: one blank cell, with weight zero
            blank = torch.zeros(4, 1176, device=x.device)
            return x + 0.0 * self.visual(blank, [(1, 2, 2)]).sum()
        return x

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """M-RoPE: cos and sin [T, 1, d] of positions [3, T]. The frequencies are cut into mrope_section;
        each section turns with its own coordinate (time, height, width)."""
        frequencies = inverse_frequencies(self.config.head_dim, self.config.rope_theta, positions.device)
        angles = positions[..., None] * frequencies  # [3, T, d / 2]
        sections = angles.split(self.config.mrope_section, dim=-1)
        return rotation(torch.cat([section[i] for i, section in enumerate(sections)], dim=-1))


def row_attention(row, keep: bool = False) -> PackedAttention:
    """The causal attention of a packed row."""
    lengths, prefixes = [s.length for s in row.segments], [s.prefix for s in row.segments]
    return PackedAttention(lengths, prefixes, True, row.ids.device, keep)


def predecessors(row) -> Tensor:
    """For every token the index of the token that predicts it [T]: the one before it in its segment; for a
    segment's first token the prefix's last. Unpredicted tokens (the first of a prompt) point at themselves."""
    before = torch.arange(-1, len(row.ids) - 1, device=row.ids.device)
    for start, _, prefix in row.segments:
        if prefix is None:
            before[start] = start
        else:
            before[start] = row.segments[prefix].start + row.segments[prefix].length - 1
    return before


# ------------------------------------------------------------------------------------------------ checkpoints


def locate(path: str) -> Path:
    """The checkpoint's folder: `path` itself, or the local snapshot of a hub id (downloaded if need be)."""
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or path.count("/") != 1 or path.startswith((".", "/")):
        raise CheckpointError(f"{path}: no such checkpoint directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{path}: neither a directory nor a hub id that can be fetched") from error


def published_name(name: str) -> str:
    """The published name of a tensor, from either naming in the wild."""
    for old, new in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the checkpoint under their published names, mapped from the files, not read into memory."""
    index, tensors, files = folder / "model.safetensors.index.json", {}, ["model.safetensors"]
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: no index of safetensors files ({error!r})") from error
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as handle:
                tensors.update({published_name(name): handle.get_tensor(name) for name in handle.keys()})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / file}: cannot be read as safetensors ({error})") from error
    return tensors


def load(path: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> QwenVL:
    """A model from a checkpoint directory or hub id; dtype None keeps the stored one.

    The files are mapped, so no second copy of the weights is ever held: a tensor that needs neither
    conversion nor a move stays in the mapping. CheckpointError names what is missing, unexpected, misshapen or
    not finite.
    """
    folder = locate(path)
    try:
        with torch.device("meta"):
            model = QwenVL(Config.from_json(json.loads((folder / "config.json").read_text())))
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: missing, or does not fit ({error})") from error
    found, wanted = read_tensors(folder), model.state_dict()
    if model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # some files repeat the tied matrix
    for problem, names in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if names:
            raise CheckpointError(f"{folder}: {len(names)} {problem} tensors, first: {min(names)}")
    for name in wanted:
        if found[name].shape != wanted[name].shape:
            shape, right = list(found[name].shape), list(wanted[name].shape)
            raise CheckpointError(f"{folder}: {name} has shape {shape}, config.json wants {right}")
        if not found[name].is_floating_point():
            raise CheckpointError(f"{folder}: {name} holds {found[name].dtype}, not floating-point numbers")
        if not torch.stack(found[name].aminmax()).isfinite().all():  # NaN comes through
            raise CheckpointError(f"{folder}: {name} holds NaN or infinite numbers")
        found[name] = found[name].to(device, dtype)
    model.load_state_dict(found, assign=True)
    return model


def save(model: QwenVL, folder: str | Path, source: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a checkpoint directory in published names; config, tokenizer and preprocessor come from `source`.

    dtype None keeps the model's. Sharded models are gathered, so every rank must call; rank 0 writes. The
    weights appear under their final name only when complete.
    """
    folder, source = Path(folder), locate(str(source))
    writer, state = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0, {}
    for name, parameter in model.named_parameters():
        whole = full(parameter).detach()  # collective
        if writer:
            state[name] = whole.to("cpu", dtype).contiguous()
    if not writer:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        extra = file.suffix in (".json", ".txt", ".jinja") and not file.name.endswith(".safetensors.index.json")
        if extra and file.name not in ("run.json", "config.json") and source.resolve() != folder.resolve():
            shutil.copyfile(file, folder / file.name)
    raw = json.loads((source / "config.json").read_text())
    for key in ("torch_dtype", "dtype"):
        for part in (raw, raw.get("text_config") or {}, raw.get("vision_config") or {}):
            if key in part:
                part[key] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    try:
        save_file(state, folder / "model.safetensors.partial", metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: the weights cannot be written ({error})") from error
    os.replace(folder / "model.safetensors.partial", folder / "model.safetensors")
    for stale in [*folder.glob("model.safetensors.index.json"), *folder.glob("model-*-of-*.safetensors")]:
        stale.unlink()  # shards of an earlier checkpoint, which a reader would take instead


# ------------------------------------------------------------------------------------------------ several ranks


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; a single process is rank 0 of 1."""

    rank: int
    world: int
    device: torch.device

    def reduce(self, value: float, how: str = "sum") -> float:
        """The sum (or "max") of a number over all ranks."""
        box = torch.tensor(value, dtype=torch.float64, device="cpu" if self.world == 1 else self.device)
        if self.world > 1:
            torch.distributed.all_reduce(box, getattr(torch.distributed.ReduceOp, how.upper()))
        return box.item()

    def gather(self, items: list) -> list:
        """The lists of all ranks as one, on every rank."""
        boxes = [items] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(boxes, items)
        return [item for box in boxes for item in box]

    def barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks instead of handing them back to the system, which costs a
    page fault per 4 KB when they are needed again, step after step. This is for CPU runs: beside a GPU
    it would keep what a rank has loaded in host memory for the whole job. Without glibc there is no
    mallopt, and nothing to do."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for parameter, value in ((-1, 2**31 - 1), (-2, 2**28), (-4, 0)) if mallopt else ():
        mallopt(parameter, value)  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX


def choose_device(name: str, local_rank: int | None) -> torch.device:
    """The device of this process, and on CUDA its current one; "auto" is CUDA, else MPS, else the CPU.

    local_rank: with several ranks, this process's number on its machine, and the index of its GPU.
    OSError if the device cannot be used.
    """
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
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


def start_ranks(device: str = "auto") -> Ranks:
    """Read torchrun's environment, choose this process's device and, with several ranks, join the group."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = choose_device(device, int(os.environ["LOCAL_RANK"]) if world > 1 else None)
    if place.type == "cpu":
        keep_freed_memory()
    if place.type == "cuda":
        # cuDNN's attention builds a graph for every new shape, and packed rows hardly repeat one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world > 1:
        # Ranks wait in a collective while another one still generates: outputs differ in length.
        patience = timedelta(hours=1)
        backend = "nccl" if place.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=patience)
        atexit.register(leave_group)  # after success only: an error does not come here (data.end_process)
        # Ctrl-C shall end a rank at once, also one that waits for others, where Python handles no signal.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return Ranks(rank, world, place)


def leave_group() -> None:
    """Close the process group after success, and let its threads run: one that still waits for the
    interpreter's lock when the interpreter ends (to drop what the last collective held) aborts the
    process, about one run in twenty on a busy machine."""
    torch.distributed.destroy_process_group()
    time.sleep(0.5)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type for --dtype auto, float32 or bfloat16; auto is bfloat16 on CUDA, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def shard(model: QwenVL, ranks: Ranks, compute: torch.dtype) -> QwenVL:
    """FSDP2: every block's parameters, gradients and optimizer state are cut over the ranks. Master weights
    stay float32; blocks compute in `compute`; gradients are reduced in float32. A single rank stays whole."""
    if ranks.world == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in [*model.visual.blocks, *model.model.layers, model]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    model.sharded = True
    return model


def full(parameter: Tensor) -> Tensor:
    """The whole of a parameter, gathered if it is sharded."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


@torch.no_grad()
def replica(model: QwenVL, dtype: torch.dtype, old: QwenVL | None = None) -> QwenVL:
    """An unsharded copy of the weights in `dtype` to sample from; `old`, an earlier replica, is overwritten.
    A model that is whole and of that dtype already is its own replica."""
    if not model.sharded and next(model.parameters()).dtype == dtype:
        return model
    if old is None:
        with torch.device("meta"):
            old = QwenVL(model.config)
        old = old.to(dtype).to_empty(device=next(model.parameters()).device).eval()
    for target, parameter in zip(old.parameters(), model.parameters(), strict=True):
        target.copy_(full(parameter))
    return old


# ------------------------------------------------------------------------------------------------ sampling


@dataclass
class Completion:
    """One sampled output. ids: with the stop token when finished; logprobs: [len(ids)] float32, at the sampling
    temperature and before top-p; finished: False if cut off at max_new_tokens."""

    ids: list[int]
    logprobs: Tensor
    finished: bool


def choose(probs: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Next tokens [B], drawn from the most likely of probs [B, V] that make up top_p.

    Inverse-CDF sampling with one given uniform number per branch [B]: what a branch draws then depends on its
    own random stream alone, not on what else is in the batch.
    """
    if top_p < 1:
        ranked, ids = probs.sort(-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= max(top_p, 1e-9), 0.0)  # the first always stays
        probs = torch.zeros_like(probs).scatter(1, ids, ranked)
    cumulative = probs.cumsum(-1)
    point = uniform * (1 - 2.0**-20) * cumulative[:, -1]  # strictly inside, whatever the rounding
    token = torch.searchsorted(cumulative, point[:, None], right=True)
    impossible = probs.gather(1, token) == 0  # where a parallel cumsum is not monotone to the last bit
    if impossible.any():
        token = torch.where(impossible, probs.argmax(-1, keepdim=True), token)
    return token.squeeze(1)


def random_stream(seed: int, key: int, branch: int, length: int) -> Tensor:
    """The uniform numbers [length] of one branch of one prompt: a function of (seed, key, branch) only."""
    digest = hashlib.blake2b(f"{seed} {key} {branch}".encode(), digest_size=4).digest()  # torch seeds with 32 bits
    return torch.rand(length, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))


def pad_to(x: Tensor, size: int) -> Tensor:
    """x [..., t, d] with zeros appended to [..., size, d]."""
    return F.pad(x, (0, 0, 0, size - x.shape[-2]))


def packed(module: nn.Module) -> nn.Module:
    """The module for decoding on the CPU: a second copy of its Linear weights, in oneDNN's blocked order, makes
    products with a few rows up to twice as fast; all else is shared with the original."""
    twin = copy.copy(module)
    twin._modules = {name: packed(child) for name, child in module._modules.items()}
    if isinstance(module, Linear):
        twin._parameters = module._parameters | {"weight": pack(module.weight)}
    return twin


def packable(weight: Tensor) -> bool:
    """Whether oneDNN takes weights of this kind on this machine."""
    if not HAS_ONEDNN or not weight.is_cpu or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    return weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(weight: Tensor) -> Tensor:
    """The weight in the blocked order that `onednn` multiplies fastest with."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


class Branches:
    """The completions being sampled: B branches of N prompts, kept sorted by prompt.

    Each prompt's keys and values exist once, padded to the longest prompt; each branch adds those of its own
    tokens. `state` holds one tensor per property of a branch, first dimension B: owner (index of its prompt), key
    and branch (the caller's names for it), length (tokens generated), position (of the next token), alive, ids and
    logprobs [B, limit], uniform (its random numbers [B, limit]) and hidden (of its last token [B, D]).
    """

    def __init__(self, model: QwenVL, limit: int):
        self.model, self.limit = model, limit
        layers, head = model.model.layers, model.head
        small = sum(weight.nbytes for weight in layers.parameters()) < 2**30  # of what is larger, no second copy
        if small and packable(head):
            layers, head = [packed(layer) for layer in layers], pack(head)
        self.layers, self.head = layers, head
        self.prompt_kv: list[Tensor] = []  # per layer [2, N, K, P, d]
        self.own_kv: list[Tensor] = []  # per layer [2, B, K, R, d]; R grows with the longest branch
        self.prompt_length = None  # [N]
        self.state: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.state["owner"]) if self.state else 0

    def admit(self, prompts: list[tuple[int, object]], n: int, seed: int) -> None:
        """Encode new prompts (vision tower and text once each) and open n branches of every one."""
        keys, rows = zip(*prompts)
        device = self.model.head.device
        row = rows[0].join(*rows[1:]).to(device)
        recorder = row_attention(row, keep=True)
        hidden = self.model.hidden(row, recorder)
        start, length = torch.tensor([(s.start, s.length) for s in row.segments], device=device).T
        self._add_prompts(recorder.kept, start, length)

        branches = [(key, branch) for key in keys for branch in range(n)]
        streams = torch.stack([random_stream(seed, *names, self.limit) for names in branches]).to(device)
        owner = torch.arange(len(rows), device=device) + len(self.prompt_length) - len(rows)
        last = (start + length - 1).repeat_interleave(n)
        blank = torch.zeros(len(branches), self.limit, device=device)
        new = {
            "owner": owner.repeat_interleave(n),
            "key": torch.tensor(branches, device=device)[:, 0],
            "branch": torch.tensor(branches, device=device)[:, 1],
            "length": torch.zeros_like(last),
            "position": row.positions[0, last] + 1,  # a prompt ends in text, whose three coordinates are equal
            "alive": torch.ones_like(last, dtype=torch.bool),
            "ids": blank.long(),
            "logprobs": blank,
            "uniform": streams,
            "hidden": hidden[last],
        }
        self.state = {k: torch.cat([self.state[k], v]) if k in self.state else v for k, v in new.items()}
        kv = recorder.kept[0][0]
        size = self.own_kv[0].shape[-2] if self.own_kv else 0
        fresh = kv.new_zeros(2, len(branches), kv.shape[1], size, kv.shape[2])
        self.own_kv = [torch.cat([x, fresh], dim=1) for x in self.own_kv] or [fresh.clone() for _ in recorder.kept]
        self._group()

    def _add_prompts(self, kept: list[tuple[Tensor, Tensor]], start: Tensor, length: Tensor) -> None:
        """Append the prefill's keys and values [T, K, d], cut by prompt and padded to the longest."""
        old = self.prompt_kv[0].shape[-2] if self.prompt_kv else 0
        size = max(int(length.max()), old)
        place = (start[:, None] + torch.arange(size, device=start.device)).clamp(max=len(kept[0][0]) - 1)  # [N, P]
        new = [torch.stack([x[place] for x in kv]).transpose(2, 3) for kv in kept]
        self.prompt_kv = [
            torch.cat([pad_to(a, size), b], dim=1) for a, b in zip(self.prompt_kv, new)
        ] or new
        self.prompt_length = length if self.prompt_length is None else torch.cat([self.prompt_length, length])

    def keep(self, index: Tensor) -> None:
        """Keep the branches of `index` (ascending), and the prompts that still have one."""
        self.state = {k: v[index] for k, v in self.state.items()}
        self.own_kv = [x[:, index] for x in self.own_kv]
        used = self.state["owner"].unique()
        if len(used) < len(self.prompt_length):
            self.prompt_length = self.prompt_length[used]
            longest = int(self.prompt_length.max()) if len(used) else 0
            self.prompt_kv = [x[:, used, :, :longest] for x in self.prompt_kv]
            self.state["owner"] = torch.searchsorted(used, self.state["owner"])
        if len(index):
            self._group()

    def _group(self) -> None:
        """What attention needs to know of which branch belongs to which prompt."""
        owner, prompts = self.state["owner"], len(self.prompt_length)
        first = torch.searchsorted(owner, torch.arange(prompts, device=owner.device))
        self.rows = torch.arange(len(owner), device=owner.device)
        self.slot = self.rows - first[owner]  # the branch's number among those of its prompt
        width = torch.arange(int(self.slot.max()) + 1, device=owner.device)
        self.members = (first[:, None] + width).clamp(max=len(owner) - 1)  # [N, width]; others' are not read
        kv = self.prompt_kv[0]
        self.far_mask = length_mask(self.prompt_length, kv.shape[-2], kv)

    def step(self) -> None:
        """Run every branch's newest token through the decoder: one position further."""
        state, model = self.state, self.model
        newest = int(state["length"].max())
        if newest > self.own_kv[0].shape[-2]:
            size = min(max(64, 2 * newest), self.limit)
            self.own_kv = [pad_to(x, size) for x in self.own_kv]
        self.newest, self.near_mask = newest, length_mask(state["length"], newest, self.own_kv[0])
        x = model.model.embed_tokens(state["ids"][self.rows, state["length"] - 1])
        cos, sin = model.rope(state["position"].expand(3, -1))
        for layer in self.layers:
            x = layer(x, cos, sin, self.attend)
        state["hidden"] = model.model.norm(x)
        state["position"] += 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Decoding attention: q [B, H, d], k, v [B, K, d] of the newest tokens -> [B, H, d].

        A branch attends to its prompt and to itself in two softmaxes, joined by their normalisers. The
        branches of one prompt ask its single copy of the keys together.
        """
        own, owner = self.own_kv[layer], self.state["owner"]
        own[:, self.rows, :, self.state["length"] - 1] = torch.stack([k, v], dim=1)
        q = q.unflatten(1, (k.shape[1], -1))  # [B, K, H/K, d]
        attention = fused_attention if q.device.type == "cpu" else partial_attention
        near, near_total = attention(q, *own[..., : self.newest, :], self.near_mask)
        grouped = q[self.members].transpose(1, 2).flatten(2, 3)  # [N, K, width * H/K, d]
        far, far_total = attention(grouped, *self.prompt_kv[layer], self.far_mask)
        apart = self.members.shape[1], -1  # [N, K, width * H/K, ...] -> [B, K, H/K, ...]
        far, far_total = (x.unflatten(2, apart).transpose(1, 2)[owner, self.slot] for x in (far, far_total))
        weight = torch.sigmoid(far_total - near_total)[..., None].to(q.dtype)
        return torch.lerp(near, far, weight).flatten(1, 2)


def length_mask(lengths: Tensor, size: int, like: Tensor) -> Tensor | None:
    """What to add to scores so that only the first `lengths` [X] keys count, [X, 1, 1, size]; None: all do."""
    hidden = torch.arange(size, device=lengths.device) >= lengths[:, None, None, None]
    return like.new_zeros(hidden.shape).masked_fill(hidden, float("-inf")) if hidden.any() else None


def partial_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of q [X, K, q, d] to some of its keys and values [X, K, t, d], mask [X, 1, 1, t]; and the log of
    the softmax's normaliser [X, K, q], float32, by which the parts are joined."""
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    total = scores.logsumexp(-1)
    return (scores - total[..., None]).exp().to(v.dtype) @ v, total


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """partial_attention on the CPU in half the time: the kernel within scaled_dot_product_attention, which alone
    also returns the normaliser."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)


@torch.no_grad()
def sample(
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
    prefill_tokens: int = 16384,
    watch: Callable[[Tensor], None] | None = None,
) -> Iterator[tuple[int, list[Completion]]]:
    """Sample n completions of every prompt; yields (key, completions) as each prompt finishes, in any order.

    prompts: (key, row) pairs, taken from the iterable as places free up; at most max_branches completions (but
    always those of one prompt) run at a time. The key also names the prompt's random numbers, so what a prompt
    gets does not depend on its neighbours, on batching or on the number of ranks. Temperature 0 is greedy, with
    log-probabilities at temperature 1. `watch` is called at every step with the new tokens [B] of all running
    completions.
    """
    branches, queue, done = Branches(model, max_new_tokens), iter(prompts), {}
    stops = torch.tensor(stop_ids, dtype=torch.long, device=model.head.device)
    places, waiting = max(1, max_branches // n), True
    while waiting or len(branches):
        free = places - -(-len(branches) // n)
        if waiting and (not len(branches) or 4 * free >= places):  # refill by the quarter: copying caches costs
            waiting = fill(branches, queue, free, n, seed, prefill_tokens)
            continue
        state = branches.state
        logits = scaled_logits(state["hidden"], branches.head, temperature or 1.0, banned)
        probs, rows = logits.softmax(-1), branches.rows
        uniform = state["uniform"][rows, state["length"]]
        token = choose(probs, uniform, top_p) if temperature else logits.argmax(-1)
        state["ids"][rows, state["length"]] = token
        state["logprobs"][rows, state["length"]] = probs[rows, token].log()
        state["length"] += 1
        if watch:
            watch(token)
        stopped = torch.isin(token, stops)
        ended = state["alive"] & (stopped | (state["length"] == max_new_tokens))
        for i in ended.nonzero().flatten().tolist():
            key, length = int(state["key"][i]), int(state["length"][i])
            done.setdefault(key, {})[int(state["branch"][i])] = Completion(
                state["ids"][i, :length].tolist(), state["logprobs"][i, :length].cpu(), bool(stopped[i])
            )
            if len(done[key]) == n:
                yield key, [done[key][b] for b in range(n)]
                del done[key]
        state["alive"] &= ~ended
        alive = state["alive"].nonzero().flatten()
        if 8 * len(alive) <= 7 * len(branches) or (state["length"] == max_new_tokens).any():
            branches.keep(alive)
        if len(branches):
            branches.step()


def fill(branches: Branches, queue: Iterator, places: int, n: int, seed: int, prefill_tokens: int) -> bool:
    """Admit up to `places` prompts from the queue, prefilled in batches of about prefill_tokens tokens.
    Returns whether the queue may hold more."""
    batch, size = [], 0
    for _ in range(places):
        item = next(queue, None)
        if item is None:
            break
        batch.append(item)
        size += len(item[1].ids)
        if size >= prefill_tokens:
            branches.admit(batch, n, seed)
            batch, size = [], 0
    else:
        item = True
    if batch:
        branches.admit(batch, n, seed)
    return item is not None
