"""Reasoning by a teacher, against a real HTTP server on loopback that fails in every way a server can.

python -m pytest -q tests/test_synthesize.py
"""

import base64
import collections
import dataclasses
import gzip
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

import data
from data import InputError, Sample, SynthesizeConfig

KEY = "sk-test-3f9c2b7e81d04a6655aa"
GOOD = "# Task 1: request\n## Reasoning Step 1: a bag.\n\n# Task 2: response\n## Reasoning Step 1: an answer."
LEAK = GOOD + "\n## Reasoning Step 2: The ground truth agrees."
FAULTS = (
    "429",
    "429 0.05",
    "500",
    "disconnect",
    "cut",
    "hang",
    "broken json",
    "html",
    "no choices",
    "no content",
    "wrong",
    "leak",
    "twice",
    "unnumbered",
    "tag",
    "half surrogate",
    "key in error",
    "key in answer",
)


class Teacher(BaseHTTPRequestHandler):
    """Answers as the layout in the system message says, or as the fault that `server.fault(body)` names."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.open += 1
            server.most = max(server.most, server.open)
            server.seen.append((time.monotonic(), body))
            fault = server.fault(body)
        try:
            assert (
                self.path == "/v1/chat/completions"
                and self.headers["Authorization"] == f"Bearer {KEY}"
            )
            time.sleep(server.delay)
            self.answer(body, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with server.lock:
                server.open -= 1

    def answer(self, body, fault):
        if fault == "disconnect":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "hang":
            time.sleep(3)
        elif fault == "drip":  # a byte every 50 ms: never silent, never done
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b" ")
                time.sleep(0.05)
        elif fault == "filter":  # as Azure's content filter refuses
            error = {"message": "flagged \x1b[31mred", "code": "content_filter", "param": "prompt"}
            self.send(json.dumps({"error": error}), 400)
        elif isinstance(fault, dict):  # what to send
            self.send(**fault)
        elif fault and fault[:3].isdigit():
            code, _, after = fault.partition(" ")
            error = {"message": f"status {code}", "param": "model"}
            self.send(json.dumps({"error": error}), int(code), {"Retry-After": after})
        elif fault == "key in error":
            self.send(json.dumps({"error": {"message": "Incorrect API key " + KEY}}), 500)
        elif fault == "html":
            self.send("<html>busy</html>", kind="text/html")
        else:
            text = json.dumps(self.completion(body, fault))[
                : -9 if fault == "broken json" else None
            ]
            self.send(text, cut=fault == "cut")

    def completion(self, body, fault):
        labels = list(
            re.findall(r"^Re(?:quest|sponse): (.*)$", body["messages"][0]["content"], re.M)[-2:]
        )
        labels = [
            "harmful" if "or" in label.split() else label for label in labels
        ]  # the teacher decides
        if fault == "wrong":
            labels = [{"harmful": "unharmful"}.get(label, "harmful") for label in labels]
        reasoning = {
            "leak": LEAK,
            "unnumbered": "a bag.",
            "tag": GOOD + "<think>",
            "half surrogate": GOOD + "\ud800",
            "key in answer": GOOD + KEY,
        }.get(fault, GOOD)
        text = data.TARGET.format(reasoning, *labels)
        text = {"twice": text + text, "no content": None}.get(fault, text)
        choices = [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        ]
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [] if fault == "no choices" else choices,
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }

    def send(self, text, code=200, headers=(), kind="application/json", cut=False):
        content = text if isinstance(text, bytes) else text.encode()
        self.send_response(code)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": len(content),
            **dict(headers),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if cut:
            self.wfile.write(content[:20])
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def teacher(fault=lambda body: None, delay=0.0):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    server.daemon_threads, server.block_on_close = True, False
    server.lock, server.seen, server.fault, server.delay = threading.Lock(), [], fault, delay
    server.open = server.most = 0
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    server.handle_error = lambda *_: None  # clients that were killed
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def key_stays_secret(tmp_path, monkeypatch, capfd):
    """In every test: the key is in the environment, and afterwards in no file and in no output."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    shown = []
    yield shown
    shown += capfd.readouterr()
    assert not any(KEY in text for text in shown)
    assert not any(
        KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    )


