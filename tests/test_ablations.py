"""ablations.py: stages run in order, two at a time, once; forks apply; claims.py's numbers by hand.

python -m pytest tests/test_ablations.py
"""

import importlib.util
import io
import json
import math
import sys
from itertools import groupby
from pathlib import Path

import ablations
import claims
import draw
import pytest
import torch
import toy
from ablations import Stage

import data
from data import InputError
from model import Completion

# ---------------------------------------------------------------------- running

STAGE = """
import sys, time
print("loaded")
for share in (50, 100):
    sys.stderr.write(f"\\rsampling {share}%")
    time.sleep(0.5)
sys.stderr.write("\\r             \\r")
time.sleep(0.5)
print("step 1/1")
sys.stderr.write("\\rsampling 7%")
time.sleep(0.5)
sys.stderr.write("\\r            \\r")
print("done")
"""


@pytest.fixture
def stage(tmp_path) -> Stage:
    (tmp_path / "stage.py").write_text(STAGE)
    return Stage("name", tmp_path, "stage.py --flag", sources=tmp_path)


def test_in_a_file_the_newest_line_stands_from_time_to_time(stage, capsys):
    ablations.run_all([stage], every=0.1)
    assert stage.log.read_text() == "loaded\nstep 1/1\ndone\n"  # no frame of the bar
    _, command, *live, last_but_one, last, _ = capsys.readouterr().out.splitlines()
    assert command == "$ python stage.py --flag" and (last_but_one, last) == ("step 1/1", "done ")
    texts = [line.partition(" s  name: ")[2] for line in live]
    assert [t for t, _ in groupby(texts) if t not in ("starting", "done")] == [
        "sampling 50%",
        "sampling 100%",
        "loaded",  # when the bar is gone, the last whole line again
        "step 1/1",  # and no bar in place of a step
    ]
    assert 1.4 < stage.seconds() < 60


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_newest_line_is_rewritten_in_place(stage, monkeypatch):
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        ablations.run_all([stage])
    _, *frames, end = terminal.getvalue().split(ablations.START_OF_LINE)
    assert any(frame.endswith(" s  name: sampling 50%") for frame in frames)
    assert not any("\n" in frame for frame in frames)
    assert end.startswith("step 1/1\ndone")


