"""Broken inputs: every command ends in one clear line on stderr and status 2, without a traceback.

Each case breaks one thing in a small world of four samples and a random checkpoint, and runs the commands
that meet it, in-process through data.cli; a few run as real processes. Below: what is unusual but fine,
what --skip-bad sets aside, and outputs that cannot be written: what is there stays whole and is gone on with.

    python -m pytest -q tests/test_broken_inputs.py
"""

import io
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from PIL import Image
from safetensors.torch import load_file, save_file

import augment
import data
import evaluate
import grpo
import model
import sft
from model import CheckpointError

STAGE = "--model base --data data.jsonl --device cpu "
COMMANDS = {
    "sft": (sft, STAGE + "--out out --batch-size 4 --epochs 1 --steps 1 --no-checkpointing"),
    "augment": (augment, STAGE + "--out out/rl.jsonl --samples 1 --max-new-tokens 4"),
    "grpo": (grpo, STAGE + "--out out --rollout-batch 4 --update-batch 2 --group 2 --max-new-tokens 4 "
                           "--steps 1 --no-checkpointing"),
    "evaluate": (evaluate, STAGE + "--out out --max-new-tokens 4"),
    "judge": (evaluate, "--model base --device cpu --max-new-tokens 4 --json --request Hello"),
    "score": (evaluate, "--predictions predictions.jsonl"),
    "convert": (data, "convert --input released.json --out out/train.jsonl"),
    "synthesize": (data, "synthesize --input data.jsonl --out out/reasoned.jsonl --attempts 1 "
                         "--base-url http://127.0.0.1:9/v1"),  # where nobody answers
}  # fmt: skip
STAGES, MODELS = "sft augment grpo evaluate", "sft augment grpo evaluate judge"
READERS = STAGES + " synthesize"


# ---------------------------------------------------------------- the world and the commands

ROWS = [
    {
        "id": f"s{i}",
        "source": "test",
        "request": text,
        "image": image,
        "response": response,
        "request_label": "harmful",
        "response_label": response and "unharmful",
        "reasoning": "They ask.",
    }
    for i, (text, image, response) in enumerate(
        [
            ("Hello", None, "Hi"),
            ("May I?", None, None),
            ("", "a.png", None),
            ("Look", "a.png", "Nice"),
        ]
    )
]
ANSWER = "<think>\nx\n</think>\n<result>\nAnswers:\nRequest: harmful\nResponse: None\n</result>"
RELEASED = {
    "messages": [
        {"role": "user", "content": "Human user:\n<image>\nHi\n\nAI assistant:\nNone\n"},
        {"role": "assistant", "content": ANSWER},
    ],
    "images": ["a.png"],
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    toy.build_checkpoint(folder / "base")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 84, 3), np.uint8)).save(
        folder / "a.png"
    )
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "released.json").write_text(json.dumps([RELEASED, RELEASED]))
    (folder / "predictions.jsonl").write_text(
        "".join(
            json.dumps(row | {"output": "", "n_tokens": 1, "finished": True}) + "\n" for row in ROWS
        )
    )
    return folder


