"""Qwen2.5-VL in plain PyTorch: rows, layers, log-probabilities, generation, checkpoints, ranks.

In:  a Hugging Face checkpoint (directory or hub id), and rows of tokens and images (Row).
Out: log-probabilities and entropies of supervised tokens (training), completions, a checkpoint.

Training and prefill run over one flat row of tokens, without batch dimension or padding. The row is
cut into segments. A segment attends causally to itself and, if it names a prefix segment, to every
token of the prefix. Logits are float32, whatever the type of the weights: Eq. (7) compares
probabilities whose differences are too small for bfloat16.

T  tokens of a row          D  hidden size           B  branches: completions being generated
S  supervised tokens        H  heads                 C  capacity of the cache, in tokens of a slot
P  patches of images        K  key-value heads       n  completions of a prompt
V  vocabulary               d  size of a head
(These letters belong to the code: S and K_i mean other things in the paper.)

    python -c "import model as m; print(m.outline(m.locate('Qwen/Qwen2.5-VL-3B-Instruct')))"
"""

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class InputError(ValueError):
    """Bad input. The message is one line: where, which sample, what is wrong, what to do."""


@contextmanager
def as_input_error(what: str, *kinds: type) -> Iterator:
    """Raise errors of these kinds again as InputErrors whose messages begin with `what`."""
    try:
        yield
    except kinds as error:
        raise InputError(f"{what}: {str(error) or repr(error)}") from error


# ------------------------------------------------------------------------------- the packed row

Grid = tuple[int, int, int]  # an image's time (always 1), height and width, in patches


class Segment(NamedTuple):
    """Consecutive tokens of a row. They attend causally and see all of segment `prefix`, if any."""

    start: int
    length: int
    prefix: int | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """Everything one forward pass needs. The tensors lie on the CPU; the model moves them to its
    device as needed. (Row is a dataclass because FSDP would move a NamedTuple by itself.)"""

    ids: Tensor  # [T] int64
    positions: Tensor  # [3, T] int64, M-RoPE: time, height, width
    segments: tuple[Segment, ...]  # they tile the row in order
    supervised: Tensor  # [T] bool: the tokens that the loss is taken over
    pixels: Tensor  # [P, 1176] float32; [0, 1176] without an image
    grids: tuple[Grid, ...] = ()  # one per image

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def next_position(self) -> int:
        """The position, on all three axes, of a text token that is appended to the row."""
        return int(self.positions.max()) + 1

    def join(self, *others: "Row") -> "Row":
        """Concatenate rows: row.join(other) or Row.join(*rows). Segments keep their prefixes, and
        do not see the other rows."""
        rows = (self, *others)
        segments = []
        tokens_before = 0
        for row in rows:
            segments_before = len(segments)
            for start, length, prefix in row.segments:
                if prefix is not None:
                    prefix += segments_before
                segments.append(Segment(tokens_before + start, length, prefix))
            tokens_before += len(row)
        return Row(
            ids=torch.cat([row.ids for row in rows]),
            positions=torch.cat([row.positions for row in rows], dim=1),
            segments=tuple(segments),
            supervised=torch.cat([row.supervised for row in rows]),
            pixels=torch.cat([row.pixels for row in rows]),
            grids=tuple(grid for row in rows for grid in row.grids),
        )

    def extend(self, completions: Sequence[Sequence[int]]) -> "Row":
        """This prompt row [T] and G completions (token ids, with any stop token) -> one row, [T +
        the lengths of the completions]. Each completion is a supervised segment whose prefix is the
        prompt. Its positions continue from the prompt's last position."""
        (prompt,) = self.segments
        lengths = [len(completion) for completion in completions]
        starts = accumulate(lengths, initial=len(self))
        segments = [Segment(start, length, 0) for start, length in zip(starts, lengths)]
        ids = torch.cat([self.ids, *(torch.tensor(completion) for completion in completions)])
        positions = [torch.arange(n).expand(3, -1) + self.next_position for n in lengths]
        return Row(
            ids=ids,
            positions=torch.cat([self.positions, *positions], dim=1),
            segments=(prompt, *segments),
            supervised=torch.arange(len(ids)) >= len(self),
            pixels=self.pixels,
            grids=self.grids,
        )


# -------------------------------------------------------------------------------- configuration


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
    spatial_merge_size: int = 2  # patches along the edge of a cell; a cell becomes one image token
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
        """raw: config.json, flat as published, nested, or nested with rope_parameters.
        InputError for another architecture, and for values that contradict each other."""
        nested = raw.get("text_config") or {}
        text = raw | {name: value for name, value in nested.items() if value is not None}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        kind, rope_type = raw.get("model_type"), rope.get("rope_type", rope.get("type", "mrope"))
        if kind != "qwen2_5_vl" or rope_type not in ("default", "mrope"):
            raise InputError(f"model type {kind}, rope {rope_type}: want qwen2_5_vl and mrope")
        if text.get("hidden_act", "silu") != "silu" or text.get("use_sliding_window"):
            raise InputError("want the activation silu, and no sliding window")
        vision = build_config(VisionConfig, raw.get("vision_config") or {})
        tied = raw.get("tie_word_embeddings") or nested.get("tie_word_embeddings")
        derived = {"vision": vision, "tie_word_embeddings": bool(tied)}
        config = build_config(cls, text | rope | derived)
        sections, size = config.mrope_section, config.head_dim
        if sum(sections) * 2 != size:
            raise InputError(f"mrope_section {sections}, head size {size}")
        return config