def test_a_stage_that_fails_ends_the_others_and_leaves_no_record(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("raise SystemExit('error: no such file')")
    (tmp_path / "long.py").write_text("import time; time.sleep(100)")
    bad, long = (Stage(n, tmp_path, f"{n}.py", sources=tmp_path) for n in ("bad", "long"))
    with pytest.raises(SystemExit) as stopped:
        ablations.run_all([bad, long, Stage("after", tmp_path, "bad.py", (bad,), tmp_path)])
    assert stopped.value.code == 1 and "error: no such file" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.stage.json")) and not (tmp_path / "after.log").exists()


def test_a_stage_runs_after_what_it_needs_and_once_until_something_changes(tmp_path, capsys):
    (tmp_path / "add.py").write_text("import sys; open(sys.argv[1], 'a').write(sys.argv[2])")

    def run(first: str = "a") -> str:
        """The order in which four stages begin: b needs a, d needs b and c."""
        (tmp_path / "order").write_text("")
        command = f"add.py {tmp_path}/order "
        a = Stage("a", tmp_path, command + first, sources=tmp_path)
        b = Stage("b", tmp_path, command + "b", (a,), tmp_path)
        c = Stage("c", tmp_path, command + "c", (), tmp_path)
        d = Stage("d", tmp_path, command + "d", (b, c), tmp_path)
        ablations.run_all([a, b, c, d])
        return (tmp_path / "order").read_text()

    assert run() in ("acbd", "cabd")  # a and c side by side
    assert run() == ""
    (tmp_path / "b.stage.json").unlink()  # as if stopped within b
    assert run() == "bd"
    capsys.readouterr()
    assert run(first="A") == "Abd"
    assert "a once more, with another command" in capsys.readouterr().out


def test_another_code_is_another_stage(tmp_path):
    sources = [tmp_path / name for name in ("one", "two")]
    for folder in sources:
        folder.mkdir()
        (folder / "x.py").write_text(f"# {folder.name}")
    first, second = (Stage("x", tmp_path, "x.py", sources=folder) for folder in sources)
    ablations.run_all([first])
    assert first.is_done() and not second.is_done()


def test_the_stages_of_a_seed():
    plain = [variant for variant in ablations.VARIANTS if not variant.fork]
    stages = ablations.stages_of(31, Path("/out"), plain, alone=False)
    listed = list(stages)
    for name, stage in stages.items():
        assert stage.name == name and stage.threads == 1
        assert all(listed.index(need.name) < listed.index(name) for need in stage.needs)
        assert "--seed 31" in stage.command
    assert {need.name for need in stages["grpo"].needs} == {"sft", "rl"}
    assert {need.name for need in stages["control"].needs} == {"sft", "world"}
    assert stages["rl-random"].copied[0] == Path("/out/seed-31/rl.jsonl.parts")
    assert len({variant.name for variant in ablations.VARIANTS}) == len(ablations.VARIANTS)


def test_training_seconds_count_mining_but_not_the_first_sft(tmp_path):
    stages = ablations.stages_of(31, tmp_path, ablations.VARIANTS[:3], alone=True)
    stages["sft"].folder.mkdir()
    for seconds, name in ((1000, "world"), (100, "sft"), (20, "rl"), (3, "grpo"), (25, "control")):
        record = {"settings": {}, "seconds": seconds}
        (tmp_path / "seed-31" / f"{name}.stage.json").write_text(json.dumps(record))
    found = [ablations.training_seconds(stages[name]) for name in ("sft", "grpo", "control")]
    assert found == [100, 23, 25]


# ---------------------------------------------------------------------- forks


@pytest.mark.parametrize("diff", sorted(ablations.FORKS.glob("*.diff")), ids=lambda path: path.stem)
def test_a_fork_applies_to_the_sources_as_they_are_and_is_used(diff, tmp_path):
    folder = ablations.forked(diff.stem, tmp_path / "fork")
    changed = [
        f for f in folder.glob("*.py") if f.read_text() != (ablations.ROOT / f.name).read_text()
    ]
    assert len(changed) >= 1
    for file in changed:
        compile(file.read_text(), file, "exec")
    assert diff.stem in {variant.name for variant in ablations.VARIANTS if variant.fork}


def test_a_diff_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "FORKS", tmp_path)
    (tmp_path / "old.diff").write_text(
        "--- a/grpo.py\n+++ b/grpo.py\n@@ -1,1 +1,1 @@\n-gone\n+new\n"
    )
    with pytest.raises(InputError, match="old.diff does not apply"):
        ablations.forked("old", tmp_path / "fork")


def fork_of(name: str, module: str, folder: Path):
    """A changed copy of a module, which itself imports the sources as they are."""
    path = ablations.forked(name, folder / name) / f"{module}.py"
    spec = importlib.util.spec_from_file_location(f"forked_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_what_the_forks_compute_by_hand(tmp_path):
    grpo = fork_of("no-std", "grpo", tmp_path)
    assert grpo.compute_advantages([-2.0, 0.0, -4.0, -2.0]).tolist() == [0.0, 2.0, -2.0, 0.0]
    assert not grpo.compute_advantages([-0.1, -0.1, -0.1]).any()

    # Two outputs, of two tokens and one: ratios 2 * 1.5 = 3 and 0.5, clipped to 1.2 and 0.8.
    grpo = fork_of("ratio-of-outputs", "grpo", tmp_path)
    ratios, advantages = torch.tensor([2.0, 1.5, 0.5]), torch.tensor([1.0, 1.0, -1.0])
    loss, counts = grpo.policy_loss(ratios.log(), torch.zeros(3), advantages, 0.2, [2, 1])
    assert loss.item() == pytest.approx(-(1.2 - 0.8))
    assert (counts["clipped_high"], counts["clipped_low"]) == (2, 1)  # tokens

    # Outputs of one token and three: the tokens of each add up to its advantage.
    grpo = fork_of("mean-over-outputs", "grpo", tmp_path)
    none = torch.zeros(2, dtype=torch.bool)
    positions, segments = torch.arange(2).repeat(3, 1), (data.Segment(0, 2),)
    prompt = data.Row(torch.arange(2), positions, segments, none, torch.zeros(0, 1176))
    outputs = [Completion([5] * n, torch.zeros(n), True) for n in (1, 3)]
    group = grpo.Group(0, None, prompt, outputs, [], [], torch.tensor([1.0, -1.0]))
    (batch,) = grpo.pack_groups([group], 100)
    by_length = sorted(batch.advantages.tolist())
    assert by_length == pytest.approx([-1 / 3, -1 / 3, -1 / 3, 1.0])

    betas = [fork_of(name, "grpo", tmp_path).Config().beta for name in ("beta-third", "beta-half")]
    assert betas == [1 / 3, 1 / 2]

    output = "<think>\n{}\n</think>\n\n<result>\nRequest: harmful\nResponse: harmful\n</result>"
    score = fork_of("accuracy-only", "reward", tmp_path).score
    for text in ("short", "long " * 50):  # half right, at any length
        assert score(output.format(text), "harmful", "unharmful", len).total == -0.5

    encoder = fork_of("labels-only", "data", tmp_path).Encoder
    sample = data.Sample("a", "toy", "?", None, None, "harmful", None, "a chain")
    target = encoder.target_text(sample)
    assert target.startswith("<result>") and "Request: harmful" in target


# ---------------------------------------------------------------------- numbers


def test_an_interval_by_hand():
    # 1, 2, 3: mean 2, standard deviation 1, t of two degrees of freedom 4.303; over sqrt(3): 2.484
    assert claims.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.484, abs=1e-3))
    # 0, 10: mean 5, standard deviation sqrt(50), t of one 12.706; 12.706 * 7.071 / 1.414 = 63.53
    assert claims.interval([0.0, 10.0]) == (5.0, pytest.approx(63.53))
    # five seeds: squares 4 + 1 + 0 + 1 + 4 = 10, variance 2.5; 2.776 * 1.5811 / 2.2361 = 1.963
    assert claims.interval([8.0, 9.0, 10.0, 11.0, 12.0]) == (10.0, pytest.approx(1.963, abs=1e-3))
    assert claims.interval([7.0]) == (7.0, None)
    twelve = [0.0, 2.0] * 6  # squares 12, variance 12 / 11; t of ten values 2.262
    expected = 2.262 * math.sqrt(12 / 11 / 12)
    assert claims.interval(twelve) == (1.0, pytest.approx(expected))


