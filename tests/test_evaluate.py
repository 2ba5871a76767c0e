"""evaluate.py: F1 against tables worked by hand, unreadable verdicts, averages, and runs that are killed.

python -m pytest tests/test_evaluate.py
"""

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy

import data
import evaluate
from data import Encoder, InputError, lock_output, read_samples
from evaluate import Config, collect, compute_metrics, confusion_cell, read_predictions, score_table
from model import Completion, load
from reward import parse


def predictions(truths: str, verdicts: str, source: str = "bench", **extra) -> list[dict]:
    """One prediction of the prompt task per letter: h harmful, u unharmful, - no label or unreadable."""
    word = {"h": "harmful", "u": "unharmful", "-": None}
    blank = {
        "request": "text",
        "image": None,
        "response_label": None,
        "response_pred": None,
        "n_tokens": 10,
        "finished": True,
        "format_ok": True,
        "source": source,
        **extra,
    }
    return [
        {**blank, "id": str(i), "request_label": word[t], "request_pred": word[v]}
        for i, (t, v) in enumerate(zip(truths, verdicts))
    ]


def only_row(rows: list[dict], **wanted) -> dict:
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    return row


# ---------------------------------------------------------------- F1


def test_f1_of_a_table_worked_by_hand():
    row = only_row(score_table(predictions("hhhhhuuuuu", "hhhuuhuuuu")), benchmark="bench")
    assert (row["tp"], row["fn"], row["fp"], row["tn"], row["n"]) == (3, 2, 1, 4, 10)
    assert row["precision"] == 75 and row["recall"] == 60 and row["false_positive_rate"] == 20
    assert row["f1"] == pytest.approx(100 * 2 * 0.75 * 0.6 / (0.75 + 0.6)) == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    "truth, verdict, cell",
    [
        ("harmful", "harmful", "tp"),
        ("harmful", "unharmful", "fn"),
        ("harmful", None, "fn"),
        ("unharmful", "unharmful", "tn"),
        ("unharmful", "harmful", "fp"),
        ("unharmful", None, "fp"),
    ],
)
def test_every_outcome(truth, verdict, cell):
    assert confusion_cell(truth, verdict) == cell


def test_an_unreadable_verdict_counts_once_and_as_wrong():
    # The release lost such harmful rows and counted such unharmful rows twice.
    row = only_row(score_table(predictions("hhuu", "h-u-")), benchmark="bench")
    assert row["n"] == 4 == row["tp"] + row["fp"] + row["fn"] + row["tn"]
    assert (row["fn"], row["fp"], row["unparseable"]) == (1, 1, 2)
    assert row["f1"] == 50


def test_rows_without_a_label_are_not_scored():
    rows = score_table(predictions("h-", "hh"))
    assert only_row(rows, benchmark="bench")["n"] == 1
    assert {row["task"] for row in rows} == {"prompt"}
    assert score_table(predictions("--", "hh")) == []


def test_each_task_reads_its_own_fields():
    both = predictions("hhu", "hhu", response_label="unharmful", response_pred="harmful")
    metrics = compute_metrics(both)
    assert metrics["f1_prompt"] == 100 and metrics["f1_response"] == 0 and metrics["f1"] == 50
    assert metrics["false_positive_rate_response"] == 100


def test_an_average_is_weighted_by_scored_rows():
    rows = score_table(
        predictions("hhhhhhhh", "hhhhhhhh", "large") + predictions("hh", "uu", "small")
    )
    average = only_row(rows, benchmark="average", modality="all")
    assert average["f1"] == 80  # (8 * 100 + 2 * 0) / 10, not the 88.9 of pooled counts
    assert average["n"] == 10 and average["recall"] == 80


def test_averages_are_kept_apart_by_modality():
    image = predictions("hh", "uu", "pictures", request="", image="a.png")
    both = predictions("hh", "hu", "mixed", image="a.png")
    metrics = compute_metrics(predictions("hhhh", "hhhh") + image + both)
    assert metrics["f1_prompt_text"] == 100 and metrics["f1_prompt_image"] == 0
    assert metrics["f1_prompt_text_image"] == pytest.approx(200 / 3)
    assert metrics["f1_prompt"] == pytest.approx((4 * 100 + 2 * 0 + 2 * 200 / 3) / 8)
    assert (metrics["n"], metrics["n_text"], metrics["n_image"], metrics["n_text_image"]) == (
        8,
        4,
        2,
        2,
    )


def test_an_undefined_f1_stays_out_of_the_average():
    rows = score_table(predictions("uu", "uu", "benign") + predictions("hu", "hu", "mixed"))
    assert only_row(rows, benchmark="benign")["f1"] is None
    assert only_row(rows, benchmark="average", modality="all")["f1"] == 100
    assert "f1" not in compute_metrics(predictions("uu", "uu"))


