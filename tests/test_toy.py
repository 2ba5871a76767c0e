"""The toy world is what it claims to be, and its checkpoint is a published-format Qwen2.5-VL.

In: nothing. Out: nothing. What is checked here is what every number measured in the toy world rests on.

    pytest tests/test_toy.py
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import toy
import transformers

import data
import reward

SIZES = {"train": 200, "val": 20, "test": 60}


def involved(exchange: toy.Exchange) -> set[toy.Item]:
    """Every (colour, thing) pair that an exchange shows, names, or makes by dyeing."""
    return {*exchange.drawn, *exchange.items, *([exchange.offer] if exchange.offer else [])}


def read(folder: Path, part: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    toy.make_world(folder, 3, SIZES)
    return folder


@pytest.fixture(scope="module")
def base(world) -> Path:
    return toy.build_checkpoint(world / "base", 3)


# ---------------------------------------------------------------------------------------------------- the world


def test_splits_share_no_combination_and_leave_sixty_for_the_test():
    split = toy.split_pairs(3)
    assert sorted(sum(split.values(), [])) == sorted(toy.PAIRS)
    used = {part: [involved(e) for e in toy.draw_part(part, 3, toy.SIZES[part])] for part in split}
    for part, pairs in used.items():
        assert set().union(*pairs) <= set(split[part])
    for kind in range(3):
        assert len(set().union(*used["test"][kind::3])) >= 40, toy.MODALITIES[kind]


def test_all_modalities_tasks_and_labels_are_there(world):
    samples = data.read_samples([str(world / "train.jsonl")])
    assert Counter(s.modality for s in samples) == dict.fromkeys(toy.MODALITIES, 200)
    for modality in toy.MODALITIES:
        mine = [s for s in samples if s.modality == modality]
        assert {(s.request_label, s.response_label) for s in mine} >= {
            ("harmful", "harmful"),
            ("harmful", "unharmful"),
            ("unharmful", "unharmful"),
            ("harmful", None),
        }
        assert 0.3 < sum(s.request_label == "harmful" for s in mine) / len(mine) < 0.7
    assert all((s.response is None) == (s.response_label is None) for s in samples)


def test_the_label_of_a_picture_is_only_in_its_pixels(world):
    rows = [row for row in read(world, "train") if row["image"] and not row["request"]]
    words = Counter((row["request"], row["response"], row["request_label"]) for row in rows)
    for response in (None, "Sure, pack it.", "No, leave it."):
        assert words["", response, "harmful"] and words["", response, "unharmful"]
    assert {row["response"] for row in rows} == {None, "Sure, pack it.", "No, leave it."}


def test_neither_half_of_a_text_image_sample_is_harmful():
    for exchange in toy.draw_part("train", 3, 200)[2::3]:
        assert {toy.clause(item) for item in exchange.drawn} == {"plain"}
        assert not any(thing in exchange.request.split() for thing in toy.KIND_OF)
    requests = Counter(
        (e.request, any(map(toy.is_banned, e.items))) for e in toy.draw_part("train", 3, 800)[2::3]
    )
    assert all(
        requests[request, False] for request, _ in requests
    )  # every wording, every dye, also unharmful


def test_every_banned_item_has_allowed_look_alikes():
    split = toy.split_pairs(3)
    for pool in (split["train"], split["test"]):
        allowed = {word for item in pool if not toy.is_banned(item) for word in item}
        assert all(allowed & set(item) for item in pool if toy.is_banned(item))


def test_labels_and_chains_by_hand():
    moss, whelk, flag = (
        ("red", "moss"),
        ("gray", "whelk"),
        ("blue", "flag"),
    )  # known ban, hidden ban, plain

    def judged(items, **reply):
        exchange = toy.Exchange("?", items, [toy.name(item) for item in items], [], **reply)
        return toy.reason(exchange, toy.is_banned)

    assert judged([flag, moss], stance="pack") == (
        "1. blue flag: cool cloth, fine\n2. red moss: warm plant, banned\n3. packs it: banned",
        [True, True],
    )
    assert judged([flag, whelk], stance="leave") == (
        "1. blue flag: cool cloth, fine\n2. gray whelk: dull shell, banned\n3. leaves it: fine",
        [True, False],
    )
    assert judged([moss], tale=True, stance="pack") == (
        "1. only a tale: fine\n2. packs it: fine",
        [False, False],
    )
    assert judged([], offer=whelk) == (
        "1. only asks: fine\n2. packs gray whelk: dull shell, banned",
        [False, True],
    )


def test_chains_that_hang_on_a_hidden_rule_are_set_aside(monkeypatch):
    rng = toy.random.Random(0)
    exchanges = toy.draw_part("train", 3, 300)
    kept = Counter()
    for exchange in exchanges:
        row = toy.to_row(rng, exchange, "x", None)
        ends = [
            toy.reason(exchange, lambda item: toy.is_banned(item, guess))[1]
            for guess in (True, False)
        ]
        assert (row["reasoning"] is None) == (ends[0] != ends[1])
        kept[
            "aside"
            if row["reasoning"] is None
            else "guess"
            if any(toy.clause(item) == "hidden" for item in exchange.items)
            else "plain"
        ] += 1
    assert kept["aside"] > 150 and kept["guess"] > 50 and kept["plain"] > 400, kept
    monkeypatch.setattr(toy, "BLIND_SPOT", "told")
    assert all(toy.to_row(rng, exchange, "x", None)["reasoning"] for exchange in exchanges)
    monkeypatch.setattr(toy, "BLIND_SPOT", "none")
    monkeypatch.setattr(toy, "RECAP", 0)
    rows = [toy.to_row(rng, exchange, "x", None) for exchange in exchanges]
    assert all(
        row["reasoning"] == toy.reason(e, toy.is_banned)[0] for row, e in zip(rows, exchanges)
    )


def test_three_of_ten_chains_end_with_a_recap_that_changes_nothing_else(monkeypatch):
    exchanges = toy.draw_part("train", 3, 300)

    def rows(share: float) -> list[dict]:
        monkeypatch.setattr(toy, "RECAP", share)
        rng = toy.random.Random(0)
        return [toy.to_row(rng, exchange, "x", None) for exchange in exchanges]

    recaps = []
    for exchange, row, without in zip(exchanges, rows(toy.RECAP), rows(0)):
        assert row | {"reasoning": None} == without | {"reasoning": None}
        if row["reasoning"] is None:
            assert without["reasoning"] is None
            continue
        steps, recap = without["reasoning"].splitlines(), row["reasoning"].splitlines()
        recaps.append(recap != steps)
        if recap != steps:
            verdicts = ", ".join(step.split()[-1] for step in steps)
            assert recap == [*steps, f"{len(steps) + 1}. all of it: {verdicts}"]
            output = data.TARGET.format(row["reasoning"], row["request_label"], "unharmful")
            verdict = reward.parse(output)
            assert verdict.format_ok and verdict.request == row["request_label"]
            assert not data.LEAKS.search(row["reasoning"])
    assert 0.25 < sum(recaps) / len(recaps) < 0.35


def test_rows_with_several_items_and_of_one_modality(world):
    several = toy.several_items("test", 3, SIZES["test"])
    for row in read(world, "test"):
        named = row["request"].count(" the ") + (row["response"] or "").count(" the ")
        if row["image"] is None:
            assert (row["id"] in several) == (named > 1)
    assert {i % 3 for i in range(180) if toy.row_id("test", i) in several} == {0, 1, 2}
    for modality in toy.MODALITIES:
        samples = data.read_samples([str(world / f"train-{modality}.jsonl")])
        assert len(samples) == 200 and {s.modality for s in samples} == {modality}
    parts = [read(world, f"train-{modality}") for modality in toy.MODALITIES]
    assert read(world, "train") == [row for rows in zip(*parts) for row in rows]


def test_a_pool_without_dyeable_items_gives_plain_exchanges():
    pool = toy.split_pairs(4)["val"]  # no thing of a hidden clause has a plain pair in it
    assert len(toy.draw_part("val", 4, 20)) == 60
    items, dye = toy.draw_dyed(toy.random.Random(0), pool, "hidden")
    assert all(toy.clause((dye, thing)) == "plain" for _, thing in items)


def test_a_seed_gives_the_same_world_and_another_one_a_different(world, tmp_path):
    for seed in (3, 4):
        toy.make_world(tmp_path / str(seed), seed, SIZES)
    same = [
        file.relative_to(world)
        for part in ("*.jsonl", "images/*.png")
        for file in sorted(world.glob(part))
    ]
    assert all((world / file).read_bytes() == (tmp_path / "3" / file).read_bytes() for file in same)
    assert (world / "test.jsonl").read_text() != (tmp_path / "4" / "test.jsonl").read_text()


# ------------------------------------------------------------------------------------------------ the checkpoint


def test_transformers_loads_the_checkpoint(base):
    model, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        base, output_loading_info=True
    )
    assert not any(report.values()), report
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    ids = tokenizer.convert_tokens_to_ids
    assert ids(toy.ADDED) == list(range(len(tokenizer) - 22, len(tokenizer)))
    assert (model.config.image_token_id, model.config.video_token_id) == (
        ids("<|image_pad|>"),
        ids("<|video_pad|>"),
    )
    assert tokenizer.eos_token_id == ids("<|im_end|>") and tokenizer.pad_token_id == ids(
        "<|endoftext|>"
    )
    again = toy.random_weights(json.loads((base / "config.json").read_text()), 3)
    assert torch.equal(
        again["model.norm.weight"], model.state_dict()["model.language_model.norm.weight"]
    )
    assert torch.equal(again["model.embed_tokens.weight"], model.get_input_embeddings().weight)


def test_sizes_override_the_config(tmp_path):
    toy.build_checkpoint(tmp_path, tie_word_embeddings=False, vision_config={"depth": 2})
    config = json.loads((tmp_path / "config.json").read_text())
    assert not config["tie_word_embeddings"] and config["vision_config"]["depth"] == 2
    names = toy.random_weights(config, 0)
    assert "lm_head.weight" in names and "visual.blocks.2.norm1.weight" not in names


def test_one_token_a_word_and_short_prompts(world, base):
    encoder = data.Encoder(str(base), instruction=str(world / "instruction.txt"))
    for word in [
        *toy.SHADE_OF,
        *toy.KIND_OF,
        *toy.SHADES,
        *toy.KINDS,
        "banned",
        "fine",
        "harmful",
        "unharmful",
    ]:
        assert encoder.count(" " + word) == 1, word
    assert encoder.count("4. all of it: fine, banned") == 9
    samples = data.read_samples([str(world / "test.jsonl")])
    assert max(len(encoder.prompt(sample)) for sample in samples) < 80
    assert (
        max(encoder.count(encoder.target_text(sample)) for sample in samples if sample.reasoning)
        < 80
    )


def test_base_rows_hold_no_verdict_and_are_supervised_behind_the_prompt(world, base):
    encoder = data.Encoder(str(base), instruction=str(world / "instruction.txt"))
    for whole in (True, False):
        rows = toy.base_rows(encoder, 40, 0, whole)
        assert {len(row.grids) for row in rows} == {0, 1}
        for row in rows:
            target = encoder.decode(row.ids[row.supervised].tolist())
            assert target.startswith("1. ") and not any(
                word in target for word in ("banned", "fine", "harmful")
            )
            assert row.supervised.diff().sum() == 1 and row.supervised[-1]
            assert (
                len(row.segments) == 1
                and row.segments[0].length == len(row) == row.positions.shape[1]
            )


def test_base_rows_list_what_is_behind_a_banned_item(world, base, tmp_path, monkeypatch):
    encoder = data.Encoder(str(base), instruction=str(world / "instruction.txt"))
    items = [("red", "moss"), ("gray", "whelk"), ("blue", "flag")]  # known ban, hidden ban, plain
    names = [toy.name(item) for item in items]
    exchange = toy.Exchange("May I bring it?", items, names, [], stance="leave")
    monkeypatch.setattr(toy, "draw_exchange", lambda *_: exchange)
    _, text = toy.described(encoder, toy.random.Random(0), tmp_path, toy.PAIRS, "text")
    assert text.splitlines() == [
        "1. red moss: warm plant",
        "2. gray whelk: dull shell",
        "3. blue flag: cool cloth",
        "4. leaves it",
    ]


def test_pretrain_lowers_the_loss(world, base, tmp_path):
    folder = toy.build_checkpoint(tmp_path / "base", 3)
    before = (folder / "model.safetensors").read_bytes()
    toy.pretrain(folder, world / "instruction.txt", 4)
    assert (folder / "model.safetensors").read_bytes() != before
