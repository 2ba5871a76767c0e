"""compare.py: the bootstrap, paired differences and released countings by hand; the paper's rows beside ours.

python -m pytest tests/test_compare.py
"""

import json
import subprocess
import sys

import compare
import numpy as np
import pytest
from compare import CompareFlags, score_by
from test_evaluate import only_line, predictions, write
from test_reward import RESULT, output

from data import InputError
from evaluate import score_table

EARLY = "Request: unharmful? " + RESULT.format("harmful", "None")
LATE = "Request: unharmful" + " " * 300 + RESULT.format("harmful", "HARMFUL")


def keyed(*groups: list[dict]) -> dict[tuple, dict]:
    """As read_predictions returns them."""
    names = ("source", "id", "request", "response", "image")
    return {tuple(p[name] for name in names): p for group in groups for p in group}


def test_intervals_by_hand():
    def of(truths: str, verdicts: str) -> tuple:
        line = only_line(score_by(predictions(truths, verdicts), compare.OURS), benchmark="bench")
        return line["f1"], line["f1_interval"]

    assert of("hhuu", "hhuu") == (100, [100, 100]) and of("hh", "uu") == (0, [0, 0])
    assert of("uu", "uu") == (None, None)
    assert of("hu", "hu") == (100, [100, 100])  # two unharmful rows, 1/4, have no F1: left out
    # Two rows drawn of a hit and a miss: 0 in 1/4 of the draws, 2/3 in 1/2, 1 in 1/4.
    f1, interval = of("hh", "hu")
    assert f1 == pytest.approx(200 / 3) and interval == [0, 100]


def test_intervals_are_those_of_drawn_rows():
    rng = np.random.default_rng(1)
    truths, verdicts = rng.integers(0, 2, 300), rng.random(300)
    verdicts = np.where(verdicts < 0.7, truths, 1 - truths)
    drawn = rng.integers(0, 300, (4000, 300))
    hits, errors = (truths & verdicts)[drawn].sum(1), (truths ^ verdicts)[drawn].sum(1)
    expected = np.percentile(200 * hits / (2 * hits + errors), (2.5, 97.5))
    some = predictions(*("".join("uh"[n] for n in values) for values in (truths, verdicts)))
    lines = score_by(some, compare.OURS)
    assert only_line(lines, benchmark="bench")["f1_interval"] == pytest.approx(expected, abs=0.7)
    assert lines == score_by(some, compare.OURS)  # seeded


def test_the_interval_of_an_average_draws_from_every_benchmark_by_itself():
    large, small = predictions("h" * 8, "h" * 8, "large"), predictions("hh", "hu", "small")
    average = only_line(score_by(large + small, compare.OURS), is_average=True, modality="all")
    assert average["f1_interval"] == pytest.approx([80, 100])  # 8 : 2


def test_paired_differences_by_hand():
    def differences(ours: str, theirs: str) -> list:
        shared = compare.paired(keyed(predictions("hh", ours)), keyed(predictions("hh", theirs)))
        line = score_by(shared, compare.OURS | compare.AGAINST)[0]
        return [line["f1_difference"], *line["f1_difference_interval"]]

    assert differences("hh", "uu") == [100, 100, 100] and differences("uu", "hh") == [-100] * 3
    assert differences("hu", "hu") == [0, 0, 0]  # while either F1 alone is 0 to 100
    assert differences("hu", "uh") == [0, -100, 100]  # 1/4 draw the first row only, 1/4 the second
    # Ours misses the first row: -100/3 as they are, 0 or -100 when one of the rows is drawn twice.
    assert differences("uh", "hh") == pytest.approx([200 / 3 - 100, -100, 0])
    # A benchmark where one side has no F1 (nothing harmful, no false alarm) is in no average.
    ours = keyed(predictions("hh", "hh", "a"), predictions("uu", "uu", "b"))
    theirs = keyed(predictions("hh", "hh", "a"), predictions("uu", "hu", "b"))
    table = score_by(compare.paired(ours, theirs), compare.OURS | compare.AGAINST)
    average = only_line(table, is_average=True, modality="all")
    assert (average["f1"], average["f1_against"], average["f1_difference"]) == (100, 50, 0)


