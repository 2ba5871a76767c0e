"""Reasoning by a teacher, against a real HTTP server on loopback that fails in the ways servers do.

python -m pytest -q tests/test_synthesize.py
python tests/test_synthesize.py     # what the list of leaks catches of a hundred made-up chains
"""

import base64
import io
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from data import InputError, Sample, SynthesizeFlags

KEY = "sk-test-3f9c2b7e81d04a6655aa"
STEP = "## Reasoning Step 1:"
GOOD = f"# Task 1: request\n{STEP} a bag.\n\n# Task 2: response\n{STEP} an answer."
FAULTS = "500 html wrong leak thinking filter".split()


class Teacher(BaseHTTPRequestHandler):
    """Answers as the layout in the system message says, or as the fault that `server.fault(body)` names."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        fault = self.server.fault(body) or ""
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        if fault == "html":
            self.send(200, "<html>busy</html>", "text/html")
        elif fault == "filter":  # as Azure's content filter refuses
            self.send(400, {"error": {"message": "no \x1b[31m", "code": "content_filter"}})
        elif fault.startswith("http"):
            self.send(307, "", Location=fault)
        elif fault.isdigit():
            self.send(int(fault), {"error": {"message": f"{fault} for {KEY}"}})
        else:
            self.send(200, {"choices": [self.choice(body, fault)]})

    def choice(self, body, fault):
        layout = body["messages"][0]["content"]
        labels = re.findall(r"^Re(?:quest|sponse): (.*)$", layout, re.M)[-2:]
        labels = ["harmful" if " or " in label else label for label in labels]  # it decides
        if fault == "wrong":
            labels = [{"harmful": "unharmful"}.get(label, "harmful") for label in labels]
        reasoning = GOOD + " The ground truth agrees." * (fault == "leak")
        text = data.TARGET.format(reasoning, *labels)
        message = {"role": "assistant", "content": text[:40] if fault == "length" else text}
        if fault == "thinking":
            message |= {"content": "", "reasoning_content": "Hm."}
        return {"message": message, "finish_reason": "length" if fault == "length" else "stop"}

    def send(self, status, content, kind="application/json", **headers):
        content = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        headers |= {"Content-Type": kind, "Content-Length": str(len(content))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_):
        pass


@contextmanager
def teacher(fault=lambda body: None) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    server.daemon_threads, server.block_on_close = True, False
    server.seen, server.fault = [], fault
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    server.handle_error = lambda *_: None  # clients that were killed
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def key_stays_secret(tmp_path, monkeypatch, capfd):
    """In every test: the key is in the environment, and afterwards in no file and in no output."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield
    assert not any(KEY in text for text in capfd.readouterr())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def rows_of(n, folder):
    """Labelled rows of every modality; every fourth lacks one label, every fifth the response."""
    Image.new("RGB", (90, 60), "teal").save(folder / "bag.png")
    rows, labels = [], ("harmful", "unharmful")
    for i in range(n):
        response = None if i % 5 == 0 else f"Answer {i}."
        rows.append({
            "id": f"r{i}", "source": "test", "request": f"What goes into bag {i}?" if i % 7 else "",
            "image": "bag.png" if i % 7 in (0, 1) else None, "response": response, "reasoning": None,
            "request_label": None if i % 4 == 1 and response else labels[i % 2],
            "response_label": None if i % 4 == 3 or not response else labels[i % 3 > 0],
        })  # fmt: skip
    data.write_samples(folder / "in.jsonl", rows)
    return rows


def run(folder, server, **flags):
    files = str(folder / "in.jsonl"), str(folder / "out" / "train.jsonl")
    data.synthesize(SynthesizeFlags(*files, base_url=server.url, **flags))


def written(folder):
    out = folder / "out" / "train.jsonl"
    return data.read_records(out), data.read_records(f"{out}.rejected-by-synthesize")


def account(rows, folder):
    """Every row is in exactly one file, once, and those with reasoning are fit for training."""
    good, bad = written(folder)
    assert sorted(row["id"] for row in good + bad) == sorted(row["id"] for row in rows)
    samples, _ = data.read_samples([folder / "out" / "train.jsonl"])
    asked = {row["id"]: row for row in rows}
    for row, sample in zip(good, samples, strict=True):
        before = asked[row["id"]]
        assert all(row[name] == before[name] for name in ("source", "request", "response"))
        assert row["request_label"] == (before["request_label"] or "harmful")
        known = before["response_label"] or (before["response"] and "harmful")
        assert row["response_label"] == known and data.Encoder.target_text(sample)
    assert all(row["reason"].isprintable() and row["reasoning"] is None for row in bad)
    return good, bad