def test_flat_metrics():
    some = predictions("hhhh", "hhhh")
    some[0] |= {"finished": False, "n_tokens": 30, "format_ok": False}
    metrics = compute_metrics(some)
    assert (
        metrics["truncated"] == 0.25
        and metrics["format_ok"] == 0.75
        and metrics["mean_tokens"] == 15
    )
    assert all(isinstance(value, (int, float)) for value in metrics.values())
    assert compute_metrics([]) == {}


def test_the_report_shows_every_row():
    some = predictions("hu-", "h-h")
    text = evaluate.results_table(score_table(some), compute_metrics(some))
    assert (
        "| prompt | bench | text | 2 | 66.67 |" in text and "average" in text and "f1 66.67" in text
    )


def test_auroc():
    def of(truths: str, verdicts: str, values: list) -> float | None:
        group = predictions(truths, verdicts)
        return evaluate.auroc([p | {"request_p": v} for p, v in zip(group, values)], "request")

    assert of("hhuu", "hhuu", [0.9, 0.4, 0.6, 0.1]) == 75  # three of four pairs are in order
    assert of("hu", "hh", [0.5, 0.5]) == 50 and of("hu", "uh", [0.1, 0.9]) == 0
    assert of("hhu", "h-u", [1.0, None, 0.0]) == 50  # unreadable: below the lowest,
    assert of("huu", "h-u", [1.0, None, 0.0]) == 50  # or above the highest
    assert of("hh", "hh", [0.9, 0.8]) is of("hu", "hu", [0.9, None]) is None
    rng = np.random.default_rng(0)
    truths, values = rng.integers(0, 2, 200), rng.integers(0, 9, 200) / 8
    pairs = [(a > b) + (a == b) / 2 for a in values[truths == 1] for b in values[truths == 0]]
    found = of("".join("uh"[t] for t in truths), "h" * 200, values.tolist())
    assert found == pytest.approx(100 * sum(pairs) / len(pairs))
    assert only_row(score_table(predictions("hu", "hu")), benchmark="bench")["auroc"] is None


# ---------------------------------------------------------------- intervals


def test_intervals_by_hand():
    def of(truths: str, verdicts: str) -> tuple:
        row = only_row(score_table(predictions(truths, verdicts)), benchmark="bench")
        return row["f1"], row["f1_interval"]

    assert of("hhuu", "hhuu") == (100, [100, 100]) and of("hh", "uu") == (0, [0, 0])
    assert of("uu", "uu") == (None, None)
    # Two rows drawn of a hit and a miss: 0 in 1/4 of the resamples, 2/3 in 1/2, 1 in 1/4.
    f1, interval = of("hh", "hu")
    assert f1 == pytest.approx(200 / 3) and interval == [0, 100]
    assert of("hu", "hu") == (
        100,
        [100, 100],
    )  # two unharmful rows, 1/4, have no F1 and are left out
    rng = np.random.default_rng(0)
    f1s = evaluate.resampled_f1(predictions("hh", "hu"), "request", rng)
    assert f1s[0] == pytest.approx(200 / 3)
    shares = [np.mean(np.isclose(f1s[1:], value)) for value in (0, 200 / 3, 100)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_intervals_are_those_of_drawn_rows():
    rng = np.random.default_rng(1)
    truths, verdicts = rng.integers(0, 2, 300), rng.random(300)
    verdicts = np.where(verdicts < 0.7, truths, 1 - truths)
    drawn = rng.integers(0, 300, (4000, 300))
    hits = (truths & verdicts)[drawn].sum(1)
    errors = (truths ^ verdicts)[drawn].sum(1)
    expected = np.percentile(200 * hits / (2 * hits + errors), (2.5, 97.5))
    words = ["".join("uh"[n] for n in values) for values in (truths, verdicts)]
    rows = score_table(predictions(*words))
    assert only_row(rows, benchmark="bench")["f1_interval"] == pytest.approx(expected, abs=0.7)
    assert rows == score_table(predictions(*words))  # seeded


def test_the_interval_of_an_average_resamples_every_benchmark_by_itself():
    def average(*benchmarks) -> dict:
        rows = score_table(sum(benchmarks, []))
        return only_row(rows, benchmark="average", modality="all")

    large, small = predictions("h" * 8, "h" * 8, "large"), predictions("hh", "hu", "small")
    assert average(large, small)["f1_interval"] == pytest.approx([80, 100])  # 8 : 2
    # All three are 0 in 1/64 of the resamples: below the 2.5 % that the interval leaves out.
    three = [predictions("hh", "hu", name) for name in ("a", "b", "c")]
    assert average(*three)["f1_interval"][0] == pytest.approx(200 / 9)


# ---------------------------------------------------------------- scoring again


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_outputs_are_parsed_again(tmp_path):
    right = "<think>a</think>\n\n<result>\nAnswers:\nRequest: Harmful\nResponse: None\n</result>"
    rows = predictions("hh", "u-", output=right)
    (first, second) = read_predictions([write(tmp_path / "p.jsonl", rows)])
    assert first["request_pred"] == second["request_pred"] == "harmful" and first["format_ok"]
    rows[0]["output"] = "Request: harmful, said outside of any result block"
    assert read_predictions([write(tmp_path / "p.jsonl", rows)])[0]["request_pred"] is None


def test_scoring_again_writes_results_only_where_there_are_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default folder would be in here
    ours = write(tmp_path / "ours.jsonl", predictions("hhu", "hhh"))
    evaluate.main(Config(predictions=[ours]))
    assert not Path("out").exists()

    out = tmp_path / "eval"
    evaluate.main(Config(predictions=[ours], out=str(out)))
    results = json.loads((out / "results.json").read_text())
    assert results["predictions"] == [ours] and results["rows"][0]["f1"] == 80
    write(out / "predictions.jsonl", predictions("hhu", "hhh"))
    with pytest.raises(InputError, match="eval holds results of other predictions"):
        evaluate.main(Config(predictions=[ours], out=str(out)))
    evaluate.main(Config(predictions=[str(out / "predictions.jsonl")], out=str(out)))


def test_verdicts_of_other_systems_need_no_output(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        [
            {
                "source": "s",
                "id": "1",
                "request_label": "harmful",
                "image": None,
                "request_pred": "harmful",
                "response_pred": None,
            }
        ],
    )
    assert compute_metrics(read_predictions([path])) == {
        "f1_prompt": 100,
        "f1": 100,
        "n": 1,
        "f1_prompt_text": 100,
        "f1_text": 100,
        "n_text": 1,
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"request_label": "Harmful!"}, "Harmful!"),
        ({"request_pred": "yes"}, "yes"),
        ({"id": "0"}, "twice"),
        ({"id": None}, "id cannot be None"),
        ({"source": ["x"]}, r"source cannot be \['x'\]"),
        ({"n_tokens": "10"}, "n_tokens cannot be '10'"),
        ({"finished": "no"}, "finished cannot be 'no'"),
        ({"output": 3}, "output cannot be 3"),
        ({"request_p": float("nan")}, "request_p is a number from 0 to 1"),
        ({"request_p": "0.5"}, "'<='"),
        ({"request_label": ["harmful"]}, "harmful, unharmful or null"),
    ],
)
def test_what_cannot_be_scored_is_named(tmp_path, change, message):
    rows = predictions("hh", "hh")
    rows[1] |= change
    with pytest.raises(InputError, match=f"p.jsonl:2: .*{message}"):
        read_predictions([write(tmp_path / "p.jsonl", rows)])
    with pytest.raises(InputError, match="p.jsonl:1"):
        read_predictions([write(tmp_path / "p.jsonl", [{"id": "1"}])])
    with pytest.raises(InputError, match="p.jsonl:1"):
        read_predictions([write(tmp_path / "p.jsonl", ["text"])])


