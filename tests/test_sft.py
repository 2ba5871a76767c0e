"""sft.py: the loss against full logits, what is left out, freezing, the folder of a run, resuming bit
by bit. What several ranks share is in test_ranks.py.

    python -m pytest tests/test_sft.py
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy
from safetensors.torch import load_file

import data
import model as qwen
import sft
from data import Encoder, InputError, Sample, read_json, read_samples, write_samples

ROOT = Path(sft.__file__).parent
ALONE = qwen.Ranks(0, 1, torch.device("cpu"), torch.float32)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def wait(process: subprocess.Popen, seconds: float = 300) -> int:
    """The exit status; a process that takes longer is a failure, and leaves no process behind."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun takes its workers along
        process.wait()
        raise


def metrics(out: str | Path) -> list[dict]:
    """metrics.jsonl without what differs from run to run."""
    lines = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
    varies = re.compile("seconds|.*_per_second")
    return [{k: v for k, v in line.items() if not varies.match(k)} for line in lines]


def weights(out: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(out, "model.safetensors"))


def same(first: dict, second: dict) -> bool:
    """Equal to the last bit."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def same_runs(first, second) -> bool:
    are_same = same(weights(first.out), weights(second.out))
    return are_same and metrics(first.out) == metrics(second.out)


def words(flags, **changes) -> list[str]:
    """The command line of flags with changes: what differs from the defaults."""
    usual, line = asdict(type(flags)()), []
    for key, value in (asdict(flags) | changes).items():
        if value != usual[key]:
            line += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return line


def refused(capsys, flags, **changes) -> str:
    """The one line on stderr with which `python sft.py` refuses flags."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        data.cli(sft.SFTFlags, sft.main, words(flags, **changes))
    error = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch("error: .*\n", error)
    return error


def complete(paths) -> list[Sample]:
    return [s for s in read_samples(paths)[0] if s.is_complete]


def tiny_world(folder: Path, short: bool = False) -> Path:
    """12 exchanges, some without reasoning (short: all with a word of it), an untrained tiny model;
    mixed.jsonl: 3 exchanges that have it, one of each modality; val.jsonl: the one of text."""
    toy.make_world(folder, sizes={"train": 4, "val": 1, "test": 1})
    toy.build_checkpoint(folder / "base", **toy.TINY)
    if short:
        samples, _ = read_samples([folder / "train.jsonl"])
        write_samples(folder / "train.jsonl", [replace(s, reasoning="fine") for s in samples])
    found = {s.modality: s for s in complete([folder / "train.jsonl"])}
    write_samples(folder / "mixed.jsonl", found.values())
    write_samples(folder / "val.jsonl", [found["text"]])
    return folder


def small_run(kind: type, world: Path, out: Path, **fields):
    """Flags of a run in which everything trains."""
    usual = dict(model=str(world / "base"), data=[str(world / "train.jsonl")], out=str(out))
    usual |= dict(instruction=str(world / "instruction.txt"), device="cpu")
    return kind(**usual | dict(freeze=["none"], lr=1e-2) | fields)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def encoder(world):
    return Encoder(str(world / "base"), str(world / "instruction.txt"))


@pytest.fixture
def run_flags(world, tmp_path):
    """run_flags(name, **fields): a run of 3 steps in tmp_path/name."""

    def make(name="out", **fields):
        usual = dict(batch_size=4, epochs=2)
        return small_run(sft.SFTFlags, world, tmp_path / name, **usual | fields)

    return make


# ---- the method


def test_cosine_at_both_ends():
    assert sft.cosine(1, 10, 2.0) == 2.0 and sft.cosine(6, 10, 2.0) == pytest.approx(1.0)
    assert sft.cosine(10, 10, 2.0) == pytest.approx(1 - math.cos(math.pi / 10))  # it still learns


def test_the_order_is_endless_and_the_same_in_any_portions():
    order = sft.data_order(7, 1, 28, seed=3)
    epochs = [tuple(order[i : i + 7]) for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(epochs)) > 1
    assert sft.data_order(7, 1, 28, seed=4) != order
    for size in (1, 3, 10):  # 10: more than an epoch at a time
        portions = [sft.data_order(7, step, size, seed=3) for step in range(1, 29)]
        assert sum(portions, [])[:28] == order


def test_epochs_are_whole_batches_rounded_down():
    assert sft.total_steps(3, 123_093, 192) == 1923 and sft.total_steps(1, 12_000, 512) == 23
    assert sft.total_steps(0.29, 100, 29) == 1  # 0.29 * 100 is 28.999999999999996
    for epochs, samples in ((1, 3), (0, 100), (math.inf, 100), (math.nan, 100)):
        with pytest.raises(InputError, match=f"--epochs {epochs} of {samples} samples"):
            sft.total_steps(epochs, samples, 4)


