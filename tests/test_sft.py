"""sft.py: schedule and data order, the loss against full logits, invariance to packing and ranks, freezing, FLOPs,
resuming bit by bit, one-line errors, compute types. Two-rank runs go through torchrun on the CPU (gloo, FSDP2).

    python -m pytest tests/test_sft.py
"""

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import model as qwen
import sft
from data import Encoder, InputError, Row, Sample, Segment, lock_output, read_samples, write_samples

ROOT = Path(sft.__file__).parent
ALONE = qwen.Ranks(0, 1, torch.device("cpu"))
DRIVER = """# Runs a stage several times in the processes of one torchrun.
import functools, importlib, json, sys
stage = importlib.import_module(sys.argv[1])
stage.start_ranks = functools.cache(stage.start_ranks)  # a process joins its group once
for fields in json.loads(sys.argv[2]):
    stage.main(stage.Config(**fields))
"""


def torchrun(folder: Path, world: int, *command: str) -> None:
    """torchrun on this machine; a deadlock is a failure, and leaves no process behind."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={world}",
        *command,
    ]
    with open(folder / "torchrun.log", "w") as log:
        process = subprocess.Popen(launch, cwd=folder, env=env, stdout=log, stderr=log)
        try:
            status = process.wait(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # it takes its workers along
            status = process.wait()
    assert status == 0, (folder / "torchrun.log").read_text()[-3000:]


def on_two_ranks(folder: Path, stage: str, configs: list) -> None:
    (folder / "driver.py").write_text(DRIVER)
    torchrun(folder, 2, "driver.py", stage, json.dumps([asdict(cfg) for cfg in configs]))


def metrics(out: str | Path) -> list[dict]:
    """metrics.jsonl without what differs from run to run."""
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not re.match("seconds|.*_per_second|mfu", k)}
        for line in lines
    ]


def weights(out: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(out, "model.safetensors"))


def same(first: dict, second: dict) -> bool:
    """Equal to the last bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy world of 12 exchanges, some without reasoning; mixed.jsonl: 3 of them, one of each modality."""
    folder = tmp_path_factory.mktemp("world")
    toy.make_world(folder, sizes={"train": 4, "val": 1, "test": 1})
    toy.build_checkpoint(folder / "base", **toy.TINY)
    found = [s for s in read_samples([str(folder / "train.jsonl")]) if s.reasoning]
    write_samples(folder / "mixed.jsonl", {s.modality: s for s in found}.values())
    write_samples(folder / "val.jsonl", [s for s in found if s.modality == "text"][:1])
    return folder


@pytest.fixture(scope="module")
def encoder(world):
    return Encoder(str(world / "base"), str(world / "instruction.txt"))


@pytest.fixture
def config(world, tmp_path):
    """config(name, **fields): a small run in tmp_path/name, in which everything trains."""

    def make(name="out", **fields):
        usual = dict(
            model=str(world / "base"),
            data=[str(world / "train.jsonl")],
            out=str(tmp_path / name),
            instruction=str(world / "instruction.txt"),
            batch_size=4,
            lr=1e-2,
            freeze=[],
            device="cpu",
            epochs=2,
        )
        return sft.Config(**usual | fields)

    return make


def learnable(cfg) -> list[Sample]:
    return [s for s in read_samples(cfg.data) if s.reasoning]


def flags(cfg, **changes) -> list[str]:
    """The command line of a configuration with changes: what differs from the defaults."""
    usual, words = asdict(type(cfg)()), []
    for key, value in (asdict(cfg) | changes).items():
        if value != usual[key]:
            value = value if isinstance(value, list) else [] if value is True else [value]
            words += ["--" + key.replace("_", "-"), *map(str, value)]
    return words


def command(capsys, *words: str) -> tuple[int, str]:
    """`python sft.py WORDS` in this process: its exit status and stderr."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["sft.py", *words])
        runpy.run_path(str(ROOT / "sft.py"), run_name="__main__")
    return stopped.value.code, capsys.readouterr().err