def test_a_paired_difference_by_hand():
    ours, theirs = {31: 50.0, 32: 72.0, 33: 93.0}, {31: 49.0, 32: 70.0, 33: 90.0, 34: 0.0}
    # within the seeds 1, 2, 3: far narrower than the spread between them
    assert claims.paired_difference(ours, theirs) == (2.0, pytest.approx(2.484, abs=1e-3))
    assert claims.paired_difference(ours, {35: 1.0}) is None


def test_scores_by_hand(tmp_path):
    several = toy.several_items("test", 31, 30)
    ids = [toy.row_id("test", i) for i in range(90)]
    hard, easy = (
        [name for name in ids if (name in several) == wanted][:2] for wanted in (True, False)
    )

    def line(name: str, truth: str, said: str) -> str:
        found = {"id": name, "source": "toy", "request": "?", "image": None, "format_ok": True}
        found |= {"request_label": truth, "response_label": None, "n_tokens": 40, "finished": True}
        found["output"] = "1. a" if name in easy else "1. a\n2. all of it: fine"
        return json.dumps(found | {"request_pred": said, "response_pred": None}) + "\n"

    said = [line(name, "harmful", "harmful") for name in (hard[0], *easy)]
    (tmp_path / "predictions.jsonl").write_text(
        "".join(said) + line(hard[1], "harmful", "unharmful")
    )
    found = claims.scores(tmp_path / "predictions.jsonl", 31)
    again = (
        (tmp_path / "predictions.jsonl").read_text().replace("fine", "fine\\n3. all of it: fine", 1)
    )
    (tmp_path / "again.jsonl").write_text(again)
    assert found["repeats"] == 0 and claims.scores(tmp_path / "again.jsonl", 31)["repeats"] == 25
    assert found["f1"] == pytest.approx(100 * 6 / 7)  # tp 3, fn 1: 2 * 3 / (2 * 3 + 1)
    assert found["f1_several"] == pytest.approx(100 * 2 / 3)  # tp 1, fn 1
    assert found["f1_single"] == 100 and found["mean_tokens"] == 40
    assert found["recaps"] == 50
    exchange = toy.Exchange("", [], [], [], stance="pack")
    assert claims.RECAPPED in toy.reason(exchange, toy.is_banned, recap=True)[0]


