"""augment.py: what counts as right and as hard, the algebra of joined labels, merged pictures, provenance.

python -m pytest tests/test_augment.py
"""

import itertools
import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import toy
from PIL import Image

import augment
from augment import (
    Config,
    concatenate,
    concatenations,
    either,
    is_right,
    join_texts,
    merge_images,
    select_rl_rows,
)
from data import Encoder, InputError, Sample, lock_output, read_samples

LABELS = ("harmful", "unharmful", None)


def sample(
    key: str, request_label=None, response_label=None, response=None, request=None, **extra
) -> Sample:
    return Sample(
        key,
        "bench",
        f"ask {key}" if request is None else request,
        response=response,
        request_label=request_label,
        response_label=response_label,
        **extra,
    )


def output(request: str, response: str) -> str:
    return (
        f"<think>why</think><result>\nAnswers:\nRequest: {request}\nResponse: {response}\n</result>"
    )


# ---------------------------------------------------------------- right, hard, chosen


@pytest.mark.parametrize(
    "request_label, response_label, said, right",
    [
        ("harmful", "unharmful", output("harmful", "unharmful"), True),
        ("harmful", "unharmful", output("harmful", "harmful"), False),
        ("harmful", "unharmful", output("unharmful", "unharmful"), False),
        ("harmful", None, output("harmful", "None"), True),  # only the request is labelled
        (None, "harmful", output("unharmful", "Harmful"), True),
        ("harmful", "unharmful", "Request: harmful\nResponse: unharmful", False),  # no result block
        ("unharmful", "unharmful", output("?", "unharmful"), False),  # unreadable is wrong
        ("unharmful", None, "", False),
    ],
)
def test_right_is_every_label_right(request_label, response_label, said, right):
    assert is_right(said, sample("a", request_label, response_label, "answer")) is right


def pool(texts: int = 20, images: int = 5) -> tuple[list[Sample], list[int]]:
    """Text rows of which each fifth is right 0, 1, .. 4 times, and image-only rows that are always right."""
    rows = [sample(f"t{i}", "harmful") for i in range(texts)]
    rows += [sample(f"i{i}", "harmful", request="", image="x.png") for i in range(images)]
    return rows, [i % 5 for i in range(texts)] + [4] * images


def chosen(seed: int = 0, **flags) -> list[str]:
    return [
        row.id
        for row in select_rl_rows(
            *pool(), random.Random(seed), Config(augmented_share=0.0, **flags)
        )
    ]


def test_only_rows_that_are_never_right_are_hard_and_images_always_are():
    assert sorted(chosen()) == ["i0", "i1", "i2", "i3", "i4", "t0", "t10", "t15", "t5"]
    assert sorted(chosen(keep_images=False)) == ["t0", "t10", "t15", "t5"]
    assert set(chosen(keep_images=False, max_correct=1)) == {
        f"t{i}" for i in (0, 1, 5, 6, 10, 11, 15, 16)
    }


def test_the_pool_can_be_mixed_with_any_rows():
    mixed = chosen(size=10, random_share=0.6, keep_images=False)
    assert len(mixed) == len(set(mixed)) == 10  # 6 of any rows and the 4 hard ones
    assert {"t0", "t5", "t10", "t15"} <= set(mixed)
    everything = chosen(size=25, random_share=1.0)
    assert len(set(everything)) == 25


def test_size_share_and_seed():
    assert len(chosen(size=6)) == 6
    assert chosen(size=6) == chosen(size=6) != chosen(size=6, seed=1)
    rows, right = pool()
    assert (
        len(select_rl_rows(rows, right, random.Random(0), Config(size=10, augmented_share=0.2)))
        == 8
    )


def test_statistics_count_every_row_once():
    table = augment.right_counts_table(*pool(), 4)
    assert "| text | 4 | 4 | 4 | 4 | 4 |" in table and "| image | 0 | 0 | 0 | 0 | 5 |" in table


# ---------------------------------------------------------------- the algebra of labels


@pytest.mark.parametrize("first, second", list(itertools.product(LABELS, LABELS)))
def test_two_labels_of_things_that_exist(first, second):
    joined = either(first, second)
    assert joined == either(second, first)
    for hidden in ("harmful", "unharmful"):  # the answer holds whatever the unknown ones are
        truths = [label or hidden for label in (first, second)]
        assert joined in (None, "harmful" if "harmful" in truths else "unharmful")
    if joined is None:  # and unknown is said only where it depends on them
        assert None in (first, second) and "harmful" not in (first, second)


