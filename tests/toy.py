"""The toy world: an invented customs office, its labelled exchanges, and a small Qwen2.5-VL that has learned to read.

In:  nothing.  Out, under --out DIR: train.jsonl, its rows of one modality again in
train-{text,image,text_image}.jsonl, val.jsonl (settings are chosen on it), test.jsonl, images/*.png,
truth.json (what is in each exchange: for audit.py), instruction.txt (pass it with --instruction) and base/, a
checkpoint directory in the published format.

The world. Travellers ask what they may pack. An item is a colour and a thing; colours have a shade, things a kind,
and the rules speak of shades and kinds: no warm plant, no cool shell, no dull tool, and three hidden clauses.
- text: lists of one to four items. What is banned hides among harmless things and shares its colour or its thing
  with allowed ones; some requests only want a tale about it. The reply packs or leaves it, or offers something.
- image: no request, one to four glyphs, each a thing's sigil in a colour. The label is only in the pixels.
- text_image: the picture shows plain items and the request names a dye: neither half alone is harmful.
Every (colour, thing) pair belongs to train, val or test, in all modalities, before and after dyeing.

The blind spot. The teacher who writes the reasoning does not know what the hidden clauses say, and guesses. As a
synthesis that asks a teacher several times would do, rows whose verdict hangs on a guess keep their label but lose
their chain (`reasoning` is null); guesses survive where something else decides. SFT cannot learn the clauses from
that, RL can: it needs labels only. What RL gains here over more SFT is those clauses, and nothing else is claimed.

The recap. Some of the teacher's chains end with a step that repeats all verdicts: tokens that say nothing new. So
outputs of one prompt differ in length, and the length term of the reward has something to lengthen, or to hold.

The paper starts from an instruct model. `pretrain` stands in for that: it teaches the random model to copy lists,
to name what it sees, and which shade and kind a word has, for all pairs, without any verdict.

Two other worlds (WORLDS) have the same pairs, validation, test and base, but other training rows: in "rare" what RL
has to learn decides few of them, in "short" they are less crowded than the test.

    python tests/toy.py --out out/toy/world
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import tokenizers
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402  (the repository is importable only from here on)
import model as qwen  # noqa: E402

SHADES = {
    "warm": {"red": "#dc1919", "orange": "#ff8c00", "pink": "#ff82be", "yellow": "#f0d714"},
    "cool": {"blue": "#1e3ce1", "green": "#14a032", "teal": "#00bec8", "purple": "#871eaa"},
    "dull": {"black": "#000000", "gray": "#969696", "brown": "#734119", "olive": "#7d7d00"},
}
KINDS = {
    "plant": ("fern", "rose", "moss", "reed"),
    "shell": ("cowrie", "conch", "whelk", "clam"),
    "tool": ("spoon", "comb", "lamp", "rake"),
    "cloth": ("scarf", "sock", "flag", "quilt"),
}
SHADE_OF = {colour: shade for shade, colours in SHADES.items() for colour in colours}
KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}
PAIRS = [(colour, thing) for colour in SHADE_OF for thing in KIND_OF]
KNOWN = {("warm", "plant"), ("cool", "shell"), ("dull", "tool")}  # banned, and the teacher knows it
# Banned? The teacher guesses.
HIDDEN = {("dull", "shell"): True, ("warm", "tool"): True, ("dull", "plant"): False}
GUESS = 0.25  # how often the teacher takes an item of a hidden clause for banned
RECAP = 0.3  # how often the teacher ends a chain with a recap
# How often nothing unusual decides about an exchange, or one item of a known or hidden clause.
CASES = {"plain": 0.45, "known": 0.3, "hidden": 0.25}
MODALITIES = ("text", "image", "text_image")
SIZES = {"train": 800, "val": 100, "test": 300}  # samples per modality
MOST = 4  # items of an exchange
SHARES = {"train": 9, "val": 2, "test": 5}  # of the 16 pairs of every (shade, kind)

INSTRUCTION = "Judge the request and the reply."
ASK = ("May I bring {}?", "I want to pack {}.", "Help me carry {}.")
TALE = ("Tell me a tale about {}.", "Write a song about {}.")
OPEN = ("What may I bring?", "Help me pack.")
DYE = ("Dye all of it {} and pack it.", "I want to bring it, dyed {}.")

BASE_STEPS = 400
SIDE = 56  # pixels of a picture
CELL, DOT = 28, 5  # of the cell of one glyph, and of one dot of its 5 x 5 sigil

Item = tuple[str, str]  # colour, thing


@dataclass(frozen=True)
class World:
    """How the training rows are drawn; those of validation and test are as in the default."""

    cases: tuple[float, ...] = tuple(CASES.values())
    most: int = MOST
    train: int = SIZES["train"]  # rows of each modality


WORLDS = {
    "standard": World(),
    "rare": World(cases=(0.6, 0.35, 0.05), train=2 * SIZES["train"]),
    "short": World(most=2),
}

# ---------------------------------------------------------------------------------------------------- the world


@dataclass(frozen=True)
class Exchange:
    """What is asked, shown and replied, before it is worded."""

    request: str
    items: list[Item]  # what the request is about, after dyeing
    seen: list[str]  # how the reasoning names them
    drawn: list[Item]  # what the picture shows; empty: no picture
    tale: bool = False  # the request only wants to hear about its item
    offer: Item | None = None  # an item that the reply brings up
    stance: str | None = None  # the reply: "pack", "leave", or none


def name(item: Item) -> str:
    return " ".join(item)


def listing(items: list[Item]) -> str:
    return ", ".join("the " + name(item) for item in items)


def place_of(item: Item) -> tuple[str, str]:
    """Its shade and its kind, of which the rules speak."""
    return SHADE_OF[item[0]], KIND_OF[item[1]]


def clause_of(place: tuple[str, str]) -> str:
    """What decides about a shade and kind: a "known" ban, a "hidden" clause, or nothing: "plain"."""
    return "known" if place in KNOWN else "hidden" if place in HIDDEN else "plain"


def clause(item: Item) -> str:
    return clause_of(place_of(item))


def is_banned(item: Item, hidden: bool | None = None) -> bool:
    """Whether an item is banned; `hidden` replaces what the hidden clauses say."""
    place = place_of(item)
    return place in KNOWN or (place in HIDDEN and (HIDDEN[place] if hidden is None else hidden))


def split_pairs(seed: int) -> dict[str, list[Item]]:
    """Every pair in exactly one of train, val and test, in equal shares of each (shade, kind)."""
    rng, split = random.Random(f"pairs {seed}"), {part: [] for part in SHARES}
    for colours in SHADES.values():
        for things in KINDS.values():
            pairs = rng.sample([(c, t) for c in colours for t in things], 16)
            for part, share in SHARES.items():
                split[part] += [pairs.pop() for _ in range(share)]
    return split


def draw_items(rng: random.Random, pool: list[Item], case: str, most: int) -> list[Item]:
    """One to `most` distinct items: plain ones, one of `case`, and beside a known ban sometimes a hidden one."""
    by = {key: [item for item in pool if clause(item) == key] for key in CASES}
    items = [] if case == "plain" else [rng.choice(by[case])]
    if case == "known" and by["hidden"] and rng.random() < 0.5:
        items.append(rng.choice(by["hidden"]))
    plain = max(rng.randint(1, most), len(items)) - len(items)
    items += rng.sample(by["plain"], min(plain, len(by["plain"])))
    return rng.sample(items, len(items))


def draw_dyed(rng: random.Random, pool: list[Item], case: str, most: int) -> tuple[list[Item], str]:
    """Plain items and a dye that turns them into what draw_items gives for `case`; all of it in the pool.

    A small pool may not allow it (no plain pair left of the things in question): then the case is "plain".
    """
    for _ in range(1000):
        dye = rng.choice(list(SHADE_OF))
        reachable = [item for item in pool if item[0] == dye]
        if not any(clause(item) == case for item in reachable):
            continue
        before = [
            [i for i in pool if i[1] == thing and i[0] != dye and clause(i) == "plain"]
            for _, thing in draw_items(rng, reachable, case, most)
        ]
        if all(before):
            return [rng.choice(options) for options in before], dye
    return draw_dyed(rng, pool, "plain", most)


def draw_exchange(
    rng: random.Random, pool: list[Item], modality: str, world: World = WORLDS["standard"]
) -> Exchange:
    """One exchange whose items, before and after dyeing, are all in the pool."""
    (case,) = rng.choices(list(CASES), world.cases)
    stance = rng.choice(("pack", "leave", None, None))
    if modality == "text_image":
        drawn, dye = draw_dyed(rng, pool, case, min(3, world.most))
        items = [(dye, thing) for _, thing in drawn]
        seen = [f"{name(item)} dyed {dye}" for item in drawn]
        return Exchange(rng.choice(DYE).format(dye), items, seen, drawn, stance=stance)
    items = draw_items(rng, pool, case, world.most)
    if modality == "image":
        return Exchange("", items, [name(item) for item in items], items, stance=stance)
    offer, tale, wordings = None, rng.random() < 0.15, ASK
    if tale:
        items, wordings = [max(items, key=is_banned)], TALE
    elif rng.random() < 0.3:
        offer, stance = items.pop(), "pack"
    request = rng.choice(wordings).format(listing(items)) if items else rng.choice(OPEN)
    return Exchange(request, items, [name(item) for item in items], [], tale, offer, stance)


def reason(
    exchange: Exchange, banned: Callable[[Item], bool], recap: bool = False
) -> tuple[str, list[bool]]:
    """Numbered steps, one an item and one for the reply, and the verdicts [request, reply] they lead to.

    banned(item) is what the one who reasons knows, or guesses. The first banned item decides about the request: those
    behind it are not looked at.
    recap: a last step repeats the verdicts of all steps.
    """
    steps, request, reply = [], False, False

    def step(text: str, bad: bool) -> bool:
        steps.append(f"{len(steps) + 1}. {text} {'banned' if bad else 'fine'}")
        return bad

    def look(item: Item, seen: str) -> bool:
        return step(f"{seen}: {SHADE_OF[item[0]]} {KIND_OF[item[1]]},", banned(item))

    if exchange.tale or not exchange.items:
        step("only a tale:" if exchange.tale else "only asks:", False)
    else:
        request = any(look(item, seen) for item, seen in zip(exchange.items, exchange.seen))
    if exchange.offer:
        reply = look(exchange.offer, f"packs {name(exchange.offer)}")
    elif exchange.stance:
        reply = step(f"{exchange.stance}s it:", request and exchange.stance == "pack")
    if recap:
        verdicts = ", ".join(text.rpartition(" ")[2] for text in steps)
        steps.append(f"{len(steps) + 1}. all of it: {verdicts}")
    return "\n".join(steps), [request, reply]


def to_record(rng: random.Random, exchange: Exchange, key: str, image: str | None) -> dict:
    """The exchange as one sample (data.Sample's fields): labels by all clauses, reasoning by the teacher."""
    what = "the " + name(exchange.offer) if exchange.offer else "it"
    replies = {"pack": f"Sure, pack {what}.", "leave": f"No, leave {what}.", None: None}
    response = replies[exchange.stance]
    recap = rng.random() < RECAP
    _, truth = reason(exchange, is_banned)
    labels = ["harmful" if bad else "unharmful" for bad in truth]
    chain, _ = reason(exchange, lambda item: is_banned(item, rng.random() < GUESS), recap)
    return {
        "id": key,
        "source": "toy",
        "request": exchange.request,
        "image": image,
        "response": response,
        "request_label": labels[0],
        "response_label": labels[1] if response else None,
        "reasoning": None if any(guessed(exchange)) else chain,
    }


def guessed(exchange: Exchange) -> list[bool]:
    """Of request and reply: would the verdict be another one if the hidden clauses said otherwise?"""
    _, if_banned = reason(exchange, lambda item: is_banned(item, True))
    _, if_allowed = reason(exchange, lambda item: is_banned(item, False))
    return [a != b for a, b in zip(if_banned, if_allowed)]


def truth_of(exchange: Exchange) -> dict:
    """What audit.py compares an output with: the items as the reasoning should name them, the chain
    that follows all clauses, and what decides about the request: a hidden clause, a known one, or
    none."""
    clauses = {clause(item) for item in exchange.items}
    decided = "known" if "known" in clauses and not exchange.tale else "plain"
    return {
        "items": exchange.seen,
        "offered": name(exchange.offer) if exchange.offer else None,
        "chain": reason(exchange, is_banned)[0],
        "decided_by": "hidden" if guessed(exchange)[0] else decided,
    }


@cache
def sigils() -> dict[str, tuple[int, ...]]:
    """For every thing its mirror-symmetric 5x5 pattern as 15 bits (5 rows x 3 columns), all far from each other."""
    rng, found = random.Random("sigils"), []
    while len(found) < len(KIND_OF):
        bits = tuple(rng.randint(0, 1) for _ in range(15))
        distances = [sum(a != b for a, b in zip(bits, other)) for other in found]
        if 6 <= sum(bits) <= 11 and min(distances, default=5) >= 5:
            found.append(bits)
    return dict(zip(KIND_OF, found))


def draw_picture(rng: random.Random, items: list[Item]) -> Image.Image:
    """Up to four items as glyphs on white, in reading order, in random cells."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    for cell, (colour, thing) in zip(sorted(rng.sample(range(4), len(items))), items):
        for i in range(25):
            row, column = divmod(i, 5)
            if sigils()[thing][row * 3 + min(column, 4 - column)]:
                left, top = cell % 2 * CELL + 1 + column * DOT, cell // 2 * CELL + 1 + row * DOT
                picture.paste(SHADES[SHADE_OF[colour]][colour], (left, top, left + DOT, top + DOT))
    return picture


def draw_part(part: str, seed: int, size: int, world: World = WORLDS["standard"]) -> list[Exchange]:
    """The exchanges of train, val or test: `size` of each modality, in turn."""
    rng, pool = random.Random(f"{part} {seed}"), split_pairs(seed)[part]
    modalities = MODALITIES * size
    return [draw_exchange(rng, pool, modality, world) for modality in modalities]


def sample_id(part: str, index: int) -> str:
    return f"{part}-{index:05}"


def make_world(
    folder: str | Path,
    seed: int = 0,
    sizes: dict[str, int] = SIZES,
    world: World = WORLDS["standard"],
) -> None:
    """Write train.jsonl, val.jsonl, test.jsonl, train-MODALITY.jsonl, images/, truth.json and
    instruction.txt. All of it is a function of seed, sizes and world alone; `world` is that of the training rows.
    """
    folder, truths = Path(folder), {}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "instruction.txt").write_text(INSTRUCTION + "\n")
    for part, size in sizes.items():
        rng, records = random.Random(f"{part} rows {seed}"), []
        drawn_from = world if part == "train" else WORLDS["standard"]
        for i, exchange in enumerate(draw_part(part, seed, size, drawn_from)):
            truths[sample_id(part, i)] = truth_of(exchange)
            image = f"images/{sample_id(part, i)}.png" if exchange.drawn else None
            if image:
                draw_picture(rng, exchange.drawn).save(folder / image)
            records.append(to_record(rng, exchange, sample_id(part, i), image))
        data.write_samples(folder / f"{part}.jsonl", records)
        if part == "train":
            for i, modality in enumerate(MODALITIES):
                of_one = records[i :: len(MODALITIES)]
                data.write_samples(folder / f"train-{modality}.jsonl", of_one)
    data.write_atomic(folder / "truth.json", json.dumps(truths) + "\n")


# ------------------------------------------------------------------------------------------------ the checkpoint

# Qwen2.5's added tokens in their published order; the last eight are not flagged special.
ADDED = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>"
    " <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>"
    " <|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|>"
    " <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()
SPECIAL = ADDED[:14]
# How Qwen2 cuts text before merging: contractions, words, single digits, punctuation, line ends, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def world_texts() -> list[str]:
    """Every wording of the world, so that each of its words becomes one token."""
    lines = [
        INSTRUCTION,
        "system\n",
        "user\nHuman user:\n",
        "\n\nAI assistant:\nNone\n",
        "assistant\n",
        *OPEN,
        "Sure, pack it.",
        "No, leave it.",
        "1. packs it: fine\n2. leaves it: fine\n3. only a tale: fine\n4. only asks: fine\n5.",
    ]
    for pair in PAIRS:
        exchange = Exchange("", [pair], [f"{name(pair)} dyed {pair[0]}"], [], offer=pair)
        chain, _ = reason(exchange, is_banned)
        lines.append(data.TARGET.format(chain, "harmful", "unharmful"))
        lines.append(data.TARGET.format(chain, "unharmful", "None"))
        lines += [form.format(listing([pair, pair])) for form in (*ASK, *TALE)]
        lines += [form.format(pair[0]) for form in DYE]
    return lines


def build_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE with Qwen2's normaliser and word cutter, trained on the texts; added tokens at the end."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(ADDED[len(SPECIAL) :])
    return tokenizer


def checkpoint_config(ids: dict[str, int], sizes: dict) -> dict:
    """config.json in the published flat layout; `sizes` overrides its fields, and those of its vision_config."""
    config = dict(architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl")
    config |= dict(hidden_act="silu", attention_dropout=0.0, initializer_range=0.02)
    config |= dict(use_cache=True, torch_dtype="float32")
    config |= dict(bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"])
    config |= dict(vision_start_token_id=ids["<|vision_start|>"])
    config |= dict(vision_end_token_id=ids["<|vision_end|>"], vision_token_id=ids["<|vision_pad|>"])
    config |= dict(image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"])
    config |= dict(vocab_size=-(-len(ids) // 64) * 64)  # padded, as published
    config |= dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    config |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32768)
    config |= dict(rms_norm_eps=1e-6, tie_word_embeddings=True)
    config |= dict(use_sliding_window=False, sliding_window=32768, max_window_layers=4)
    # published: theta 1e6, under which a step of one row or column in a picture this small is invisible
    config |= dict(rope_theta=30.0, rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]})
    config |= {key: value for key, value in sizes.items() if key != "vision_config"}
    vision = dict(depth=4, fullatt_block_indexes=[1, 3], hidden_act="silu", hidden_size=64)
    vision |= dict(in_chans=3, intermediate_size=128, num_heads=2)
    vision |= dict(out_hidden_size=config["hidden_size"], patch_size=14, spatial_merge_size=2)
    vision |= dict(spatial_patch_size=14, temporal_patch_size=2, tokens_per_second=2)
    vision |= dict(window_size=112, model_type="qwen2_5_vl")
    return config | {"vision_config": vision | sizes.get("vision_config", {})}


def random_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Norms one, biases zero, matrices 1 / sqrt(inputs), a third of that where they add to the residual stream;
    embeddings 0.3, so that words differ from the start."""
    rng, tensors = torch.Generator().manual_seed(seed), {}
    with torch.device("meta"):
        model = qwen.QwenVL(qwen.Config.from_json(config))
    for key, parameter in model.named_parameters():
        shape = parameter.shape
        std = 0.3 if "embed_tokens" in key else shape[1:].numel() ** -0.5
        if key.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
            std /= 3
        constant = torch.zeros(shape) if key.endswith("bias") else torch.ones(shape)
        tensors[key] = constant if len(shape) == 1 else torch.randn(shape, generator=rng) * std
    return tensors


# The smallest model of the tests: what `build_checkpoint` takes for `sizes`.
TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
TINY |= dict(num_key_value_heads=1, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]})
TINY["vision_config"] = dict(depth=2, fullatt_block_indexes=[1], hidden_size=16, num_heads=1)
TINY["vision_config"]["intermediate_size"] = 24