def build_config(kind: type, values: dict):
    """Build the dataclass `kind` from the values that it has fields for. None counts as absent."""
    names = [field.name for field in fields(kind) if values.get(field.name) is not None]
    return kind(**{name: values[name] for name in names})


# ------------------------------------------------------------------------------------ attention


def boundaries(lengths: list[int], device) -> Tensor:
    """[0, l_0, l_0 + l_1, ...], int32: where each sequence of a packed tensor begins and ends."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)


def has_varlen(x: Tensor) -> bool:
    """Whether torch has variable-length attention for x: on CUDA, in half precision."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


class PackedAttention:
    """Attention over one packed row of segments, each of which sees itself and its prefix.

    lengths: number of tokens of each segment. prefixes: index of each segment's prefix segment, or
    None. causal: if true, a token sees itself and the tokens before it; if false (in the vision
    tower, where there are no prefixes), a token sees its whole segment.

    A call takes q [T, H, d], k and v [T, K, d] and returns [T, H, d]. The segments' keys are laid
    out one after the other. A segment has the keys of its prefix first, then its own. Its last
    query sees its last key. For a prompt p and its completions a, b, c:

        queries     p p p p     a a           b b           c c c
        keys        p p p p     p p p p a a   p p p p b b   p p p p c c c

    On CUDA in half precision, one kernel call covers the row; elsewhere each segment has its own.
    """

    def __init__(self, lengths: list[int], prefixes: list[int | None], causal: bool, device):
        tokens = torch.arange(sum(lengths)).split(lengths)
        keys = list(tokens)
        for i, prefix in enumerate(prefixes):
            if prefix is not None:
                keys[i] = torch.cat([tokens[prefix], tokens[i]])
        self.causal = causal
        self.lengths, self.key_lengths = lengths, [len(seen) for seen in keys]
        self.key_tokens = None  # no prefixes: the keys stay as they are
        if self.key_lengths != lengths:
            self.key_tokens = torch.cat(keys).to(device)
        self.ends = boundaries(lengths, device), boundaries(self.key_lengths, device)

    @classmethod
    def of_row(cls, row: Row, device) -> "PackedAttention":
        """The decoder's causal attention over a row."""
        lengths = [segment.length for segment in row.segments]
        prefixes = [segment.prefix for segment in row.segments]
        return cls(lengths, prefixes, causal=True, device=device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int = 0) -> Tensor:
        if self.key_tokens is not None:
            # Select in float32: then the backward pass sums in float32 the gradients that a prompt
            # token receives from all completions.
            k, v = (x.float().index_select(0, self.key_tokens).to(x.dtype) for x in (k, v))
        if has_varlen(q):
            # Importing it takes more than a second, and only CUDA needs it.
            from torch.nn.attention.varlen import varlen_attn

            longest = max(self.lengths), max(self.key_lengths)
            window = (-1, 0) if self.causal else (-1, -1)  # (-1, 0) is causal; last keys align
            options = {"window_size": window, "enable_gqa": True}
            return varlen_attn(q, k, v, *self.ends, *longest, **options)
        outputs = []
        parts = zip(q.split(self.lengths), k.split(self.key_lengths), v.split(self.key_lengths))
        for part in parts:
            of_segment = [x.transpose(0, 1)[None] for x in part]  # each [1, heads, tokens, d]
            queries, keys, _ = (x.shape[2] for x in of_segment)
            mask = None
            if keys > queries:  # the segment has a prefix
                mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
                mask = mask.tril(keys - queries)
            how = {"is_causal": self.causal and mask is None, "enable_gqa": True}
            out = F.scaled_dot_product_attention(*of_segment, mask, **how)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)


def rotary_angles(coords: Tensor, size: int, theta: float) -> Tensor:
    """Angles [..., size / 2], float32: coordinates [...] times theta^(-2i / size), i < size / 2."""
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=coords.device) / size
    return coords[..., None] * (1.0 / theta**exponents)


