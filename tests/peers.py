"""The two sides of the benchmark: the same random weights, prompts and pictures for our code and for transformers."""

import gc
import json
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import toy
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import grpo
import model as qwen
from data import Encoder, Sample, user_text
from model import QwenVL, Row

SHAPES = {"short": (300, 224, 224), "guard": (1200, 868, 896)}  # tokens, height, width of the image
FOLDER = Path(os.environ.get("BENCHMARK_FOLDER", "."))  # of the checkpoints and pictures


def sizes(language: tuple, vision: tuple) -> dict:
    """Fields of config.json: layers, hidden and inner size, heads; then of the language its words and the frequencies
    of time, row and column, of the tower the blocks that attend to the whole image."""
    names = ("hidden_size", "intermediate_size")
    *common, words, sections = language
    fields = dict(zip(("num_hidden_layers", *names, "num_attention_heads"), common))
    fields |= {"vocab_size": words, "rope_theta": 1e6}
    fields["rope_scaling"] = {"type": "mrope", "mrope_section": sections}
    tower = ("depth", *names, "num_heads", "fullatt_block_indexes")
    return fields | {"vision_config": dict(zip(tower, vision))}


SIZES = {
    "tiny": sizes((4, 256, 1376, 4, 4096, [8, 12, 12]), (4, 128, 342, 4, [1, 3])),
    "mid": sizes((24, 896, 4864, 14, 151936, [8, 12, 12]), (8, 1280, 3420, 16, [3, 7])),
    "3b": sizes((36, 2048, 11008, 16, 151936, [16, 24, 24]), (32, 1280, 3420, 16, [7, 15, 23, 31])),
}
DTYPES = {"tiny": torch.float32, "mid": torch.bfloat16}