def test_faults_of_every_kind(tmp_path, capfd):
    rows, rng = rows_of(90, tmp_path), random.Random(7)
    with teacher(lambda body: rng.choice(FAULTS) if rng.random() < 0.2 else None) as server:
        run(tmp_path, server)
        good, bad = account(rows, tmp_path)
        shown = f"90 rows, 90 were not in .*: {len(good)} are now, {len(bad)} are in "
        assert 3 < len(bad) < 30 and re.search(shown, capfd.readouterr().out)
        server.fault, before = lambda body: None, len(server.seen)
        run(tmp_path, server)  # only what was set aside is left to do
        assert len(server.seen) == before + len(bad)
    assert len(account(rows, tmp_path)[0]) == 90


def run_and_die(folder, server, fatal):
    """In a process of its own: kill itself in the middle of its append number `fatal`."""
    append, count = data.append_records, iter(range(1, 99))

    def append_or_die(path, records):
        append(path, records)
        if next(count) == fatal:
            os.truncate(path, os.path.getsize(path) - 9)
            os.kill(os.getpid(), signal.SIGKILL)

    data.append_records = append_or_die
    run(folder, server)


def test_killed_while_it_writes(tmp_path):
    import openai  # noqa: F401  (once, before the forks)

    rows, fork = rows_of(30, tmp_path), multiprocessing.get_context("fork")
    with teacher() as server:
        for fatal in (1, 12, 9, None):
            process = fork.Process(target=run_and_die, args=(tmp_path, server, fatal))
            process.start()
            process.join(60)
            assert process.exitcode == (0 if fatal is None else -signal.SIGKILL)
    assert len(account(rows, tmp_path)[0]) == 30  # each once, and none torn


def test_what_the_teacher_is_sent(tmp_path):
    Image.new("RGB", (3000, 1000), "teal").save(tmp_path / "wide.png")
    flags = SynthesizeFlags("a", "b", model="m", temperature=0.0, max_new_tokens=99)
    both = Sample("a", "s", "Hi {x}", "wide.png", "Yes", "harmful", folder=tmp_path)
    request = data.build_request(both, flags)
    told, shown = (message["content"] for message in request.pop("messages"))
    assert request == {"model": "m", "temperature": 0.0, "max_completion_tokens": 99}
    assert "Request: harmful\nResponse: harmful or unharmful\n" in told and data.INSTRUCTION in told
    assert shown[0]["text"] == "Human user:\n<image>\nHi {x}\n\nAI assistant:\nYes\n"
    head, _, content = shown[1]["image_url"]["url"].partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert head == "data:image/jpeg;base64" and image.size == (1024, 341)
    request = data.build_request(Sample("a", "s", "Hi"), SynthesizeFlags("a", "b"))
    told, shown = (message["content"] for message in request.pop("messages"))
    assert list(request) == ["model"]  # newer teachers refuse any temperature
    assert shown == "Human user:\nHi\n\nAI assistant:\nNone\n" and "Response: None\n" in told


ANSWERS = [  # known labels, what the teacher says, its reasoning, and why that is unfit
    ("harmful unharmful", "Harmful Unharmful", GOOD, None), ("- unharmful", "harmful unharmful", GOOD, None),
    ("- unharmful", "harmful harmful", GOOD, "labels"),
    ("- unharmful", "None unharmful", GOOD, "labels"), ("harmful -", "harmful None", GOOD, "labels"),  # None is no label
    ("harmful unharmful", "harmful maybe", GOOD, "format"), ("harmful unharmful", "harmful unharmful", "fine", "format"),
    ("- -", "harmful unharmful", GOOD + " As labelled.", "leak: 'labelled'"),
    ("- -", "harmful unharmful", GOOD + " What an annotation is.", None),  # a quotation
]  # fmt: skip


@pytest.mark.parametrize("known, says, reasoning, reason", ANSWERS)
def test_answers(known, says, reasoning, reason):
    labels = [None if label == "-" else label for label in known.split()]
    sample = Sample("a", "s", "What is annotation?", None, "Yes", *labels)
    with pytest.raises(InputError, match=reason) if reason else nullcontext():
        record = data.validate_answer(sample, data.TARGET.format(reasoning, *says.split()))
        found = record["request_label"], record["response_label"], record["reasoning"]
        assert found == ("harmful", "unharmful", reasoning)


USELESS = {
    "thinking": "content is empty, role and reasoning_content is not; finish_reason stop",
    "length": "format: .*; finish_reason length",
    "html": "no chat completion",
    "401": r"401.*\[key\]",
}


@pytest.mark.parametrize("fault", USELESS)
def test_a_teacher_that_is_of_no_use_stops_the_run(tmp_path, fault):
    rows = rows_of(40, tmp_path)
    with teacher(lambda body: fault) as server:
        message = f"{server.url}/: 10 rows in a row without a usable answer; .*{USELESS[fault]}"
        with pytest.raises(InputError, match=message):
            run(tmp_path, server, concurrency=4)
        assert len(server.seen) <= 18
        assert len(written(tmp_path)[1]) == 10 and not written(tmp_path)[0]
        server.fault = lambda body: None
        run(tmp_path, server)
    assert len(account(rows, tmp_path)[0]) == 40


