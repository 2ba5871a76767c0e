"""augment.py: what counts as right and as hard, the algebra of joined labels, merged pictures, provenance.

python -m pytest tests/test_augment.py
"""

import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import toy
from PIL import Image, ImageColor
from test_reward import output

import augment
import evaluate
from augment import AugmentFlags, concatenate, concatenations, either, is_right, merge_images
from data import Encoder, InputError, Sample, lock, read_samples, write_samples

LABELS = ("harmful", "unharmful", None)


def sample(name, request_label=None, response_label=None, response=None, **extra) -> Sample:
    labels = {"request_label": request_label, "response_label": response_label}
    fields = {"source": "bench", "request": f"ask {name}", "response": response}
    return Sample(name, **fields | labels | extra)


def test_right_is_every_label_right():
    for request_label, response_label, said, right in (
        ("harmful", "unharmful", output("harmful", "unharmful"), True),
        ("harmful", "unharmful", output("harmful", "harmful"), False),
        ("harmful", "unharmful", output("unharmful", "unharmful"), False),
        ("harmful", None, output("harmful", "None"), True),  # only the request is labelled
        (None, "harmful", output("unharmful", "Harmful"), True),
        ("unharmful", "unharmful", output("?", "unharmful"), False),  # unreadable is wrong
    ):
        assert is_right(said, sample("a", request_label, response_label, "answer")) is right


def pool(texts: int = 20, images: int = 5) -> tuple[list[Sample], list[int]]:
    """Texts of which each fifth is right 0, 1, .. 4 times, and images that are always right."""
    samples = [sample(f"t{i}", "harmful") for i in range(texts)]
    samples += [sample(f"i{i}", "harmful", request="", image="x.png") for i in range(images)]
    return samples, [i % 5 for i in range(texts)] + [4] * images


def chosen(seed: int = 0, augmented_share: float = 0.0, **flags) -> list[str]:
    flags = AugmentFlags(augmented_share=augmented_share, **flags)
    return [s.id for s in augment.select_samples(*pool(), random.Random(seed), flags)]


def test_samples_that_are_never_right_are_hard_and_images_always_are():
    assert sorted(chosen()) == ["i0", "i1", "i2", "i3", "i4", "t0", "t10", "t15", "t5"]
    assert sorted(chosen(keep_images=False)) == ["t0", "t10", "t15", "t5"]
    one_right = {f"t{i}" for i in (0, 1, 5, 6, 10, 11, 15, 16)}
    assert set(chosen(keep_images=False, max_correct=1)) == one_right


def test_size_share_and_seed():
    assert len(chosen(size=6)) == 6
    assert chosen(size=6) == chosen(size=6) != chosen(size=6, seed=1)
    assert len(chosen(size=10, augmented_share=0.2)) == 8
    mixed = chosen(size=10, random_share=0.6, keep_images=False)
    assert len(mixed) == len(set(mixed)) == 10  # 6 of any samples and the 4 hard ones
    assert {"t0", "t5", "t10", "t15"} <= set(mixed)


@pytest.mark.parametrize("first, second", list(itertools.product(LABELS, LABELS)))
def test_two_labels_of_things_that_exist(first, second):
    joined = either(first, second)
    assert joined == either(second, first)
    assert joined == concatenate(sample("a", first), sample("b", second)).request_label
    for hidden in ("harmful", "unharmful"):  # the answer holds whatever the unknown ones are
        truths = [label or hidden for label in (first, second)]
        assert joined in (None, "harmful" if "harmful" in truths else "unharmful")
    if joined is None:  # and unknown is said only where it depends on them
        assert None in (first, second) and "harmful" not in (first, second)


RESPONSES = [("answer", label) for label in LABELS] + [(None, None)]


@pytest.mark.parametrize("first, second", list(itertools.product(RESPONSES, RESPONSES)))
def test_a_response_that_is_absent_has_no_say(first, second):
    a, b = sample("a", "harmful", first[1], first[0]), sample("b", None, second[1], second[0])
    joined = concatenate(a, b)
    present = [label for response, label in (first, second) if response is not None]
    expected = "harmful" if "harmful" in present else None
    if set(present) == {"unharmful"}:
        expected = "unharmful"
    assert (joined.request_label, joined.response_label) == ("harmful", expected)
    assert (joined.response is None) == (not present)