def timed(work: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def build(name: str) -> Path:
    """The random checkpoint of one of SIZES, written when it is first asked for.

    Stop and image tokens have the (tied) embedding zero: beside logits in the tens they are never drawn, so no
    completion ends early on either side, without a logits processor that one side would have to pay for. Signs in
    the last norm keep a token from being its own likeliest successor, which would make greedy outputs loop.
    """
    folder = FOLDER / name
    if folder.exists():
        return folder
    toy.build_checkpoint(folder, **SIZES[name])
    (folder / "instruction.txt").write_text(toy.INSTRUCTION)
    file, signs = folder / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = {key: t.to(DTYPES[name], copy=True) for key, t in load_file(file).items()}
    words = len(toy.build_tokenizer(toy.world_texts()).get_vocab())
    tensors["model.embed_tokens.weight"][words - len(toy.ADDED) : words] = 0.0
    flips = torch.randint(2, tensors["model.norm.weight"].shape, generator=signs)
    tensors["model.norm.weight"] *= 1.0 - 2.0 * flips
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def our_side(name: str) -> tuple[QwenVL, Encoder]:
    return qwen.load(str(build(name))), Encoder(str(build(name)))


def their_model(name: str):
    """The same weights in transformers, without the sampling settings that the checkpoint carries."""
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    model = kind.from_pretrained(build(name), dtype=DTYPES[name])
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


def write_3b() -> Path:
    """Configuration and weights of the 3B model's shape, in four files: one random block, repeated."""
    folder = FOLDER / "3b"
    folder.mkdir()
    config = toy.checkpoint_config(dict.fromkeys(toy.ADDED, 0), SIZES["3b"])
    (folder / "config.json").write_text(json.dumps(config))
    parameters = dict(qwen.outline(folder).named_parameters())
    block = (torch.randn(1 << 20) * 0.02).bfloat16()
    for i in range(4):
        tensors = {}
        for name in list(parameters)[i::4]:
            size = parameters[name].numel()
            tensors[name] = block.repeat((size >> 20) + 1)[:size].view_as(parameters[name])
        save_file(tensors, folder / f"model-{i}.safetensors")
    os.sync()
    return folder


@cache
def their_processor(name: str):
    """The checkpoint's processor without its video part, which cannot be built without torchvision."""

    class Stills(transformers.Qwen2_5_VLProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    tokenizer = transformers.AutoTokenizer.from_pretrained(build(name), padding_side="left")
    return Stills(Qwen2VLImageProcessorPil.from_pretrained(build(name)), tokenizer, toy.TEMPLATE)


def their_inputs(name: str, samples: list[Sample], encoder: Encoder) -> dict[str, Tensor]:
    """A left-padded batch, from the files on."""
    processor = their_processor(name)
    system = {"role": "system", "content": [{"type": "text", "text": encoder.instruction}]}
    chats = []
    for sample in samples:
        content = [{"type": "text", "text": text} for text in user_text(sample)]
        content.insert(1, {"type": "image"})
        chats.append([system, {"role": "user", "content": content}])
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    images = [Image.open(sample.image_path).convert("RGB") for sample in samples]
    return dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Soft coloured clouds with some grain, about as compressible as a photo."""
    rng = np.random.default_rng(seed)
    clouds = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
    pixels = np.asarray(clouds.resize((width, height), Image.Resampling.BICUBIC))
    grainy = pixels + rng.integers(-12, 13, (height, width, 1))
    return Image.fromarray(grainy.clip(0, 255).astype(np.uint8))


@cache
def short_words(encoder: Encoder) -> list[str]:
    """Words that are one token each, with the space before them."""
    vocabulary = sorted(encoder.tokenizer.get_vocab())
    words = [word[1:] for word in vocabulary if re.fullmatch("Ġ[a-z]{3,}", word)]
    return [word for word in words if encoder.count(" " + word) == 1]


def make_sample(encoder: Encoder, tokens: int, height: int, width: int, seed=0, answer=0) -> Sample:
    """An exchange whose prompt (with `answer` words of reasoning: whose example) has so many tokens, if it can be
    that short; one with height 0 has no image."""
    rng, image = random.Random(seed), f"{height}x{width}-{seed}.png" if height else None
    words = short_words(encoder)
    if image and not (FOLDER / image).exists():
        picture(seed, height, width).save(FOLDER / image)
    reasoning = " ".join(["1.", *rng.choices(words, k=answer)]) if answer else None
    known = {"request_label": "harmful", "reasoning": reasoning, "folder": FOLDER}
    sample = Sample(str(seed), "benchmark", "May", image, **known)
    encode = encoder.example if answer else encoder.prompt
    missing = max(0, tokens - len(encode(sample)))
    sample = replace(sample, request=" ".join(["May", *rng.choices(words, k=missing)]))
    assert not missing or len(encode(sample)) == tokens, f"{sample} has not {tokens} tokens"
    return sample


def forward_flops(model: QwenVL, row: Row) -> float:
    """Multiplications and additions with the weights (not those of attention itself) of one forward."""
    size = lambda module: sum(p.numel() for p in module.parameters() if p.dim() > 1)
    vision = (size(model.visual.blocks) + size(model.visual.merger) / 4) * len(row.pixels)
    decoder = size(model.model.layers) * len(row)
    return 2.0 * (vision + decoder + model.head.numel() * int(row.supervised.sum()))


def our_update(model: QwenVL, row: Row, completions: list, advantages: Tensor) -> Callable:
    """Forward and backward of one group as in grpo.update_policy: a packed row, Eq. (6)."""
    packed = row.extend(completions)
    spread = advantages.repeat_interleave(torch.tensor([len(c) for c in completions]))

    def run() -> None:
        model.zero_grad(set_to_none=True)
        new, _ = model(packed)
        loss, _ = grpo.policy_loss(new, new.detach(), spread, 0.2)
        (loss / len(spread)).backward()

    return run


def their_update(model, inputs, completions: list, advantages: Tensor, micro: int) -> Callable:
    """The same on `micro` padded copies of prompt and completion at a time, alike in length, with logits for the
    completions only."""
    order = sorted(range(len(completions)), key=lambda i: len(completions[i]))
    parts = [order[start : start + micro] for start in range(0, len(order), micro)]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)

    def part_loss(part: list[int]) -> Tensor:
        n = len(part)
        ids = pad([torch.tensor(completions[i]) for i in part])
        mask = pad([torch.ones(len(completions[i]), dtype=torch.long) for i in part])
        prompt, kinds = (inputs[k].expand(n, -1) for k in ("input_ids", "mm_token_type_ids"))
        logits = model(
            input_ids=torch.cat([prompt, ids], 1),
            attention_mask=torch.cat([torch.ones_like(prompt), mask], 1),
            mm_token_type_ids=torch.cat([kinds, torch.zeros_like(ids)], 1),
            use_cache=False,
            pixel_values=inputs["pixel_values"].repeat(n, 1),
            logits_to_keep=ids.shape[1] + 1,
            image_grid_thw=inputs["image_grid_thw"].repeat(n, 1),
        ).logits[:, :-1]
        new = logits.log_softmax(-1).gather(2, ids[..., None]).squeeze(2)
        ratio, weight = (new - new.detach()).exp(), advantages[part, None]
        return -(torch.minimum(ratio * weight, ratio.clamp(0.8, 1.2) * weight) * mask).sum()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        for part in parts:
            (part_loss(part) / sum(map(len, completions))).backward()

    return run


def group_of_16() -> tuple:
    """Both sides' model with the guard prompt for it; 16 completions of random tokens, their advantages."""
    (mine, encoder), rng = our_side("tiny"), torch.Generator().manual_seed(0)
    sample = make_sample(encoder, *SHAPES["guard"])
    lengths = torch.linspace(50, 250, 16).long()[torch.randperm(16, generator=rng)].tolist()
    completions = [torch.randint(1000, 4096, (n,), generator=rng).tolist() for n in lengths]
    advantages = torch.randn(16, generator=rng)
    theirs = their_model("tiny"), their_inputs("tiny", [sample], encoder)
    return (mine, encoder.prompt(sample)), theirs, completions, advantages