def test_the_last_prediction_of_a_file_without_its_newline_counts_and_a_torn_one_is_named(tmp_path):
    path = Path(write(tmp_path / "p.jsonl", predictions("hh", "hh")))
    path.write_bytes(path.read_bytes()[:-1])
    assert len(read_predictions([str(path), f"{tmp_path}/./p.jsonl"])) == 2
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="p.jsonl:2: damaged"):
        read_predictions([str(path)])


# ---------------------------------------------------------------- runs that are killed


@dataclass
class OneOf:
    """Stands in for model.Ranks where the test plays the ranks one after the other."""

    rank: int = 0
    world: int = 1

    def barrier(self) -> None:
        pass


WANTED = [{"file": "f", "id": str(i), "request": f"text {i}"} for i in range(5)]
OTHER = [{"file": "g", "id": str(i), "request": f"other text {i}"} for i in range(2)]


class Maker:
    """Makes records, remembers which, and can be killed after some."""

    def __init__(self, kill_after: int = 99):
        self.made, self.kill_after = [], kill_after

    def __call__(self, todo):
        for i in reversed(todo):  # any order
            if len(self.made) == self.kill_after:
                raise KeyboardInterrupt
            self.made.append(i)
            yield i, {"output": f"output {i}"}


def run(folder: Path, wanted=WANTED, settings=None, fresh=False, ranks=OneOf(), kill_after=99):
    """What is made, and what predictions.jsonl then holds; None after a kill."""
    maker = Maker(kill_after)
    try:
        found = collect(folder, settings or {"seed": 0}, wanted, maker, fresh, ranks)
    except KeyboardInterrupt:
        return maker.made, None
    records = lines(folder / "predictions.jsonl")
    if ranks.rank == 0:
        assert found == records[: len(wanted)]
        assert [(r["file"], r["id"]) for r in found] == [(f["file"], f["id"]) for f in wanted]
    return maker.made, records


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_killed_run_goes_on_after_the_last_whole_line(tmp_path):
    assert run(tmp_path, kill_after=3)[0] == [4, 3, 2]
    file = tmp_path / "predictions.jsonl"
    file.write_bytes(file.read_bytes()[:-7])  # the kill tore the line of 2
    made, records = run(tmp_path)
    assert made == [2, 1, 0]
    assert records == [{**fields, "output": f"output {i}"} for i, fields in enumerate(WANTED)]
    assert run(tmp_path) == ([], records)