def test_rows_are_paired_by_their_exchange_not_by_id():
    ours = keyed(predictions("hhh", "hhh", folder="../a"))
    theirs = keyed(predictions("hh", "uu", folder="../b"), predictions("h", "h", "other"))
    assert [p["id"] for p in compare.paired(ours, theirs)] == ["0", "1"]
    for change in ({"request": "another"}, {"image": "a.png"}, {"response": "Yes."}):
        with pytest.raises(InputError, match="holds none of these exchanges"):
            compare.paired(ours, keyed(predictions("hhh", "hhh", **change)))
    with pytest.raises(InputError, match="bench, 0: its request_label is unharmful in --against"):
        compare.paired(ours, keyed(predictions("uhh", "hhh")))


CELLS = [  # labels of request and response; cells of both tasks
    ("hu", None, RESULT.format("harmful", "unharmful"), "tp tn", "tp tn"),
    ("hu", None, EARLY, "fn tn", "fn fp+fp"),
    ("hu", None, LATE, "fn fp", "tp fp"),
    ("uh", None, RESULT.format("None", "harmful"), "fp tp", "fp+fp tp"),
    ("hh", None, "cut off", "fn fn", "- -"),
    ("uu", "i.png", RESULT.format("harmless", "unharmful"), "tn tn", "fp+fp tn"),
    ("hu", "i.png", "Request: harmful", "tp tn", "tp fp+fp"),  # the response cannot be read:
    ("hh", "i.png", "Request: harmful", "fn fn", "tp -"),  # it overwrites the request's verdict
]


@pytest.mark.parametrize("labels, image, output, released, predecessor", CELLS)
def test_released_counting_by_hand(labels, image, output, released, predecessor):
    word = {"h": "harmful", "u": "unharmful"}
    (p,) = predictions(labels[0], "-", image=image, response_label=word[labels[1]], output=output)
    for count, expected in zip(compare.RELEASED.values(), (released, predecessor)):
        cells = ["+".join(count(p, field)) or "-" for field in ("request", "response")]
        assert " ".join(cells) == expected


def test_published_lines_and_a_source_that_is_called_average():
    published = json.loads(compare.PUBLISHED.read_text())["rows"]
    of_text = [entry for entry in published if entry["task"] == "response"][:5]
    answered = {"response": "Yes.", "response_label": "harmful", "response_pred": "harmful"}
    texts = [p for row in of_text for p in predictions("--", "hh", row["names"][-1], **answered)]
    lines = compare.published_lines(score_table(texts))
    assert lines[-1]["is_average"] and (lines[-1]["n"], lines[-1]["published_n"]) == (10, 7837)
    assert len(lines) == 6  # all five are there, and the average over them; not that over all
    # With a benchmark that the paper lacks no average is comparable, whatever its name is.
    more = predictions("-", "h", "average", **answered)
    lines = compare.published_lines(score_table(texts + more))
    assert [line["benchmark"] for line in lines] == [row["names"][-1] for row in of_text]


def test_all_comparisons_from_the_command_line(tmp_path):
    records = predictions("hhu", "---", "ToxicChat", output=output("harmful", "unharmful"))
    write(tmp_path / "ours.jsonl", records)
    write(tmp_path / "theirs.jsonl", [record | {"output": ""} for record in records[:2]])
    command = f"{compare.__file__} ours.jsonl --against theirs.jsonl --published --release-counting"
    command = [sys.executable, *command.split(), "--out", "new"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "| 80.00 | 0.00 to 100.00 | 80.00 | 80.00 |" in shown
    assert "| prompt | ToxicChat | text | 2 | 100.00 | 0.00 | 100.00 | 100.00 to 100.00 |" in shown
    assert "2 exchanges in both, 1 only here, 0 only in --against" in shown
    assert "| prompt | ToxicChat | text | 3 | 2853 | 80.00 |" in shown
    results = json.loads((tmp_path / "new/compare.json").read_text())
    assert results["against"][0]["f1_difference_interval"] == [100, 100]
    write(tmp_path / "compare.json", records[:1])  # somebody's
    with pytest.raises(InputError, match="not of compare.py"):
        compare.main(CompareFlags([str(tmp_path / "ours.jsonl")], out=str(tmp_path)))