def by_hand(net, rows) -> torch.Tensor:
    """Eq. (3), from full logits, every sample alone: mean of - log P over all target tokens."""
    found = []
    for row in rows:
        logits = torch.nn.functional.linear(net.hidden_states(row), net.head)
        logprobs = logits[:-1].log_softmax(-1).gather(1, row.ids[1:, None]).squeeze(1)
        found.append(logprobs[row.supervised[1:]])
    return -torch.cat(found).mean()


def loss_of(folder: str, rows):
    return pytest.approx(by_hand(qwen.load(folder), rows).item(), rel=1e-5)


def first_batch(flags, rows: list) -> list:
    return [rows[i] for i in sft.data_order(len(rows), 1, flags.batch_size, flags.seed)]


@pytest.mark.parametrize("pack_tokens", [1, 200, 10_000])
def test_loss_and_gradient_are_those_of_the_mean_over_all_targets(run_flags, encoder, pack_tokens):
    flags = run_flags()
    net, chosen = qwen.load(flags.model), complete(flags.data)
    reference = by_hand(net, [encoder.example(s) for s in chosen])
    expected = torch.autograd.grad(reference, list(net.parameters()))
    rows = sft.packed_rows(chosen, encoder, pack_tokens)
    assert len(rows) == {1: len(chosen), 10_000: 1}.get(pack_tokens, len(rows))
    loss, targets = sft.batch_loss(net, [*rows, sft.SPARE_ROW], ALONE)  # in which no token counts
    assert targets == sum(int(row.supervised.sum()) for row in rows)
    assert loss == pytest.approx(reference.item(), rel=1e-5)
    for parameter, wanted in zip(net.parameters(), expected):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-5)