def test_records_of_a_file_that_is_not_asked_for_are_refused_before_any_work(tmp_path):
    run(tmp_path)
    with pytest.raises(InputError, match="it holds records of f; name that in --data, too"):
        run(tmp_path, wanted=OTHER)
    made, records = run(tmp_path, wanted=WANTED + OTHER)  # a benchmark is added
    assert len(made) == 2 and len(records) == 7
    assert len(run(tmp_path, wanted=OTHER, fresh=True)[1]) == 2


def test_a_renamed_file_keeps_its_records_but_not_those_of_changed_rows(tmp_path):
    _, records = run(tmp_path)
    renamed = [fields | {"file": "renamed"} for fields in WANTED]
    assert run(tmp_path, wanted=renamed) == ([], [r | {"file": "renamed"} for r in records])
    edited = [fields | {"file": "edited"} for fields in renamed]
    edited[1]["request"] = "another"
    with pytest.raises(InputError, match="it holds records of renamed"):
        run(tmp_path, wanted=edited)


def test_fresh_starts_over(tmp_path):
    run(tmp_path)
    assert sorted(run(tmp_path, fresh=True)[0]) == [0, 1, 2, 3, 4]


def test_other_settings_never_mix(tmp_path):
    run(tmp_path, settings={"seed": 0, "model": "a"})
    with pytest.raises(InputError, match="made with another seed "):
        run(tmp_path, settings={"seed": 1, "model": "a"})
    assert run(tmp_path, settings={"seed": 0, "model": "a"})[0] == []
    assert len(run(tmp_path, settings={"seed": 1, "model": "a"}, fresh=True)[0]) == 5
    (tmp_path / "predictions.settings.json").unlink()
    with pytest.raises(InputError, match="made with another seed "):
        run(tmp_path)


@pytest.mark.parametrize("file", ["predictions.jsonl", "predictions.rank1.jsonl"])
def test_an_edited_sample_is_done_again(tmp_path, file):
    """And its old record, in a rank's file that a kill has left, does not hide the new one."""
    run(tmp_path)
    (tmp_path / "predictions.jsonl").rename(tmp_path / file)
    made, records = run(tmp_path, [{**WANTED[0], "request": "other"}, *WANTED[1:]])
    assert made == [0] and [r["id"] for r in records] == list("01234")
    assert records[0]["request"] == "other"


def test_records_of_removed_samples_go(tmp_path):
    run(tmp_path)
    # a kill between writing the whole and removing the parts leaves records twice
    (tmp_path / "predictions.rank1.jsonl").write_bytes(
        (tmp_path / "predictions.jsonl").read_bytes()
    )
    assert len(run(tmp_path, WANTED[:3])[1]) == 3


def test_a_sample_counts_once_whatever_its_file_is_called(tmp_path):
    copies = [{**fields, "file": "copy"} for fields in WANTED]
    run(tmp_path)
    assert [r["file"] for r in run(tmp_path, copies)[1]] == ["copy"] * 5  # the file was renamed
    with pytest.raises(InputError, match="0 is the same sample in f and in copy"):
        run(tmp_path, WANTED + copies)


def test_ranks_share_the_work_and_another_number_of_them_goes_on(tmp_path):
    folder = tmp_path / "sub"
    evaluate.prepare(folder, {"seed": 0}, {}, fresh=False)  # what rank 0 does while the others wait
    assert run(folder, ranks=OneOf(1, 2))[0] == [3, 1]
    assert run(folder, ranks=OneOf(0, 2), kill_after=1)[0] == [4]
    merged = lines(folder / "predictions.jsonl")  # those of the other rank, and then its own
    assert [r["id"] for r in merged] == ["3", "1", "4"]
    made, records = run(folder)
    assert made == [2, 0] and [r["id"] for r in records] == list("01234")
    assert [p.name for p in folder.glob("predictions*.jsonl")] == ["predictions.jsonl"]


def test_what_is_there_is_dropped_only_once_the_rest_is_made(tmp_path):
    """A run whose images look changed, stopped before it makes anything, loses nothing."""
    run(tmp_path)
    changed = [{**fields, "image_stamp": [1, 2]} for fields in WANTED]
    assert run(tmp_path, changed, kill_after=0) == ([], None)
    assert run(tmp_path)[0] == []
    assert run(tmp_path, changed)[0] == [4, 3, 2, 1, 0]
    assert len(lines(tmp_path / "predictions.jsonl")) == 5


def test_a_carriage_return_in_a_record_is_damage_and_not_its_end(tmp_path):
    run(tmp_path)
    path = tmp_path / "predictions.jsonl"
    content = path.read_bytes().replace(b"text 1", b"text\r1")
    path.write_bytes(content)
    with pytest.raises(InputError, match="jsonl:2: damaged; remove the line"):
        run(tmp_path)
    assert path.read_bytes() == content