@pytest.fixture
def world(original, tmp_path, monkeypatch):
    """A copy of the world to break, as the working folder."""
    shutil.copytree(original, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    return tmp_path / "w"


@pytest.fixture
def run(monkeypatch, capsys):
    """run(command, flags) -> (status, stdout, stderr) of a script run in this process."""

    def run(command: str, flags: str = "") -> tuple[int, str, str]:
        module, usual = COMMANDS[command]
        monkeypatch.setattr(sys, "argv", [command, *usual.split(), *flags.split()])
        capsys.readouterr()
        try:
            if module is data:
                data.cli(
                    {
                        "convert": (data.ConvertConfig, data.convert),
                        "synthesize": (data.SynthesizeConfig, data.synthesize),
                    }
                )
            else:
                data.cli(module.Config, module.main)
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


# ---------------------------------------------------------------- how to break it


def line2(content):
    """Replace the second line of data.jsonl."""

    def change():
        lines = Path("data.jsonl").read_bytes().splitlines(True)
        lines[1] = (content if isinstance(content, bytes) else json.dumps(content).encode()) + b"\n"
        Path("data.jsonl").write_bytes(b"".join(lines))

    return change


def row(**fields):
    return line2(ROWS[1] | fields)


def write(name, content):
    def change():
        path = Path(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return change


def remove(name):
    return lambda: shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def cut(name, share=0.5):
    return lambda: Path(name).write_bytes(
        Path(name).read_bytes()[: int(share * Path(name).stat().st_size)]
    )


def setting(name, **values):
    """Change fields of a JSON file of the checkpoint; ... removes one."""

    def change():
        path = Path("base", name)
        content = json.loads(path.read_text()) | values
        path.write_text(
            json.dumps({key: value for key, value in content.items() if value is not ...})
        )

    return change


def tensors(edit):
    def change():
        found = load_file("base/model.safetensors")
        edit(found)
        save_file(found, "base/model.safetensors")

    return change


def poison(name, value=float("nan")):
    return tensors(lambda found: found[name].view(-1)[-1:].fill_(value))


def png(width, height):
    """A small file that claims to be a large picture."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b"IHDR" + head, b"IDAT" + zlib.compress(b"\0" * 999)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def image(*args, **how):
    """Save a picture, Image.new(*args), in the place of a.png."""

    def change():
        buffer = io.BytesIO()
        Image.new(*args).save(buffer, **{"format": "PNG"} | how)
        Path("a.png").write_bytes(buffer.getvalue())

    return change


def zipped(content, edit=lambda whole: whole):
    """Have the released rows' picture, with this content, in a zip file only."""

    def change():
        Path("a.png").unlink()
        with zipfile.ZipFile("p.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", content)
        Path("p.zip").write_bytes(edit(Path("p.zip").read_bytes()))

    return change


def nothing():
    pass


# what is broken: (the commands that meet it, how, flags, what the error says)
CASES = {
    # the samples
    "malformed JSON": (READERS, line2(b'{"id": "x", '), "", r"data.jsonl:2: not valid JSON.*--skip-bad"),
    "a JSON list": (READERS, line2([1]), "", r"data.jsonl:2: .*not list"),
    "not UTF-8": (READERS, line2(b'{"id": "\xff"}'), "", r"data.jsonl:2: not valid JSON"),
    "no id": (READERS, line2({"source": "s", "request": "x"}), "", r"data.jsonl:2: field 'id' is missing"),
    "duplicate id": (READERS, row(id="s0"), "", r"data.jsonl:2: 's0': this id was used before"),
    "a number as text": (READERS, row(request=3), "", r"data.jsonl:2: 's1': field 'request' is not a string"),
    "unknown label": (READERS, row(request_label="bad"), "", r"data.jsonl:2: 's1': request_label is 'bad'"),
    "nothing to judge": (READERS, row(request=""), "",
        r"data.jsonl:2: 's1': .*neither a request nor an image"),
    "half a character": (READERS, row(request="\ud800"), "", r"data.jsonl:2: 's1': .*surrogate"),
    "missing image": (READERS, row(image="no.png"), "", r"data.jsonl:2: 's1': image 'no.png' does not exist"),
    "escaping path": (READERS, row(image="../w/a.png"), "", r"data.jsonl:2: 's1': .*inside the data folder"),
    "absolute path": (READERS, row(image="/etc/hosts"), "", r"data.jsonl:2: 's1': .*inside the data folder"),
    "the released format": (READERS, line2(RELEASED), "", r"data.jsonl:2: unknown field.*data.py convert"),
    "empty file": (READERS, write("data.jsonl", b""), "", r"data.jsonl: holds no samples"),
    "zero bytes": (READERS, write("data.jsonl", b"\0" * 99), "", r"data.jsonl:1: not valid JSON"),
    "no such file": (READERS, remove("data.jsonl"), "", r"data.jsonl"),
    "a folder as file": (STAGES, nothing, "--data base", r"base"),
    "no file named": (STAGES, nothing, "--data", r"--data"),
    "the same file twice": (
        "augment", lambda: shutil.copy("data.jsonl", "b.jsonl"), "--data data.jsonl b.jsonl", r"s0"),
    "a prompt too long for RL": ("grpo", nothing, "--max-prompt-tokens 5",
        r"0 prompts .*--max-prompt-tokens"),
    "a prompt too long for mining": ("augment", nothing, "--max-prompt-tokens 5", r"--max-prompt-tokens"),
    "a prompt too long for the model": (
        "evaluate judge", setting("config.json", max_position_embeddings=9), "", r"the model can read 9"),
    "no label": ("augment grpo", write("data.jsonl", b'{"id": "a", "source": "s", "request": "x"}'), "",
        r"label"),
    "no reasoning": ("sft", write("data.jsonl", b'{"id": "a", "source": "s", "request": "x"}'), "",
        r"synthesize"),
    "reasoning, but no label": ("sft", write(
        "data.jsonl", b'{"id": "a", "source": "s", "request": "x", "reasoning": "1. x"}'), "", r"no sample has.*labels"),
    "control tags in reasoning": ("sft", row(reasoning="so <result>"), "", r"s1: .*<result>"),
    # the pictures
    "empty picture": (STAGES, write("a.png", b""), "", r"sample s[23]: image a.png cannot be used"),
    "truncated picture": (STAGES, cut("a.png"), "", r"sample s[23]: image a.png cannot be used"),
    "text named .png": (STAGES, write("a.png", b"a note"), "", r"sample s[23]: image a.png cannot be used"),
    "decompression bomb": (STAGES, write("a.png", png(60000, 60000)), "", r"a.png cannot be used: .*60000"),
    "large canvas": (STAGES, write("a.png", png(10000, 10000)), "", r"a.png cannot be used: .*10000"),
    "over 200:1": (STAGES, image("RGB", (402, 2)), "", r"a.png cannot be used: 402 x 2 pixels"),
    "PostScript": (STAGES, write("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n"), "", r"a.png cannot be used"),
    "flags beside standard input": ("judge", nothing, "--request - --response x", r"leave out --response"),
    "a picture that is none": ("judge", nothing, "--image base/config.json", r"config.json cannot be used"),
    "a picture that is a folder": ("judge", nothing, "--image base", r"'base' does not exist"),
    "a picture that is missing": ("judge", nothing, "--image no/such.png",
        r"'such.png' does not exist in no"),
    # the checkpoint
    "no checkpoint": (MODELS, remove("base"), "", r"base"),
    "a file as checkpoint": (MODELS, write("base", b"x"), "", r"base"),
    "an empty folder": (MODELS, lambda: [p.unlink() for p in Path("base").iterdir()], "", r"base"),
    "no config": (MODELS, remove("base/config.json"), "", r"config.json"),
    "config cut off": (MODELS, cut("base/config.json"), "", r"config.json"),
    "config a list": (MODELS, write("base/config.json", []), "", r"config.json"),
    "foreign architecture": (MODELS, setting("config.json", model_type="llama"), "", r"'llama'"),
    "config without a size": ("judge sft", setting("config.json", hidden_size=...), "", r"hidden_size"),
    "config with a text as size": ("judge sft", setting("config.json", hidden_size="x"), "", r"config.json"),
    "config with no heads": ("judge sft", setting("config.json", num_attention_heads=0), "", r"config.json"),
    "config with odd heads": ("judge sft", setting("config.json", num_attention_heads=3), "", r"config.json"),
    "config with other rope": ("judge sft", setting("config.json", rope_scaling={"type": "yarn"}), "",
        r"rope type"),
    "other sections": ("judge", setting("config.json", rope_scaling={"mrope_section": [1]}), "",
        r"mrope_section"),
    "no weights": (MODELS, remove("base/model.safetensors"), "", r"model.safetensors"),
    "weights cut off": (MODELS, cut("base/model.safetensors"), "", r"model.safetensors"),
    "empty weights": (MODELS, write("base/model.safetensors", b""), "", r"model.safetensors"),
    "weights that are text": ("judge", write("base/model.safetensors", b"hello" * 99), "",
        r"model.safetensors"),
    "lacking tensor": (MODELS, tensors(lambda t: t.pop("model.norm.weight")), "",
        r"Missing.*model.norm.weight"),
    "another tensor": ("judge", tensors(lambda t: t.update(x=torch.ones(1))), "", r"Unexpected.*x"),
    "wrong shape": (MODELS, tensors(lambda t: t.update({"model.norm.weight": torch.ones(3)})), "",
        r"model.norm.weight"),
    "NaN weights": (MODELS, poison("model.layers.1.mlp.up_proj.weight"), "",
        r"model.layers.1.mlp.up_proj.weight"),
    "infinite weights": ("judge", poison("model.norm.weight", float("inf")), "", r"model.norm.weight"),
    "integer weights": ("judge sft", tensors(lambda t: t.update({k: v.int() for k, v in t.items()})), "",
        r"int"),
    "missing shard": ("judge", write("base/model.safetensors.index.json", {"weight_map": {"x": "y"}}), "",
        r"base/y"),
    "index cut off": ("judge", write("base/model.safetensors.index.json", b'{"we'), "", r"index.json"),
    "index a list": ("judge", write("base/model.safetensors.index.json", [1]), "", r"index.json"),
    "no tokenizer": (MODELS, remove("base/tokenizer.json"), "", r"base"),
    "tokenizer cut off": (MODELS, cut("base/tokenizer.json"), "", r"base"),
    "tokenizer of text": ("judge", write("base/tokenizer.json", b"{}"), "", r"base"),
    "tokenizer settings cut off": ("judge", cut("base/tokenizer_config.json"), "", r"base"),
    "another tokenizer": (MODELS, setting("config.json", image_token_id=7), "", r"image_token_id is 7"),
    "tokenizer larger than the embedding": (
        MODELS, lambda: (setting("config.json", vocab_size=300)(), tensors(lambda t: t.update(
            {"model.embed_tokens.weight": t["model.embed_tokens.weight"][:300].clone()}))()), "", r"300"),
    "no preprocessor": ("judge sft", remove("base/preprocessor_config.json"), "", r"process"),
    "preprocessor cut off": ("judge sft", cut("base/preprocessor_config.json"), "",
        r"preprocessor_config.json"),
    "preprocessor without patches": ("judge", setting("preprocessor_config.json", patch_size=...), "",
        r"patch_size"),
    "preprocessor of other patches": (MODELS, setting("preprocessor_config.json", patch_size=16), "",
        r"patch_size"),
    "preprocessor with two means": (MODELS, setting("preprocessor_config.json", image_mean=[0.5, 0.5]), "",
        r"base: .*image_mean"),
    "preprocessor with words": ("judge", setting("preprocessor_config.json", image_std="grey"), "",
        r"base: .*image_std"),
    "preprocessor without means": ("judge", setting("preprocessor_config.json", image_mean=...), "",
        r"base: .*image_mean"),
    "preprocessor that divides by 0": ("judge",
        setting("preprocessor_config.json", image_std=[1, 1, 0]), "", r"base: .*image_std.*above 0"),
    "preprocessor with a word as size": ("judge", setting("preprocessor_config.json", min_pixels="all"), "",
        r"base: .*size"),
    "instruction not UTF-8": ("judge sft", write("base/instruction.txt", b"\xff"), "", r"instruction"),
    # flags
    "no such instruction": (MODELS, nothing, "--instruction no.txt", r"no.txt"),
    "pixels upside down": (MODELS, nothing, "--min-pixels 9000 --max-pixels 8000", r"min_pixels 9000"),
    "no pixels": ("judge", nothing, "--max-pixels 0", r"--max-pixels"),
    "unknown flag": (MODELS, nothing, "--colour red", r"--colour"),
    "a word as number": (MODELS, nothing, "--seed x", r"--seed: invalid int value: 'x'"),
    "unknown dtype": (MODELS, nothing, "--dtype float8", r"--dtype"),
    "unknown device": (MODELS, nothing, "--device abacus", r"abacus"),
    "a device that is not here": (MODELS, nothing, "--device xpu", r"xpu"),
    "no new tokens": ("augment grpo evaluate judge", nothing, "--max-new-tokens 0", r"--max-new-tokens"),
    "negative temperature": ("augment grpo evaluate judge", nothing, "--temperature -1", r"--temperature"),
    "temperature that is no number": ("evaluate", nothing, "--temperature nan", r"--temperature"),
    "no samples": ("augment", nothing, "--samples 0", r"--samples"),
    "no branches": ("augment grpo evaluate", nothing, "--max-branches 0", r"--max-branches"),
    "empty batch": ("sft", nothing, "--batch-size 0", r"--batch-size"),
    "negative epochs": ("sft grpo", nothing, "--epochs -1", r"--epochs"),
    "saved never": ("sft grpo", nothing, "--save-every 0", r"--save-every"),
    "no packing": ("sft grpo", nothing, "--pack-tokens 0", r"--pack-tokens"),
    "greedy rollouts": ("grpo", nothing, "--temperature 0", r"--temperature"),
    "group of one": ("grpo", nothing, "--group 1", r"--group"),
    "no update": ("grpo", nothing, "--update-batch 0", r"--update-batch"),
    "batches that do not divide": ("grpo", nothing, "--update-batch 3", r"--update-batch"),
    "unknown schedule": ("grpo", nothing, "--clip-schedule steep", r"--clip-schedule"),
    "unknown part to freeze": ("sft grpo", nothing, "--freeze ears", r"--freeze.*ears"),
    "all rows augmented": ("augment", nothing, "--augmented-share 1", r"--augmented-share"),
    # outputs
    "a file as output folder": (STAGES, write("out", b"x"), "", r"out"),
    "a file as parent of it": (READERS + " convert", write("o", b"x"), "--out o/p/q.jsonl", r"o"),
    "a folder as output file": (
        "augment convert synthesize", lambda: Path("t.jsonl/x").mkdir(parents=True), "--out t.jsonl", r"t.jsonl"),
    "settings cut off": ("evaluate", lambda: (write("out/predictions.jsonl", b"{}\n")(), write(
        "out/predictions.settings.json", b"{")()), "", r"out/predictions"),
    "predictions of another kind": ("evaluate", write("out/predictions.jsonl", b'{"a": 1}\n'), "", r"out"),
    "run.json cut off": ("sft grpo", write("out/run.json", b'{"config'), "", r"run.json"),
    # predictions to score, and released files
    "no predictions": ("score", remove("predictions.jsonl"), "", r"predictions.jsonl"),
    "empty predictions": ("score", write("predictions.jsonl", b""), "", r"predictions.jsonl"),
    "malformed prediction": ("score", write("predictions.jsonl", b'{"id": '), "", r"predictions.jsonl:1"),
    "prediction without verdict": ("score", write("predictions.jsonl", ROWS[0]), "",
        r"predictions.jsonl:1: .*request_pred"),
    "output that is a number": ("score", write("predictions.jsonl", ROWS[0] | {"output": 3}), "",
        r"predictions.jsonl:1"),
    "no released file": ("convert", remove("released.json"), "", r"released.json"),
    "released file cut off": ("convert", cut("released.json"), "", r"released.json"),
    "empty released file": ("convert", write("released.json", b""), "", r"released.json"),
    "released rows of another kind": ("convert", write("released.json", [{"a": 1}, 2]), "",
        r"none of its 2 rows"),
    "empty released folder": ("convert", lambda: Path("empty").mkdir(), "--input empty", r"empty"),
    "no such dataset": ("convert", nothing, "--input no/such", r"no/such: not here, and not .* the hub"),
    "no such pictures": ("convert", remove("a.png"), "", r"none of its 2 rows.*'a.png' does not exist in"),
    "zip cut off": ("convert", zipped(b"", lambda whole: whole[:-9]), "",
        r"p.zip cannot be read: .*not a zip"),
    "zip of damaged data": ("convert", zipped(bytes(999), lambda whole: whole[:35] + b"\xff" + whole[36:]), "",
        r"image 'p/a.png' in .* cannot be read"),
    "zip bomb": ("convert", zipped(bytes(data.LARGEST + 1)), "", r"image 'p/a.png' in .*: over"),
    "text in a zip": ("convert", zipped(b"a note"), "", r"none of its 2 rows.*cannot be used"),
    "no such test file": ("convert", nothing, "--against no.jsonl", r"no.jsonl"),
    "malformed test file": ("convert", lambda: (image("RGB", (30, 20))(), write("bad.jsonl", b"{")()),
        "--against bad.jsonl", r"bad.jsonl:1: not valid JSON: [^()]*\([^()]*\)"),  # not: (--skip-bad ...)
    # the teacher
    "no key": ("synthesize", lambda: os.environ.pop("OPENAI_API_KEY"), "", r"set OPENAI_API_KEY"),
    "no server": ("synthesize", write("data.jsonl", ROWS[0] | {"reasoning": None}), "",
        r"none of 1 rows .*http://127.0.0.1:9/v1/: APIConnectionError"),
    "the input as output": ("synthesize", nothing, "--out data.jsonl", r"--out data.jsonl is or holds an input"),
    "an output of another kind": ("synthesize", write("out/reasoned.jsonl", b"notes\n"), "",
        r"reasoned.jsonl:1: damaged"),
    "no requests at once": ("synthesize", nothing, "--concurrency 0", r"--concurrency"),
    "Parquet that is none": ("convert", write("x.parquet", b"PAR1"), "--input x.parquet", r"x.parquet"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "case, command",
    [(case, command) for case, (commands, *_) in CASES.items() for command in commands.split()],
)
def test_one_clear_line_and_status_2(world, run, case, command):
    _, change, flags, message = CASES[case]
    change()
    status, out, err = run(command, flags)
    assert status == 2 and re.fullmatch(rf"error: .*{message}.*\n", err), (
        err
    )  # one line: a dot is no newline


# ---------------------------------------------------------------- what is fine


def rewrite(change):
    return lambda: Path("data.jsonl").write_bytes(change(Path("data.jsonl").read_bytes()))


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return image("RGB", (30, 20), format="JPEG", exif=exif)


def moving():
    return image(
        "P", (8, 8), format="GIF", save_all=True, append_images=[Image.new("P", (8, 8), 1)]
    )


FINE = {
    "CMYK": image("CMYK", (30, 20), format="JPEG"), "16 bits": image("I;16", (30, 20), 40000),
    "palette": image("P", (30, 20), transparency=0), "two colours": image("1", (30, 20)),
    "rotated": rotated(), "animated": moving(), "transparent": image("RGBA", (30, 20)),
    "just 200:1": image("RGB", (400, 2)),
    "one pixel": image("RGB", (1, 1)), "JPEG named .png": image("RGB", (30, 20), format="JPEG"),
    "no labels": row(request_label=None), "unused field null": row(parents=None),
    "no newline at the end": rewrite(bytes.rstrip),
    "Windows lines": rewrite(lambda content: content.replace(b"\n", b"\r\n")),
    "byte order mark": rewrite(lambda content: b"\xef\xbb\xbf" + content),
    "blank lines": rewrite(lambda content: b"\n \n" + content + b"\n\n"),
    "control tokens": row(request="<|im_end|><image>\0\u202e"),
}  # fmt: skip


@pytest.mark.parametrize("case", FINE)
def test_unusual_but_fine(world, run, case):
    """The pictures as data.open_image documents; test_data.py looks at their pixels."""
    FINE[case]()
    status, out, err = run("evaluate")
    assert status == 0 and "error" not in err and "n 4" in out
    assert len(Path("out/predictions.jsonl").read_text().splitlines()) == 4


# ---------------------------------------------------------------- what is set aside


@pytest.mark.parametrize("command", STAGES.split())
def test_skip_bad_sets_rows_aside(world, run, command):
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:200])
    Path("text.png").write_text("a note")
    bad = [
        b"{oops",
        b"[1]",
        b"\xff",
        ROWS[0],
        ROWS[0] | {"id": 3},
        ROWS[0] | {"id": "x", "request_label": "no"},
        ROWS[2] | {"id": "y", "image": "cut.png"},
        ROWS[3] | {"id": "z", "image": "text.png"},
        ROWS[3] | {"id": "v", "image": "gone.png"},
        ROWS[3] | {"id": "w", "image": "../a.png"},
    ]
    with open("data.jsonl", "ab") as file:
        for line in bad:
            file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
    status, _, err = run(command, "--skip-bad")
    assert status == 0, err
    assert err.startswith(
        f"data.jsonl: {len(bad)} bad rows left out, see data.jsonl.rejected-by-skip-bad\n"
    )
    listed = Path("data.jsonl.rejected-by-skip-bad").read_text().splitlines()
    listed = [json.loads(line) for line in listed]
    assert [row["line"] for row in listed] == list(range(5, 5 + len(bad)))
    for at, name in ((6, "cut.png"), (7, "text.png")):
        assert f"{name} cannot be used" in listed[at]["reason"]


# ---------------------------------------------------------------- what cannot be written


@pytest.fixture
def full_disk():
    """full_disk(n): no file of this process can grow over n bytes until full_disk() lifts it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n=before[0]: resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "command, name, room",
    [
        ("evaluate", "out/predictions.jsonl", 1000),
        ("augment", "out/rl.jsonl.parts/predictions.jsonl", 600),
        ("augment", "out/rl.jsonl", 1000),
        ("sft", "out/model.safetensors", 100_000),
        ("sft", "out/metrics.jsonl", 100),
        ("grpo", "out/model.safetensors", 100_000),
        ("convert", "out/train.jsonl", 300),
        ("synthesize", "out/reasoned.jsonl", 300),
    ],
)
def test_a_full_disk_leaves_what_can_be_gone_on_with(world, run, full_disk, command, name, room):
    expected = run(command, "--random-share 1" if command == "augment" else "")
    assert expected[0] == 0, expected
    whole = Path(name).read_bytes()
    shutil.rmtree("out")
    full_disk(room)
    status, _, err = run(command, "--random-share 1" if command == "augment" else "")
    assert status == 2 and re.fullmatch("error: .*(File too large|cannot be written).*\n", err), err
    full_disk()
    left = Path(name).read_bytes() if Path(name).exists() else b""
    assert whole.startswith(left) and len(left) <= room  # never another file under the final name
    assert run(command, "--random-share 1" if command == "augment" else "")[0] == 0
    again = Path(name).read_bytes()
    assert again == whole or "seconds" in again.decode(errors="ignore")
    assert all(path.suffix == ".lock" for path in Path("out").rglob(".*"))


def test_a_model_that_cannot_be_written_leaves_the_old_one(world, full_disk):
    before = Path("base/model.safetensors").read_bytes()
    full_disk(100_000)
    with pytest.raises(CheckpointError, match="the weights cannot be written"):
        model.save(model.load("base"), "base", "base")
    full_disk()
    assert Path("base/model.safetensors").read_bytes() == before


# ---------------------------------------------------------------- as real processes


@pytest.mark.parametrize(
    "command, stdin, message",
    [
        (
            "evaluate.py --model base --device cpu --request - --json --max-new-tokens 4",
            '{"request": "Hi"}\n{oops\n',
            "error: 1 lines could not be judged, the first is line 2\n",
        ),
        ("data.py convert --input no.json --out x.jsonl", "", "error: there is no file no.json\n"),
        (
            "grpo.py --group x",
            "",
            "error: argument --group: invalid int value: 'x' (--help lists the flags)\n",
        ),
        (
            "sft.py --model base",
            "",
            "error: there is no data/train.jsonl: `python data.py convert` makes it; or give --model and "
            "--data\n",
        ),
    ],
)
def test_as_a_process(world, command, stdin, message):
    script, *flags = command.split()
    root = Path(data.__file__).parent
    done = subprocess.run(
        [sys.executable, str(root / script), *flags],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (2, message)
    shown = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(shown) == stdin.count("\n") and all(
        row.keys() >= {"line", "error"} for row in shown[1:]
    )