RESPONSES = [("answer", label) for label in LABELS] + [(None, None)]


@pytest.mark.parametrize("first, second", list(itertools.product(RESPONSES, RESPONSES)))
@pytest.mark.parametrize("request_first, request_second", list(itertools.product(LABELS, LABELS)))
def test_labels_of_every_pair_in_every_order(request_first, request_second, first, second):
    a = sample("a", request_first, first[1], first[0])
    b = sample("b", request_second, second[1], second[0])
    joined = concatenate(a, b)
    assert joined.request_label == either(request_first, request_second)
    present = [label for response, label in (first, second) if response is not None]
    expected = (
        "harmful"
        if "harmful" in present
        else "unharmful"
        if present and set(present) == {"unharmful"}
        else None
    )
    assert joined.response_label == expected
    assert (joined.response is None) == (not present)
    swapped = concatenate(b, a)
    assert (swapped.request_label, swapped.response_label) == (
        joined.request_label,
        joined.response_label,
    )


def test_harm_in_the_second_row_is_found():
    # The release graded a joined row against its first half.
    joined = concatenate(
        sample("a", "unharmful", "unharmful", "x"), sample("b", "harmful", "harmful", "y")
    )
    assert (joined.request_label, joined.response_label) == ("harmful", "harmful")
    assert is_right(output("harmful", "harmful"), joined)
    assert not is_right(output("unharmful", "unharmful"), joined)


# ---------------------------------------------------------------- texts and provenance


def test_texts_are_joined_in_order():
    joined = concatenate(sample("a", response=" One. "), sample("b", response="Two."))
    assert (joined.request, joined.response) == ("ask a ask b", "One. Two.")
    assert concatenate(sample("a"), sample("b", response="Two.")).response == "Two."
    assert join_texts("", "b") == join_texts("b", "") == "b"  # the text of a picture's row is empty
    assert join_texts(None, None) is None and join_texts("", "") == ""
    assert join_texts(None, " ") == " "  # a response may not become empty


def test_parents_are_recorded_and_flattened():
    a, b, c = (sample(key) for key in "abc")
    joined = concatenate(concatenate(a, b), c)
    assert joined.id == "a+b+c" and joined.source == "concat" and joined.parents == ("a", "b", "c")
    assert joined.reasoning is None


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("swap", [False, True])
def test_merged_pixels(swap):
    flat, tall = Image.new("RGB", (3, 2), (255, 0, 0)), Image.new("RGB", (2, 4), (0, 0, 255))
    merged = merge_images(tall, flat) if swap else merge_images(flat, tall)
    assert merged.size == (5, 4) and merged.mode == "RGB"
    for x, y in itertools.product(range(5), range(4)):
        in_tall = x < 2 if swap else x >= 3
        colour = (0, 0, 255) if in_tall else (255, 0, 0) if y < 2 else (255, 255, 255)
        assert merged.getpixel((x, y)) == colour, (x, y)


def test_a_large_merge_shrinks_to_the_canvas_and_a_small_one_does_not_grow():
    half = Image.new("RGB", (1500, 1000))
    assert merge_images(half, half).size == (1024, 341)
    tall = Image.new("RGB", (10, 2048))
    assert merge_images(tall, tall).size == (10, 1024)
    small = Image.new("RGB", (4, 4))
    assert merge_images(small, small).size == (8, 4)


@pytest.fixture
def pictures(tmp_path) -> list[Sample]:
    """a and b have pictures, c has none."""
    for name, size in (("a", (8, 4)), ("b", (4, 6))):
        Image.new("RGB", size, name == "a" and "red" or "blue").save(tmp_path / f"{name}.png")
    return [
        sample(
            key,
            "harmful",
            request="" if key == "a" else None,
            folder=tmp_path,
            image=f"{key}.png" if key in "ab" else None,
        )
        for key in "abc"
    ]


