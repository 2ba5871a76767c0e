"""ablations.py: stages run in order, two at a time, once; forks apply; claims.py's numbers by hand.

python -m pytest tests/test_ablations.py
"""

import json
import subprocess
from pathlib import Path

import ablations
import claims
import pytest
from ablations import Stage


def test_the_newest_line_is_shown_from_time_to_time(tmp_path, capsys):
    text = "import time\nfor i in (1, 2): print('step', i), time.sleep(1)"
    (tmp_path / "stage.py").write_text(text)
    ablations.run_all([Stage("name", tmp_path, "stage.py --flag", sources=tmp_path)], every=0.1)
    _, command, *live, first, second, _ = capsys.readouterr().out.splitlines()
    assert command == "$ python stage.py --flag" and (first, second) == ("step 1", "step 2 ")
    shown = [line.partition(" s  name: ")[2] for line in live]
    assert list(dict.fromkeys(["starting", *shown])) == ["starting", "step 1", "step 2"]


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
    assert run(first="A") == "Abd"
    assert "a once more, with another command" in capsys.readouterr().out


def test_the_stages_of_a_seed():
    plain = [variant for variant in ablations.VARIANTS if not variant.fork]
    stages = ablations.stages_of(41, Path("/out"), plain, alone=False)
    listed = list(stages)
    for name, stage in stages.items():
        assert all(listed.index(need.name) < listed.index(name) for need in stage.needs)
        assert "--seed 41" in stage.command or name.startswith("rft-rows")

    def needs(name: str) -> set[str]:
        return {need.name for need in stages[name].needs}

    assert needs("grpo") == {"sft", "rl"} and needs("control") == {"sft", "world"}
    assert needs("rft") == {"sft", "rft-rows"} and needs("rft-rows") == {"world", "rl"}
    assert needs("rare-balanced") == {"rare-sft", "rare-rl-balanced"}
    assert needs("rare-rl") == {"rare", "rare-sft"} and needs("rare-sft") == {"rare", "world"}
    assert needs("rl-of-rft") == {"rft", "world"}
    assert stages["rl-unjoined"].copied[0] == Path("/out/seed-41/rl.jsonl.parts")
    assert stages["rare-rl-random"].command.count("--random-share 1 ") == 1
    assert "--data /out/seed-41/world/test.jsonl" in stages["eval-short-joined"].command
    # Only what a chosen variant needs is made.
    few = [variant for variant in ablations.VARIANTS if variant.name in ("sft", "grpo", "rft")]
    made = set(ablations.stages_of(41, Path("/out"), few, alone=True))
    evaluations = {"eval-sft", "eval-grpo", "eval-rft"}
    assert made == {"world", "sft", "rl", "grpo", "rft-rows", "rft"} | evaluations


def test_training_seconds_count_mining_but_not_the_first_sft_and_nothing_twice(tmp_path):
    names = ("sft", "grpo", "control", "rft", "rft-twice")
    few = [v for v in ablations.VARIANTS if v.name in names]
    stages = ablations.stages_of(41, tmp_path, few, alone=True)
    stages["sft"].folder.mkdir()
    seconds = {
        "world": 1000,
        "sft": 100,
        "rl": 20,
        "grpo": 3,
        "control": 25,
        "rft-rows": 1,
        "rft": 4,
    }
    seconds |= {"rl-of-rft": 300, "rft-rows-2": 7, "rft-twice": 9}
    for name, count in seconds.items():
        record = {"settings": {}, "seconds": count}
        (tmp_path / "seed-41" / f"{name}.stage.json").write_text(json.dumps(record))
    found = [ablations.training_seconds(stages[name]) for name in names]
    assert found == [100, 23, 25, 25, 25 + 300 + 7 + 9]


def test_seconds_are_of_a_core_and_of_the_stage_that_has_ended(tmp_path):
    (tmp_path / "busy.py").write_text("import time\nwhile time.process_time() < 1: pass")
    (tmp_path / "idle.py").write_text("import time; time.sleep(1.5)")
    stages = [Stage(name, tmp_path, f"{name}.py", sources=tmp_path) for name in ("busy", "idle")]
    ablations.run_all(stages)
    busy, idle = (stage.seconds() for stage in stages)
    assert 1 <= busy < 2 and idle < 0.9


@pytest.mark.parametrize("diff", sorted(ablations.FORKS.glob("*.diff")), ids=lambda path: path.stem)
def test_a_fork_applies_to_the_lines_that_it_names_and_is_used(diff):
    command = ["git", "apply", "--check", "--verbose", str(diff)]
    checked = subprocess.run(command, cwd=ablations.ROOT, capture_output=True, text=True)
    assert checked.returncode == 0 and "offset" not in checked.stderr, checked.stderr
    assert diff.stem in {variant.name for variant in ablations.VARIANTS if variant.fork}