def rows_of(n, folder):
    """Labelled rows of every modality; every fourth lacks one label, every fifth the response."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (90, 60), "teal").save(folder / "bag.png")
    rows, labels = [], ("harmful", "unharmful")
    for i in range(n):
        response = None if i % 5 == 0 else f"Answer {i}."
        rows.append(
            {
                "id": f"r{i}",
                "source": "test",
                "request": f"What goes into bag {i}?" if i % 7 else "",
                "image": "bag.png" if i % 7 in (0, 1) else None,
                "response": response,
                "request_label": None if i % 4 == 1 and response else labels[i % 2],
                "response_label": None if i % 4 == 3 or not response else labels[i % 3 > 0],
            }
        )
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def config(folder, server, **options):
    url = server if isinstance(server, str) else server.url
    return SynthesizeConfig(
        str(folder / "in.jsonl"),
        str(folder / "out" / "train.jsonl"),
        base_url=url,
        **{"timeout": 2.0} | options,
    )


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def written(folder):
    out = folder / "out" / "train.jsonl"
    return read(out), read(out.with_name("train.jsonl.rejected-by-synthesize"))


def seeded_faults(seed, rate):
    """Faults at `rate`, by row and try whatever their order; every 60th row gets no right answer ever."""
    tries = collections.Counter()

    def fault(body):
        text = str(body["messages"][1]["content"])[:200]
        number = re.search(r"bag (\d+)|Answer (\d+)", text)
        if number and int(number[1] or number[2]) % 60 == 59:
            return "wrong"
        tries[text] += 1
        rng = random.Random(f"{seed} {text} {tries[text]}")
        return rng.choice(FAULTS) if rng.random() < rate else None

    return fault


def account(rows, folder):
    """Every row is in exactly one file, once, and those with reasoning are fit for training."""
    good, bad = written(folder)
    ids = [row["id"] for row in good + bad]
    assert sorted(ids) == sorted(row["id"] for row in rows)
    asked = {row["id"]: row for row in rows}
    samples = {
        sample.id: sample for sample in data.read_samples([str(folder / "out" / "train.jsonl")])
    }
    for row in good:
        before = asked[row["id"]]
        assert all(row[key] == before[key] for key in ("source", "request", "response"))
        assert row["request_label"] == (before["request_label"] or "harmful")
        assert row["response_label"] == (
            before["response_label"] or (before["response"] and "harmful")
        )
        assert row["reasoning"].startswith("# Task 1") and "ground truth" not in row["reasoning"]
        assert data.Encoder.target_text(samples[row["id"]])
        assert (row["image"] is None) == (before["image"] is None)
    assert all(row["reason"] and row["reasoning"] is None for row in bad)
    return good, bad


def test_faults_of_every_kind(tmp_path, capfd, key_stays_secret):
    rows = rows_of(180, tmp_path)
    with teacher(seeded_faults(7, 0.3)) as server:
        data.synthesize(config(tmp_path, server))
        good, bad = account(rows, tmp_path)
        assert {"r59", "r119", "r179"} <= {row["id"] for row in bad} and len(bad) < 20
        for row in bad:
            assert int(row["id"][1:]) % 60 != 59 or row["reason"].startswith("labels: ")
        shown = capfd.readouterr()
        counts = f"180 rows = 0 in .* before \\+ {len(good)} now \\+ {len(bad)} set aside in .* 0 missing"
        assert re.search(counts, shown.out)
        assert shown.err == "" and len(server.seen) > 240
        requests, server.fault = len(server.seen), lambda body: None
        data.synthesize(config(tmp_path, server))  # only what was set aside is left to do
        assert len(server.seen) == requests + len(bad) and len(account(rows, tmp_path)[0]) == 180
    assert not list((tmp_path / "out").glob("*rejected*"))
    key_stays_secret += shown


def run_and_die(cfg, log, fatal_append):
    """In a process of its own: run, with everything it says in a file; kill itself in the middle of
    its append of number `fatal_append`, of which odd ones are to OUT.inputs and even ones to OUT."""
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    logging.basicConfig(level=logging.DEBUG, force=True)  # the client's log must not name the key
    append, count = data.append_records, itertools.count(1)

    def append_or_die(path, records):
        if next(count) != fatal_append:
            return append(path, records)
        with open(path, "ab") as file:
            file.write(json.dumps(records[0]).encode()[:20])
        os.kill(os.getpid(), signal.SIGKILL)

    data.append_records = append_or_die
    data.synthesize(cfg)


def test_killed_at_any_moment(tmp_path):
    import openai  # noqa: F401  (once, before the forks)

    rows, rng, before = rows_of(80, tmp_path), random.Random(5), 0
    out, log = tmp_path / "out" / "train.jsonl", tmp_path / "log.txt"
    with teacher(seeded_faults(3, 0.05), delay=0.01) as server:
        cfg = config(tmp_path, server, timeout=0.5)

        def start(fatal_append):
            context = multiprocessing.get_context("fork")
            process = context.Process(target=run_and_die, args=(cfg, log, fatal_append))
            process.start()
            return process

        for fatal_append in (1, 2, None, 21, 20, None):  # None: whatever it is doing
            until = len(server.seen) + rng.randrange(1, 30)
            process = start(fatal_append)
            while fatal_append is None and process.is_alive() and len(server.seen) < until:
                time.sleep(0.001)
            if fatal_append is None:
                process.kill()
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
            settled = out.read_bytes().count(b"\n") if out.exists() else 0
            assert before <= settled < 80
            before = settled
        process = start(None)
        process.join(60)
    assert process.exitcode == 0 and before > 20
    account(rows, tmp_path)
    assert f"80 rows = {before} in " in log.read_text() and "DEBUG:openai" in log.read_text()


def test_torn_lines(tmp_path):
    rows = rows_of(6, tmp_path)
    out = tmp_path / "out" / "train.jsonl"
    with teacher(lambda body: "wrong" if "bag 4" in str(body) else None) as server:
        data.synthesize(config(tmp_path, server))
        content = out.read_bytes()
        for end in (0, 6, len(content) // 2, len(content) - 1):
            out.write_bytes(content[:end])
            data.synthesize(config(tmp_path, server))
            good, bad = account(rows, tmp_path)
            assert [row["id"] for row in bad] == ["r4"]


def test_what_the_teacher_is_sent(tmp_path):
    rows_of(0, tmp_path)
    Image.new("RGB", (3000, 1000), "teal").save(tmp_path / "wide.png")
    samples = [
        Sample("a", "s", "Hi {x}", "wide.png", "Yes", "harmful", folder=tmp_path),
        Sample("b", "s", "", "bag.png", None, "unharmful", folder=tmp_path),
        Sample("c", "s", "Hi", None, "No", None, "unharmful"),
    ]
    seen, picture, text = (data.build_request(sample, "m") for sample in samples)
    user = seen["messages"][1]["content"]
    assert user[0] == {
        "type": "text",
        "text": "Human user:\n<image>\nHi {x}\n\nAI assistant:\nYes\n",
    }
    head, _, content = user[1]["image_url"]["url"].partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert head == "data:image/jpeg;base64" and image.size == (1024, 341)
    assert abs(sum(p - q for p, q in zip(image.getpixel((5, 5)), (0, 128, 128)))) < 6
    system = seen["messages"][0]["content"]
    assert (
        "Request: harmful\nResponse: harmful or unharmful\n" in system
        and data.INSTRUCTION in system
    )
    assert text["messages"][1]["content"] == "Human user:\nHi\n\nAI assistant:\nNo\n"
    assert "Request: harmful or unharmful\nResponse: unharmful\n" in text["messages"][0]["content"]
    assert "Response: None\n" in picture["messages"][0]["content"]


@pytest.mark.parametrize(
    "says, reason",
    [
        (GOOD, None),
        ("Step 1: fine", None),
        ("fine", "format"),
        ("", "format"),
        (GOOD + "</think>", "format"),
        (LEAK, "leak"),
        (GOOD + " As the given label shows,", "leak"),
        (GOOD + " The Ground-Truth is", "leak"),
        (GOOD + " The provided labels say so.", "leak"),
        (GOOD + " This matches the label.", "leak"),
        (GOOD + " The label is 'harmful'.", "leak"),
        (GOOD + " according to its annotation", "leak"),
        (GOOD + " the labels that were given", "leak"),
        (GOOD + " the known harmful label", "leak"),
        (GOOD + " As I was told, it is harmful.", "leak"),
        (GOOD + " I've been told so.", "leak"),
        (GOOD + " The user was told to go.", None),
        (GOOD + " The bottle's label says soap; the answer provided is correct.", None),
        (GOOD + " It asks what ground truth means.", "leak"),
    ],
)
def test_check(says, reason):
    sample = Sample("a", "s", "Hi", None, "Yes", "harmful", "unharmful")
    output = data.TARGET.format(says, "harmful", "unharmful")
    if reason is None:
        assert data.validate_answer(sample, output)["reasoning"] == says
    else:
        with pytest.raises(InputError, match=reason):
            data.validate_answer(sample, output)


def test_check_labels_and_quotations():
    sample = Sample("a", "s", "What is Ground truth?", None, None, "unharmful")
    assert (
        data.validate_answer(sample, data.TARGET.format(LEAK, "unharmful", "None"))[
            "response_label"
        ]
        is None
    )
    for labels in (("harmful", "None"), ("unharmful", "harmful")):
        with pytest.raises(InputError, match="labels: "):
            data.validate_answer(sample, data.TARGET.format(GOOD, *labels))
    open_ended = Sample("a", "s", "Hi", None, "Yes", None, "unharmful")
    row = data.validate_answer(open_ended, data.TARGET.format(GOOD, "harmful", "Unharmful"))
    assert (row["request_label"], row["response_label"]) == ("harmful", "unharmful")


def test_retry_after_and_backoff(tmp_path):
    rows_of(1, tmp_path)
    faults = ["429 1", "500", None]
    with teacher(lambda body: faults.pop(0)) as server:
        data.synthesize(config(tmp_path, server))
        times = [when for when, _ in server.seen]
    gaps = [after - before for before, after in zip(times, times[1:])]
    assert gaps[0] >= 1 and gaps[1] >= 0.3


def test_unusable_answers_are_asked_for_again_at_temperature_1(tmp_path, capfd):
    rows_of(1, tmp_path)
    faults = ["500", "leak", "wrong", None]
    with teacher(lambda body: faults.pop(0)) as server:
        data.synthesize(config(tmp_path, server))
    assert [body["temperature"] for _, body in server.seen] == [0.0, 0.0, 1.0, 1.0]
    assert "330 tokens" in capfd.readouterr().out


def test_after_a_reply_that_is_no_answer_the_temperature_is_still_0(tmp_path):
    rows_of(1, tmp_path)
    faults = ["html", None]
    with teacher(lambda body: faults.pop(0)) as server:
        data.synthesize(config(tmp_path, server))
    assert [body["temperature"] for _, body in server.seen] == [0.0, 0.0]


def test_concurrency_is_bounded(tmp_path):
    rows = rows_of(12, tmp_path)
    with teacher(delay=0.05) as server:
        data.synthesize(config(tmp_path, server, concurrency=3))
        assert server.most == 3
    account(rows, tmp_path)


def test_the_command_with_a_wrong_key(tmp_path, monkeypatch, capfd, key_stays_secret):
    rows_of(300, tmp_path)
    with teacher(lambda body: "401") as server:
        flags = f"--input {tmp_path}/in.jsonl --out {tmp_path}/out.jsonl --base-url {server.url}"
        monkeypatch.setattr(sys, "argv", ["data.py", "synthesize", *flags.split()])
        with pytest.raises(SystemExit, match="2"):
            data.cli({"synthesize": (SynthesizeConfig, data.synthesize)})
        assert len(server.seen) <= 26
    shown = capfd.readouterr()
    key_stays_secret += shown
    assert re.fullmatch("error: http://[^\n]* 401 [^\n]*check key[^\n]*\n", shown.err)
    assert re.search(r"291 missing.*\nmissing: r[^\n]*, \.\.\.\n", shown.out)


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("404", "404"),
        ("403", "403"),
        ("429", "429"),
        ("400", "400"),  # it names the model, which all rows share
        ("500", "500"),
        ("html", "no chat completion: <html>busy"),
        ("disconnect", "Connection error"),
    ],
)
def test_a_server_that_never_answers_stops_the_run(tmp_path, fault, reason):
    rows = rows_of(30, tmp_path)
    with teacher(lambda body: fault) as server:
        with pytest.raises(InputError, match=f"{server.url}.*{reason}"):
            data.synthesize(config(tmp_path, server, concurrency=4, attempts=1))
        assert len(server.seen) <= 14 and len(written(tmp_path)[1]) < 10
        server.fault = lambda body: None
        data.synthesize(config(tmp_path, server))
    assert not account(rows, tmp_path)[1]


def test_an_unreachable_server(tmp_path):
    rows_of(60, tmp_path)
    with socket.socket() as reserved:  # bound, but nobody listens
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/v1"
        with pytest.raises(InputError, match=f"{url}/?: APIConnectionError: Connection error"):
            data.synthesize(config(tmp_path, url, attempts=1))
    assert written(tmp_path)[0] == []


def test_one_refused_row_is_set_aside_at_once_and_asked_for_by_the_next_run(tmp_path):
    rows = rows_of(5, tmp_path)
    (tmp_path / "bag.png").write_bytes(
        (tmp_path / "bag.png").read_bytes()[:60]
    )  # r0 and r1: cut off
    with teacher(lambda body: "400" if "bag 3" in str(body) else None) as server:
        data.synthesize(config(tmp_path, server))
        assert len(server.seen) == 3
        good, bad = account(rows, tmp_path)
        assert [
            (row["id"], row["reason"].split()[0]) for row in sorted(bad, key=lambda row: row["id"])
        ] == [("r0", "image"), ("r1", "image"), ("r3", f"{server.url}/:")]
        server.fault = lambda body: None
        Image.new("RGB", (90, 60), "teal").save(tmp_path / "bag.png")
        data.synthesize(config(tmp_path, server))
        assert len(server.seen) == 6
    assert len(account(rows, tmp_path)[0]) == 5


def test_dry_run_sends_nothing(tmp_path, monkeypatch, capfd):
    rows = rows_of(8, tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY")
    with teacher() as server:
        data.synthesize(config(tmp_path, server, dry_run=True))
        assert not server.seen and not (tmp_path / "out").exists()
    request, _, estimate = capfd.readouterr().out.partition("\n}\n")
    request = json.loads(request + "}")
    assert (
        request["model"] == "gpt-4o-2024-08-06"
        and "Request: harmful" in request["messages"][0]["content"]
    )
    assert request["messages"][1]["content"][1]["image_url"]["url"].endswith("...")
    tokens = len(rows) * len(request["messages"][0]["content"]) / 4 + 765 * sum(
        bool(row["image"]) for row in rows
    )
    found = re.search(r"8 requests, about (\d+) prompt and 2000 completion tokens", estimate)
    assert tokens < int(found[1]) < 1.1 * tokens  # the exchanges are short


def test_reasoning_that_is_there_is_kept(tmp_path):
    row = rows_of(1, tmp_path)[0] | {"reasoning": "mine"}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    with teacher() as server:
        data.synthesize(config(tmp_path, server))
        assert not server.seen
    [kept] = written(tmp_path)[0]
    assert kept["reasoning"] == "mine" and (tmp_path / "out" / kept["image"]).is_file()


@pytest.mark.parametrize(
    "content",
    [
        '{"id": "r0", "source": "s", "request": "What?", "reasoning": "x"}\n',  # another sample of the same id
        '{"id": "r0", "source": "s", "request": "", "reasoning": null}\n',  # labelled, not reasoned
        '[{"id": "r0"}]',
        '{"a": 1}',
        "notes",
        '{"id": "r0"\n',
        "[1]\n",
    ],
)
def test_files_of_others_are_left_alone(tmp_path, content):
    rows_of(1, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").write_text(content)
    with teacher() as server:
        with pytest.raises(InputError, match="train.jsonl(: remove row|:1: damaged)"):
            data.synthesize(config(tmp_path, server))
        assert not server.seen
    assert (tmp_path / "out" / "train.jsonl").read_text() == content


def test_rows_are_added_to_a_file_that_holds_others(tmp_path):
    rows = rows_of(2, tmp_path)
    out = tmp_path / "out" / "train.jsonl"
    out.parent.mkdir()
    converted = {"id": "other", "source": "s", "request": "What?", "reasoning": "mine"}
    out.write_text(json.dumps(converted) + "\n")
    with teacher() as server:
        data.synthesize(config(tmp_path, server))
        asked = len(server.seen)
        data.synthesize(config(tmp_path, server))
        assert len(server.seen) == asked == len(rows)
    first, *added = written(tmp_path)[0]
    assert first == converted and {row["id"] for row in added} == {"r0", "r1"}


@pytest.mark.parametrize(
    "flag",
    ["concurrency=0", "concurrency=501", "attempts=0", "timeout=0", "timeout=nan", "timeout=inf"],
)
def test_the_range_of_flags(flag):
    name, value = flag.split("=")
    flags = data.Parser(SynthesizeConfig).parse_args(["--input=a", "--out=b", f"--{flag}"])
    with pytest.raises(InputError, match=rf"--{name}: {value}\S* is not a number from "):
        data.check_numbers(SynthesizeConfig(**vars(flags)))


def test_wrong_use(tmp_path, monkeypatch):
    rows_of(2, tmp_path)
    cfg, out = config(tmp_path, "http://x"), tmp_path / "out" / "train.jsonl"
    with data.lock_output(out), pytest.raises(InputError, match="another run is writing"):
        data.synthesize(cfg)
    for path, reason in (
        (cfg.input, "is or holds an input"),
        (tmp_path / "out" / ".." / "in.jsonl", "is or holds an input"),
        (tmp_path, "no regular file"),
        ("/dev/null", "no regular file"),
        ("", "empty"),
    ):
        with pytest.raises(InputError, match=reason):
            data.synthesize(replace(cfg, out=str(path)))
    for flags in (
        *({"base_url": url} for url in ("", "x", "localhost:80/v1", "ftp://x/v1", "http:///v1")),
        *({"base_url": url} for url in ("http://x:99999/", "http://[", "http://x/\nv1")),
    ):
        [(name, value)] = flags.items()
        with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} "):
            data.synthesize(replace(cfg, **flags))
        with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} "):
            data.synthesize(replace(cfg, dry_run=True, **flags))
    monkeypatch.setenv("OPENAI_BASE_URL", "nowhere")
    with pytest.raises(InputError, match="OPENAI_BASE_URL 'nowhere' is no address"):
        data.synthesize(replace(cfg, base_url=None))
    for key in ("", KEY + "\n", "sk-\u201cquoted\u201d"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(InputError, match="OPENAI_API_KEY"):
            data.synthesize(cfg)
    assert not out.exists()


# ---- the same command means the same inputs


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"id": "r0", "source": "s", "request": "x", "reasoning": "y"}', "is there twice"),
        ('{"id": "n", "source": "s", "request": "x", "reasoning": "y", "z": 1}', "unknown field"),
        ('{"id": "n", "source": "s", "request": "x", "reasoning": null}', "has no reasoning"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_before_any_request(tmp_path, line, reason):
    rows_of(2, tmp_path)
    with teacher() as server:
        data.synthesize(config(tmp_path, server))
        asked = len(server.seen)
        with open(tmp_path / "out" / "train.jsonl", "a") as file:
            file.write(line + "\n")
        with pytest.raises(InputError, match=f"remove row .*{reason}"):
            data.synthesize(config(tmp_path, server))
        assert len(server.seen) == asked


def test_a_row_counts_as_done_only_if_its_sample_is_unchanged(tmp_path):
    rows = rows_of(4, tmp_path)  # r1: all but a request label, and an image; r3: one label
    with teacher() as server:
        data.synthesize(config(tmp_path, server))
        asked = len(server.seen)
        for change, field in (
            ({"source": "other"}, "source"),
            ({"request": "Another?"}, "request"),
            ({"response": "Another."}, "response"),
            ({"request_label": "harmful"}, "request_label"),  # what the teacher itself has chosen
            ({"response_label": None}, "response_label"),
            ({"image": None}, "image"),
            ({"reasoning": "mine"}, "reasoning"),
        ):
            changed = [rows[0], rows[1] | change, *rows[2:]]
            (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
            with pytest.raises(
                InputError, match=f"train.jsonl: remove row 'r1', or .*: .*{field}.* changed in"
            ):
                data.synthesize(config(tmp_path, server))
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
        with pytest.raises(InputError, match="teacher changed in"):
            data.synthesize(dataclasses.replace(config(tmp_path, server), model="another"))
        data.synthesize(config(tmp_path, server))  # r3 is in the output alone
        # The same path, another content; a copy of the content elsewhere is the same image.
        (tmp_path / "bag.png").rename(tmp_path / "copy.png")
        Image.new("RGB", (90, 60), "red").save(tmp_path / "bag.png")
        with pytest.raises(InputError, match="remove row 'r[01]', .* image changed in"):
            data.synthesize(config(tmp_path, server))
        moved = "".join(json.dumps(row) + "\n" for row in rows).replace("bag.png", "copy.png")
        (tmp_path / "in.jsonl").write_text(moved)
        data.synthesize(config(tmp_path, server))
        assert len(server.seen) == asked
    assert len(account(json.loads(f"[{moved.strip().replace(chr(10), ',')}]"), tmp_path)[0]) == 4


def test_an_image_in_the_folder_of_the_output_counts_by_content(tmp_path):
    rows_of(1, tmp_path)
    cfg = replace(config(tmp_path, ""), out=str(tmp_path / "train.jsonl"))
    with teacher() as server:
        data.synthesize(replace(cfg, base_url=server.url))
        assert read(tmp_path / "train.jsonl")[0]["image"] == "bag.png"
        Image.new("RGB", (90, 60), "red").save(tmp_path / "bag.png")
        with pytest.raises(InputError, match="remove row 'r0', .* image changed"):
            data.synthesize(replace(cfg, base_url=server.url))


# ---- the server is a stranger


def test_rows_that_a_content_filter_refuses_are_set_aside_and_the_next_asked(tmp_path):
    rows = rows_of(15, tmp_path)
    with teacher(lambda body: None if "bag 13" in str(body) else "filter") as server:
        data.synthesize(config(tmp_path, server, concurrency=1))
        assert len(server.seen) == 15
        good, bad = account(rows, tmp_path)
    assert [row["id"] for row in good] == ["r13"] and len(bad) == 14
    assert all("flagged" in row["reason"] and "\x1b" not in row["reason"] for row in bad)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert [name for name in names if name.endswith(".jsonl")] == ["train.jsonl"]


def test_replies_are_bounded_in_bytes_and_seconds(tmp_path):
    rows_of(5, tmp_path)
    bomb = gzip.compress(bytes(10 * data.MAX_REPLY), 1)
    replies = {
        "bag 1": {"text": bomb, "headers": {"Content-Encoding": "gzip"}},
        "bag 2": {"text": "{}", "headers": {"Content-Encoding": "rot13"}},
        "bag 3": {"text": bytes(data.MAX_REPLY + 1)},
        "bag 4": {"text": "{}", "headers": {"Content-Encoding": "gzip"}},
        "": "drip",
    }
    begun = time.monotonic()
    with teacher(lambda body: next(replies[bag] for bag in replies if bag in str(body))) as server:
        with pytest.raises(InputError, match="none of 5 rows asked for is done"):
            data.synthesize(config(tmp_path, server, attempts=1, timeout=0.5))
    assert time.monotonic() - begun < 1.9
    bad = {
        row["id"]: row["reason"].removeprefix(f"{server.url}/: ") for row in written(tmp_path)[1]
    }
    assert bad == {
        "r0": "no whole reply in 0.5 seconds",
        "r1": "the reply has more than 4194304 bytes",
        "r2": "the reply is no chat completion: {}",
        "r3": "the reply has more than 4194304 bytes",
        "r4": "APIConnectionError: Connection error. "
        "Error -3 while decompressing data: incorrect header check",
    }


def test_a_compressed_answer_and_a_bad_usage_are_no_reason_to_lose_it(tmp_path):
    rows = rows_of(1, tmp_path)
    content = data.TARGET.format(GOOD, "harmful", "None")
    reply = {"choices": [{"message": {"content": content}}], "usage": "many"}
    packed = gzip.compress(json.dumps(reply).encode())
    fault = {"text": packed, "headers": {"Content-Encoding": "gzip"}}
    with teacher(lambda body: fault) as server:
        data.synthesize(config(tmp_path, server, attempts=1))
    assert account(rows, tmp_path)[0][0]["reasoning"] == GOOD
    for usage in (None, [], "many", {"total_tokens": "9"}, {"total_tokens": -1}, {}):
        assert data.read_completion(json.dumps(reply | {"usage": usage}).encode()) == (content, 0)
    reply["usage"] = {"total_tokens": 9}
    assert data.read_completion(json.dumps(reply).encode()) == (content, 9)


@pytest.mark.parametrize(
    "reply, kind, reason",
    [
        ("<html>busy</html>", data.ServerError, "no chat completion: <html>busy</html>"),
        ("[" * 10**6, data.ServerError, "no chat completion"),
        ('"a string"', data.ServerError, 'no chat completion: "a string"'),
        ('["a"]', data.ServerError, "no chat completion"),
        ('{"error": "quota"}', data.ServerError, 'no chat completion: {"error": "quota"}'),
        ('{"choices": []}', data.ServerError, "no chat completion"),
        ('{"choices": {}}', data.ServerError, "no chat completion"),
        ('{"choices": ["a"]}', data.ServerError, "no chat completion"),
        ('{"choices": [{"message": [1]}]}', data.ServerError, "no chat completion"),
        (
            '{"choices": [{"message": {"content": ["a"]}}]}',
            data.ServerError,
            "content is no text: .*a",
        ),
        ('{"choices": [{"message": {"refusal": "no"}}]}', InputError, "gave no text: .*refusal"),
    ],
)
def test_odd_replies_are_told_in_words(reply, kind, reason):
    with pytest.raises(InputError, match=reason) as told:
        data.read_completion(reply.encode())
    assert told.type is kind


def test_text_of_a_server_is_fit_to_print_and_to_write():
    shown = data.printable(f"a\x1b[1;31mb\x1b]0;title\x07c\x9b\r\n\td\ud800{KEY}\x00\u4e2d", KEY)
    assert shown == "abc\n\td?[key]\u4e2d"
    assert data.printable("none", "none") == "none"