def test_texts_are_joined_in_order_and_parents_recorded():
    joined = concatenate(sample("a", response=" One. "), sample("b", response="Two."))
    assert (joined.request, joined.response) == ("ask a ask b", "One. Two.")
    assert concatenate(sample("a"), sample("b", response="Two.")).response == "Two."
    assert augment.join_texts("", "b") == augment.join_texts("b", "") == "b"
    joined = concatenate(joined, sample("c"))
    assert joined.id == "a+b+c" and joined.source == "concat" and joined.parents == ("a", "b", "c")


def test_merged_pixels():
    merged = merge_images(Image.new("RGB", (3, 2), "red"), Image.new("RGB", (2, 4), "blue"))
    assert merged.size == (5, 4) and merged.mode == "RGB"
    for x, y in itertools.product(range(5), range(4)):
        colour = "blue" if x >= 3 else "red" if y < 2 else "white"
        assert merged.getpixel((x, y)) == ImageColor.getrgb(colour), (x, y)


def test_a_large_merge_shrinks_to_the_canvas_and_a_small_one_does_not_grow():
    for size, merged in (((1500, 1000), (1024, 341)), ((10, 2048), (10, 1024)), ((4, 4), (8, 4))):
        assert merge_images(Image.new("RGB", size), Image.new("RGB", size)).size == merged


def test_two_pictures_become_one_and_one_stays_itself(tmp_path):
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.png")
    Image.new("RGB", (4, 6), "blue").save(tmp_path / "b.png")
    a = sample("a", request="", folder=tmp_path, image="a.png")
    b = sample("b", folder=tmp_path, image="b.png")
    c = sample("c", folder=tmp_path)
    both = concatenate(a, b)
    assert both.image.startswith("images/") and both.modality == "text_image"
    assert Image.open(both.image_path).size == (12, 6) and a.image_path.is_file()
    assert concatenate(b, a).image != both.image
    assert concatenate(a, c).image == concatenate(c, a).image == "a.png"
    assert concatenate(c, c).image is None and concatenate(a, a).modality == "image"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    toy.make_world(folder, 0, {"train": 6, "val": 1, "test": 1})
    toy.build_checkpoint(folder / "base", 0)
    return folder


@pytest.fixture(scope="module")
def encoder(world) -> Encoder:
    return Encoder(str(world / "base"), str(world / "instruction.txt"))


def draw(encoder, samples, count, seed=0, limit=3072) -> list[Sample]:
    return list(concatenations(samples, count, random.Random(seed), encoder, limit))


def test_pairs_are_distinct_samples_drawn_once(encoder):
    samples = [sample(name, "harmful") for name in "abcd"]
    pairs = Counter(frozenset(pair.parents) for pair in draw(encoder, samples, 100))
    assert pairs == Counter(map(frozenset, itertools.combinations("abcd", 2)))  # all 6, each once
    first = draw(encoder, samples, 3)
    assert len(first) == 3 and draw(encoder, samples[:1], 3) == []
    assert first == draw(encoder, samples, 3) != draw(encoder, samples, 3, seed=1)


def test_pairs_without_a_label_or_over_the_limit_are_left_out(encoder):
    unknown = sample("a", "unharmful", None, "answer"), sample("b", None, "unharmful", "answer")
    assert draw(encoder, list(unknown), 5) == []
    samples = [sample("a", "harmful"), sample("b", "harmful")]
    samples.append(sample("c", "harmful", request="long " * 100))
    limit = len(encoder.prompt(concatenate(*samples[:2])))
    (pair,) = draw(encoder, samples, 5, limit=limit)
    assert set(pair.parents) == {"a", "b"} and draw(encoder, samples, 5, limit=limit - 1) == []


@pytest.fixture
def flags(world, tmp_path) -> AugmentFlags:
    return AugmentFlags(
        model=str(world / "base"),
        data=[str(world / "train.jsonl")],
        out=str(tmp_path / "rl.jsonl"),
        instruction=str(world / "instruction.txt"),
        size=20,
        max_new_tokens=6,
        device="cpu",
        temperature=20.0,  # at 1 an untrained model says much the same
        top_p=1.0,
    )


