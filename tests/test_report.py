"""report.py: hostile text stays text; what stands beside an output is what it is about.

python -m pytest tests/test_report.py
"""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import audit
import draw
import pytest
import report
from PIL import Image
from report import ReportFlags

import data
import evaluate

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "</script><script>alert(1)</script> \"><img src='http://x.invalid/' onerror=a()> &lt;"
OUTPUT = "<think>\n1.\n</think>\n\n<result>\nRequest: {}\nResponse: None\n</result>"
PAID = {"total": -1.0, "format": 1.0, "request": 1.0, "response": None, "length": 0.2}


def group(step: int, sample: data.Sample, folder: Path = Path(), total: float = -1.0) -> dict:
    """A record of rollouts.jsonl in `folder`: one right output, and one that is hostile."""
    output = {"n_tokens": 9, "finished": True, "reward": PAID | {"total": total}, "advantage": 0.5}
    outputs = [output | {"output": text} for text in (OUTPUT.format("harmful"), HOSTILE + "\udc80")]
    fields = evaluate.sample_fields(replace(sample, request_label="harmful"), folder)
    return {"step": step, "clip": 0.1, **fields, "outputs": outputs}


def prediction(sample: data.Sample, said: str, p: float, folder: Path) -> dict:
    """A record of predictions.jsonl in `folder`."""
    found = {"output": OUTPUT.format(said), "n_tokens": 9, "finished": True, "format_ok": True}
    found |= {"request_pred": said, "response_pred": "unharmful"}
    return evaluate.sample_fields(sample, folder) | found | {"request_p": p, "response_p": None}


@pytest.fixture
def folders(tmp_path, monkeypatch) -> list[str]:
    """A GRPO run on a text and an image, and its evaluation on the same two; run from elsewhere."""
    (tmp_path / "rl").mkdir()
    Image.new("RGB", (400, 300), "teal").save(tmp_path / "rl" / "a.png")
    said = data.Sample("said", "toy", HOSTILE, None, "No.", "harmful", folder=tmp_path / "rl")
    seen = data.Sample("seen", "toy", "", "a.png", None, "unharmful", folder=tmp_path / "rl")
    file = tmp_path / "rl" / "rl.jsonl"
    data.write_samples(file, [said, seen])
    grpo, judged = tmp_path / "out" / "grpo", tmp_path / "out" / "eval"
    grpo.mkdir(parents=True)
    flags = {"data": ["rl/rl.jsonl"], "validation": [], "seed": 3}
    run = {
        "flags": flags,
        "fingerprint": data.fingerprint(str(grpo), {"data": [file]}, [said, seen]),
    }
    data.write_atomic(grpo / "run.json", json.dumps(run))
    data.write_samples(grpo / "rollouts.jsonl", [group(1, seen, grpo), group(2, said, grpo)])
    steps = [{"step": s, "reward": -s, "loss": 0.1, "clip": 0.2, "val_f1": 50} for s in (1, 2)]
    data.write_samples(grpo / "metrics.jsonl", steps)
    records = [prediction(said, "harmful", 0.9, judged), prediction(seen, "harmful", 0.8, judged)]
    data.write_samples(judged / "predictions.jsonl", records)
    monkeypatch.chdir(tmp_path / "out")
    return [str(judged), str(grpo)]


def content_of(page: str) -> dict:
    return json.loads(re.search('id="content">(.*?)</script>', page)[1])


def shown(folders: list[str]) -> dict[str, tuple]:
    """{run and id of a card: its texts, and whether its image is there}."""
    cards = content_of(report.page(report.read_runs(folders), {}, {}))["cards"]
    return {f"{c['run']} {c['id']}": (list(c["texts"].values()), bool(c["image"])) for c in cards}


def tags_of(text: str) -> list[tuple[str, dict]]:
    parser, found = HTMLParser(), []
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(text)
    return found