def test_cosine_at_both_ends_and_warm_up():
    assert sft.cosine(0, 10, 0, 2.0) == 2.0
    assert sft.cosine(5, 10, 0, 2.0) == pytest.approx(1.0)
    assert sft.cosine(9, 10, 0, 2.0) == pytest.approx(
        1 - math.cos(math.pi / 10)
    )  # the last step still learns
    assert sft.cosine(10, 10, 0, 2.0) == 0.0
    assert [sft.cosine(step, 10, 4, 2.0) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert sft.cosine(0, 1, 0, 2.0) == sft.cosine(0, 1, 1, 2.0) == 2.0


def test_the_order_is_endless_and_the_same_in_any_portions():
    order = sft.data_order(7, 0, 28, seed=3)
    epochs = [order[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1 and sft.data_order(7, 0, 28, seed=4) != order
    for size in (1, 3, 7, 10):  # 10: more than an epoch at a time
        portions = [sft.data_order(7, start, size, seed=3) for start in range(0, 28, size)]
        assert sum(portions, [])[:28] == order


def by_hand(net, rows) -> torch.Tensor:
    """Eq. (3), from full logits, every sample alone: mean of - log P over all target tokens."""
    found = []
    for row in rows:
        logprobs = net.logits(row)[:-1].log_softmax(-1).gather(1, row.ids[1:, None]).squeeze(1)
        found.append(logprobs[row.supervised[1:]])
    return -torch.cat(found).mean()


@pytest.mark.parametrize("pack_tokens", [1, 200, 10_000])
def test_loss_and_gradient_are_those_of_the_mean_over_all_targets(config, encoder, pack_tokens):
    cfg = config(pack_tokens=pack_tokens)
    net, chosen = qwen.load(cfg.model), learnable(cfg)
    assert len({s.modality for s in chosen}) == 3
    reference = by_hand(net, [encoder.example(s) for s in chosen])
    expected = torch.autograd.grad(reference, list(net.parameters()))
    rows, too_long = sft.packed_rows(chosen, encoder, cfg)
    assert too_long == 0 and len(rows) == {1: len(chosen), 10_000: 1}.get(pack_tokens, len(rows))
    tokens = sum(int(row.supervised.sum()) for row in rows)
    loss = sum(sft.sft_loss(net, row, torch.float32) for row in rows) / tokens
    torch.testing.assert_close(loss, reference)
    for got, wanted in zip(torch.autograd.grad(loss, list(net.parameters())), expected):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_the_first_step_logs_the_loss_of_its_batch(config, encoder, capsys):
    cfg = config(validation=config().data, epochs=1, steps=1)
    sft.main(cfg)
    (line,), rows = metrics(cfg.out), [encoder.example(s) for s in learnable(cfg)]
    assert f"{12 - len(rows)} of 12 samples lack reasoning or a label" in capsys.readouterr().out
    batch = [rows[i] for i in sft.data_order(len(rows), 0, 4, cfg.seed)]
    assert line["loss"] == pytest.approx(by_hand(qwen.load(cfg.model), batch).item(), rel=1e-5)
    assert line["target_tokens"] == sum(int(row.supervised.sum()) for row in batch)
    whole = json.loads(Path(cfg.out, "metrics.jsonl").read_text())
    assert whole["trained_tokens_per_second"] * whole["seconds"] == pytest.approx(
        sum(map(len, batch))
    )
    assert (line["step"], line["lr"], line["skipped"], line["too_long"]) == (1, cfg.lr, 0, 0)
    assert line["validation_loss"] == pytest.approx(
        by_hand(qwen.load(cfg.out), rows).item(), rel=1e-5
    )
    assert json.loads(Path(cfg.out, "run.json").read_text())["config"] == asdict(cfg)


# ---- what a person watches


@pytest.fixture(scope="module")
def net(world):
    return qwen.load(str(world / "base"))


def prompt_row(net, tokens: int, image: bool) -> Row:
    """A prompt without targets; with an image of 4 x 4 patches, its first four tokens are the image's."""
    ids = torch.full((tokens,), 5)
    ids[: 4 * image] = net.config.image_token_id
    return Row(
        ids,
        torch.arange(tokens).expand(3, -1),
        (Segment(0, tokens),),
        torch.zeros(tokens, dtype=torch.bool),
        torch.zeros(16 * image, 1176),
        ((1, 4, 4),) * image,
    )


def test_model_flops_by_hand(net):
    # A layer of the decoder: q 32 x 32, k and v 32 x 16 each, o 32 x 32, three matrices of the MLP 32 x 48.
    layers = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    # A prompt of 5 tokens and completions of 2 and 3: 10 tokens, 5 of them targets.
    row = prompt_row(net, 5, image=False).extend([[6, 7], [6, 7, 8]])
    decoder = layers * 10 + 32 * net.config.vocab_size * 5
    assert sft.model_flops(net, row) == (2 + 4) * decoder
    # A block of the vision tower: qkv 16 x 48, proj 16 x 16, MLP 3 x 16 x 24; the merger: 64 x 64, 64 x 32.
    tower = 1176 * 16 + 2 * (16 * 48 + 16 * 16 + 3 * 16 * 24)
    merger = 64 * 64 + 64 * 32
    row = prompt_row(net, 5, image=True).extend([[6, 7], [6, 7, 8]])
    everything = decoder + 16 * tower + 4 * merger
    assert sft.model_flops(net, row) == (2 + 4) * everything
    assert sft.model_flops(net, row, forwards=2) == (2 * 2 + 4) * everything


@pytest.mark.parametrize(
    "freeze", [["vision", "merger"], ["vision"], ["decoder"], ["decoder", "vision"]]
)
def test_what_is_frozen_takes_no_flops_backward(config, freeze):
    net, _, _ = sft.load_for_training(config(freeze=freeze), ALONE)
    row = prompt_row(net, 6, image=True).extend([[6, 7, 8]])
    net.requires_grad_(True)
    everything = sft.model_flops(net, row)
    net, _, _ = sft.load_for_training(config(freeze=freeze), ALONE)
    parts = {
        "merger": 4 * (64 * 64 + 64 * 32),
        "vision": 16 * (1176 * 16 + 2 * (16 * 48 + 16 * 16 + 3 * 16 * 24)),
        "decoder": 9 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
        + 3 * 32 * net.config.vocab_size,
    }
    spared = sum(4 * parts[name] for name in freeze)
    assert sft.model_flops(net, row) == everything - spared


def test_model_flops_are_those_that_torch_counts(net, encoder, config):
    row = encoder.example(next(s for s in learnable(config()) if s.modality == "text_image"))
    matrix_products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    with FlopCounterMode(display=False) as counter:
        net(row)
    counted = sum(
        counter.get_flop_counts()["Global"].get(product, 0) for product in matrix_products
    )
    assert sft.model_flops(net, row, forwards=2) - sft.model_flops(net, row) == counted


H200 = qwen.Ranks(0, 1, torch.device("cuda", 0))


def test_training_speed_by_hand(net, monkeypatch):
    rows = [
        prompt_row(net, 5, image=False).extend([[6, 7]]),
        prompt_row(net, 5, image=True).extend([[6]]),
    ]
    assert sft.training_speed(net, rows, 2.0, ALONE) == {
        "trained_tokens_per_second": (7 + 6) / 2
    }  # on a CPU
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    forward = sum(sft.model_flops(net, row) for row in rows) / 3
    speed = sft.training_speed(net, rows, 2.0, H200)
    assert speed["mfu"] == pytest.approx(3 * forward / 2 / 989e12)
    speed = sft.training_speed(net, rows, 2.0, H200, forwards=2)
    assert speed["mfu"] == pytest.approx(4 * forward / 2 / 989e12)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_the_peak_of_a_card_is_known_by_its_whole_name(net, monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    row = prompt_row(net, 5, image=False)
    mfu = sft.training_speed(net, [row], 1.0, H200).get("mfu")
    assert mfu == (peak and pytest.approx(sft.model_flops(net, row) / peak))


@pytest.mark.parametrize(
    "times, left",
    [
        ([7.0, 9.0], "0:00:20"),
        ([7.0, 9.0, 15.0], "0:00:40"),  # with a checkpoint or evaluation before the last step
    ],
)
def test_time_left_by_hand(config, capsys, monkeypatch, times, left):
    for steps, told in ((10, left), (0, "0:00:00")):
        run = sft.Run(config(fresh=True), ALONE, [])
        capsys.readouterr()
        for step, now in enumerate(times):  # step 0 is the evaluation before the first
            monkeypatch.setattr(sft.time, "perf_counter", lambda now=now: now)
            run.log(step, {}, "", step + steps)
        first, *_, last = capsys.readouterr().out.splitlines()
        assert first == f"step 0/{steps}" and last.endswith(f"  left {told}")


def test_a_step_on_the_screen(config, capsys, monkeypatch):
    line = {
        "loss": 0.123456,
        "lr": 5e-5,
        "grad_norm": 12.0,
        "trained_tokens_per_second": 54321.9,
        "target_tokens": 9,
        "skipped": 0,
    }
    shown = "loss lr mfu trained_tokens_per_second skipped"
    run = sft.Run(config(), ALONE, [])
    run.log(0, {"loss": 2.0}, shown, 20)  # the evaluation before the first step
    monkeypatch.setattr(sft, "RECENT", 1)
    run.times = [0.0, 100.0]  # the pace is that of the last step
    monkeypatch.setattr(sft.time, "perf_counter", lambda: 160.0)
    run.log(1, line, shown, 4)
    monkeypatch.setattr(sft.time, "perf_counter", lambda: 160.0 + 3725.4 / 17)
    run.log(3, line, shown, 20)
    assert capsys.readouterr().out == (
        "step 0/20  loss 2\n"
        "step 1/4  left 0:03:00  loss 0.123  lr 5e-05  trained/s 54322  skipped 0\n"
        "step 3/20  left 1:02:05  loss 0.123  lr 5e-05  trained/s 54322  skipped 0\n"
    )
    assert [json.loads(x) for x in (run.folder / "metrics.jsonl").open()] == [
        {"step": 0, "loss": 2.0},
        {"step": 1, **line},
        {"step": 3, **line},
    ]


def test_tensorboard_gets_the_same_scalars(config, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((Path(folder).name, purge_step))

        def add_scalar(self, *scalar):
            written.append(scalar)

        def flush(self):
            written.append("flushed")

    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = sft.Run(config(), ALONE, [])
    run.log(4, {"loss": 2.0, "skipped": 0}, "loss", 9)
    run.log(5, {"loss": 1.0}, "loss", 9)
    first = [("tensorboard", 4), ("loss", 2.0, 4), ("skipped", 0, 4), "flushed"]
    assert written == [*first, ("loss", 1.0, 5), "flushed"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    run.log(6, {"loss": 1.0}, "loss", 9)
    assert len(written) == 6 and len((run.folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_what_is_shown_is_in_the_file(config, capsys):
    cfg = config(validation=config().data, epochs=1, steps=1)
    sft.main(cfg)
    out, err = capsys.readouterr()
    (line,) = [json.loads(line) for line in Path(cfg.out, "metrics.jsonl").read_text().splitlines()]
    assert set(sft.SHOWN.split()) - {"mfu"} <= line.keys() and "mfu" not in line  # on a CPU
    (shown,) = [text for text in out.splitlines() if text.startswith("step")]
    assert re.fullmatch(
        r"step 1/1  left 0:00:00  loss \S+  lr 0.01  grad_norm \S+  trained/s \S+  seconds \S+  "
        r"validation_loss \S+",
        shown,
    )
    assert err == ""  # no bar outside of a terminal


# ---- runs


def test_eight_samples_are_learnt(config):
    cfg = config(batch_size=8, epochs=20 * 8 / len(learnable(config())))
    sft.main(cfg)
    losses = [line["loss"] for line in metrics(cfg.out)]
    assert len(losses) == 20 and losses[0] > 5 and losses[-1] < 0.2 * losses[0]


def test_too_long_samples_are_counted_and_left_out(config, encoder):
    rows = [encoder.example(s) for s in learnable(config())]
    limit = sorted(map(len, rows))[len(rows) // 2]
    cfg = config(batch_size=len(rows), epochs=1, max_tokens=limit)
    sft.main(cfg)
    (line,), short = metrics(cfg.out), [row for row in rows if len(row) <= limit]
    assert line["too_long"] == len(rows) - len(short) > 0
    assert line["loss"] == pytest.approx(by_hand(qwen.load(cfg.model), short).item(), rel=1e-5)


def test_a_gradient_that_is_not_finite_skips_the_step(config, monkeypatch):
    ranks = qwen.Ranks(0, 1, torch.device("cpu"))
    net, _, _ = sft.load_for_training(config(), ranks)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = sft.make_optimizer(net, 1.0, 0.0)

    def skipped(*factors):
        monkeypatch.setattr(
            sft, "sft_loss", lambda net, x, compute: net.model.norm.weight.sum() * x
        )
        step = sft.train_step(net, optimizer, factors, 1.0, 1.0, 1.0, torch.float32, ranks)
        return step["skipped"]

    assert skipped(1.0, math.nan) == 1 and same(net.state_dict(), before)
    assert all(p.grad is None for p in net.parameters())
    assert skipped(1.0) == 0 and not same(net.state_dict(), before)


def test_without_an_image_the_vision_tower_decays_all_the_same(config, world):
    cfg = config(data=[str(world / "val.jsonl")], batch_size=1, epochs=1, weight_decay=0.5)
    sft.main(cfg)
    before, after = weights(cfg.model), weights(cfg.out)
    for name in [name for name in before if name.startswith("visual.")]:
        torch.testing.assert_close(after[name], before[name] * (1 - cfg.lr * cfg.weight_decay))


def test_two_ranks_train_as_one(config, world, tmp_path):
    # A batch of 3, one row a sample: rank 0 has two rows and rank 1 one, and at some turn the text row meets a
    # row with an image. Only rank 0 has a validation sample.
    mixed = dict(data=[str(world / "mixed.jsonl")], batch_size=3, pack_tokens=1, eval_every=1)
    mixed["validation"] = [str(world / "val.jsonl")]
    alone, two, halted = (
        config("one", **mixed),
        config("two", **mixed),
        config("halted", **mixed, steps=1),
    )
    frozen = config("frozen", **mixed, freeze=["vision", "merger"], steps=1)
    on_two_ranks(tmp_path, "sft", [two, frozen, halted, replace(halted, steps=None)])
    sft.main(alone)
    for one, both in zip(metrics(alone.out), metrics(two.out), strict=True):
        assert both == pytest.approx(one, rel=1e-4)
    started, first, second = weights(alone.model), weights(alone.out), weights(two.out)
    for name in first:  # within a fraction of the distance gone
        assert (first[name] - second[name]).abs().max() < 0.05 * (
            first[name] - started[name]
        ).abs().max()
    assert same(second, weights(halted.out)) and metrics(halted.out) == metrics(two.out)
    untouched = {
        name for name, tensor in weights(frozen.out).items() if torch.equal(started[name], tensor)
    }
    assert untouched == {name for name in started if name.startswith("visual.")}


@pytest.mark.parametrize("freeze", [["vision"], ["merger"], ["decoder"], ["vision", "merger"]])
def test_freezing_leaves_exactly_those_tensors_alone(config, freeze):
    cfg = config(epochs=1, batch_size=8, freeze=freeze)
    sft.main(cfg)
    before, after = weights(cfg.model), weights(cfg.out)
    part = {
        n: "decoder" if n.startswith("model.") else "merger" if "merger" in n else "vision"
        for n in before
    }
    assert {n for n in before if torch.equal(before[n], after[n])} == {
        n for n in part if part[n] in freeze
    }


def test_a_frozen_decoder_freezes_an_untied_head(config, tmp_path):
    folder = toy.build_checkpoint(
        tmp_path / "untied", tie_word_embeddings=False, **toy.TINY
    )  # as the 7B
    # Every sample is a row of its own, and in those without an image nothing trains.
    cfg = config(model=str(folder), epochs=1, batch_size=8, pack_tokens=1, freeze=["decoder"])
    sft.main(cfg)
    before, after = weights(cfg.model), weights(cfg.out)
    frozen = {n for n in before if torch.equal(before[n], after[n])}
    assert "lm_head.weight" in frozen and frozen == {
        n for n in before if not n.startswith("visual.")
    }


def test_a_run_that_stops_and_goes_on_is_the_run_that_never_stopped(config):
    whole, halted = config("whole"), config("halted", steps=2)
    sft.main(whole)
    sft.main(halted)
    assert len(metrics(halted.out)) == 2 < len(metrics(whole.out))
    with open(
        Path(halted.out, "metrics.jsonl"), "a"
    ) as file:  # killed after step 3, before its checkpoint
        file.write('{"step": 3, "loss": 9.0}\n{"step": 4, "lo')
    sft.main(replace(halted, steps=None))
    assert same(weights(whole.out), weights(halted.out)) and metrics(whole.out) == metrics(
        halted.out
    )
    sft.main(whole)  # nothing is left to do
    assert same(weights(whole.out), weights(halted.out)) and metrics(whole.out) == metrics(
        halted.out
    )


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """The configuration of a run that stopped after step 2 of 3, and what it left."""
    folder = tmp_path_factory.mktemp("stopped")
    cfg = sft.Config(
        model=str(world / "base"),
        data=[str(world / "train.jsonl")],
        out=str(folder / "out"),
        instruction=str(world / "instruction.txt"),
        batch_size=4,
        epochs=2,
        lr=1e-2,
        freeze=[],
        device="cpu",
        save_every=1,
        steps=2,
    )
    sft.main(cfg)
    shutil.copytree(cfg.out, folder / "left")
    return cfg, folder / "left"


@pytest.fixture
def halted(stopped):
    """The configuration of that run, with its folder as it was left; steps=None goes on."""
    cfg, left = stopped
    shutil.rmtree(cfg.out)
    shutil.copytree(left, cfg.out)
    return replace(cfg, steps=None)


def test_a_run_in_a_moved_folder_goes_on_with_other_intervals(halted, tmp_path):
    shutil.move(halted.out, tmp_path / "moved")
    sft.main(replace(halted, out=str(tmp_path / "moved"), save_every=7, eval_every=7))
    sft.main(replace(halted, fresh=True))
    assert metrics(tmp_path / "moved") == metrics(halted.out)
    assert same(weights(str(tmp_path / "moved")), weights(halted.out))


def restored(cfg) -> int:
    """The step that the run goes on from."""
    net = qwen.load(cfg.model)
    run = sft.Run(cfg, ALONE, learnable(cfg))
    return run.restore(net, sft.make_optimizer(net, 1.0, 0.0))


def flipped(content: bytes) -> bytes:
    """64 bytes in the middle have all their bits flipped."""
    middle = len(content) // 2
    changed = bytes(byte ^ 255 for byte in content[middle : middle + 64])
    return content[:middle] + changed + content[middle + 64 :]


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "text": lambda content: b"a note",
    "flipped": flipped,
    "missing": None,
}


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGE[how](path.read_bytes()))


@pytest.mark.parametrize(
    "suffix, how", [*((".pt", how) for how in DAMAGE), (".sha256", "cut"), (".sha256", "missing")]
)
def test_with_the_newest_checkpoint_damaged_the_one_before_is_taken(halted, capsys, suffix, how):
    newest = Path(halted.out, "checkpoints", "step-000002")
    assert restored(halted) == 2 and capsys.readouterr().err == ""
    damage(newest / f"rank-0-of-1{suffix}", how)
    assert restored(halted) == 1
    assert capsys.readouterr().err == f"{newest}: damaged; going on from step 1\n"
    left = sorted(path.name for path in newest.parent.iterdir())
    assert left == ["damaged-step-000002", "step-000001"]  # until the next checkpoint is whole
    assert [line["step"] for line in metrics(halted.out)] == [1]


def test_from_the_checkpoint_before_the_run_is_the_one_that_never_stopped(halted, config):
    whole = config("whole", save_every=1)
    sft.main(whole)
    folder = Path(halted.out, "checkpoints")
    damage(folder / "step-000002" / "rank-0-of-1.pt", "flipped")
    sft.main(halted)
    assert same(weights(whole.out), weights(halted.out))
    assert metrics(whole.out) == metrics(halted.out)
    last = metrics(whole.out)[-1]["step"]
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == [f"step-{step:06d}" for step in (last - 1, last)]


def test_a_damaged_checkpoint_is_not_one_of_the_two_that_are_kept(halted):
    folder = Path(halted.out, "checkpoints")
    Path(halted.out, "notes.jsonl").symlink_to("nowhere")  # a stranger's file is left alone
    damage(folder / "step-000002" / "rank-0-of-1.pt", "flipped")
    net = qwen.load(halted.model)
    optimizer = sft.make_optimizer(net, 1.0, 0.0)
    run = sft.Run(halted, ALONE, learnable(halted))
    assert run.restore(net, optimizer) == 1
    run.checkpoint(3, net, optimizer)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000003"]


def test_another_compute_type_is_another_run(halted):
    path = Path(halted.out, "run.json")
    path.write_text(path.read_text().replace("torch.float32", "torch.bfloat16"))
    with pytest.raises(InputError, match="compute torch.bfloat16 -> torch.float32"):
        restored(halted)


def test_without_a_whole_checkpoint_the_run_does_not_start_over(halted, capsys):
    for part in Path(halted.out, "checkpoints").glob("*/*.pt"):
        damage(part, "cut")
    status, error = command(capsys, *flags(halted))
    assert status == 2
    assert re.fullmatch("error: .*step-000002, .*step-000001: damaged.*--fresh.*\n", error)
    assert len(metrics(halted.out)) == 2


class OneOfTwo(qwen.Ranks):
    """Two ranks as threads of this process."""

    meeting, boxes = threading.Barrier(2, timeout=60), [None, None]

    def gather(self, items: list) -> list:
        self.boxes[self.rank] = items
        self.barrier()
        gathered = [item for box in self.boxes for item in box]
        self.barrier()
        return gathered

    def reduce(self, value: float, how: str = "sum") -> float:
        return float({"sum": sum, "max": max}[how](self.gather([value])))

    def barrier(self) -> None:
        self.meeting.wait()


def test_ranks_agree_on_a_checkpoint_that_is_whole_on_both(config, capsys):
    cfg, device = config(), torch.device("cpu")

    def agreed(rank: int) -> int:
        run = sft.Run(cfg, OneOfTwo(rank, 2, device), [])
        for step in (1, 2, 3):
            folder = run.checkpoints / f"step-{step:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            sft.write_state(run._part(folder), {"step": step})
        if rank == 0:
            damage(run._part(run.checkpoints / "step-000002"), "flipped")
        else:
            damage(run._part(run.checkpoints / "step-000003"), "cut")
        run.ranks.barrier()
        return run._last_whole()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(agreed, (0, 1))) == [1, 1]
    told = capsys.readouterr().err
    assert re.fullmatch(r"\S+3, \S+2: damaged; going on from step 1\n", told)


@pytest.mark.parametrize(
    "name, content",
    [
        ("metrics.jsonl", b'{"step": 1}\n{oops\n{"step": 2}\n'),
        ("metrics.jsonl", b"\xff\n"),
        ("metrics.jsonl", b'{"loss": 1}\n'),
        ("metrics.jsonl", b'{"step": "two"}\n'),
        ("rollouts.jsonl", b"[1]\n"),
        ("run.json", b'{"config": '),
        ("run.json", b"[]"),
        ("run.json", b'{"config": {}, "world": 1}'),
        ("run.json", b'{"config": [], "world": 1, "inputs": {}}'),
        ("run.json", None),
    ],
)
def test_what_a_run_reads_back_may_be_damaged(halted, name, content):
    path = Path(halted.out, name)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}.*(--fresh|remove the line or the file)"):
        restored(halted)
    assert len(list(Path(halted.out, "checkpoints").iterdir())) == 2


def test_other_inputs_under_the_same_names_are_refused_by_name(world, config, tmp_path):
    folder = tmp_path / "inputs"
    shutil.copytree(world, folder)
    paths = {"model": folder / "base", "instruction": folder / "instruction.txt"}
    cfg = config(
        **{name: str(path) for name, path in paths.items()},
        data=[str(folder / "train.jsonl")],
        validation=[str(folder / "val.jsonl")],
    )
    samples = learnable(cfg)
    sft.Run(cfg, ALONE, samples)
    image = next(sample.image_path for sample in samples if sample.image)
    inputs = ["train.jsonl", "val.jsonl", "instruction.txt"]
    inputs += [f"base/{name}" for name in ("config.json", "tokenizer.json", "model.safetensors")]
    inputs += ["base/preprocessor_config.json"]
    for path in (*(folder / name for name in inputs), image):
        before, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        path.write_bytes(before[:-2] + b"  ")
        named = "images" if path == image else str(path)
        with pytest.raises(InputError, match=rf"\(?other content of {named}; .*--fresh"):
            sft.Run(cfg, ALONE, samples)
        path.write_bytes(before)
        os.utime(path, ns=times)
    sft.Run(cfg, ALONE, samples)  # as it was


def test_fresh_starts_over_also_without_run_json(halted):
    Path(halted.out, "run.json").unlink()
    Path(halted.out, "rollouts.jsonl").write_text("{oops\n")
    sft.main(replace(halted, fresh=True, steps=1))
    assert [line["step"] for line in metrics(halted.out)] == [1]
    assert [path.name for path in Path(halted.out, "checkpoints").iterdir()] == ["step-000001"]
    assert not Path(halted.out, "rollouts.jsonl").exists()


def test_the_commit_is_unknown_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert sft.versions()["commit"] is None


def test_a_second_run_in_a_folder_is_refused(halted, capsys):
    with lock_output(halted.out):
        status, error = command(capsys, *flags(halted, fresh=True))
    assert status == 2 and re.fullmatch("error: .*another run is writing to it.*\n", error)
    assert len(metrics(halted.out)) == 2


def test_what_is_left_when_there_is_less_to_do_is_what_was_done(halted, capsys):
    sft.main(replace(halted, steps=1))
    assert capsys.readouterr().out.endswith("2 of 4 steps done\n")


def test_a_run_that_trained_nothing_is_no_success(config, monkeypatch):
    for_nothing = "every step was skipped"
    too_long = config("long", max_tokens=1, epochs=1)
    for _ in range(2):  # the second time, no step is left
        with pytest.raises(InputError, match=for_nothing):
            sft.main(too_long)
    assert {line["target_tokens"] for line in metrics(too_long.out)} == {0}
    assert {line["skipped"] for line in metrics(too_long.out)} == {1}
    sft_loss, diverged = sft.sft_loss, config("diverged", epochs=1)
    monkeypatch.setattr(sft, "sft_loss", lambda *inputs: sft_loss(*inputs) * math.nan)
    with pytest.raises(InputError, match=for_nothing):
        sft.main(diverged)
    assert not Path(diverged.out, "model.safetensors").exists()


def test_no_validation_loss_is_not_zero(config, encoder):
    cfg, net = config(max_tokens=1), qwen.load(config().model)
    loss = sft.validation_loss(net, encoder, learnable(cfg), cfg, torch.float32, ALONE)
    assert math.isnan(loss)


def test_a_run_killed_before_its_first_checkpoint_starts_its_log_again(config):
    cfg = config(steps=1)
    Path(cfg.out).mkdir()
    Path(cfg.out, "metrics.jsonl").write_text(
        '{"step": 1, "loss": 9.0}\n{"step": 2, "loss": 9.0}\n'
    )
    sft.main(cfg)
    assert [line["step"] for line in metrics(cfg.out)] == [1]


def test_other_settings_stop_with_one_line_and_fresh_starts_over(config, capsys):
    cfg = config(steps=1)  # with an empty --freeze
    sft.main(cfg)
    status, error = command(capsys, *flags(cfg, lr=0.5))
    assert status == 2 and re.fullmatch(r"error: .*lr 0\.01 -> 0\.5.*--fresh.*\n", error)
    assert [line["lr"] for line in metrics(cfg.out)] == [1e-2]
    sft.main(replace(cfg, lr=0.5, fresh=True))
    assert [line["lr"] for line in metrics(cfg.out)] == [0.5]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"data": ["no/such.jsonl"]}, "no/such.jsonl"),
        ({"freeze": ["legs"]}, "choose from vision, merger, decoder"),
        ({"model": "./nowhere"}, "./nowhere"),
        ({"out": "WORLD/base"}, "is or holds an input"),
        ({"out": "WORLD"}, "is or holds an input"),
        ({"out": "WORLD/val.jsonl"}, "is no folder"),
        ({"out": " "}, "--out is empty"),
        ({"instruction": "/dev/null"}, "/dev/null is no regular file"),
        ({"epochs": 0}, "nothing trains"),
        ({"max_norm": 0}, "nothing trains"),
        ({"epochs": "inf"}, "argument --epochs: inf is not a number from 0 to"),
        ({"lr": "nan"}, "argument --lr: nan is not a number from 0.0 to 1.0"),
        ({"seed": 2**64}, "argument --seed: 18446744073709551616 is not a number from 0 to"),
        ({"batch_size": 10**12}, "argument --batch-size: 1000000000000 is not a number from 1 to"),
    ],
)
def test_wrong_input_stops_with_one_line(config, world, capsys, fields, message):
    cfg = config()
    if "out" in fields:
        fields = {"out": fields["out"].replace("WORLD", str(world))}
    status, error = command(capsys, *flags(cfg, **fields))
    assert status == 2 and re.fullmatch(r"error: .*\n", error) and message in error
    assert not Path(cfg.out).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_with_the_file_that_cannot_be_written(config, monkeypatch):
    monkeypatch.setattr(sft.Run, "_part", lambda run, folder: Path("/dev/full"))
    with pytest.raises(
        OSError, match=r"^/dev/full: cannot be written \(.*No space left on device\)$"
    ):
        sft.main(config(steps=1))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_with_the_log_and_the_config(config):
    run = sft.Run(config(), ALONE, [])
    for name in ("metrics.jsonl", "config.json"):
        Path(run.folder, name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="metrics.jsonl: cannot be written .*space"):
        run.log(1, {}, "", 1)
    with pytest.raises(qwen.CheckpointError, match="config.json: cannot be written .*space"):
        qwen.save(qwen.load(run.cfg.model), run.folder, run.cfg.model)


def test_an_error_of_the_device_while_a_checkpoint_is_written_is_not_one_of_the_disk(
    config, monkeypatch
):
    def copy_to_the_host(*arguments):  # where an asynchronous error of CUDA shows
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", copy_to_the_host)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        sft.main(config(steps=1))


def test_bfloat16_computes_in_half_and_keeps_whole_masters(config):
    half, whole = config("half", dtype="bfloat16", steps=1), config("whole", steps=1)
    sft.main(half)
    sft.main(whole)
    assert metrics(half.out)[0]["loss"] == pytest.approx(metrics(whole.out)[0]["loss"], rel=0.02)
    assert metrics(half.out)[0]["loss"] != metrics(whole.out)[0]["loss"]
    (part,) = Path(half.out, "checkpoints", "step-000001").glob("*.pt")
    state = torch.load(part, weights_only=True)
    tensors = [
        *state["model"].values(),
        *(v for m in state["optimizer"].values() for v in m.values()),
    ]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert {tensor.dtype for tensor in weights(half.out).values()} == {torch.bfloat16}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_on_the_gpu(config, encoder):
    cfg = config(steps=1, device="cuda", dtype="bfloat16")
    sft.main(cfg)
    sft.main(replace(cfg, steps=2))
    assert all(math.isfinite(line["loss"]) for line in metrics(cfg.out))
    here, there = qwen.load(cfg.model), qwen.load(cfg.model, "cuda")
    for row in map(encoder.example, learnable(cfg)[:3]):
        torch.testing.assert_close(there(row)[0].cpu(), here(row)[0], rtol=1e-3, atol=1e-3)
