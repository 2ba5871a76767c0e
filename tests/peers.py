"""The two sides of the benchmark: the same random weights, prompts and pictures for our code and for its peers,
transformers and, where it is importable, TRL (measured: 1.16.0, datasets 5.2.0, accelerate 1.15.0).
"""

import gc
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import toy
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import grpo
import model as qwen
from data import Encoder, Sample, user_text
from model import QwenVL, Row

SHAPES = {"short": (300, 224, 224), "guard": (1200, 868, 896)}  # tokens, height, width of the image
FOLDER = Path(os.environ.get("BENCHMARK_FOLDER", "."))  # of the checkpoints and pictures


def sizes(language: tuple[int, ...], vision: tuple[int, ...]) -> dict:
    """Fields of config.json: layers, hidden and inner size, heads; of the language also the words."""
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    found = dict(zip((*names, "vocab_size"), language)) | {"rope_theta": 1e6}
    half = found["hidden_size"] // found["num_attention_heads"] // 2
    sections = [half // 4, half * 3 // 8, half * 3 // 8]
    found["rope_scaling"] = {"type": "mrope", "mrope_section": sections}
    full = min(8, vision[0] // 2)  # every so many blocks of the tower attend to the whole image
    kinds = dict(zip(("depth", "hidden_size", "intermediate_size", "num_heads"), vision))
    kinds["fullatt_block_indexes"] = list(range(full - 1, vision[0], full))
    return found | {"vision_config": kinds}


SIZES = {
    "tiny": sizes((4, 256, 1376, 4, 4096), (4, 128, 342, 4)),
    "mid": sizes((24, 896, 4864, 14, 151936), (8, 1280, 3420, 16)),
    "3b": sizes((36, 2048, 11008, 16, 151936), (32, 1280, 3420, 16)),
}
DTYPES = {"tiny": torch.float32, "mid": torch.bfloat16}


def check(same: bool, what: str) -> None:
    if not same:
        raise AssertionError(f"the two sides do not do the same work: {what}")


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
    """A checkpoint of the 3B model's shape in four files: one random block, repeated."""
    folder = toy.build_checkpoint(FOLDER / "3b", num_hidden_layers=1)  # for the small files
    (folder / "model.safetensors").unlink()
    sizes = SIZES["3b"] | {"torch_dtype": "bfloat16"}
    config = toy.checkpoint_config(Encoder(str(folder)).tokenizer.get_vocab(), sizes)
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = QwenVL(qwen.Config.from_json(config))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    block, file_of = (torch.randn(1 << 20) * 0.02).bfloat16(), {}
    for i in range(4):
        file, tensors = f"model-{i + 1:05}-of-00004.safetensors", {}
        for name in list(shapes)[i::4]:
            size = shapes[name].numel()
            tensors[name] = block.repeat((size >> 20) + 1)[:size].view(shapes[name])
            file_of[name] = file
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    os.sync()
    return folder


@cache
def their_processor(name: str):
    """The checkpoint's processor without its video part, which cannot be built without torchvision."""

    class Stills(transformers.Qwen2_5_VLProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    tokenizer = transformers.AutoTokenizer.from_pretrained(build(name), padding_side="left")
    return Stills(their_image_processor(build(name)), tokenizer, toy.TEMPLATE)


def their_image_processor(folder: Path, **how):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(folder, **how)


def messages(sample: Sample, encoder: Encoder) -> list[dict]:
    """The exchange as a chat for transformers, the image as a placeholder."""
    texts = [{"type": "text", "text": text} for text in user_text(sample)]
    content = [texts[0], {"type": "image"}, *texts[1:]] if sample.image else texts
    instruction = {"role": "system", "content": [{"type": "text", "text": encoder.instruction}]}
    return [instruction, {"role": "user", "content": content}]


def their_inputs(name: str, samples: list[Sample], encoder: Encoder) -> dict[str, Tensor]:
    """A left-padded batch, from the files on."""
    processor = their_processor(name)
    chats = [messages(sample, encoder) for sample in samples]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    images = [Image.open(s.image_path).convert("RGB") for s in samples if s.image]
    return dict(processor(text=texts, images=images or None, padding=True, return_tensors="pt"))


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


def make_sample(
    encoder: Encoder, tokens: int, height: int, width: int, seed: int = 0, answer: int = 0
) -> Sample:
    """An exchange whose prompt (with `answer` words of reasoning: whose example) has so many tokens, if it can be
    that short; one with height 0 has no image."""
    rng, image = random.Random(seed), f"{height}x{width}-{seed}.png" if height else None
    words = short_words(encoder)
    if image and not (FOLDER / image).exists():
        picture(seed, height, width).save(FOLDER / image)
    reasoning = " ".join(["1.", *rng.choices(words, k=answer)]) if answer else None
    known = {"request_label": "harmful", "reasoning": reasoning, "folder": FOLDER}
    encode = encoder.example if answer else encoder.prompt

    def made(extra: int) -> Sample:
        request = " ".join(["May", *rng.choices(words, k=extra)])
        return Sample(str(seed), "benchmark", request, image, **known)

    sample = made(max(0, tokens - len(encode(made(0)))))
    length = len(encode(sample))
    check(length == tokens or sample.request == "May", f"{length} tokens, not {tokens}")
    return sample


def choose_stops(said: list[list[int]], limit: int) -> list[int]:
    """Stop tokens under which outputs that say this end at widely different lengths, at a quarter of the limit in
    the mean: the best of many random sets."""
    rng, tokens = random.Random(0), sorted({token for ids in said for token in ids})
    sets = []
    for _ in range(200):
        size = min(len(tokens), rng.choice((4, 8, 16, 32, 64, 128)))
        sets.append(sorted(set(rng.sample(tokens, size))))
    mean = lambda stops: statistics.mean(length_of(ids, stops) for ids in said)
    return min(sets, key=lambda stops: (abs(mean(stops) - limit / 4), stops))


def length_of(ids: list[int], stops) -> int:
    return next((n for n, token in enumerate(ids, 1) if token in stops), len(ids))


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

    def run() -> float:
        model.zero_grad(set_to_none=True)
        new, _ = model(packed)
        loss = grpo.policy_loss(new, new.detach(), spread, 0.2)[0] / len(spread)
        loss.backward()
        return loss.item()

    return run


def their_update(
    model, inputs: dict, completions: list, advantages: Tensor, micro: int
) -> Callable:
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

    def run() -> float:
        model.zero_grad(set_to_none=True)
        summed = 0.0
        for part in parts:
            loss = part_loss(part) / sum(map(len, completions))
            loss.backward()
            summed += loss.item()
        return summed

    return run


def group_of_16(side: str) -> tuple:
    """A side's model, the guard prompt for it, 16 completions of random tokens, their advantages."""
    (mine, encoder), rng = our_side("tiny"), torch.Generator().manual_seed(0)
    sample = make_sample(encoder, *SHAPES["guard"])
    lengths = torch.linspace(50, 250, 16).long()[torch.randperm(16, generator=rng)].tolist()
    completions = [torch.randint(1000, 4096, (n,), generator=rng).tolist() for n in lengths]
    advantages = torch.randn(16, generator=rng)
    if side == "ours":
        return mine, encoder.prompt(sample), completions, advantages
    return their_model("tiny"), their_inputs("tiny", [sample], encoder), completions, advantages


class InTurn(transformers.TrainerCallback):
    """Times a trainer's steps, data included, and runs and times `ours` after each."""

    def __init__(self, ours: Callable[[], object] | None):
        self.ours, self.times, self.start = ours, ([], []), 0.0

    def on_train_begin(self, *_, **__) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        self.times[1].append(time.perf_counter() - self.start)
        if self.ours:
            self.times[0].append(timed(self.ours))
        self.start = time.perf_counter()


def trl_run(kind: str, samples, encoder, micro: int, steps: int, ours=None, batch=32, **how):
    """Seconds of each of our steps and of a trainer's, `batch` samples a step, `micro` at a time; and its log."""
    import datasets
    import trl

    def chat(sample: Sample) -> dict:
        images = [Image.open(sample.image_path)] if sample.image else []
        record = {"prompt": messages(sample, encoder), "images": images}
        if kind == "SFT":
            record["completion"] = [{"role": "assistant", "content": encoder.target_text(sample)}]
        return record

    rewards = {"reward_funcs": lambda completions, **_: [random.random() for _ in completions]}
    how |= dict(max_steps=steps, learning_rate=1e-6, lr_scheduler_type="constant")
    how |= dict(per_device_train_batch_size=micro, gradient_accumulation_steps=batch // micro)
    how |= dict(optim="adamw_torch_fused", bf16=False, gradient_checkpointing=False, use_cpu=True)
    how |= dict(logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    how |= dict(shuffle_dataset=False, dataloader_pin_memory=False, max_grad_norm=1.0)
    with tempfile.TemporaryDirectory() as out:
        clock = InTurn(ours)
        trainer = getattr(trl, f"{kind}Trainer")(
            their_model("tiny"),
            args=getattr(trl, f"{kind}Config")(out, **how),
            processing_class=their_processor("tiny"),
            callbacks=[clock],
            train_dataset=datasets.Dataset.from_list([chat(s) for s in samples]),
            **(rewards if kind == "GRPO" else {}),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return *clock.times, trainer.state.log_history