def test_hostile_text_is_data_of_a_page_that_loads_nothing(folders):
    page = report.page(report.read_runs(folders), {}, {"curves": b"png"})
    tags = tags_of(page)
    assert [tag for tag, _ in tags].count("script") == page.count("</script>") == 2
    assert not [a for tag, a in tags if a.keys() & {"src", "href", "onerror"} or tag == "img"]
    (policy,) = [a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    (nonce,) = [a["nonce"] for _, a in tags if "nonce" in a]
    assert policy.startswith("default-src 'none'; img-src data:;") and f"'nonce-{nonce}'" in policy
    texts = [output["text"] for card in content_of(page)["cards"] for output in card["outputs"]]
    assert texts.count(HOSTILE + "?") == 2


EXCHANGES = {"grpo said": ([HOSTILE, "No."], False), "grpo seen": (["(none)", "(none)"], True)}
EXCHANGES |= {name.replace("grpo", "eval"): found for name, found in EXCHANGES.items()}
NO_IMAGES = {name: (texts, False) for name, (texts, _) in EXCHANGES.items()}

CHANGES = {
    "touch rl/rl.jsonl rl/a.png": EXCHANGES,
    "mv rl rl2": NO_IMAGES,
    "sed -i 's/No[.]/Yes/' rl/rl.jsonl": EXCHANGES,  # of the other row
    "echo >> rl/a.png": NO_IMAGES,
    "mv rl/a.png b.png && ln -s ../b.png rl/a.png": NO_IMAGES,
    'cp -r rl rl2; rm rl2/*.jsonl; sed -i s:/rl\\":/rl2\\": out/eval/*.jsonl': EXCHANGES
    | {"eval seen": NO_IMAGES["eval seen"]},
}


@pytest.mark.parametrize("change, wanted", CHANGES.items())
def test_what_stands_beside_an_output_is_what_it_is_about(change, wanted, folders, tmp_path):
    subprocess.run(change, shell=True, check=True, cwd=tmp_path)
    assert shown(folders) == wanted


def test_a_damaged_record_is_one_line_and_left_out(folders, capsys):
    good = json.dumps(group(1, data.Sample("a", "toy", "x")))
    changes = [('"a"', "1"), ('"outputs": [', '"outputs": [1,'), ('"harmful"', "[1]")]
    changes += [("-1.0", "1" * 400), (good[-9:], "")]
    damage = {"metrics": ['{"step": "1"}', '{"step": NaN}', "[1]"]}
    damage["rollouts"] = [good.replace(*change) for change in changes]
    damage["predictions"] = ["[" * 100_000, '{"output": 1, "id": "\x1b[2J"}', "\xff", "null"]
    for kind, lines in damage.items():
        path = Path("eval" if kind == "predictions" else "grpo", f"{kind}.jsonl")
        path.write_bytes(path.read_bytes() + "\n".join(lines).encode("latin-1"))
    report.main(ReportFlags(folders, out="page.html"))
    told, content = capsys.readouterr().err.splitlines(), content_of(Path("page.html").read_text())
    for kind, lines in damage.items():
        for number in range(3, 3 + len(lines)):
            (line,) = [line for line in told if f"{kind}.jsonl:{number}: damaged, and left" in line]
            assert line.isprintable() and line in content["notes"]
    assert len(told) == 12 and len(content["cards"]) == 4


def test_the_outcome_has_a_column_for_each_run_in_the_order_of_the_arguments(folders):
    shutil.copytree(folders[0], "another")
    runs = report.read_runs(["another", folders[1], folders[0]])
    content = content_of(report.page(runs, report.outcomes_of(runs), {}))
    assert content["runs"] == ["another", "grpo", "eval"]
    cell = content["outcome"]["eval"]["prompt, all"]
    assert re.fullmatch(r"50\.0 \(\d+\.\d to \d+\.\d\)\n9\.0 tokens", cell), cell
    assert content["settings"]["grpo"]["seed"] == "3"


def test_of_many_records_the_newest_the_worst_and_the_surest_errors_are_shown(tmp_path):
    x = data.Sample("x", "toy", "x")
    rollouts = [group(i, replace(x, id=str(i)), total=-(i % 100)) for i in range(999)]
    rollouts[-1]["outputs"][0]["output"] = "x" * 4000
    cards = report.rollout_cards(report.Run("grpo", tmp_path, {}, [], rollouts, [], []))
    ids, half = [card["id"] for card in cards], report.MAX_CARDS // 2
    assert ids[:2] == ["998", "997"] and {id[-2:] for id in ids[half:][:9]} == {"99"}
    assert len(ids) == 2 * half and "1000 more char" in cards[0]["outputs"][0]["text"]
    # A right one, two errors of which the guard is more and more sure, and one without a P.
    said = [("harmful", 0.9), ("unharmful", 0.3), ("unharmful", 0.2), ("perhaps", None)]
    samples = [data.Sample(str(i), "toy", "?", request_label="harmful") for i in range(4)]
    records = [prediction(sample, *what, tmp_path) for sample, what in zip(samples, said)]
    cards = report.prediction_cards(report.Run("eval", tmp_path, {}, [], [], records, []))
    assert [card["id"] for card in cards] == ["3", "2", "1", "0"]


def test_unfaithful_outputs_are_marked_and_a_toy_world_is_audited(folders, tmp_path):
    runs = report.read_runs(folders)
    assert content_of(report.page(runs, {}, {}))["audit"] == {}  # no truth.json
    truth = {"items": [], "offered": None, "chain": "1.", "decided_by": "plain"}
    (tmp_path / "rl" / "truth.json").write_text(json.dumps({"said": truth, "seen": truth}))
    content = content_of(report.page(runs, {}, {}))
    rates = content["audit"]["eval"]
    assert rates[audit.RATES["faithful"]] == "0.0"  # "harmful", and no step that says so
    assert rates[audit.RATES["true_chain"]] == "100.0"
    marks = {c["run"]: [o.get("unfaithful") for o in c["outputs"]] for c in content["cards"]}
    assert marks == {"eval": [True], "grpo": [True, None]}  # the hostile one has no chain


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_in_a_browser_of_1280_pixels(folders, tmp_path):
    names = [f"a long name of a run, number {i}" for i in range(9)]
    for name in names:
        shutil.copytree(folders[0], name)
    runs = report.read_runs([folders[1], *names])
    page = report.page(runs, report.outcomes_of(runs), {})
    probe = """document.querySelector("img").click(); document.title = Math.max(
        ...Array.from(document.querySelectorAll("*"), (e) => e.getBoundingClientRect().right));"""
    page = page.replace("filterCards();\n</script>", f"filterCards(); {probe}</script>")
    (tmp_path / "page.html").write_text(page)
    command = "chromium --headless --no-sandbox --disable-gpu --virtual-time-budget=2000 --dump-dom"
    command += f" --window-size=1280,900 --user-data-dir={tmp_path}/browser"
    command += f" file://{tmp_path}/page.html#modality=text&verdict=wrong"
    dom = subprocess.run(command.split(), capture_output=True, text=True, timeout=60)
    tags = tags_of(dom.stdout)
    assert "1 of 20" in dom.stdout  # the hostile output of grpo is wrong, eval's text is right
    shown = [a["data-run"] for tag, a in tags if tag == "article" and "hidden" not in a]
    images = [a["class"] for tag, a in tags if tag == "img"]
    assert shown == ["grpo"] and images == ["", *["blurred"] * 9]
    assert float(re.search("<title>(.*)</title>", dom.stdout)[1]) <= 1280


def test_the_drawn_metrics_are_those_that_the_stages_write():
    written = "".join((ROOT / f"{stage}.py").read_text() for stage in ("sft", "grpo", "evaluate"))
    names = {name for panel in draw.PANELS + draw.README_PANELS for name in panel.metrics}
    bare = {re.sub("^val_|_(prompt|response)$", "", name) for name in names}
    assert not [name for name in bare if f'"{name}"' not in written]


def test_all_is_written_by_one_command(folders):
    report.main(ReportFlags(folders, "p.html", "c.png", "e.png", "seen", "r.png"))
    assert all(Path(f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in "cer")
    assert list(content_of(Path("p.html").read_text())["figures"])[0] == "The outcome"