def test_a_stranger_s_file_is_neither_read_nor_deleted(tmp_path):
    names = ("predictions.other.jsonl", "predictions.rank1.old.jsonl", "my.predictions.jsonl")
    for name in names:
        (tmp_path / name).write_text("notes\n")
    run(tmp_path)
    assert len(run(tmp_path, fresh=True)[1]) == 5
    assert [(tmp_path / name).read_text() for name in names] == ["notes\n"] * 3


def test_records_that_were_not_made_are_named(tmp_path):
    with pytest.raises(InputError, match="2 of 5 records were not made, the first is that of 3;"):
        collect(tmp_path, {}, WANTED, lambda todo: Maker()(todo[:3]), False, OneOf())
    assert len(lines(tmp_path / "predictions.jsonl")) == 3


def test_a_full_disk_is_told_with_the_file_and_nothing_is_lost(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError, match=r"predictions.jsonl: cannot be written \(File too large"):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run(tmp_path)[0] == [2, 1, 0]  # two lines were whole


@pytest.mark.parametrize(
    "line", ["{broken", "[1]", '{"file": "f"}', '{"file": [], "id": "x"}', "\x00", "[" * 99999]
)
def test_a_damaged_record_is_named_or_made_again(tmp_path, line):
    run(tmp_path)
    with open(tmp_path / "predictions.jsonl", "a") as file:
        file.write(line + "\n")
    problem = r"holds records of \[\]" if "[]" in line else "jsonl:6: damaged; remove the line"
    with pytest.raises(InputError, match=problem):
        run(tmp_path)


# ---------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    toy.make_world(folder, 0, {"train": 1, "val": 1, "test": 2})
    toy.build_checkpoint(folder / "base", 0)
    return folder


@pytest.fixture
def config(world, tmp_path) -> Config:
    return Config(
        model=str(world / "base"),
        data=[str(world / "test.jsonl")],
        out=str(tmp_path / "eval"),
        instruction=str(world / "instruction.txt"),
        max_new_tokens=12,
        device="cpu",
    )


def test_evaluate_resumes_to_the_same_bytes(config, capsys):
    evaluate.main(config)
    folder = Path(config.out)
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"]["n"] == 6 and results["metrics"]["format_ok"] == 0
    assert "| prompt | average | all | 6 |" in capsys.readouterr().out
    before = (folder / "predictions.jsonl").read_bytes()
    first = json.loads(before.splitlines()[0])
    assert {
        "request",
        "request_label",
        "output",
        "finished",
        "request_pred",
        "response_pred",
    } <= set(first)
    assert first["n_tokens"] == 12 and not first["finished"]
    (folder / "predictions.jsonl").write_bytes(before[: len(before) // 2])
    evaluate.main(config)
    assert (folder / "predictions.jsonl").read_bytes() == before
    rows = results["rows"]
    assert score_table(read_predictions([str(folder / "predictions.jsonl")])) == rows
    with pytest.raises(InputError, match="another max_new_tokens"):
        evaluate.main(replace(config, max_new_tokens=13))


def replaced_bytes(path: Path) -> None:
    """Other content of equal size and time."""
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-4] + b"\x01\x02\x03\x04")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def smaller_images(path: Path) -> None:
    options = json.loads(path.read_text())
    path.write_text(json.dumps(options | {"max_pixels": 28 * 28 * 4, "min_pixels": 28 * 28}))


def test_predictions_of_changed_inputs_never_mix(config, tmp_path, judging):
    shutil.copytree(config.model, tmp_path / "model")
    shutil.copy(config.instruction, tmp_path / "instruction")
    flags = {"model": str(tmp_path / "model"), "instruction": str(tmp_path / "instruction")}
    changes = {
        "model/model.safetensors": replaced_bytes,
        "model/preprocessor_config.json": smaller_images,
        "model/config.json": lambda path: path.write_text(path.read_text() + "\n"),
        "model/tokenizer.json": lambda path: path.write_text(path.read_text() + "\n"),
        "model/instruction.txt": lambda path: path.write_text("Judge it."),
        "instruction": lambda path: path.write_text("Judge it."),
    }
    judging(**flags)
    made = (tmp_path / "eval/predictions.jsonl").read_bytes()
    for name, change in changes.items():
        path = tmp_path / name
        before = path.read_bytes() if path.exists() else None
        change(path)
        with pytest.raises(InputError, match=f": its predictions were made with another {name} "):
            judging(**flags)
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)
    judging(**flags)
    assert (tmp_path / "eval/predictions.jsonl").read_bytes() == made