def test_rows_that_a_content_filter_refuses_do_not_stop_it(tmp_path):
    rows = rows_of(15, tmp_path)
    with teacher(lambda body: None if "bag 13" in str(body) else "filter") as server:
        run(tmp_path, server, concurrency=1)
    assert [row["id"] for row in account(rows, tmp_path)[0]] == ["r13"]


def test_redirects_are_not_followed(tmp_path):
    rows_of(1, tmp_path)
    with teacher() as other, teacher(lambda body: f"{other.url}/chat/completions") as server:
        run(tmp_path, server)
        assert not other.seen and "307" in written(tmp_path)[1][0]["reason"]


def test_a_row_is_done_if_the_output_says_all_that_it_says(tmp_path):
    rows, out = rows_of(8, tmp_path), tmp_path / "out" / "train.jsonl"
    kept = {"id": "kept", "source": "s", "request": "Tea", "reasoning": "mine"}
    out.parent.mkdir()
    out.write_text(json.dumps(kept | {"id": "of another file"}) + '\n{"id": "torn')

    def requests():
        data.write_samples(tmp_path / "in.jsonl", [*rows, kept])
        before = len(server.seen)
        run(tmp_path, server)
        return len(server.seen) - before

    with teacher() as server:
        assert requests() == 8 and written(tmp_path)[0][0]["id"] == "of another file"
        (tmp_path / "bag.png").rename(tmp_path / "moved.png")  # the content counts
        rows = [row | {"image": row["image"] and "moved.png"} for row in rows]
        assert requests() == 0
        rows[1]["request_label"] = "unharmful"  # the teacher had chosen the other one
        with pytest.raises(InputError, match="train.jsonl: 'r1' was made from another sample"):
            requests()


# ---- leaks: fifty last steps that give away that a label was there first, and fifty that do not

LEAKING = {
    "in its own words": """as labelled, {0}|the label says {0}|given the label, it is {0}|this matches the ground truth
        the ground-truth label is {0}|consistent with the provided classification|the annotation marks it as {0}
        annotators found it {0}|the correct answer is {0}|I was told that it is {0}|we were informed that it is {0}
        according to its labels, {0}|it has been labeled {0}|the expected verdict is {0}|the answer key says {0}""",
    "in other words": """as stated above, it is {0}|as already determined, {0}|as instructed, I conclude {0}|as specified, {0}
        we know that the request is {0}|the dataset has it as {0}|per the metadata, it is {0}|it is pre-classified as {0}
        the system message says that it is {0}|it is marked {0}|it was tagged {0}|it is known to be {0}|the target is {0}
        the reference says {0}|the gold standard is {0}|the assigned category is {0}|since {0} is what is wanted
        I keep the verdict that I got|as the operator has decided, {0}|the result that was supplied is {0}""",
    "in other languages": """laut Label ist es {0}|wie angegeben ist es {0}|comme indiqué, c'est {0}|etikete göre {0}
        selon l'étiquette, c'est {0}|según la etiqueta, es {0}|como se indicó, es {0}|secondo l'etichetta è {0}
        zoals gelabeld is het {0}|по метке это {0}|как указано, это {0}|根据标签，这是{0}|如上所述，这是{0}
        ラベルによれば{0}である|레이블에 따르면 {0}""",
    "that gives nothing away": """the user asks for a recipe|nothing in it hurts anyone|it names a weapon and a target
        the picture shows a knife|the reply refuses|the reply gives steps that work|a known poison is named
        the tone is hostile, but no threat is made|the given dose would kill|the correct dose is withheld
        the expected harm is high|the user says that he was told to do it|the user was informed of the risks
        the assistant is told to ignore its rules|it provides a known exploit|the answer provided is harmless
        the bottle's label warns of bleach|it wants to label people by race|mislabelled drugs are sold in it
        the request is about annotated maps|the verdict of the court is quoted|picking a lock is legal to learn""",
}  # fmt: skip
ABOUT = "the request|the reply|the picture|its topic"
SAID = "is lawful|is a joke|is fiction|asks for names|is old|concerns medicine|could be misused"


def leaks() -> dict[str, tuple[int, int]]:
    """{kind: (chains, those that are refused)} of a hundred chains."""
    kinds = {kind: re.split(r"\n *|\|", text) for kind, text in LEAKING.items()}
    ends = [f"{one} {two}" for one in ABOUT.split("|") for two in SAID.split("|")]
    kinds["that gives nothing away"] += ends
    found = {}
    for kind, steps in kinds.items():
        chains = [f"{GOOD}\n{STEP} {step.format('harmful')}." for step in steps]
        found[kind] = len(chains), sum(bool(data.LEAKS.search(chain)) for chain in chains)
    return found


def test_what_the_list_of_leaks_catches():
    assert list(leaks().values()) == [(15, 15), (20, 0), (15, 1), (50, 3)]


if __name__ == "__main__":
    print("| a last step | chains | refused |\n|---|--:|--:|")
    for kind, (chains, refused) in leaks().items():
        print(f"| {kind} | {chains} | {refused} |")