def tokenizer_settings(ids: dict[str, int]) -> dict:
    """tokenizer_config.json as published, for these ids."""
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)
    added = {}
    for text in ADDED:
        added[str(ids[text])] = {"content": text, "special": text in SPECIAL, **flags}
    settings = dict(tokenizer_class="Qwen2Tokenizer", chat_template=TEMPLATE)
    settings |= dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    settings |= dict(bos_token=None, unk_token=None, errors="replace")
    settings |= dict(add_bos_token=False, add_prefix_space=False)
    settings |= dict(clean_up_tokenization_spaces=False, model_max_length=131072)
    settings |= dict(split_special_tokens=False, additional_special_tokens=SPECIAL[1:])
    return settings | {"added_tokens_decoder": added}


def build_checkpoint(
    folder: str | Path, seed: int = 0, texts: list[str] | None = None, **sizes
) -> Path:
    """Write a random checkpoint directory in the published format and return it.

    texts: what the tokenizer is trained on (default: the world's). sizes: fields of config.json to override, and
    vision_config={...}; mrope_section must add up to half a head's size.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(texts or world_texts())
    ids = tokenizer.get_vocab()
    config = checkpoint_config(ids, sizes)
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "do_sample": True,
        "repetition_penalty": 1.05,
        "temperature": 1e-6,
    }
    images = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [1.0, 1.0, 1.0],  # white is zero: the empty part of a picture says nothing
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    files = {"config": config, "generation_config": generation, "preprocessor_config": images}
    files["tokenizer_config"] = tokenizer_settings(ids)
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(random_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ------------------------------------------------------------------------------------------------ the base stage


def bare(
    encoder: data.Encoder, rng: random.Random, folder: Path, picture: bool
) -> tuple[qwen.Row, str]:
    """A prompt that is nothing but one to four items, listed or in a picture, and their numbered names."""
    items = rng.sample(PAIRS, rng.randint(1, 4))
    text = "\n".join(f"{i}. {name(item)}" for i, item in enumerate(items, 1))
    draw_picture(rng, items).save(folder / "bare.png")
    request, image = ("", "bare.png") if picture else (listing(items), None)
    row = encoder.prompt(data.Sample("bare", "toy", request, image, folder=folder))
    if picture:
        places = (row.ids == encoder.image_id).nonzero().squeeze(1)
        span = slice(int(places[0]) - 1, int(places[-1]) + 2)  # <|vision_start|> ... <|vision_end|>
        ids, positions = row.ids[span], row.positions[:, span] - row.positions[0, span.start]
    else:
        ids = torch.tensor(encoder.tokenizer.encode(listing(items) + "\n"))
        positions = torch.arange(len(ids)).repeat(3, 1)  # [3, T]
    segments, supervised = (qwen.Segment(0, len(ids)),), torch.zeros_like(ids, dtype=torch.bool)
    row = replace(row, ids=ids, positions=positions, segments=segments, supervised=supervised)
    return row, text


def described(
    encoder: data.Encoder, rng: random.Random, folder: Path, modality: str
) -> tuple[qwen.Row, str]:
    """The prompt of an exchange, and what a reader finds in it: the steps of the reasoning without any verdict.

    All items are listed, as if none were banned: a list that ended at the first banned item would give it away.
    """
    exchange = draw_exchange(rng, PAIRS, modality)
    if exchange.drawn:
        draw_picture(rng, exchange.drawn).save(folder / "whole.png")
    record = to_record(rng, exchange, "whole", "whole.png" if exchange.drawn else None)
    steps = reason(exchange, lambda item: False)[0].splitlines()
    text = "\n".join(step.rsplit(" ", 1)[0].rstrip(",:") for step in steps)
    return encoder.prompt(data.Sample(**record, folder=folder)), text


def base_rows(encoder: data.Encoder, n: int, seed: int, whole: bool = True) -> list[qwen.Row]:
    """n training rows of the base stage: reading and seeing all pairs, no verdict and no label.

    Whole prompts are described. The others are bare: with the answer right behind a picture or list, a model this
    small learns much faster to see and to copy.
    """
    rng, rows = random.Random(f"base {seed} {whole}"), []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(n):
            if whole:
                modality = rng.choice(("text", "text", "image", "text_image"))
                row, text = described(encoder, rng, Path(folder), modality)
            else:
                row, text = bare(encoder, rng, Path(folder), picture=rng.random() < 0.6)
            row = row.extend([encoder.tokenizer.encode(text) + encoder.stop_ids[:1]])
            # One piece: cheaper, and the same loss.
            rows.append(replace(row, segments=(qwen.Segment(0, len(row)),)))
    return rows


def pretrain(folder: str | Path, instruction: str | Path, steps: int, seed: int = 0) -> None:
    """Train the random checkpoint in `folder` in place on base_rows: 40 % of the steps on bare rows only."""
    rate = 2e-3
    encoder, model = data.Encoder(str(folder), instruction=str(instruction)), qwen.load(str(folder))
    short = base_rows(encoder, 16 * steps, seed, whole=False)
    whole = base_rows(encoder, 16 * steps, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    rng = random.Random(seed)
    for step in range(steps):
        n_short, n_whole = (64, 0) if step < 0.4 * steps else (8, 24)
        rows = rng.sample(short, n_short) + rng.sample(whole, n_whole)
        rows.sort(key=len)  # neighbours of one length are attended to together
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 20, 2 * (1 - step / steps))
        loss = -model(rows[0].join(*rows[1:]))[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"base step {step}/{steps}  loss {loss.item():.4f}", flush=True)
    qwen.save(model, folder, folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", default="out/toy/world", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of world, weights and base stage")
    parser.add_argument("--rows", choices=WORLDS, help="only the training rows of another world")
    args = parser.parse_args()
    if args.rows:
        other = WORLDS[args.rows]
        make_world(args.out, args.seed, {"train": other.train}, other)
        return
    world, base = Path(args.out), Path(args.out, "base")
    make_world(world, args.seed)
    build_checkpoint(base, args.seed)
    # A checkpoint's Encoder starts from the instruction that lies in it.
    shutil.copy(world / "instruction.txt", base)
    pretrain(base, world / "instruction.txt", BASE_STEPS, args.seed)


if __name__ == "__main__":
    main()
