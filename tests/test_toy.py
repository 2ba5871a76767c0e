"""The toy world is what it claims to be, and its checkpoint is a published-format Qwen2.5-VL.

python -m pytest tests/test_toy.py
"""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import toy
import transformers

import data

SIZES = {"train": 200, "val": 20, "test": 60}
MOSS, WHELK, FLAG = ("red", "moss"), ("gray", "whelk"), ("blue", "flag")  # known ban, hidden, plain


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    toy.make_world(folder, 3, SIZES)
    toy.build_checkpoint(folder / "base", 3)
    return folder


@pytest.fixture(scope="module")
def encoder(world) -> data.Encoder:
    return data.Encoder(str(world / "base"), instruction=str(world / "instruction.txt"))


def samples_of(folder: Path, part: str) -> list[data.Sample]:
    samples, _ = data.read_samples([str(folder / f"{part}.jsonl")])
    return samples


def test_splits_share_no_pair_and_every_banned_item_has_allowed_look_alikes():
    split = toy.split_pairs(3)
    assert sorted(sum(split.values(), [])) == sorted(toy.PAIRS)
    for part, pairs in split.items():
        exchanges = toy.draw_part(part, 3, toy.SIZES[part])
        used = [{*e.drawn, *e.items, *filter(None, [e.offer])} for e in exchanges]
        assert set().union(*used) <= set(pairs)
        if part != "val":  # which is small
            allowed = {word for item in pairs if not toy.is_banned(item) for word in item}
            assert all(allowed & set(item) for item in pairs if toy.is_banned(item))
            assert all(len(set().union(*used[kind::3])) >= 40 for kind in range(3))


def test_all_modalities_tasks_and_labels_are_there(world):
    samples = samples_of(world, "train")
    assert Counter(s.modality for s in samples) == dict.fromkeys(toy.MODALITIES, 200)
    wanted = {("harmful", "harmful"), ("harmful", "unharmful"), ("unharmful", "unharmful")}
    for modality in toy.MODALITIES:
        mine = [s for s in samples if s.modality == modality]
        pairs = [(s.request_label, s.response_label) for s in mine]
        assert wanted | {("harmful", None)} <= set(pairs)
        assert 0.3 < sum(s.request_label == "harmful" for s in mine) / len(mine) < 0.7
    assert all((s.response is None) == (s.response_label is None) for s in samples)
    pictures = [s for s in samples if s.modality == "image"]  # labelled in their pixels alone:
    words = {(s.response, s.request_label) for s in pictures}
    assert len(words) == 6  # three replies (one is none), each with both labels


def test_neither_half_of_a_text_image_sample_is_harmful():
    labels = {}  # {request: of its exchanges, whether they are harmful}
    for exchange in toy.draw_part("train", 3, 800)[2::3]:
        assert {toy.clause(item) for item in exchange.drawn} == {"plain"}
        assert not set(exchange.request.split()) & toy.KIND_OF.keys()
        is_harmful = any(map(toy.is_banned, exchange.items))
        labels.setdefault(exchange.request, set()).add(is_harmful)
    assert all(False in of_request for of_request in labels.values())  # every wording, every dye


PACKED = "1. blue flag: cool cloth, fine\n2. red moss: warm plant, banned\n3. packs it: banned"
LEFT = "1. blue flag: cool cloth, fine\n2. gray whelk: dull shell, banned\n3. leaves it: fine"
TOLD = "1. only a tale: fine\n2. packs it: fine"
OFFERED = "1. only asks: fine\n2. packs gray whelk: dull shell, banned"


@pytest.mark.parametrize(
    "items, reply, steps, labels",
    [
        ([FLAG, MOSS], {"stance": "pack"}, PACKED, [True, True]),
        ([FLAG, WHELK], {"stance": "leave"}, LEFT, [True, False]),
        ([MOSS], {"tale": True, "stance": "pack"}, TOLD, [False, False]),
        ([], {"offer": WHELK}, OFFERED, [False, True]),
    ],
)
def test_labels_and_chains_by_hand(items, reply, steps, labels):
    exchange = toy.Exchange("?", items, [toy.name(item) for item in items], [], **reply)
    assert toy.reason(exchange, toy.is_banned) == (steps, labels)
    lines = steps.splitlines()
    recap = f"{len(lines) + 1}. all of it: {', '.join(line.split()[-1] for line in lines)}"
    assert toy.reason(exchange, toy.is_banned, recap=True) == (f"{steps}\n{recap}", labels)


