"""evaluate.py: F1 against tables worked by hand, unreadable verdicts, averages, P(harmful), killed runs.

python -m pytest tests/test_evaluate.py
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy

import evaluate
from data import TARGET, Encoder, InputError, Sample, lock, read_records, read_samples
from evaluate import EvaluateFlags, collect, compute_metrics, read_predictions, score_table
from model import load
from reward import parse

WORDS = {"h": "harmful", "u": "unharmful", "-": None}
ANSWER = TARGET.format("some 漢字 🙂", "{}", "{}")


def predictions(truths: str, verdicts: str, source: str = "bench", **extra) -> list[dict]:
    """A prediction of the prompt task per letter: h harmful, u unharmful, - no label or unreadable."""
    blank = {"source": source, "request": "text", "image": None, "response": None}
    blank |= {"response_label": None, "response_pred": None, "request_p": None, "response_p": None}
    blank |= {"n_tokens": 10, "finished": True, "format_ok": True}
    found = []
    for i, (truth, verdict) in enumerate(zip(truths, verdicts)):
        labels = {"request_label": WORDS[truth], "request_pred": WORDS[verdict]}
        output = ANSWER.format(WORDS[verdict] or "?", "None")
        found.append({"id": str(i), "output": output, **blank, **labels, **extra})
    return found


def only_line(lines: list[dict], **wanted) -> dict:
    (line,) = [line for line in lines if wanted.items() <= line.items()]
    return line


def write(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_f1_of_tables_worked_by_hand():
    line = only_line(score_table(predictions("hhhhhuuuuu", "hhhuuhuuuu")), benchmark="bench")
    assert line["n"] == 10  # 3 tp, 2 fn, 1 fp, 4 tn
    assert (line["precision"], line["recall"], line["false_positive_rate"]) == (75, 60, 20)
    assert line["f1"] == pytest.approx(100 * 2 * 0.75 * 0.6 / (0.75 + 0.6))
    # Unreadable is wrong, once: the release lost such harmful rows and counted such unharmful ones twice.
    line = only_line(score_table(predictions("hhuu", "h-u-")), benchmark="bench")
    assert (line["n"], line["unparseable"], line["f1"]) == (4, 2, 50)
    assert (line["precision"], line["recall"], line["false_positive_rate"]) == (50, 50, 50)


def test_each_task_scores_the_rows_that_have_its_label():
    lines = score_table(predictions("h-", "hh"))
    assert [line["n"] for line in lines if line["task"] == "prompt"] == [1, 1, 1]
    assert len(lines) == 3 and score_table(predictions("--", "hh")) == []
    both = predictions("hhu", "hhu", response_label="unharmful", response_pred="harmful")
    both[0] |= {"finished": False, "n_tokens": 40, "format_ok": False}
    metrics = compute_metrics(both)
    assert metrics["f1_prompt"] == 100 and metrics["f1_response"] == 0 and metrics["f1"] == 50
    assert metrics["false_positive_rate_response"] == 100 and metrics["mean_tokens"] == 20
    assert metrics["truncated"] == pytest.approx(1 / 3) == 1 - metrics["format_ok"]
    assert all(isinstance(value, (int, float)) for value in metrics.values())


def test_an_average_is_weighted_by_scored_rows_and_kept_apart_by_modality():
    image = predictions("hh", "uu", "pictures", request="", image="a.png")
    both = predictions("hh", "hu", "mixed", image="a.png")
    metrics = compute_metrics(predictions("hhhh", "hhhh") + image + both)
    assert metrics["f1_prompt_text"] == 100 and metrics["f1_prompt_image"] == 0
    assert metrics["f1_prompt_text_image"] == pytest.approx(200 / 3)
    # Not the 76.9 of pooled counts.
    assert metrics["f1_prompt"] == pytest.approx((4 * 100 + 2 * 0 + 2 * 200 / 3) / 8)
    assert metrics["n"] == 8


def test_a_benchmark_without_an_f1_is_in_no_average_and_is_named(tmp_path, capsys):
    """900 benign rows, all right, would stand in the n of an average that they are not part of."""
    some = predictions("u" * 900, "u" * 900, "benign") + predictions("hu", "hu", "mixed")
    for modality in ("text", "all"):
        average = only_line(score_table(some), is_average=True, modality=modality)
        assert (average["f1"], average["n"], average["false_positive_rate"]) == (100, 2, 0)
    evaluate.main(EvaluateFlags(predictions=[write(tmp_path / "p.jsonl", some)]))
    shown = capsys.readouterr().out
    assert "No F1" in shown and "| prompt | benign | text | 900 | 0.00 |" in shown
    assert [line["is_average"] for line in score_table(predictions("uu", "uu"))] == [False]
    assert score_table(predictions("uu", "uh"))[-1]["f1"] == 0  # but one false alarm is in it


def test_auroc():
    def of(truths: str, verdicts: str, values: list) -> float | None:
        group = predictions(truths, verdicts)
        return evaluate.auroc([p | {"request_p": v} for p, v in zip(group, values)], "request")

    assert of("hhuu", "hhuu", [0.9, 0.4, 0.6, 0.1]) == 75  # three of four pairs are in order
    assert of("hhu", "h-u", [1.0, None, 0.0]) == 50  # unreadable: below the lowest,
    assert of("huu", "h-u", [1.0, None, 0.0]) == 50  # or above the highest
    assert of("hh", "hh", [0.9, 0.8]) is None
    rng = np.random.default_rng(0)
    truths, values = rng.integers(0, 2, 200), rng.integers(0, 9, 200) / 8
    pairs = [(a > b) + (a == b) / 2 for a in values[truths == 1] for b in values[truths == 0]]
    found = of("".join("uh"[t] for t in truths), "h" * 200, values.tolist())
    assert found == pytest.approx(100 * sum(pairs) / len(pairs))


def test_what_comes_into_a_table_stays_in_its_cell():
    lines = score_table(predictions("h", "h", "a|b\nc\x1b[2J\u202e"))
    shown = evaluate.markdown(lines, evaluate.COLUMNS).splitlines()
    assert len(shown) == 2 + len(lines)
    assert shown[2].startswith(r"| prompt | a\|b c [2J  | text | 1 | 100.00 |")


def test_two_predictions_of_one_exchange_are_refused_wherever_they_lie(tmp_path):
    a = write(tmp_path / "a.jsonl", predictions("hu", "hu", folder="../x", file="x/test.jsonl"))
    b = write(tmp_path / "b.jsonl", predictions("h", "u", folder="../y", file="y/test.jsonl"))
    with pytest.raises(InputError, match="b.jsonl:1: .*0 has two predictions: score one model"):
        read_predictions([a, b])
    other = write(tmp_path / "c.jsonl", predictions("h", "u", request="another"))
    assert len(read_predictions([a, other])) == 3


def test_a_label_that_is_none_is_named(tmp_path):
    path = write(tmp_path / "p.jsonl", predictions("h", "h", request_label="Harmful"))
    with pytest.raises(InputError, match="p.jsonl:1: .*'Harmful'"):
        read_predictions([path])


@dataclass
class OneOf:
    """Stands in for model.Ranks where the test plays the ranks one after the other."""

    rank: int = 0
    world: int = 1
    compute: str = "float32"

    def barrier(self) -> None:
        pass

    def gather(self, items: list) -> list:
        if self.world > 1:  # the others have not come so far
            raise KeyboardInterrupt
        return items


@pytest.fixture
def no_model(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(evaluate, "load_guard", lambda flags, ranks: (None, None))
    monkeypatch.setattr(evaluate.data, "fingerprint", lambda model, files: {"model": model})
    return tmp_path / "eval"


SAMPLES = [Sample(str(i), "s", f"text {i}") for i in range(5)]


def run(folder: Path, samples=SAMPLES, ranks=OneOf(), kill_after=99, **flags) -> tuple[list, list]:
    """What is made until a kill, and what predictions.jsonl then holds, None if it is not there."""
    made = []

    def make(model, encoder, todo, flags):
        for i in reversed(todo):  # any order
            if len(made) == kill_after:
                raise KeyboardInterrupt
            made.append(todo[i].id)
            yield i, {"output": f"output {todo[i].id}"}

    try:
        found = collect(folder, samples, make, EvaluateFlags(**flags), ranks)
        assert [record["id"] for record in found] == [sample.id for sample in samples]
        assert found == read_records(folder / "predictions.jsonl")
    except KeyboardInterrupt:
        found = None
        assert not (folder / "predictions.jsonl").exists()
    return made, found


def test_a_killed_run_of_two_ranks_goes_on_with_any_number_and_nothing_counts_before(no_model):
    """Rank 1 has finished, rank 0 is killed: 3 of 5 are there, and no file scores as if all were."""
    assert run(no_model, ranks=OneOf(0, 2), kill_after=2) == (["4", "2"], None)
    file = no_model / "rank-0.jsonl"
    file.write_bytes(file.read_bytes()[:-7])  # the kill tore the line of 2
    assert run(no_model, ranks=OneOf(1, 2)) == (["3", "1"], None)
    assert not (no_model / "predictions.jsonl").exists()
    assert run(no_model, ranks=OneOf(2, 3)) == (["2"], None)
    made, records = run(no_model)
    assert made == ["0"]
    assert [record["output"] for record in records] == [f"output {i}" for i in range(5)]
    kept = [record["id"] for path in no_model.glob("rank-*.jsonl") for record in read_records(path)]
    assert sorted(kept) == list("01234")  # none twice
    assert run(no_model) == ([], records)


def test_records_are_known_by_the_exchange_not_by_labels_folder_or_order(no_model, tmp_path):
    run(no_model)
    moved = [replace(s, request_label="harmful", folder=tmp_path) for s in reversed(SAMPLES)]
    made, records = run(no_model, moved)
    assert made == [] and {record["request_label"] for record in records} == {"harmful"}
    edited = [replace(SAMPLES[0], request="another"), *SAMPLES[1:]]
    assert run(no_model, edited, kill_after=0)[1] is None  # no file scores as if it were of these
    made, records = run(no_model, edited)
    assert made == ["0"] and records[0]["request"] == "another"
    image = tmp_path / "a.png"
    image.write_bytes(b"123")
    more = [*SAMPLES, Sample("5", "s", "", "a.png", folder=tmp_path)]
    assert run(no_model, more)[0] == ["5"] and run(no_model, more)[0] == []
    image.write_bytes(b"1234")  # of another size: another image
    assert run(no_model, more)[0] == ["5"]


def test_records_of_other_settings_never_mix(no_model):
    run(no_model, model="a")
    with pytest.raises(InputError, match="made with another model, seed; "):
        run(no_model, model="b", seed=1)
    with pytest.raises(InputError, match="made with another dtype; "):
        run(no_model, model="a", ranks=OneOf(compute="bfloat16"))
    assert run(no_model, model="a", max_branches=3, skip_bad=True)[0] == []
    assert len(run(no_model, model="b", seed=1, fresh=True)[1]) == 5
    assert run(no_model, model="b", seed=1, fresh=True)[0] == list("43210")


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_holds_anything_else_is_refused(no_model, fresh):
    no_model.mkdir()
    (no_model / "predictions.jsonl").write_text('{"paid": "for"}\n')
    with pytest.raises(InputError, match="eval holds files of something else; choose another"):
        run(no_model, fresh=fresh)
    assert (no_model / "predictions.jsonl").read_text() == '{"paid": "for"}\n'


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    toy.make_world(folder, 0, {"train": 1, "val": 1, "test": 2})
    toy.build_checkpoint(folder / "base", 0)
    return folder


@pytest.fixture
def flags(world, tmp_path) -> EvaluateFlags:
    return EvaluateFlags(
        model=str(world / "base"),
        data=[str(world / "test.jsonl")],
        out=str(tmp_path / "eval"),
        instruction=str(world / "instruction.txt"),
        max_new_tokens=12,
        device="cpu",
    )


def test_two_ranks_give_what_one_gives(flags, tmp_path):
    evaluate.main(flags)
    command = f"{sys.executable} -m torch.distributed.run --nproc-per-node 2 {evaluate.__file__}"
    command += f" --device cpu --out {tmp_path}/two --max-new-tokens 12 --data {flags.data[0]}"
    command += f" --model {flags.model} --instruction {flags.instruction}"
    subprocess.run(command.split(), capture_output=True, timeout=120, check=True)
    for name in ("predictions.jsonl", "results.json"):
        assert (tmp_path / "two" / name).read_bytes() == (Path(flags.out) / name).read_bytes()
    assert all((tmp_path / "two" / f"rank-{rank}.jsonl").is_file() for rank in (0, 1))
    # And what evaluation within training gives, but for the way to the images.
    stored = read_records(Path(flags.out, "predictions.jsonl"))
    samples, encoder = read_samples(flags.data)[0], Encoder(flags.model, flags.instruction)
    found = evaluate.evaluate_samples(load(flags.model), encoder, samples, max_new_tokens=12)
    assert [p | {"folder": ""} for p in found] == [p | {"folder": ""} for p in stored]
    assert all(Path(flags.out, p["folder"], p["image"] or ".").exists() for p in stored)


def test_rows_outside_of_the_table_are_counted(flags, world, tmp_path, capsys):
    """A row without a label is judged, a bad one left out, one over the context is wrong."""
    shutil.copytree(world / "images", tmp_path / "images")
    rows = read_records(world / "test.jsonl")
    rows[0] |= {"request_label": None, "response_label": None}
    rows[1] |= {"request": "word " * 30_000, "request_label": "harmful"}
    rows[2] |= {"request_label": "Harmful"}
    evaluate.main(replace(flags, data=[write(tmp_path / "test.jsonl", rows)], skip_bad=True))
    shown = capsys.readouterr().out
    for what in ("rows without a label", "prompts over the model's context", "bad rows left out"):
        assert f"\n1 {what}" in shown
    results = json.loads((Path(flags.out) / "results.json").read_text())
    assert (results["unlabelled"], results["too_long"]) == (1, 1)
    (bad,) = results["left_out"]
    assert f"test.jsonl:3: '{rows[2]['id']}': request_label is 'Harmful'" in bad
    records = read_records(Path(flags.out) / "predictions.jsonl")
    judged = {record["id"]: record for record in records}
    assert len(judged) == len(rows) - 1 and judged[rows[0]["id"]]["output"]
    cut = judged[rows[1]["id"]]
    assert cut["output"] == "" and cut["request_pred"] is None
    assert cut["n_tokens"] == 0 and not cut["finished"]
    with pytest.raises(InputError, match="does not fit into the model's context"):
        evaluate.main(replace(flags, request="word " * 30_000))


@pytest.fixture(scope="module")
def guard(world):
    return load(str(world / "base")), Encoder(str(world / "base"))


def test_a_second_run_is_refused(flags):
    with lock(flags.out), pytest.raises(InputError, match="eval: .*another run"):
        evaluate.main(flags)


# ---- P(harmful), and one exchange

OUTPUTS = [
    ANSWER.format("harmful", "unharmful"),
    ANSWER.format("unharmful", "None"),
    ANSWER.format("Harmful", "maybe"),
    ANSWER.format("harmful\nRequest: harmful", "harmful") + " Response: harmful",
    "<think>Request: harmful</think>" + ANSWER.format("**unharmful**", "harmless") + "\nRequest: x",
]


def plays(encoder: Encoder, output: str):
    """A sampler that writes `output`, whatever the prompt; the P of token i is i / 1000."""

    def sampler(model, prompts, n, watch=None, **options):
        for key, _ in prompts:
            ids = [*encoder.tokenizer.encode(output), encoder.stop_ids[0]]
            for token in ids if watch else ():
                watch([token])
            p_harmful = [i / 1000 for i in range(len(ids))]
            yield key, [SimpleNamespace(ids=ids, p_harmful=p_harmful, finished=True)]

    return sampler


@pytest.mark.parametrize("text", OUTPUTS)
def test_probabilities_are_those_of_the_token_in_which_the_label_begins(guard, text, monkeypatch):
    model, encoder = guard
    monkeypatch.setattr(evaluate, "generate", plays(encoder, text))
    (p,) = evaluate.evaluate_samples(model, encoder, [Sample("0", "s", "x", response="y")])
    verdict = parse(text)
    for field, offset in zip(("request", "response"), verdict.label_offsets):
        if offset is None:
            assert p[f"{field}_pred"] is None and p[f"{field}_p"] is None
            continue
        before = encoder.tokenizer.encode(text[:offset])
        assert p[f"{field}_p"] == pytest.approx(len(before) / 1000)
    (p,) = evaluate.evaluate_samples(model, encoder, [Sample("0", "s", "x")])
    assert p["response_p"] is None  # there is no response to judge


def test_probabilities_equal_the_logits_before_the_label(guard, world, monkeypatch):
    """Those of a plain forward pass over prompt and output, for samples with and without images."""
    model, encoder = guard
    words = [encoder.tokenizer.encode(f" {word}")[0] for word in ("harmful", "unharmful")]
    flags = EvaluateFlags(max_new_tokens=16, temperature=1.0)
    monkeypatch.setattr(evaluate, "p_harmful", lambda encoder, completion, offset: completion)
    for sample in read_samples([world / "test.jsonl"])[0]:
        [(_, p)] = evaluate.predict(model, encoder, {0: sample}, flags)
        ids, found = p["request_p"].ids, p["request_p"].p_harmful
        prompt = encoder.prompt(sample)
        with torch.no_grad():
            hidden = model.hidden_states(prompt.extend([ids]))[len(prompt) - 1 : -1]
            logits = torch.nn.functional.linear(hidden, model.head).double()
        odds = logits.softmax(-1)[:, words]
        found = torch.tensor(found, dtype=torch.float64)
        torch.testing.assert_close(found, odds[:, 0] / odds.sum(-1), atol=1e-5, rtol=0)
        assert len(found) == 16


def test_an_exchange_is_streamed_and_ends_in_labels(guard, flags, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load_guard", lambda flags, ranks: guard)
    monkeypatch.setattr(evaluate, "generate", plays(guard[1], OUTPUTS[0]))
    pieces, say = [], evaluate.say

    def watch(text: str, end: str = "\n") -> None:
        pieces.extend([text] * (end == ""))
        say(text, end)

    monkeypatch.setattr(evaluate, "say", watch)
    evaluate.main(replace(flags, request="Hello", response="Hi"))
    assert len(pieces) > 15 and "".join(pieces) == OUTPUTS[0]  # half characters are held back
    shown = capsys.readouterr().out
    assert re.search(r"request: harmful, P\(harmful\) 0\.\d\d\n\nresponse: unharmful, P\(", shown)