def test_an_interval_by_hand():
    # 1, 2, 3: mean 2, standard deviation 1, t of two degrees of freedom 4.303; over sqrt(3): 2.484
    assert claims.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.484, abs=1e-3))
    # 0, 10: mean 5, standard deviation sqrt(50), t of one 12.706; 12.706 * 7.071 / 1.414 = 63.53
    assert claims.interval([0.0, 10.0]) == (5.0, pytest.approx(63.53))
    assert claims.interval([7.0]) == (7.0, None)


def test_scores_by_hand():
    def prediction(name: str, truth: str, said: str) -> dict:
        found = {"id": name, "source": "toy", "request": "?", "image": None, "format_ok": True}
        found |= {"request_label": truth, "response_label": None, "response": None, "n_tokens": 40}
        found |= {"request_pred": said, "response_pred": None, "finished": True, "request_p": 0.5}
        return found | {"output": "", "response_p": None}

    def truth(items: int, decided_by: str) -> dict:
        return {"items": ["a"] * items, "offered": None, "chain": "", "decided_by": decided_by}

    rows = [  # (label, verdict, items, what decides)
        ("harmful", "harmful", 4, "hidden"),
        ("harmful", "unharmful", 3, "hidden"),
        ("unharmful", "harmful", 1, "hidden"),
        ("harmful", "harmful", 3, "known"),
        ("unharmful", "unharmful", 3, "plain"),
        ("unharmful", "harmful", 3, "plain"),
        ("unharmful", "unharmful", 2, "plain"),
    ]
    records = [prediction(str(i), row[0], row[1]) for i, row in enumerate(rows)]
    truths = {str(i): truth(row[2], row[3]) for i, row in enumerate(rows)}
    found = claims.scores(records, truths)
    wanted = {"f1": 100 * 4 / 7, "false_alarms": 50, "balanced": 100 * (2 / 3 + 1 / 2) / 2}
    wanted |= {"f1_hidden": 50, "f1_known": 100, "false_alarms_plain": 100 / 3, "mean_tokens": 40}
    wanted |= {"f1_crowded": 100 * 4 / 6, "balanced_crowded": 100 * (2 / 3 + 1 / 2) / 2}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    always = claims.scores_of_always_harmful(records, truths)
    assert always["f1"] == pytest.approx(100 * 6 / 10)  # tp 3, fp 4
    assert (always["balanced"], always["false_alarms"], always["f1_known"]) == (50, 100, 100)


def test_the_tables():
    def result(sft: float, grpo: float | None) -> claims.Result:
        scores = {"sft": {"f1": sft, "f1_text": sft, "mean_tokens": 50.0, "seconds": 100.0}}
        if grpo is not None:
            scores["grpo"] = {"f1": grpo, "f1_text": grpo, "mean_tokens": 60.0, "seconds": 20.0}
        return scores

    results = {31: result(80.0, 91.0), 32: result(82.0, 94.0), 33: result(84.0, None)}
    lines = [claims.Line("RL helps", name, "grpo") for name in ("sft", "control", "grpo")]
    header, _, *rows = claims.table_of_claims(results, lines).splitlines()
    sft, _, grpo = (dict(zip(header.split(" | "), row.split(" | "))) for row in rows)
    assert sft["f1"] == "82.0 ± 5.0" and sft["seeds"] == "3"
    # -11 and -12 in the seeds that both have: 12.706 * 0.7071 / 1.4142 = 6.4
    assert sft["f1, difference"] == "-11.5 ± 6.4" and sft["against"] == "grpo"
    assert grpo["f1, difference"] == "-" and grpo["seeds"] == "2"
    assert rows[1] == "|  | control | 0 | - | - | - | - | - | grpo | - | - | - | - |"  # not run
    *_, sft, _, grpo = claims.table_of_parts(results, lines).splitlines()
    assert "| 82.0 ± 5.0 (-11.5 ± 6.4) |" in sft and "| 92.5 ± 19.1 |" in grpo
    assert "| grpo | 32 | 94.0 |" in claims.table_of_seeds(results, lines)


def test_what_eco_saves_by_hand():
    def result(eco: float, grpo: float) -> claims.Result:
        return {"eco": {"mean_tokens": eco}, "grpo": {"mean_tokens": grpo}}

    # 10, 20 and 15 %: as far apart as 1, 2, 3 above, times 5
    results = {1: result(45.0, 50.0), 2: result(40.0, 50.0), 3: result(51.0, 60.0)}
    assert claims.saving_note(results) == "Eco needs 15.0 ± 12.4 % fewer tokens than grpo."