def test_from_training_samples_to_the_rl_set(flags, capsys, monkeypatch):
    augment.main(flags)
    samples, _ = read_samples([flags.out])  # the schema holds, pictures included
    assert len(samples) == 20 and sum(bool(s.parents) for s in samples) == 4  # 20 %
    originals = {s.id: s for s in read_samples(flags.data)[0]}
    for s in samples:
        if s.parents:
            assert set(s.parents) <= {other.id for other in samples}
        else:
            ours = replace(s, image=None, folder=Path())
            assert ours == replace(originals[s.id], image=None, folder=Path(), reasoning=None)
    assert "text: 6 samples with 0 of 4 outputs right" in capsys.readouterr().out
    mined = [json.loads(line) for line in open(f"{flags.out}.parts/predictions.jsonl")]
    assert len(mined) == 18 and all(len(set(record["outputs"])) == 4 for record in mined)
    monkeypatch.setattr(evaluate, "generate", None)  # another choice needs no new sampling
    before = Path(flags.out).read_bytes()
    augment.main(flags)
    assert Path(flags.out).read_bytes() == before
    augment.main(replace(flags, size=10))
    assert len(read_samples([flags.out])[0]) == 10


def test_samples_that_the_model_gets_right_are_left_out(flags, monkeypatch):
    """It knows texts; its records come in another order than the samples."""
    originals = {s.id: s for s in read_samples(flags.data)[0]}

    def mine(model, encoder, todo, flags):
        for i in reversed(todo):
            known = output(todo[i].request_label, todo[i].response_label)
            yield i, {"outputs": ["no", known if todo[i].modality == "text" else "no", "no", "no"]}

    monkeypatch.setattr(augment, "mine", mine)
    augment.main(flags)
    samples, _ = read_samples([flags.out])
    kept = Counter(originals[s.id].modality for s in samples if not s.parents)
    assert kept == {"image": 6, "text_image": 6}
    assert len(samples) == 12 + 3  # 20 % of the smaller set, too


def test_what_is_left_out_is_counted(flags, tmp_path, capsys):
    """Over-long prompts, rows without a label, bad rows: on the screen and beside the set."""
    rows = [{"id": "long", "source": "s", "request": "long " * 200, "request_label": "harmful"}]
    rows += [{"id": "short", "source": "s", "request": "x", "request_label": "harmful"}]
    rows += [{"id": "none", "source": "s", "request": "y"}, {"id": "bad"}]
    write_samples(tmp_path / "data.jsonl", rows)
    flags = replace(flags, data=[str(tmp_path / "data.jsonl")], skip_bad=True)
    augment.main(replace(flags, max_prompt_tokens=150))
    assert [s.id for s in read_samples([flags.out])[0]] == ["short"]
    counted = "'too_long': 1, 'chosen': 1, 'concatenated': 0, 'unlabelled': 1, 'left_out': 1}"
    assert counted in capsys.readouterr().out
    counts = json.loads(Path(f"{flags.out}.parts/counts.json").read_text())
    assert "data.jsonl:4: 'bad'" in counts["left_out"][0]
    with pytest.raises(InputError, match="none of 0 samples within the limit is hard"):
        augment.main(replace(flags, max_prompt_tokens=5, fresh=True))


def test_one_id_of_two_samples_is_refused(flags, tmp_path):
    write_samples(tmp_path / "other.jsonl", [sample("train-00000", "harmful")])
    with pytest.raises(InputError, match="'train-00000' is the id of two samples"):
        augment.main(replace(flags, data=[*flags.data, str(tmp_path / "other.jsonl")]))


def test_an_output_that_is_a_stranger_s_or_in_use_is_refused(flags):
    Path(flags.out).write_text("mine\n")
    for fresh in (False, True):
        with pytest.raises(InputError, match="rl.jsonl exists, but augment.py did not make it"):
            augment.main(replace(flags, fresh=fresh))
    assert Path(flags.out).read_text() == "mine\n"
    Path(flags.out).unlink()
    with lock(flags.out), pytest.raises(InputError, match="rl.jsonl: .*another run"):
        augment.main(flags)