def test_a_course_by_hand(tmp_path):
    steps = [
        {"tokens": 10.0 * i, "entropy": 0.5, "clipped_high": 0.01 * i, "clipped_low": 0.01}
        for i in range(1, 9)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    found = claims.course(tmp_path / "metrics.jsonl")
    assert found["tokens"] == [15.0, 35.0, 55.0, 75.0] and found["entropy"] == [0.5] * 4
    assert found["clipped"] == pytest.approx([0.025, 0.045, 0.065, 0.085])


@pytest.fixture
def results() -> dict[int, claims.Result]:
    """Of three seeds; the last one has no GRPO."""

    def result(sft: float, grpo: float | None) -> claims.Result:
        scores = {"sft": {"f1": sft, "f1_text": sft, "mean_tokens": 50.0, "seconds": 100.0}}
        if grpo is not None:
            scores["grpo"] = {"f1": grpo, "f1_text": grpo, "mean_tokens": 60.0, "seconds": 20.0}
        courses = {"grpo": dict.fromkeys(claims.COURSE, [1.0, 2.0])}
        return claims.Result(scores, courses, {"sft": 90.0})

    return {31: result(80.0, 91.0), 32: result(82.0, 94.0), 33: result(84.0, None)}


def test_the_tables(results):
    lines = [claims.Line("RL helps", "sft", "grpo"), claims.Line("RL helps", "grpo", "grpo")]
    header, _, *rows = claims.table_of_claims(results, lines).splitlines()
    sft, grpo = (dict(zip(header.split(" | "), row.split(" | "))) for row in rows)
    assert sft["f1"] == "82.0 ± 5.0" and sft["seeds"] == "3"
    # -11 and -12 in the seeds that both have: 12.706 * 0.7071 / 1.4142 = 6.4
    assert sft["f1, difference"] == "-11.5 ± 6.4" and sft["against"] == "grpo"
    assert grpo["f1, difference"] == "-" and grpo["seeds"] == "2"
    assert rows[1].startswith("|  | grpo |")  # of the same claim
    *_, sft, grpo = claims.table_of_parts(results, lines).splitlines()
    assert "| 82.0 ± 5.0 (-11.5 ± 6.4) |" in sft and "| 92.5 ± 19.1 |" in grpo
    assert "| grpo | 32 | 94.0 |" in claims.table_of_seeds(results, lines)
    assert "| grpo | 1.0, 2.0 | 1.000, 2.000 |" in claims.table_of_courses(results)
    summary = claims.summary(results)
    assert summary["grpo"]["f1"] == 92.5 and summary["seconds"] == {"sft": 90.0}


def test_the_figure_of_differences(results, monkeypatch):
    monkeypatch.setattr(draw, "png", lambda figure: figure)
    figure = draw.differences(results, [claims.Line("RL helps", "sft", "grpo")])
    f1, tokens = figure.axes
    for axes, mean, half_width in ((f1, -11.5, 6.353), (tokens, -10.0, 0.0)):
        (point,) = axes.containers
        marker, _, (bar,) = point.lines
        assert marker.get_xdata() == [mean]
        ((low, _), (high, _)) = bar.get_segments()[0]
        assert (low, high) == pytest.approx((mean - half_width, mean + half_width), abs=1e-3)
    assert [label.get_text() for label in f1.get_yticklabels()] == ["sft (2 seeds)"]


def test_what_eco_saves_by_hand():
    def result(eco: float, grpo: float) -> claims.Result:
        return claims.Result({"eco": {"mean_tokens": eco}, "grpo": {"mean_tokens": grpo}}, {}, {})

    # 10, 20 and 15 %: as far apart as 1, 2, 3 above, times 5
    results = {1: result(45.0, 50.0), 2: result(40.0, 50.0), 3: result(51.0, 60.0)}
    assert claims.saving_note(results) == "Eco needs 15.0 ± 12.4 % fewer tokens than grpo."


def test_tables_of_a_study_that_has_not_ended(results):
    lines = [claims.Line("RL helps", name, "grpo") for name in ("sft", "control", "grpo")]
    report = claims.report(results | {34: claims.Result({}, {}, {})}, lines)
    assert "|  | control | 0 | - | - | - | grpo | - | - | - |" in report
    assert "| 34 |" not in report and "The control had" not in report


def test_a_control_with_too_few_seconds_is_told():
    def note(control: float, grpo: float) -> str:
        scores = {"control": {"seconds": control}, "grpo": {"seconds": grpo}}
        return claims.control_note({31: claims.Result(scores, {}, {})})

    assert "raise CONTROL" in note(190.0, 200.0) and "raise" not in note(210.0, 200.0)