def test_a_run_logs_what_it_does(run_flags, encoder, capsys, monkeypatch):
    written = []
    board = SimpleNamespace(add_scalar=lambda *x: written.append(x), flush=lambda: None)
    tensorboard = SimpleNamespace(SummaryWriter=lambda folder, purge_step: board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    flags = run_flags(validation=run_flags().data, epochs=1, steps=1, min_pixels=784)
    sft.main(flags)
    line = read_json(Path(flags.out, "metrics.jsonl"))
    rows = [encoder.example(s) for s in complete(flags.data)]
    batch = first_batch(flags, rows)
    assert line["loss"] == loss_of(flags.model, batch)
    assert line["target_tokens"] == sum(int(row.supervised.sum()) for row in batch)
    assert line["validation_loss"] == loss_of(flags.out, rows)
    assert (line["step"], line["lr"], line["skipped"]) == (1, flags.lr, 0)
    assert ("loss", line["loss"], 1) in written and len(written) == len(line) - 1
    tokens = line["trained_tokens_per_second"] * line["seconds"]
    assert tokens == pytest.approx(sum(map(len, batch)))
    out, err = capsys.readouterr()
    assert err == ""  # no bar outside of a terminal
    assert re.search("^step 1/1  left 0:00:00  loss .*  validation_loss", out, re.MULTILINE)
    record, encoder = read_json(Path(flags.out, "run.json")), Encoder(flags.out)
    assert record["flags"] == asdict(flags) | {"dtype": "torch.float32"}
    assert record["torch"] == torch.__version__
    assert encoder.instruction == toy.INSTRUCTION
    assert (encoder.min_pixels, encoder.max_pixels) == (784, flags.max_pixels)


def test_skipped_steps_are_counted(run_flags, monkeypatch, capsys):
    flags, sft_loss, losses = run_flags(), sft.sft_loss, []

    def diverging(net, row):
        losses.append(sft_loss(net, row))
        return losses[-1] * (math.nan if len(losses) == 2 else 1.0)

    monkeypatch.setattr(sft, "sft_loss", diverging)
    sft.main(flags)
    done = "3 of 3 steps done; updates skipped, as the gradient was not finite: 1\n"
    assert capsys.readouterr().out.endswith(done) and metrics(flags.out)[1]["skipped"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(flags.out).values())
    monkeypatch.setattr(sft, "sft_loss", lambda *inputs: sft_loss(*inputs) * math.nan)
    with pytest.raises(InputError, match="was not finite: 3; so nothing was trained"):
        sft.main(replace(flags, fresh=True))
    assert not Path(flags.out, "model.safetensors").exists()


@pytest.mark.parametrize("freeze", [["vision"], ["merger"], ["decoder"], ["vision", "merger"]])
def test_freezing_leaves_exactly_those_tensors_alone(run_flags, tmp_path, freeze):
    """Of a model whose head is a matrix of its own, as that of the 7B."""
    folder = toy.build_checkpoint(tmp_path / "base", tie_word_embeddings=False, **toy.TINY)
    # Every sample is a row of its own; in those without an image the decoder alone would train.
    flags = run_flags(model=str(folder), epochs=1, pack_tokens=1, freeze=freeze)
    sft.main(flags)
    before, after = weights(flags.model), weights(flags.out)
    for name in before:
        part = "merger" if "merger" in name else "vision" if "visual" in name else "decoder"
        assert torch.equal(before[name], after[name]) == (part in freeze), name


def test_bfloat16_computes_in_half_and_keeps_whole_masters(run_flags, encoder):
    half, halted = (run_flags(name, dtype="bfloat16", steps=2) for name in ("half", "halted"))
    sft.main(half)
    batch = first_batch(half, [encoder.example(s) for s in complete(half.data)])
    first, exact = metrics(half.out)[0]["loss"], by_hand(qwen.load(half.model), batch).item()
    assert first != pytest.approx(exact, rel=1e-5) and first == pytest.approx(exact, rel=0.02)
    sft.main(replace(halted, steps=1))
    sft.main(halted)  # which from rounded weights would not go on exactly
    assert same_runs(half, halted)
    assert {tensor.dtype for tensor in weights(half.out).values()} == {torch.bfloat16}


# ---- what is left out


def test_what_is_left_out_is_counted_before_training(run_flags, encoder, world, tmp_path, capsys):
    rows = [encoder.example(s) for s in complete(run_flags().data)]
    limit = sorted(map(len, rows))[len(rows) // 2]
    short = [row for row in rows if len(row) <= limit]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "x"}\n' + (world / "val.jsonl").read_text())
    usual = dict(epochs=1, batch_size=len(short), validation=[str(bad)])
    flags = run_flags(max_tokens=limit, skip_bad=True, **usual)
    sft.main(flags)
    assert metrics(flags.out)[0]["loss"] == loss_of(flags.model, short)
    lacking, too_long = 12 - len(rows), len(rows) - len(short)
    reasons = f"0 bad rows, {lacking} lacking reasoning or a label, {too_long} of more than {limit}"
    told = f"{flags.data[0]}: {len(short)} samples; left out: {reasons} tokens"
    record = read_json(Path(flags.out, "run.json"))
    assert told in capsys.readouterr().out.splitlines() and told in record["left_out"]
    assert record["left_out"][2].startswith(f"{bad}:1: 'x': ")
    none = run_flags("none", max_tokens=1)  # before: "3 of 3 steps done", with a loss of 0
    assert "of 0 samples" in refused(capsys, none) and not Path(none.out).exists()


def test_training_goes_on_when_nobody_reads_its_output(run_flags):
    flags = run_flags(epochs=6)
    command = [sys.executable, str(ROOT / "sft.py"), *words(flags)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    assert wait(process) == 0 and Path(flags.out, "model.safetensors").exists()


# ---- going on

KILLED = """# A run that is killed while it makes its second checkpoint final.
import os, pathlib, signal
import data, sft

rename = pathlib.Path.rename
kill = lambda path: path.name == "step-000002.partial" and os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.rename = lambda path, target: kill(path) or rename(path, target)
data.cli(sft.SFTFlags, sft.main)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_killed_run_goes_on_as_the_one_that_never_was(run_flags, tmp_path):
    whole, killed = (run_flags(name, save_every=1, epochs=3) for name in ("whole", "killed"))
    sft.main(whole)
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py"), *words(killed)]
    assert subprocess.run(command, env=ENVIRONMENT, timeout=300).returncode == -signal.SIGKILL
    checkpoints = Path(killed.out, "checkpoints")
    assert names(checkpoints) == ["step-000001", "step-000002.partial"]
    assert len(metrics(killed.out)) == 2
    with open(Path(killed.out, "metrics.jsonl"), "a") as file:  # torn by the kill
        file.write('{"step": 3, "lo')
    for _ in range(2):  # the second time nothing is left to do
        sft.main(killed)
        assert same_runs(whole, killed) and len(metrics(whole.out)) == 5
        assert names(checkpoints) == ["step-000004", "step-000005"]


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """The flags of a run that stopped after step 2 of 3."""
    usual = dict(batch_size=4, epochs=2, save_every=1, steps=2)
    flags = small_run(sft.SFTFlags, world, tmp_path_factory.mktemp("stopped") / "out", **usual)
    sft.main(flags)
    return flags


@pytest.fixture
def halted(stopped, tmp_path):
    """The flags with which that run goes on, in a folder of its own."""
    shutil.copytree(stopped.out, tmp_path / "halted")
    return replace(stopped, steps=None, out=str(tmp_path / "halted"))


def test_the_model_in_the_folder_is_the_last_checkpoint_s_and_saved_once(halted, monkeypatch):
    model = Path(halted.out, "model.safetensors")
    assert model.exists()  # of step 2
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(sft, "save", lambda *_: 1 // 0)
        sft.main(halted)
    assert not model.exists()  # step 3 is trained, and its model not yet there
    sft.main(halted)
    changed = model.stat().st_mtime_ns
    sft.main(halted)  # later stages know its weights by their time of change
    assert model.stat().st_mtime_ns == changed


def contents(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(halted, run_flags, capsys):
    newest = Path(halted.out, "checkpoints", "step-000002")
    content = (newest / "__0_0.distcp").read_bytes()
    (newest / "__0_0.distcp").write_bytes(content[: len(content) // 2])
    told = refused(capsys, halted)
    assert f"{newest}: " in told and "remove that folder to go on from the one before" in told
    shutil.rmtree(newest)
    whole = replace(halted, out=run_flags().out)
    sft.main(replace(halted, save_every=7, eval_every=7))  # flags that change no result
    sft.main(whole)
    assert same_runs(halted, whole)


def test_what_differs_is_refused_by_name_and_fresh_starts_over(halted, world, tmp_path, capsys):
    before, other = contents(halted.out), tmp_path / "other"
    shutil.copytree(world, other)
    for path in (other / "train.jsonl", other / "base" / "config.json"):
        path.write_text(path.read_text() + "\n")
    differing = {
        "dtype, lr": {"lr": 0.5, "dtype": "bfloat16"},
        "data/1:train.jsonl": {"data": [str(other / "train.jsonl")]},
        "model/config.json": {"model": str(other / "base")},
    }
    for name, changes in differing.items():
        told = f"{halted.out}: a run with other {name}; use --fresh to discard it, or another --out"
        assert told in refused(capsys, halted, **changes)
    assert contents(halted.out) == before
    notes = Path(halted.out, "notes.jsonl")  # not of the run, which leaves it alone
    notes.write_text("mine\n")
    sft.main(replace(halted, lr=0.5, fresh=True, steps=1))
    assert [(line["step"], line["lr"]) for line in metrics(halted.out)] == [(1, 0.5)]
    assert names(Path(halted.out, "checkpoints")) == ["step-000001"] and notes.exists()


def test_what_the_run_has_not_written_is_not_overwritten(halted, tmp_path, capsys):
    mine = tmp_path / "model.safetensors"
    mine.write_text("mine")
    told = f"{tmp_path}: holds files, but not of a run; give another --out"
    for fresh in (False, True):
        assert told in refused(capsys, halted, out=str(tmp_path), fresh=fresh)
    assert mine.read_text() == "mine"


def test_a_run_whose_checkpoints_are_gone_is_not_trained_over(halted, capsys):
    checkpoints, gone = Path(halted.out, "checkpoints"), "a run whose checkpoints are gone; use"
    shutil.rmtree(checkpoints)  # to free the disk
    before = contents(halted.out)
    assert gone in refused(capsys, halted) and contents(halted.out) == before
    checkpoints.mkdir()
    assert gone in refused(capsys, halted)
    Path(
        halted.out, "model.safetensors"
    ).unlink()  # not finished: but two steps are logged, each was saved
    assert gone in refused(capsys, halted)
    data.write_samples(Path(halted.out, "metrics.jsonl"), metrics(halted.out)[:1])
    sft.main(replace(halted, steps=1))  # as if killed before the first checkpoint
    assert [line["step"] for line in metrics(halted.out)] == [1]


def test_a_wrong_part_and_a_folder_in_use_are_one_line_and_leave_nothing(run_flags, capsys):
    assert "choose from vision" in refused(capsys, run_flags(), freeze=["legs"])
    with data.lock(run_flags().out):
        assert "another run" in refused(capsys, run_flags())
    assert not Path(run_flags().out).exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_on_the_gpu(run_flags, encoder):
    flags = run_flags(steps=1, device="cuda", dtype="bfloat16")
    sft.main(flags)
    sft.main(replace(flags, steps=2))
    assert all(math.isfinite(line["loss"]) for line in metrics(flags.out))
    here, there = qwen.load(flags.model), qwen.load(flags.model, "cuda")
    for row in map(encoder.example, complete(flags.data)[:3]):
        torch.testing.assert_close(there(row)[0].cpu(), here(row)[0], rtol=1e-3, atol=1e-3)