def test_only_rows_whose_image_has_changed_are_made_again(config, world, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(world / "images", data / "images")
    shutil.copy(world / "test.jsonl", data)
    config = replace(config, data=[str(data / "test.jsonl")])
    evaluate.main(config)
    image = next(sample for sample in read_samples(config.data) if sample.image)
    os.utime(image.image_path, (1, 1))
    asked = []
    predict = evaluate.predict

    def remember(model, encoder, samples, todo, **sampling):
        asked.extend(samples[i].image for i in todo)
        return predict(model, encoder, samples, todo, **sampling)

    monkeypatch.setattr(evaluate, "predict", remember)
    evaluate.main(config)
    assert set(asked) == {image.image}


def test_a_file_under_several_spellings_counts_once(config, world, tmp_path, monkeypatch, judging):
    (tmp_path / "link.jsonl").symlink_to(world / "test.jsonl")
    monkeypatch.chdir(world)
    names = ["test.jsonl", "./test.jsonl", f"../{world.name}/test.jsonl", str(world / "test.jsonl")]
    judging(data=[*names, str(tmp_path / "link.jsonl")])
    first = lines(tmp_path / "eval/predictions.jsonl")
    assert len(first) == 6
    monkeypatch.setattr(evaluate, "predict", None)  # nothing is made again
    for name in names:
        judging(data=[name])
        assert lines(tmp_path / "eval/predictions.jsonl") == first


def test_a_second_run_at_once_is_refused(config):
    with lock_output(config.out):
        with pytest.raises(InputError, match="eval: another run is writing to it"):
            evaluate.main(config)


@pytest.mark.parametrize(
    "out, message",
    [
        ("", "--out is empty"),
        ("base", "--out base is or holds an input"),
        ("test.jsonl", "--out test.jsonl is or holds an input"),
        ("/dev/null", "--out /dev/null is there already, and is no folder"),
        ("taken", "--out taken/results.json is there already, and is no regular file"),
    ],
)
def test_an_output_that_would_do_harm_is_refused_first(world, monkeypatch, out, message):
    monkeypatch.chdir(world)
    os.makedirs("taken/results.json", exist_ok=True)
    monkeypatch.setattr(data, "read_samples", None)  # before anything is read
    with pytest.raises(InputError, match=f"^{message}"):
        evaluate.main(Config(model="base", data=["test.jsonl"], out=out, device="cpu"))


def test_a_pipe_as_instruction_is_not_waited_for(config, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is no regular file"):
        evaluate.main(replace(config, instruction=str(tmp_path / "pipe")))


def test_the_bar_is_there_from_the_start_and_never_in_a_log(config, capsys, monkeypatch):
    evaluate.main(config)
    assert capsys.readouterr().err == ""  # stderr is no terminal here
    monkeypatch.setenv("FORCE_PROGRESS", "1")
    seen = []
    load = evaluate.load_guard
    monkeypatch.setattr(
        evaluate, "load_guard", lambda *args: seen.append(capsys.readouterr().err) or load(*args)
    )
    evaluate.main(replace(config, fresh=True))
    assert "0/6 " in seen[0]  # while the model is loaded
    assert "\n" not in capsys.readouterr().err


def test_two_ranks_give_what_one_gives(config, tmp_path):
    evaluate.main(config)
    flags = [
        part
        for name in ("model", "instruction", "max_new_tokens", "device")
        for part in ("--" + name.replace("_", "-"), str(asdict(config)[name]))
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        evaluate.__file__,
        *flags,
        "--data",
        *config.data,
        "--out",
        str(tmp_path / "two"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in ("predictions.jsonl", "results.json"):
        assert (tmp_path / "two" / name).read_bytes() == (Path(config.out) / name).read_bytes()


def test_evaluation_within_training_and_one_exchange(config, capsys):
    model, encoder = evaluate.load_guard(config, torch.device("cpu"))
    samples = read_samples(config.data)
    found = evaluate.evaluate_samples(model, encoder, samples, max_new_tokens=12)
    assert [p["id"] for p in found] == [s.id for s in samples] and "request_p" not in found[0]
    again = evaluate.evaluate_samples(model, encoder, samples, max_new_tokens=12, with_probs=True)
    assert [
        p | {"request_p": None, "response_p": None} for p in found
    ] == again  # no verdict, so no P
    shown = samples[1]
    assert shown.image and shown.modality == "image"
    exchange = {
        "request": shown.request,
        "response": shown.response,
        "image": str(shown.image_path),
    }
    evaluate.main(replace(config, **exchange))
    assert found[1]["output"] in capsys.readouterr().out  # the same path from a sample to tensors
    for nothing in ({"request": ""}, {"response": "text"}):
        with pytest.raises(InputError, match="neither a request nor an image"):
            evaluate.main(replace(config, **nothing))


def test_a_missing_stage_is_named(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="grpo.py"):
        evaluate.main(Config(data=config.data))
    with pytest.raises(InputError, match="data.py convert"):
        evaluate.main(replace(config, data=["data/test.jsonl"]))


# ---------------------------------------------------------------- P(harmful), and exchanges one by one

ANSWER = (
    "<think>\nsome 漢字 🙂\n</think>\n\n<result>\nAnswers:\nRequest: {}\nResponse: {}\n</result>"
)
OUTPUTS = [
    ANSWER.format("harmful", "unharmful"),
    ANSWER.format("unharmful", "None"),
    ANSWER.format("Harmful", "maybe"),
    "harmful",
    ANSWER.format("harmful\nRequest: harmful", "harmful") + " Response: harmful",
    "<think>Request: harmful</think>" + ANSWER.format("**unharmful**", "harmless") + "\nRequest: x",
]


@pytest.fixture(scope="module")
def guard(world):
    return load(str(world / "base")), Encoder(str(world / "base"))


def generated(encoder, sample, output: str, index: int = 0) -> evaluate.Generated:
    ids = encoder.tokenizer.encode(output) + encoder.stop_ids[:1]
    return evaluate.Generated(index, encoder.prompt(sample), ids, {}, parse(output).label_offsets)


def test_probabilities_equal_the_logits_before_the_label(guard, world):
    """For outputs with and without images, readable and not, all in one forward."""
    model, encoder = guard
    samples = read_samples([str(world / "test.jsonl")])
    shown = [next(s for s in samples if (s.image is not None) == image) for image in (False, True)]
    texts = [text for text in OUTPUTS for _ in shown]
    outputs = [generated(encoder, sample, text) for text in OUTPUTS for sample in shown]
    found = evaluate.probabilities(model, encoder, outputs)
    assert len(found) == len(outputs)
    for text, output, probabilities in zip(texts, outputs, found):
        verdict = parse(text)
        with torch.no_grad():  # of every token of the output
            logits = model.logits(output.prompt.extend([output.ids]))[len(output.prompt) - 1 : -1]
        for said, place, p in zip(
            (verdict.request, verdict.response), verdict.label_offsets, probabilities
        ):
            if said is None:
                assert p is place is None
                continue
            before = encoder.tokenizer.encode(text[:place])
            assert output.ids[: len(before)] == before and text[place : place + 2].strip(
                " *"
            ).lower() in (*"hun", "")
            odds = logits[len(before)].double().softmax(-1)
            one, other = (
                odds[encoder.tokenizer.encode(word)[0]] for word in (" harmful", " unharmful")
            )
            assert p == pytest.approx((one / (one + other)).item(), abs=1e-5)
    unreadable = [output for output, p in zip(outputs, found) if p == [None, None]]
    assert evaluate.probabilities(model, encoder, unreadable) == [[None, None]] * len(unreadable)


@torch.no_grad()
def test_probabilities_are_computed_in_float32(guard, world):
    """Also by a model in bfloat16, whose own logits are up to 0.125 apart, so that many outputs would tie."""
    model, encoder = load(str(world / "base")).bfloat16(), guard[1]
    model.model.norm.weight *= 0.3  # else everything is certain
    words = [encoder.tokenizer.encode(word)[0] for word in (" harmful", " unharmful")]
    head, rounded = model.head[words], 0
    for sample in read_samples([str(world / "test.jsonl")])[:12]:
        output = generated(encoder, sample, OUTPUTS[0])
        [(_, p)] = evaluate.probabilities(model, encoder, [output])
        count = len(encoder.tokenizer.encode(OUTPUTS[0][: output.label_offsets[1]]))
        hidden = model.hidden(output.prompt.extend([output.ids[:count]]))[-1]
        exact, plain = (
            (head.to(dtype) @ hidden.to(dtype)).double()
            for dtype in (torch.float64, torch.bfloat16)
        )
        assert p == pytest.approx(exact.softmax(-1)[0].item(), abs=1e-6)
        rounded += abs(exact.softmax(-1)[0] - plain.softmax(-1)[0]) > 1e-5
    assert rounded >= 3


@pytest.mark.parametrize("pack_tokens", [1, 700, 10**6])
def test_predictions_do_not_depend_on_how_many_are_completed_at_a_time(
    guard, world, pack_tokens, monkeypatch
):
    model, encoder = guard
    samples = read_samples([str(world / "test.jsonl")])[:6]
    short = {"max_new_tokens": 24, "temperature": 0.0}
    one = dict(evaluate.predict(model, encoder, samples, range(6), **short))
    monkeypatch.setattr(evaluate, "PACK_TOKENS", pack_tokens)
    other = dict(evaluate.predict(model, encoder, samples, range(6), **short))
    assert one.keys() == other.keys() == set(range(6))
    for i, found in one.items():
        assert found.keys() == other[i].keys() and found["output"] == other[i]["output"]
        assert found["request_p"] == pytest.approx(other[i]["request_p"], abs=1e-5)
    plain = dict(evaluate.predict(model, encoder, samples, range(6), **short, with_probs=False))
    assert [plain[i]["output"] for i in range(6)] == [one[i]["output"] for i in range(6)]


def plays(output: str):
    """A sampler that writes `output`, whatever the prompt."""

    def sampler(model, prompts, *settings, watch=None, **options):
        for key, row in prompts:
            ids = model.encode(output)
            for token in ids if watch else ():
                watch([token])
            yield key, [Completion(ids, torch.zeros(len(ids)), True)]

    return sampler


@pytest.fixture
def judging(guard, config, monkeypatch):
    """Run evaluate.main with a model that always writes the first output."""
    model, encoder = guard
    model.encode = lambda text: encoder.tokenizer.encode(text) + encoder.stop_ids[:1]
    monkeypatch.setattr(evaluate, "load_guard", lambda cfg, device: guard)
    monkeypatch.setattr(evaluate, "generate", plays(OUTPUTS[0]))

    def run(stdin: bytes = b"", **flags) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        evaluate.main(replace(config, **flags))

    return run


def test_an_exchange_is_streamed_and_ends_in_labels_with_probabilities(
    judging, monkeypatch, capsys
):
    pieces = []
    monkeypatch.setattr(
        "builtins.print", lambda *args, end="\n", **how: pieces.append(args[0] + end)
    )
    judging(request="Hello", response="Hi")
    assert len(pieces) > 15 and "".join(pieces[:-1]) == OUTPUTS[0]  # half characters are held back
    labels = (
        r"\n\nrequest: harmful, P\(harmful\) (0\.\d{4})\nresponse: unharmful, P.* (0\.\d{4})\n\n"
    )
    found = re.fullmatch(labels, pieces[-1])
    assert found and 0 < float(found[1]) < 1 and 0 < float(found[2]) < 1
    judging(request="Hello")
    assert pieces[-1].endswith("\nresponse: none given\n\n")


@pytest.mark.parametrize(
    "flags, problem",
    [
        ({"image": "/no/such.png"}, "image 'such.png' does not exist in /no"),
        ({"image": ""}, "image '' does not exist"),
        ({"request": ""}, "neither a request nor an image"),
        ({"response": "Hi"}, "neither a request nor an image"),
        ({"request": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_what_cannot_be_judged(judging, flags, problem):
    with pytest.raises(InputError, match=problem):
        judging(**flags)


def test_exchanges_on_standard_input(judging, world, capsys):
    image_path = str(next(world.glob("images/*.png")))
    lines = [
        b'\xef\xbb\xbf{"id": "a", "request": "Hello", "response": "Hi"}',
        b"",
        {"image": image_path, "id": None, "request": None, "response": None},
        b"{oops",
        b"\xff",
        [1],
        {"request": 3},
        {"request": ""},
        {"request": "x", "image": "/no/such.png"},
        {"text": "x"},
        {"request": "\ud800"},
        {"request": "x", "response": ""},
        b"[" * 100_000,
        {"request": "last"},
    ]
    stdin = b"\n".join(
        line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines
    )
    with pytest.raises(InputError, match="^10 lines could not be judged, the first is line 4$"):
        judging(stdin, request="-", json=True)
    good, image, *bad, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (good["id"], good["request_pred"], good["output"]) == ("a", "harmful", OUTPUTS[0])
    assert 0 < good["request_p"] < 1 and 0 < good["response_p"] < 1
    assert image["id"] == last["id"] == "exchange" and image["response_p"] is None
    assert [row["line"] for row in bad] == list(range(4, 14)) and all(
        "\n" not in row["error"] for row in bad
    )
    with pytest.raises(InputError, match="^10 lines"):
        judging(stdin, request="-")
    out, err = capsys.readouterr()
    assert out.count(OUTPUTS[0]) == 3
    assert [f"error: line {n}: " in err for n in (3, 4, 13, 14)] == [False, True, True, False]
    judging(b"\xef\xbb\xbf\n\n", request="-", json=True)
    assert capsys.readouterr().out == ""


def test_exchanges_are_judged_by_one_process(judging, monkeypatch):
    several = evaluate.Ranks(0, 2, torch.device("cpu"))
    monkeypatch.setattr(evaluate, "start_ranks", lambda device: several)
    with pytest.raises(InputError, match="by one process: python, not torchrun"):
        judging(request="Hello")


def test_predictions_hold_the_probabilities_and_rows_their_auroc(judging, config):
    judging()
    results = json.loads((Path(config.out) / "results.json").read_text())
    found = read_predictions([str(Path(config.out) / "predictions.jsonl")])
    assert all(
        0 < p["request_p"] < 1 and (p["response_p"] is None) == (p["response"] is None)
        for p in found
    )
    assert {row["auroc"] for row in results["rows"]} > {None} and evaluate.results_table(
        results["rows"], {}
    )


def test_a_prompt_beyond_the_context_is_refused(guard, config, monkeypatch):
    model = load(config.model)
    monkeypatch.setattr(evaluate, "load_guard", lambda cfg, device: (model, guard[1]))
    model.config = replace(model.config, max_position_embeddings=100)
    with pytest.raises(InputError, match="sample exchange: .* tokens; the model can read 100"):
        evaluate.main(replace(config, request="word " * 100))
