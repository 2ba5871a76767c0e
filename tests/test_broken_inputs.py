"""Bad input ends every command in one printable line on stderr and exit code 2; unusual input does not.

Each case damages one thing in a small world of four samples and a random checkpoint, and runs a command that
meets it, in-process through data.cli. What all stages read, they read by the same functions: most cases run
evaluate.py, some of them all.

    python -m pytest tests/test_broken_inputs.py
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import toy
from PIL import Image

import augment
import data
import evaluate
import grpo
import sft

STAGE = "--model base --data data.jsonl --device cpu"
MORE = "--no-checkpointing --max-new-tokens 4 --rollout-batch 4 --update-batch 2 --group 2"
SERVER = "--base-url http://127.0.0.1:9/v1"  # where nobody answers
COMMANDS = {
    "sft": (sft.SFTFlags, sft.main, f"{STAGE} --out out --batch-size 2 --epochs 1"),
    "augment": (augment.AugmentFlags, augment.main, f"{STAGE} --out out/rl.jsonl --max-new-tokens 4"),
    "grpo": (grpo.GRPOFlags, grpo.main, f"{STAGE} --out out {MORE}"),
    "evaluate": (evaluate.EvaluateFlags, evaluate.main, f"{STAGE} --out out --max-new-tokens 4"),
    "judge": (evaluate.EvaluateFlags, evaluate.main, "--model base --device cpu --request Hi"),
    "score": (evaluate.EvaluateFlags, evaluate.main, "--predictions predictions.jsonl"),
    "convert": (data.ConvertFlags, data.convert, "--input released.json --out out/train.jsonl"),
    "synthesize": (data.SynthesizeFlags, data.synthesize, f"--input data.jsonl --out out/train.jsonl {SERVER}"),
}  # fmt: skip
STAGES, BOTH = "sft augment grpo evaluate", "sft evaluate"

# ---- the world and the commands

LABELS = {"request_label": "harmful", "response_label": "unharmful", "reasoning": "They ask."}
SAMPLES = [
    {"id": "s0", "source": "test", "request": "Hello", "response": "Hi"} | LABELS,
    {"id": "s1", "source": "test", "request": "May I?", "response": "No"} | LABELS,
    {"id": "s2", "source": "test", "request": "", "image": "a.png", "response": "Hm"} | LABELS,
    {"id": "s3", "source": "test", "request": "Look", "image": "a.png", "response": "No"} | LABELS,
]
ANSWER = "<think>\nx\n</think>\n<result>\nAnswers:\nRequest: harmful\nResponse: None\n</result>"
PREDICTION = SAMPLES[0] | {"image": None, "output": ANSWER, "n_tokens": 9, "finished": True}
PREDICTION |= {"request_p": 0.5, "response_p": None}
USER = "Human user:\n<image>\nHi\n\nAI assistant:\nNone\n"
RELEASED = {"input": USER, "output": ANSWER, "image": "a.png"}


def to_bytes(content):
    return content if isinstance(content, bytes) else json.dumps(content).encode()


def lines(*contents):
    return b"".join(to_bytes(content) + b"\n" for content in contents)


def damage(changes):
    """{file: new content, as bytes, as an object of JSON, or as a function of the old one; None removes it}"""
    for name, new in changes.items():
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        if new is not None:
            path.write_bytes(to_bytes(new(path.read_bytes()) if callable(new) else new))
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    toy.build_checkpoint(folder / "base", **toy.TINY)
    Image.effect_noise((84, 56), 99).convert("RGB").save(folder / "a.png")
    (folder / "data.jsonl").write_bytes(lines(*SAMPLES))
    (folder / "predictions.jsonl").write_bytes(lines(PREDICTION))
    (folder / "released.json").write_bytes(to_bytes([RELEASED, RELEASED]))
    return folder


@pytest.fixture
def run(original, tmp_path, monkeypatch, capsys):
    """run(command, flags) -> (status, stdout, stderr) of a script run in this process, in a copy of the world.
    Flags that are given here take the place of the usual ones."""
    shutil.copytree(original, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setenv("OPENAI_API_KEY", "none")

    def run(command: str, flags: str = "") -> tuple[int, str, str]:
        flags_class, main, usual = COMMANDS[command]
        usual, given = (text.split("--")[1:] for text in (usual, flags))  # names with their values
        names = {flag.split()[0] for flag in given}
        given = [flag for flag in usual if flag.split()[0] not in names] + given
        try:
            data.cli(flags_class, main, " ".join(f"--{flag}" for flag in given).split())
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


# ---- bad input


def half(content):
    return content[: len(content) // 2]


def changed(old, new):
    return lambda content: content.replace(old, new)


def line(content):
    """Another second line of data.jsonl."""
    return {"data.jsonl": lines(SAMPLES[0], content, *SAMPLES[2:])}


def sample(**fields):
    return line(SAMPLES[1] | fields)


def setting(**values):
    return {f"base/{PROCESSOR}": lambda content: json.loads(content) | values}


def poison(content):
    weights = safetensors.torch.load(content)
    return safetensors.torch.save(weights | {"model.norm.weight": torch.full((32,), torch.nan)})


CONFIG, PROCESSOR = "base/config.json", "preprocessor_config.json"
WEIGHTS = "base/model.safetensors"
TOKENIZER = ("base/tokenizer.json", "base/tokenizer_config.json")
UNLABELLED = {"data.jsonl": {"id": "a", "source": "s", "request": "x"}}
# what is bad: (the commands that meet it, what is damaged, flags, what the error says)
CASES = {
    # flags
    "no steps between checkpoints": ("sft", {}, "--save-every 0", "save_every 0: want at least 1"),
    # the samples
    "malformed JSON": (STAGES + " synthesize", line(b'{"id": "x", '), "", r"data.jsonl:2: .*JSON"),
    "a hostile id": ("evaluate", sample(id="\x1b[2J\u202e|\n", request=3), "", r"data.jsonl:2: .*'request'"),
    "the released format": ("evaluate", line(RELEASED), "", r"data.jsonl:2: unknown field.*data.py convert"),
    "empty file": ("evaluate", {"data.jsonl": b""}, "", r"data.jsonl: "),
    "no such file": (STAGES, {"data.jsonl": None}, "", r"no data.jsonl.*data.py convert"),
    "a file twice": (STAGES, {}, "--data data.jsonl ../w/data.jsonl", r"data.jsonl.*(before|twice|2 times)"),
    "no labels": ("sft grpo", UNLABELLED, "", r"0 samples"),
    # the pictures
    "truncated picture": (STAGES, {"a.png": half}, "", r"s[23]: image a.png cannot be used"),
    "bomb": ("evaluate", {"a.png": b"P6 60000 60000 255 "}, "", r"a.png cannot be used: .*bomb"),
    "over 200:1": ("evaluate", {"a.png": b"P5 402 2 255 " + bytes(804)}, "", r"a.png cannot be used: .*402"),
    "PostScript": ("evaluate", {"a.png": b"%!PS-Adobe-3.0 EPSF-3.0\n"}, "", r"a.png cannot be used"),
    "no picture to judge": ("judge", {}, "--image no/such.png", r"'such.png' does not exist in no"),
    # the checkpoint
    "no checkpoint": (STAGES + " judge", {"base": None}, "", r"base: no such checkpoint"),
    "no config": (BOTH, {CONFIG: None}, "", CONFIG),
    "foreign architecture": (BOTH, {CONFIG: changed(b'"qwen2_5_vl"', b'"llama"')}, "", CONFIG + r".*llama"),
    "weights cut off": (BOTH, {WEIGHTS: half}, "", WEIGHTS),
    "NaN weights": ("evaluate", {WEIGHTS: poison}, "", r"prompt \d: after 0 tokens the model's logits are no numbers"),
    "no tokenizer": (BOTH, {TOKENIZER[0]: None}, "", r"base: its tokenizer"),
    "another tokenizer": (BOTH, dict.fromkeys(TOKENIZER, changed(b"image_pad", b"x_pad")), "", r"base: its tokenizer"),
    "tags that are tokens": (BOTH, dict.fromkeys(TOKENIZER, changed(b"<|file_sep|>", b"<think>")), "", r"base: .*<think>"),
    "other resampling": ("evaluate", setting(resample=0), "", r"base: resample is 0"),
    "raw colours": ("evaluate", setting(do_normalize=False), "", r"base: do_normalize is False"),
    "values to 2": ("evaluate", setting(rescale_factor=2 / 255), "", r"base: rescale_factor is"),
    # flags
    "no such instruction": (BOTH, {}, "--instruction no.txt", r"no.txt"),
    "instruction not UTF-8": ("evaluate", {"i.txt": b"\xff"}, "--instruction i.txt", r"i.txt"),
    "a flag twice": (STAGES, {}, "--seed 1 --seed 2", r"--seed"),
    "nothing to train": ("sft grpo", {}, "--freeze vision merger decoder", r"--freeze"),
    # outputs
    "an input as output": (STAGES, {}, "--out base", r"--out base is or holds an input"),
    "a stranger's folder": ("grpo", {"out/notes.txt": b"mine"}, "", r"out.* another --out"),
    # predictions to score, released files, the teacher
    "no text": ("score", {"predictions.jsonl": PREDICTION | {"output": 3}}, "", r"predictions.jsonl:1: "),
    "released and cut off": ("convert", {"released.json": half}, "", r"released.json: cannot be read"),
    "no released rows": ("convert", {"released.json": [{"a": 1}, 2]}, "", r"out/train.jsonl.rejected-by-convert"),
    "no server": ("synthesize", {"data.jsonl": lines(*(UNLABELLED["data.jsonl"] | {"id": str(i)} for i in range(30)))}, "",
                  r"http://127.0.0.1:9/v1/: .*APIConnectionError"),
}  # fmt: skip
PAIRS = [(case, command) for case, row in CASES.items() for command in row[0].split()]


@pytest.mark.parametrize("case, command", PAIRS)
def test_one_clear_line_and_status_2(run, case, command):
    _, changes, flags, message = CASES[case]
    damage(changes)
    status, _, err = run(command, flags)
    assert status == 2 and err.endswith("\n") and err[:-1].isprintable(), err
    assert re.fullmatch(rf"(\S+ )?error: .*{message}.*\n", err), err
    assert not Path("out/model.safetensors").exists()


@pytest.mark.parametrize("command, name, room", [
    ("evaluate", "predictions.jsonl", 1000), ("sft", "model.safetensors", 60_000), ("convert", "train.jsonl", 300)])  # fmt: skip
def test_a_full_disk_leaves_what_can_be_gone_on_with(run, command, name, room):
    """No file of this process can grow over `room` bytes, until the second run."""
    path, before = Path("out", name), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        status, _, err = run(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2 and re.fullmatch("error: .*(too large|written).*\n", err), err
    assert "Traceback" not in err and not path.exists()  # what has its final name is whole
    assert run(command)[0] == 0 and path.stat().st_size > room


# ---- unusual input


def marked(content):
    return b"\xef\xbb\xbf" + content


def test_files_from_windows(run):
    """Byte order marks, and a carriage return at the end of every line."""
    ends = changed(b"\n", b"\r\n")
    damage({"data.jsonl": lambda content: marked(ends(content)), f"base/{PROCESSOR}": marked})
    damage({"base/instruction.txt": marked(b"Judge.")})
    for command, flags in (("evaluate", ""), ("sft", "--out sft")):
        status, _, err = run(command, flags)
        assert status == 0 and not err, err
    assert len(data.read_records("out/predictions.jsonl")) == 4
    assert Path("sft/instruction.txt").read_bytes() == b"Judge.\n"


SAME = {  # what is done, and the flags that then name the same inputs
    "touched": (lambda: os.utime("a.png", (0, 0)), ""),
    "another working folder": (lambda: os.chdir("base"), "--model . --data ../data.jsonl --out ../out"),
    "a copy by rsync": (lambda: os.chdir(shutil.copytree(".", "../copy")), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
@pytest.mark.parametrize("command", ["sft", "evaluate"])
def test_the_same_inputs_are_the_same(run, tmp_path, case, command):
    """A finished run goes on, and finds nothing to do."""
    assert run(command)[0] == 0
    before = {path.read_bytes() for path in tmp_path.rglob("out/*.jsonl")}
    change, flags = SAME[case]
    change()
    status, _, err = run(command, flags)
    assert status == 0 and not err, err
    assert {path.read_bytes() for path in tmp_path.rglob("out/*.jsonl")} == before


def test_a_screen_that_knows_no_unicode(run):
    """A source that the terminal cannot show; as a process."""
    damage({"data.jsonl": lines(*(sample | {"source": "quelle \u00fc"} for sample in SAMPLES))})
    command = [sys.executable, evaluate.__file__, *COMMANDS["evaluate"][2].split()]
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, env=env)
    assert done.returncode == 0 and b"| prompt | quelle ? |" in done.stdout, done.stderr