def test_two_pictures_become_one_and_one_stays_itself(pictures):
    a, b, c = pictures
    both = concatenate(a, b)
    assert both.image.startswith("images/") and both.modality == "text_image"
    with Image.open(both.image_path) as image:
        assert (
            image.size == (12, 6)
            and image.format == "PNG"
            and image.getpixel((0, 5)) == (255, 255, 255)
        )
    assert concatenate(a, c).image == concatenate(c, a).image == "a.png"
    assert concatenate(c, replace(c, id="d")).image is None
    assert (
        concatenate(a, replace(a, id="e")).modality == "image"
    )  # two image-only rows stay image-only
    assert (a.image_path.is_file(), concatenate(b, a).image != both.image) == (True, True)


def test_a_row_is_brought_with_its_picture(pictures, tmp_path):
    a, _, c = (replace(row, reasoning="why") for row in pictures)
    there = augment.copy_into(a, tmp_path / "out")
    assert (
        there.image_path.read_bytes() == a.image_path.read_bytes()
        and there.folder == tmp_path / "out"
    )
    assert there.image_path.suffix == ".png" and there.reasoning is None
    assert augment.copy_into(a, tmp_path).image == "a.png"  # already in place
    assert augment.copy_into(c, tmp_path / "out") == replace(
        c, folder=tmp_path / "out", reasoning=None
    )


# ---------------------------------------------------------------- drawing pairs


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    toy.make_world(folder, 0, {"train": 6, "val": 1, "test": 1})
    toy.build_checkpoint(folder / "base", 0)
    return folder


@pytest.fixture(scope="module")
def encoder(world) -> Encoder:
    return Encoder(str(world / "base"), str(world / "instruction.txt"))


def draw(encoder, rows, count, seed=0, limit=3072) -> list[Sample]:
    return list(concatenations(rows, count, random.Random(seed), encoder, limit))


def test_pairs_are_distinct_rows_drawn_once(encoder):
    rows = [sample(key, "harmful") for key in "abcd"]
    pairs = draw(encoder, rows, 100)
    assert Counter(frozenset(pair.parents) for pair in pairs) == Counter(
        map(frozenset, itertools.combinations("abcd", 2))
    )  # all 6 of them, each once, none with itself
    assert len(draw(encoder, rows, 3)) == 3 and draw(encoder, rows[:1], 3) == []
    assert draw(encoder, rows, 3) == draw(encoder, rows, 3) != draw(encoder, rows, 3, seed=1)


def test_pairs_without_a_label_or_over_the_limit_are_left_out(encoder):
    unknown = sample("a", "unharmful", None, "answer"), sample("b", None, "unharmful", "answer")
    assert draw(encoder, list(unknown), 5) == []
    rows = [
        sample("a", "harmful"),
        sample("b", "harmful"),
        sample("c", "harmful", request="long " * 100),
    ]
    limit = len(encoder.prompt(concatenate(*rows[:2])))
    assert [pair.id in ("a+b", "b+a") for pair in draw(encoder, rows, 5, limit=limit)] == [True]
    assert draw(encoder, rows, 5, limit=limit - 1) == []


# ---------------------------------------------------------------- the stage


@pytest.fixture
def config(world, tmp_path) -> Config:
    return Config(
        model=str(world / "base"),
        data=[str(world / "train.jsonl")],
        out=str(tmp_path / "rl.jsonl"),
        instruction=str(world / "instruction.txt"),
        size=20,
        max_new_tokens=6,
        device="cpu",
        temperature=20.0,
        top_p=1.0,
    )  # at 1 an untrained model says much the same


def test_from_training_rows_to_the_rl_set(config, world, capsys, monkeypatch):
    augment.main(config)
    rows = read_samples([config.out])  # the schema holds, pictures included
    joined = [row for row in rows if row.parents]
    assert len(rows) == 20 and len(joined) == 4  # 20 %
    originals = {row.id: row for row in read_samples(config.data)}
    for row in rows:
        if row.parents:
            first, second = (originals[key] for key in row.parents)
            assert row.request_label == either(first.request_label, second.request_label)
            assert {first.id, second.id} <= {row.id for row in rows}
        else:
            assert replace(row, image=None, folder=Path()) == replace(
                originals[row.id], image=None, folder=Path(), reasoning=None
            )
    assert (
        "| text | 6 | 0 | 0 | 0 | 0 |" in capsys.readouterr().out
    )  # an untrained model is never right
    mined = [json.loads(line) for line in open(f"{config.out}.parts/predictions.jsonl")]
    assert len(mined) == 18 and all(len(set(record["outputs"])) == 4 for record in mined)
    monkeypatch.setattr(augment, "generate", None)  # another choice needs no new sampling
    before = Path(config.out).read_bytes()
    augment.main(config)
    assert Path(config.out).read_bytes() == before
    augment.main(replace(config, size=10))
    assert len(read_samples([config.out])) == 10