def test_chains_that_hang_on_a_hidden_rule_are_set_aside_and_three_of_ten_end_with_a_recap():
    rng, kept = random.Random(0), Counter()
    for exchange in toy.draw_part("train", 3, 300):
        record = toy.to_record(rng, exchange, "x", None)
        _, if_banned = toy.reason(exchange, lambda item: toy.is_banned(item, True))
        _, if_allowed = toy.reason(exchange, lambda item: toy.is_banned(item, False))
        assert (record["reasoning"] is None) == (if_banned != if_allowed)
        is_guess = any(toy.clause(item) == "hidden" for item in exchange.items)
        kept["aside" if record["reasoning"] is None else "guess" if is_guess else "plain"] += 1
        kept["recap"] += ". all of it: " in (record["reasoning"] or "")
    assert kept["aside"] > 150 and kept["guess"] > 50 and kept["plain"] > 400, kept
    assert 0.25 < kept["recap"] / (kept["guess"] + kept["plain"]) < 0.35


def test_files_of_one_modality_and_the_other_worlds(world, tmp_path):
    parts = [samples_of(world, f"train-{modality}") for modality in toy.MODALITIES]
    assert samples_of(world, "train") == [s for samples in zip(*parts) for s in samples]
    # The rare and the short world: other training rows, of the same pairs; the same test.
    truths = {}
    for name, other in toy.WORLDS.items():
        toy.make_world(tmp_path / name, 3, SIZES, other)
        assert (tmp_path / name / "test.jsonl").read_text() == (world / "test.jsonl").read_text()
        found = json.loads((tmp_path / name / "truth.json").read_text())
        truths[name] = [truth for key, truth in found.items() if key.startswith("train")]
    assert max(len(truth["items"]) for truth in truths["short"]) == 2
    assert {len(truth["items"]) for truth in truths["standard"]} == {0, 1, 2, 3, 4}
    hidden = {name: [t["decided_by"] == "hidden" for t in found] for name, found in truths.items()}
    assert sum(hidden["rare"]) < 0.08 * 600 < 0.15 * 600 < sum(hidden["standard"])


def test_a_seed_gives_the_same_world_and_another_one_a_different(world, tmp_path):
    toy.make_world(tmp_path / "3", 3, SIZES)
    toy.make_world(tmp_path / "4", 4, SIZES)
    files = [f.relative_to(tmp_path / "3") for f in tmp_path.glob("3/**/*") if f.is_file()]
    assert all((world / f).read_bytes() == (tmp_path / "3" / f).read_bytes() for f in files)
    assert (world / "test.jsonl").read_text() != (tmp_path / "4" / "test.jsonl").read_text()


def test_transformers_loads_the_checkpoint(world):
    base = world / "base"
    load = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained
    model, problems = load(base, output_loading_info=True)
    assert not any(problems.values()), problems
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    ids = tokenizer.convert_tokens_to_ids
    assert ids(toy.ADDED) == list(range(len(tokenizer) - 22, len(tokenizer)))
    images = [model.config.image_token_id, model.config.video_token_id]
    assert images == ids(["<|image_pad|>", "<|video_pad|>"])
    again = toy.random_weights(json.loads((base / "config.json").read_text()), 3)
    assert torch.equal(again["model.embed_tokens.weight"], model.get_input_embeddings().weight)


def test_one_token_a_word_and_short_prompts(world, encoder):
    words = [*toy.SHADE_OF, *toy.KIND_OF, *toy.SHADES, *toy.KINDS, "banned", "fine"]
    assert {encoder.count(f" {word}") for word in [*words, "harmful", "unharmful"]} == {1}
    assert encoder.count("4. all of it: fine, banned") == 9
    samples = samples_of(world, "test")
    assert max(len(encoder.prompt(sample)) for sample in samples) < 80
    assert max(len(encoder.example(sample)) for sample in samples if sample.is_complete) < 160


def test_base_rows_hold_no_verdict_and_are_supervised_behind_the_prompt(encoder):
    for whole in (True, False):
        rows = toy.base_rows(encoder, 40, 0, whole)
        assert {len(row.grids) for row in rows} == {0, 1}
        for row in rows:
            target = encoder.decode(row.ids[row.supervised].tolist())
            assert target.startswith("1. ")
            assert not any(word in target for word in ("banned", "fine", "harmful"))
            assert row.supervised.diff().sum() == 1 and row.supervised[-1]
            assert [segment.length for segment in row.segments] == [len(row)]


def test_base_rows_list_what_is_behind_a_banned_item(encoder, tmp_path, monkeypatch):
    names = ["red moss", "gray whelk", "blue flag"]
    exchange = toy.Exchange("May I?", [MOSS, WHELK, FLAG], names, [], stance="leave")
    monkeypatch.setattr(toy, "draw_exchange", lambda *_: exchange)
    _, text = toy.described(encoder, random.Random(0), tmp_path, "text")
    steps = ("red moss: warm plant", "gray whelk: dull shell", "blue flag: cool cloth", "leaves it")
    assert text == "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))


def test_pretrain_trains_in_place(world, tmp_path, capsys):
    folder = toy.build_checkpoint(tmp_path / "base", 3)
    before = (folder / "model.safetensors").read_bytes()
    toy.pretrain(folder, world / "instruction.txt", 4)
    assert (folder / "model.safetensors").read_bytes() != before
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0]