def rotation(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Angles [T, d / 2] -> (cos, cos) and (-sin, sin), each [T, 1, d], as `rotate` needs them."""
    cos, sin = angles.cos(), angles.sin()
    cos = torch.cat([cos, cos], dim=-1)
    sin = torch.cat([-sin, sin], dim=-1)
    return cos[:, None], sin[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, d], computed in float32. The halves a and b of a head form
    points (a_i, b_i). Each turns by its angle: (a, b) -> (a cos - b sin, b cos + a sin)."""
    x32 = x.float()
    a, b = x32.chunk(2, dim=-1)
    turned = torch.addcmul(x32 * cos, torch.cat([b, a], dim=-1), sin)
    return turned.to(x.dtype)


# --------------------------------------------------------------------------------------- layers


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm whose weight and result take the type of x. Master weights are float32 while
    activations are half precision, and autocast on CUDA would leave the result in float32."""

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
    """Grouped-query attention. The argument `attention` computes it over a packed row or cache."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads = [config.num_attention_heads, config.num_key_value_heads]  # H, K
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention) -> Tensor:
        """x [T, D] -> [T, D]."""
        q_and_k = torch.cat([self.q_proj(x), self.k_proj(x)], dim=-1)
        q_and_k = q_and_k.unflatten(-1, (-1, self.head_dim))  # [T, H + K, d]
        q, k = rotate(q_and_k, cos, sin).split(self.heads, dim=1)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, K, d]
        out = attention(q, k, v, self.layer)  # [T, H, d]
        return self.o_proj(out.flatten(-2))


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3 * self.heads, -1))  # [P, 3 * heads, d]
        qk, v = qkv.split((2 * self.heads, self.heads), dim=1)
        q, k = rotate(qk, cos, sin).chunk(2, dim=1)
        return self.proj(attention(q, k, v).flatten(-2))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, 1e-6)
        self.attn = VisionAttention(config)
        self.norm2 = RMSNorm(config.hidden_size, 1e-6)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, attention)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Merge the patches of each cell into one image token: [P, size] -> [P / 4, D]."""

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
    """Patches [P, 1176] of several images -> image tokens [P / 4, D], in the order of the patches.

    The input lists images cell by cell. A cell is 2 x 2 patches and becomes one token. Most blocks
    attend within windows, and need the cells of a window side by side. An image of 4 x 6 patches,
    the numbers of its cells, and the cells in each window of 2 x 2 cells (published: 4 x 4):

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

    def forward(self, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
        """pixels [P, 1176], grids of (1, rows, columns) patches -> [P / 4, D]."""
        # 1. Put the cells of a window side by side: sort them by image and window.
        merge, device = self.config.spatial_merge_size, pixels.device
        window_edge = self.config.window_size // (self.config.patch_size * merge)  # in cells
        shapes = [(height // merge, width // merge) for _, height, width in grids]
        coords = [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in shapes]
        image = torch.arange(len(grids)).repeat_interleave(torch.tensor([len(c) for c in coords]))
        coords = torch.cat(coords)  # row and column of every cell in its image [P / 4, 2]
        windows = torch.cat([image[:, None], coords // window_edge], dim=1)  # of cells [P / 4, 3]
        _, number, sizes = windows.unique(dim=0, return_inverse=True, return_counts=True)
        order = number.argsort(stable=True)  # [P / 4]
        coords = coords[order]
        order = order.to(device)
        cells = pixels.unflatten(0, (-1, merge**2))[order]  # [P / 4, 4, 1176]
        # 2. Embed the patches: a convolution whose kernel is as large as a patch is a linear map.
        weight = self.patch_embed.proj.weight.flatten(1)  # [size, 1176]
        x = F.linear(cells.flatten(0, 1).to(weight.dtype), weight)  # [P, size]
        # 3. Rotary angles: half of every head turns with the patch's row, half with its column.
        corners = torch.cartesian_prod(torch.arange(merge), torch.arange(merge))  # of a cell [4, 2]
        coords = (coords[:, None] * merge + corners).flatten(0, 1)  # [P, 2]
        head_dim = self.config.hidden_size // self.config.num_heads
        angles = rotary_angles(coords.to(device), head_dim // 2, 10000.0)  # [P, 2, d / 4]
        cos, sin = rotation(angles.flatten(1))
        # 4. Run the blocks. Most of them attend within windows, a few within whole images.
        window_lengths = (sizes * merge**2).tolist()  # number of patches
        image_lengths = [rows * columns for _, rows, columns in grids]
        in_windows = PackedAttention(window_lengths, [None] * len(window_lengths), False, device)
        in_images = PackedAttention(image_lengths, [None] * len(image_lengths), False, device)
        for i, block in enumerate(self.blocks):
            attention = in_images if i in self.config.fullatt_block_indexes else in_windows
            x = recomputed(self.checkpointing, block, x, cos, sin, attention)
        # 5. Merge every cell into a token, and put the tokens back into the order of the input.
        tokens = self.merger(x)
        return torch.empty_like(tokens).index_copy(0, order, tokens)


def recomputed(enabled: bool, function: Callable, *inputs):
    """function(*inputs). If enabled, the backward pass computes the activations again."""
    if enabled and torch.is_grad_enabled():
        # Nothing in this model draws random numbers, so there is no state to preserve.
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)


# ------------------------------------------------------------------------------ the whole model


def scale_logits(logits: Tensor, temperature: float, banned: tuple[int, ...]) -> Tensor:
    """Divide logits [S, V] by temperature, and rule out banned ids. In place at temperature 1."""
    if temperature != 1:
        logits = logits / temperature
    # -inf would make the entropy NaN. A loop over few ids copies no index tensor to the device.
    for token in banned:
        logits[:, token] = -1e9
    return logits


def token_logprobs(
    hidden: Tensor, targets: Tensor, head: Tensor, temperature: float, banned: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [S] of targets [S], and entropies [S] (without gradient), computed in
    float32 from hidden states [S, D] and the head [V, D]."""
    logits = F.linear(hidden.float(), head)
    logprobs = scale_logits(logits, temperature, banned).log_softmax(-1)  # [S, V]
    with torch.no_grad():
        entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropies


class QwenVL(nn.Module):
    """Vision tower, decoder and head, with the published parameter names."""

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
        # Set by `shard`, for training:
        self.compute: torch.dtype | None = None  # float32 weights are cast to this type
        self.sharded = False

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
        self, row: Row, temperature: float = 1.0, banned: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [S], float32, of the row's supervised tokens in order.

        SFT, Eq. (3), and the old and the new policy, Eq. (7), all use this function. Logits exist
        for one chunk of tokens at a time, never as [S, V]; the backward pass computes them again.
        """
        # 1. Token predictor[i] predicts token i. It is token i - 1, or, for a completion's first
        # token, the prompt's last token. (A prompt's first token is never supervised.)
        predictor = torch.arange(len(row)) - 1  # [T]
        for start, _, prefix in row.segments:
            if prefix is not None:
                prompt = row.segments[prefix]
                predictor[start] = prompt.start + prompt.length - 1
        supervised = row.supervised.nonzero().squeeze(1)  # [S]
        targets = row.ids[supervised].to(self.device)
        predictor = predictor[supervised].to(self.device)  # [S]
        hidden = self.hidden_states(row).index_select(0, predictor)  # [S, D]
        # 2. Round the head to the compute type, like the sampler's copy, then widen it to float32.
        # On CUDA, TF32 holds bfloat16 exactly and adds in float32, at half the speed of bfloat16.
        head = self.head.to(hidden.dtype).float()
        chunk = 1024 if hidden.is_cuda else 128  # tokens
        chunks = [
            recomputed(True, token_logprobs, h, t, head, temperature, banned)
            for h, t in zip(hidden.split(chunk), targets.split(chunk))
        ]
        logprobs, entropies = zip(*chunks)
        return torch.cat(logprobs), torch.cat(entropies)

    def hidden_states(self, row: Row, attention: Callable | None = None) -> Tensor:
        """Final hidden states [T, D] of a packed row. `attention`, if given, replaces the row's own
        attention."""
        attention = attention or PackedAttention.of_row(row, self.device)
        # Autocast float32 weights to the compute type. (FSDP casts the weights of sharded models.)
        mixed = not self.sharded and self.compute not in (None, self.head.dtype)
        with torch.autocast(self.device.type, self.compute, mixed, cache_enabled=False):
            x = self.embed(row)
            cos, sin = self.rope(row.positions.to(self.device))
            for layer in self.model.layers:
                x = recomputed(self.checkpointing, layer, x, cos, sin, attention)
            return self.model.norm(x)

    def embed(self, row: Row) -> Tensor:
        """Token embeddings [T, D]; the vision tower's outputs replace those of the image tokens."""
        x = self.model.embed_tokens(row.ids.to(self.device))
        if self.compute is not None:
            x = x.to(self.compute)  # the residual stream has this type, as under FSDP
        if row.grids:
            images = self.visual(row.pixels.to(self.device), row.grids)  # [P / 4, D]
            places = (row.ids == self.config.image_token_id).nonzero().squeeze(1)  # [P / 4]
            return x.index_copy(0, places.to(self.device), images.to(x.dtype))
        if self.sharded:
            # Every rank must join the tower's collectives: encode a blank cell, and add it times 0.
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


# ----------------------------------------------------------------------------------- generation


@dataclass(eq=False)
class Completion:
    """One sampled output. While it grows, it is a branch of its prompt."""

    ids: list[int]  # with the stop token, when finished
    logprobs: list[float]  # of every token, at the sampling temperature and before top-p
    p_harmful: list[float] = field(default_factory=list)  # at every token, if asked for
    random: Callable[[], float] | None = None  # draws this completion's uniform numbers
    running: bool = True
    finished: bool = False  # False also if cut off at max_new_tokens


@dataclass(eq=False)
class Prompt:
    """A prompt that is being answered."""

    key: int  # the caller's name for the prompt
    length: int  # tokens
    next_position: int  # position of each completion's first token
    completions: list[Completion]  # [n]


NUCLEUS_TOKENS = 1024  # top-p sees this many of the likeliest tokens: sorting all costs much more
ENDED_SHARE = 1 / 8  # ended branches are dropped once they are this share of the batch
CACHE_SHARE = 0.6  # keys and values get this share of free GPU memory; prefills and logits the rest
PREFILL_TOKENS = 8192  # one forward pass encodes about this many tokens of prompts
CACHE_STEP = 64  # the cache grows by this many tokens


@torch.no_grad()
def generate(
    model: QwenVL,
    prompts: Iterable[tuple[int, Row]],  # (key, row), taken when there is room
    n: int = 1,  # completions of each prompt
    max_new_tokens: int = 3072,
    temperature: float = 1.0,  # 0 is greedy, with log-probabilities at temperature 1
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),  # a completion ends when it draws one of these
    banned: Sequence[int] = (),  # ids that are never drawn
    seed: int = 0,
    max_branches: int = 256,  # limit on running completions; one prompt may exceed it
    label_ids: tuple[int, int] | None = None,  # of "harmful", "unharmful", for P(harmful)
    watch: Callable[[list[int]], None] | None = None,  # called with all tokens drawn in a step
) -> Iterator[tuple[int, list[Completion]]]:
    """Sample n completions of every prompt; yield (key, completions) when the last one ends.

    A prompt starts once the cache could hold all completions at full length; one too large for that
    runs alone. Random numbers depend only on (seed, key, index of the completion). So neighbours,
    batching and the number of ranks do not change a completion, except by rounding (CUDA's kernels
    differ by shape, so last bits and then tokens differ). The model must be whole, in the type that
    it computes in: from `load` or `replica`. InputError if logits are not finite.
    """
    batch = DecodeBatch(model, prompts, n, max_new_tokens, seed, max_branches)
    while True:
        # 1. Drop branches that have ended; new prompts take their room.
        batch.drop_ended()
        batch.add_prompts()
        if not batch.branches:
            return
        # 2. Draw every branch's next token, and yield the prompts whose completions have all ended.
        drawn = batch.draw(temperature, top_p, banned, label_ids)
        if watch:
            watch([int(token) for token, *_ in drawn])
        for prompt in batch.record(drawn, stop_ids):
            yield prompt.key, prompt.completions
        # 3. The new tokens go through the layers.
        batch.step()


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """probs [B, V] with 0 outside the nucleus. The nucleus is the smallest set of likeliest tokens
    whose sum reaches top_p (at most NUCLEUS_TOKENS), and all tokens as likely as the last one."""
    size = min(NUCLEUS_TOKENS, probs.shape[1])
    top = probs.topk(size, dim=-1).values  # descending
    before = top.cumsum(-1) - top
    outside = before >= max(top_p, 1e-9)  # earlier tokens reach top_p; the first always stays
    smallest = top.masked_fill(outside, 2.0).amin(-1, keepdim=True)
    return probs.masked_fill(probs < smallest, 0.0)


def sample_tokens(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token [B] from each distribution [B, V] with one uniform number [B]. Inverse-CDF
    sampling makes a branch's tokens depend on its own random stream alone. A distribution need not
    sum to one. From NaN probabilities it draws an arbitrary token, with log-probability NaN."""
    cumulative = probs.cumsum(-1)
    point = uniform * (1 - 2.0**-20) * cumulative[:, -1]  # below the total, despite rounding
    token = torch.searchsorted(cumulative, point[:, None], right=True)  # [B, 1]
    token = token.clamp(max=probs.shape[1] - 1)
    # A parallel cumsum is not monotone to the last bit: a token of probability 0 may be hit.
    impossible = probs.gather(1, token) == 0
    return torch.where(impossible, probs.argmax(-1, keepdim=True), token).squeeze(1)


class DecodeBatch:
    """B branches, which grow by one token per step. Each branch has a slot of the cache. A prompt
    is encoded once, and its keys and values are copied to the slots of all its branches. A branch's
    own keys and values follow. Two branches of one prompt and one branch of another:

        slot 0: p p p p a a . .
        slot 1: p p p p b b b .
        slot 2: q q q q q c . .

    A place in a slot is not a position: after an image, the M-RoPE position is smaller than the
    place. A branch that has ended repeats its last step until it is dropped.
    """

    def __init__(self, model: QwenVL, prompts, n, max_new_tokens, seed, max_branches):
        """The arguments are those of `generate`."""
        self.model, self.n, self.max_new_tokens, self.seed = model, n, max_new_tokens, seed
        self.max_branches = max_branches
        self.cache_tokens = free_cache_tokens(model)
        self.queue = iter(prompts)
        self.upcoming = next(self.queue, None)  # the first (key, row) that is not in the batch yet
        self.branches: list[tuple[Prompt, Completion]] = []
        self.head = model.head.float()  # as in QwenVL.forward
        config = model.config
        empty = model.head.new_zeros(2, 0, config.num_key_value_heads, 0, config.head_dim)
        self.cache = [empty] * config.num_hidden_layers  # keys and values, each [2, B, K, C, d]
        self.hidden = model.head.new_zeros(0, config.hidden_size)  # [B, D] of the newest tokens
        self.resize_cache([])

    def has_room(self) -> bool:
        """Whether the upcoming prompt may join: at most max_branches branches would run, and the
        cache could hold all of them at full length. (All slots are as long as the longest.) An
        empty batch has room for any prompt."""
        branches = len(self.branches) + self.n
        longest = max([len(self.upcoming[1]), *(prompt.length for prompt, _ in self.branches)])
        tokens = branches * (longest + self.max_new_tokens)
        fits = branches <= self.max_branches and tokens <= self.cache_tokens
        return fits or not self.branches

    def drop_ended(self) -> None:
        """Drop the ended branches once there are many: dropping branches copies the cache."""
        kept = [i for i, (_, completion) in enumerate(self.branches) if completion.running]
        if len(kept) <= len(self.branches) * (1 - ENDED_SHARE):
            self.branches = [self.branches[i] for i in kept]
            self.resize_cache(kept)

    def add_prompts(self) -> None:
        """Add prompts in order while there is room; prefill about PREFILL_TOKENS at a time."""
        while self.upcoming and self.has_room():
            rows = []
            while self.upcoming and self.has_room() and sum(map(len, rows)) < PREFILL_TOKENS:
                key, row = self.upcoming
                streams = [random.Random(f"{self.seed} {key} {i}").random for i in range(self.n)]
                completions = [Completion([], [], random=stream) for stream in streams]
                prompt = Prompt(key, len(row), row.next_position, completions)
                self.branches += [(prompt, completion) for completion in completions]
                rows.append(row)
                self.upcoming = next(self.queue, None)
            self.prefill(rows)

    def resize_cache(self, old_slots: Sequence[int]) -> None:
        """Give every branch a slot. Branch i takes over slot old_slots[i] and its hidden state; the
        branches beyond these get empty slots, which `prefill` fills. Every slot has room for more
        tokens than the longest branch has now. Layer by layer: two whole caches never exist."""
        longest = max([prompt.length + len(c.ids) for prompt, c in self.branches], default=0)
        self.capacity = (longest // CACHE_STEP + 1) * CACHE_STEP
        n_new, device = len(self.branches) - len(old_slots), self.model.device
        old_slots = torch.tensor(old_slots, dtype=torch.long).to(device)
        self.hidden = self.hidden[old_slots]
        for i, layer in enumerate(self.cache):
            old = layer[:, old_slots, :, : self.capacity]
            n_more = self.capacity - old.shape[3]
            self.cache[i] = F.pad(old, (0, 0, 0, n_more, 0, 0, 0, n_new))
        self.slots = torch.arange(len(self.branches), device=device)  # [B]
        self.all_places = torch.arange(self.capacity, device=device)  # [C]

    def prefill(self, rows: list[Row]) -> None:
        """Encode the rows of the newest prompts, so that their branches can start."""
        # 1. Run one forward pass over all rows, packed, and store keys and values in the cache.
        row, device = Row.join(*rows), self.model.device
        lengths, first_new = [len(row) for row in rows], len(self.branches) - self.n * len(rows)
        self.resize_cache(range(first_new))
        packed_attention = PackedAttention.of_row(row, device)

        def attend_and_record(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            """The row's attention. It copies a prompt's keys and values to its branches' slots."""
            # Each of new_slots is [2, n, K, C, d], each of prompts [2, K, length, d].
            new_slots = self.cache[layer][:, first_new:].split(self.n, dim=1)
            prompts = torch.stack([k, v]).transpose(1, 2).split(lengths, dim=2)
            for slots, prompt in zip(new_slots, prompts):
                slots[:, :, :, : prompt.shape[2]] = prompt[:, None]  # the same for all n
            return packed_attention(q, k, v)

        hidden = self.model.hidden_states(row, attend_and_record)  # [T, D]
        # 2. Every branch starts from the hidden state of its prompt's last token.
        last_tokens = (torch.tensor(lengths).cumsum(0) - 1).repeat_interleave(self.n)
        self.hidden = torch.cat([self.hidden, hidden[last_tokens.to(device)]])

    def draw(self, temperature: float, top_p: float, banned, label_ids) -> list[list[float]]:
        """The next token of every branch, its log-probability and, with label_ids, P(harmful).
        Temperature 0 takes the most likely token."""
        logits = F.linear(self.hidden.float(), self.head)  # [B, V]
        p_harmful = []
        if label_ids:
            harmful, unharmful = label_ids
            p_harmful = [torch.sigmoid(logits[:, harmful] - logits[:, unharmful])]
        logprobs = scale_logits(logits, temperature or 1.0, banned).log_softmax(-1)
        if temperature == 0:
            token = logprobs.argmax(-1)
        else:
            probs = logprobs.exp()
            if top_p < 1:
                probs = nucleus(probs, top_p)
            uniform = torch.tensor([completion.random() for _, completion in self.branches])
            uniform = uniform.to(logits.device, non_blocking=True)
            token = sample_tokens(probs, uniform)
        chosen = logprobs.gather(1, token[:, None]).squeeze(1)
        # One tensor, so that the host waits once for the device; float32 holds every token id.
        return torch.stack([token.float(), chosen, *p_harmful], dim=1).tolist()

    def record(self, drawn: list[list[float]], stop_ids) -> list[Prompt]:
        """Record the new token of every running branch. Returns the prompts whose last branch ends
        with it."""
        answered = []
        for (prompt, completion), (token, logprob, *p_harmful) in zip(self.branches, drawn):
            if not completion.running:
                continue
            if not math.isfinite(logprob):
                where = f"prompt {prompt.key}: after {len(completion.ids)} tokens"
                raise InputError(f"{where} the model's logits are no numbers")
            completion.ids.append(int(token))
            completion.logprobs.append(logprob)
            completion.p_harmful += p_harmful
            completion.finished = completion.ids[-1] in stop_ids
            if completion.finished or len(completion.ids) == self.max_new_tokens:
                completion.running = False
                if not any(other.running for other in prompt.completions):
                    answered.append(prompt)
        return answered

    def step(self) -> None:
        """Run every branch's newest token through the decoder, at the next position."""
        model, newest = self.model, []
        for prompt, completion in self.branches:
            cached = len(completion.ids) - 1  # how many of the branch's own tokens
            place, position = prompt.length + cached, prompt.next_position + cached
            newest.append((completion.ids[-1], place, position))
        if max(place for _, place, _ in newest) >= self.capacity:
            self.resize_cache(range(len(newest)))
        # The host has just waited for the device, so this copy waits for nothing.
        newest = torch.tensor(newest).to(model.device, non_blocking=True)
        token, place, position = newest.unbind(1)  # each [B]
        # Attention adds this mask to its scores: 0 where there is a token, else minus infinity.
        is_empty = self.all_places > place[:, None]  # [B, C]
        mask = torch.zeros_like(is_empty, dtype=self.hidden.dtype)
        mask = mask.masked_fill(is_empty, -math.inf)[:, None, None]  # [B, 1, 1, C]
        attention = partial(self.attention, place, mask)
        x = model.model.embed_tokens(token)  # [B, D]
        cos, sin = model.rope(position.expand(3, -1))
        for layer in model.model.layers:
            x = layer(x, cos, sin, attention)
        self.hidden = model.model.norm(x)

    def attention(self, place: Tensor, mask: Tensor, q, k, v, layer: int) -> Tensor:
        """Decoding attention: q [B, H, d], k, v [B, K, d] of the newest tokens -> [B, H, d]. place:
        where keys and values go in every slot [B]."""
        cache = self.cache[layer]  # [2, B, K, C, d]
        cache[:, self.slots, :, place] = torch.stack([k, v], dim=1)  # this index is [B, 2, K, d]
        # The H / K heads that share a key-value head become H / K queries to that head.
        queries = q.unflatten(1, (k.shape[1], -1))  # [B, K, H / K, d]
        return F.scaled_dot_product_attention(queries, *cache, mask).flatten(1, 2)


def free_cache_tokens(model: QwenVL) -> int:
    """How many tokens the cache may hold: on a GPU, what fits into CACHE_SHARE of free memory."""
    config, device = model.config, model.device
    if device.type != "cuda":
        return 2**20  # the free memory is not known
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    bytes_per_layer = 2 * config.num_key_value_heads * config.head_dim * model.head.itemsize
    return max(1, int(CACHE_SHARE * free) // (config.num_hidden_layers * bytes_per_layer))


# ---------------------------------------------------------------------------------- checkpoints


def locate(name: str) -> Path:
    """The checkpoint folder: `name` itself, or the snapshot of a hub id (downloaded if missing)."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    reason = "no such checkpoint directory, nor a hub id that can be fetched"
    with as_input_error(f"{name}: {reason}", OSError, ValueError):
        return Path(snapshot_download(name, allow_patterns=patterns))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory's *.safetensors under their published names. They are mapped, not
    read into memory. InputError if the weights are missing, unreadable or ambiguous."""
    if any(folder.glob("adapter_*")):
        raise InputError(f"{folder}: holds an adapter (LoRA); merge it into the weights first")
    tensors, files = {}, sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: holds no weights (*.safetensors)")
    for path in files:
        problem = as_input_error(f"{path}: cannot be read", SafetensorError, OSError)
        with problem, safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # mapped
        for name, tensor in stored.items():
            name = name.replace("model.visual.", "visual.")
            name = name.replace("model.language_model.", "model.")
            if name in tensors:
                raise InputError(f"{path}: {name} is in another file, too; remove one of them")
            tensors[name] = tensor
    return tensors


def outline(folder: Path) -> QwenVL:
    """The model of a checkpoint directory without its weights: shapes only, on the meta device.
    InputError if config.json is missing or does not fit."""
    path = folder / "config.json"
    kinds = OSError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError
    with as_input_error(f"{path}: missing, or does not fit", *kinds), torch.device("meta"):
        return QwenVL(Config.from_json(json.loads(path.read_text("utf-8"))))


def load(name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> QwenVL:
    """A model from a checkpoint directory or hub id; dtype None keeps the stored type.

    The files are mapped. A tensor that needs neither conversion nor a move stays in the mapping.
    The others are converted one by one, so at most one of them is held twice. InputError names the
    first tensors that are missing, unexpected or misshapen.
    """
    folder = locate(name)
    model, tensors = outline(folder), read_tensors(folder)
    if model.config.tie_word_embeddings and "lm_head.weight" in tensors:
        # Some files repeat the tied matrix.
        head, embeddings = tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        if embeddings is None or not torch.equal(head, embeddings):
            problem = "lm_head.weight is not the embeddings, as tie_word_embeddings says"
            raise InputError(f"{folder}: {problem}; set that to false in config.json")
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise InputError(f"{folder}: {shorten(str(error), 400)}") from error
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device).to(dtype or parameter.dtype)  # move, then cast
    return model


def save(model: QwenVL, folder, source, dtype: torch.dtype | None = None, files=None) -> None:
    """Write a checkpoint directory with the published names. Files other than the weights come from
    the checkpoint `source`, or from `files` as {name: text}. dtype None keeps the model's type.

    Sharded models are gathered, so every rank must call `save`; rank 0 writes. The weights get
    their final name last.
    """
    folder, source, files = Path(folder), locate(str(source)), files or {}
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    state = {}
    for name, whole in whole_parameters(model):  # collective
        if writes:
            state[name] = whole.to("cpu", dtype).contiguous()
    if not writes:
        return
    folder.mkdir(parents=True, exist_ok=True)
    not_copied = {"run.json", "model.safetensors.index.json"}
    if "preprocessor_config.json" in files:
        not_copied.add("processor_config.json")  # it repeats these settings, with old values
    for file in () if source == folder else source.iterdir():
        if file.suffix in (".json", ".txt", ".jinja") and file.name not in not_copied:
            shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text("utf-8"))
    stored = str(next(iter(state.values())).dtype).removeprefix("torch.")
    for part in (config, config.get("text_config") or {}, config.get("vision_config") or {}):
        part |= {name: stored for name in ("torch_dtype", "dtype") if name in part}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")
    final, partial = folder / "model.safetensors", folder / "model.safetensors.partial"
    with as_input_error(f"{final}: cannot be written", SafetensorError):
        save_file(state, partial, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", partial)  # save_file lets only the owner read
    os.replace(partial, final)


# -------------------------------------------------------------------------------- several ranks


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; a single process is rank 0 of 1."""

    rank: int
    world: int
    device: torch.device
    compute: torch.dtype  # the type that models compute in

    def reduce(self, value: float, how: str = "sum") -> float:
        """The sum (or "max") of a number over all ranks."""
        if self.world == 1:
            return float(value)
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        operation = getattr(torch.distributed.ReduceOp, how.upper())
        torch.distributed.all_reduce(tensor, operation)
        return tensor.item()

    def gather(self, items: list) -> list:
        """Concatenate the lists of all ranks, on every rank."""
        lists = [items] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(lists, items)
        return [item for one in lists for item in one]

    def barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()


def start_ranks(device_name: str = "auto", dtype_name: str = "auto") -> Ranks:
    """Read torchrun's environment, choose device and type, join the process group, and print the
    choice once. On CUDA, a process takes the GPU with its local rank. "auto" means the accelerator
    that torch finds, else the CPU. InputError if the device or the type cannot be used."""
    rank, world, local_rank = 0, 1, 0
    if torch.distributed.is_torchelastic_launched():
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, world, local_rank = (int(os.environ[name]) for name in names)
    # The cache grows, so CUDA's memory segments should grow, too. Set this before CUDA starts.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if device_name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        device_name = found.type if found else "cpu"
    on_cuda = device_name == "cuda"
    with as_input_error(f"device {device_name} cannot be used", RuntimeError, AssertionError):
        device = torch.device("cuda", local_rank) if on_cuda else torch.device(device_name)
        if on_cuda:
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()  # raises an error if the device cannot be used
    # Variable-length attention has kernels from compute capability 8.0 (A100, RTX 30) on.
    recent = on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    if dtype_name == "auto":
        dtype_name = "bfloat16" if recent else "float32"
    if dtype_name == "bfloat16" and on_cuda and not recent:
        raise InputError("--dtype bfloat16: this card has no kernels for it; use float32")
    if on_cuda:
        # cuDNN's attention builds a graph for every new shape, and packed rows hardly repeat one.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if recent and dtype_name == "bfloat16":
        torch.set_float32_matmul_precision("high")  # TF32, for the head: see QwenVL.forward
    if world > 1:
        # Outputs differ in length, so ranks wait in a collective while another rank still generates
        # (in mining and evaluation its whole share). After an hour the job fails, but can resume.
        backend, wait = "nccl" if on_cuda else "gloo", timedelta(hours=1)
        torch.distributed.init_process_group(
            backend, timeout=wait, device_id=device if on_cuda else None
        )
    if rank == 0:
        print(f"{world} x {device.type}, computing in {dtype_name}")
        if torch.version.cuda and not torch.cuda.is_available():
            print(f"torch is built for CUDA {torch.version.cuda}, but finds no GPU that it can use")
    return Ranks(rank, world, device, getattr(torch, dtype_name))


def shard(model: QwenVL, ranks: Ranks) -> QwenVL:
    """Prepare a model with float32 weights on the rank's device for training in ranks.compute. With
    several ranks, FSDP2 splits the parameters, gradients and optimizer state of every block over
    them, gathers a block's parameters while it computes, and reduces gradients in float32."""
    model.compute, model.sharded = ranks.compute, ranks.world > 1
    if model.sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        policy = MixedPrecisionPolicy(
            param_dtype=ranks.compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in [*model.visual.blocks, *model.model.layers, model]:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    return model


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_parameters(model: QwenVL) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of every parameter, gathered one by one. Every rank must take all."""
    if model.sharded:
        model.reshard()  # after a forward pass alone, the root is still whole, in the compute type
    for name, parameter in model.named_parameters():
        yield name, full(parameter.detach())


@torch.no_grad()
def replica(model: QwenVL, dtype: torch.dtype) -> QwenVL:
    """An unsharded copy of the model in `dtype`, to generate with. A model that is already
    unsharded and in `dtype` is returned itself, not copied. Every rank must call `replica`."""
    if not model.sharded and model.head.dtype == dtype:
        return model
    with torch.device("meta"):
        copy = QwenVL(model.config)
    copy = copy.to(dtype).to_empty(device=model.device).eval()
    for target, (_, whole) in zip(copy.parameters(), whole_parameters(model)):
        target.copy_(whole)
    return copy