def test_rows_that_the_model_gets_right_are_left_out(config, monkeypatch):
    originals = {row.id: row for row in read_samples(config.data)}

    def mine(
        model, encoder, samples, todo, cfg
    ):  # a model that knows texts and fails on other rows
        for i in todo:
            right = output(samples[i].request_label, samples[i].response_label)
            known = samples[i].modality == "text"
            yield i, {"outputs": ["no", right if known else "no", "no", "no"]}

    monkeypatch.setattr(augment, "mine", mine)
    augment.main(config)
    rows = read_samples([config.out])
    kept = Counter(originals[row.id].modality for row in rows if not row.parents)
    assert kept == {"image": 6, "text_image": 6}
    assert len(rows) == 12 + 3  # 20 % of the smaller set, too


def test_over_long_prompts_are_not_sampled(config, capsys):
    with pytest.raises(InputError, match="none of 18 samples is within --max-prompt-tokens 5"):
        augment.main(replace(config, max_prompt_tokens=5))
    records = [json.loads(line) for line in open(f"{config.out}.parts/predictions.jsonl")]
    assert all(record["outputs"] == [] for record in records)


def test_bad_requests_are_refused(config, world, tmp_path):
    with pytest.raises(InputError, match="augmented-share"):
        augment.main(replace(config, augmented_share=1.0))
    copy = tmp_path / "copy.jsonl"
    copy.write_text(
        '{"id": "train-00000", "source": "s", "request": "x", "request_label": "harmful"}\n'
    )
    with pytest.raises(InputError, match="train-00000: another file"):
        augment.main(replace(config, data=[*config.data, str(copy)]))
    with pytest.raises(InputError, match="sft.py"):
        augment.main(Config(data=config.data))


def test_records_are_matched_to_samples_by_id(config, tmp_path, monkeypatch):
    """Not by position: of the image rows one is right, and the file is in another order each time."""
    rows = open(config.data[0]).read().splitlines(True)
    shutil.copytree(Path(config.data[0]).parent / "images", tmp_path / "images")
    right_id = json.loads(rows[0])["id"]

    def mine(model, encoder, samples, todo, cfg):
        for i in reversed(todo):
            right = output(samples[i].request_label, samples[i].response_label)
            yield i, {"outputs": [right if samples[i].id == right_id else "no"]}

    monkeypatch.setattr(augment, "mine", mine)
    config = replace(config, data=[str(tmp_path / "data.jsonl")], keep_images=False, size=99)
    for order in (rows, rows[::-1], rows[1:] + rows[:1]):
        (tmp_path / "data.jsonl").write_text("".join(order))
        augment.main(config)
        kept = {row.id for row in read_samples([config.out]) if not row.parents}
        assert len(kept) == 17 and right_id not in kept


def test_mined_records_that_are_no_texts_are_named(config):
    augment.main(config)
    file = Path(f"{config.out}.parts/predictions.jsonl")
    first, *rest = file.read_text().splitlines()
    broken = json.loads(first) | {"outputs": [3]}
    file.write_text("\n".join([json.dumps(broken), *rest, ""]))
    with pytest.raises(
        InputError, match="predictions.jsonl:1: train-00000: its outputs are no list"
    ):
        augment.main(config)


def test_the_output_is_no_input_and_has_one_writer(config, tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    shutil.copy(config.data[0], data)
    before = data.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(data)
    for out in (data, tmp_path / "link.jsonl", tmp_path / "." / "data.jsonl"):
        with pytest.raises(InputError, match="is or holds an input"):
            augment.main(replace(config, data=[config.data[0], str(data)], out=str(out)))
    assert data.read_bytes() == before
    for out, message in (("", "--out is empty"), ("/dev/null", "is no regular file")):
        with pytest.raises(InputError, match=message):
            augment.main(replace(config, out=out))
    with lock_output(config.out):
        with pytest.raises(InputError, match="rl.jsonl: another run is writing to it"):
            augment.main(config)
