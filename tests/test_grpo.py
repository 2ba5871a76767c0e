"""grpo.py: clip range, advantages and loss worked by hand; packed groups against completions run one by one; the
files of a run; one process, torchrun and two ranks (gloo, FSDP2) as the same run; resuming bit by bit; learning.

    python -m pytest tests/test_grpo.py
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy
from test_sft import ROOT, flags, metrics, on_two_ranks, same, torchrun, weights

import grpo
import model as qwen
import reward
import sft
from data import Encoder, InputError, Parser, Segment, check_numbers, read_samples, write_samples
from grpo import clip_range, compute_advantages, policy_loss

ALONE = qwen.Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """12 exchanges with a word of reasoning, and a tiny model that has half learnt to answer in the format."""
    folder = tmp_path_factory.mktemp("world")
    toy.make_world(folder, sizes={"train": 4, "val": 1, "test": 1})
    toy.build_checkpoint(folder / "base", **toy.TINY)
    short = [replace(s, reasoning="fine") for s in read_samples([str(folder / "train.jsonl")])]
    write_samples(folder / "train.jsonl", short)
    same_label = {"request_label": "harmful", "response_label": "harmful"}
    easy = [replace(s, **same_label) for s in short if s.image is None and s.response]
    write_samples(folder / "easy.jsonl", easy)
    sft.main(
        sft.Config(
            model=str(folder / "base"),
            data=[str(folder / "train.jsonl")],
            out=str(folder / "sft"),
            batch_size=6,
            lr=1e-2,
            epochs=100,
            steps=15,
            freeze=[],
            device="cpu",
            instruction=str(folder / "instruction.txt"),
        )
    )
    return folder


@pytest.fixture(scope="module")
def encoder(world):
    return Encoder(str(world / "sft"))


@pytest.fixture
def config(world, tmp_path):
    """config(name, **fields): a run of 2 steps of 6 prompts in tmp_path/name."""

    def make(name="out", **fields):
        usual = dict(
            model=str(world / "sft"),
            data=[str(world / "train.jsonl")],
            out=str(tmp_path / name),
            rollout_batch=6,
            update_batch=3,
            group=4,
            max_new_tokens=24,
            lr=1e-3,
            floor=0.1,
            device="cpu",
        )
        return grpo.Config(**usual | fields)

    return make


def rollouts(out: str) -> list[dict]:
    return [json.loads(line) for line in Path(out, "rollouts.jsonl").read_text().splitlines()]


def test_the_product_schedule_is_eq_7():
    table = {
        1: 0.191,
        2: 0.175,
        3: 0.152,
        5: 0.098,
        7: 0.051,
        8: 0.033,
        10: 0.011,
        12: 0.0028,
        15: 1.7e-4,
        18: 2.9e-6,
        23: 0,
    }  # of the release's 23 steps, rounded
    for step, printed in table.items():
        assert clip_range(step, 23, 0.2, "product") == pytest.approx(printed, rel=0.04)


def test_the_other_schedules_at_both_ends():
    assert [clip_range(s, 10, 0.2, "linear") for s in (1, 5, 10)] == pytest.approx([0.18, 0.1, 0])
    cosine = [clip_range(s, 10, 0.2, "cosine") for s in (1, 5, 10)]
    assert cosine == pytest.approx([0.1 * (1 + math.cos(math.pi / 10)), 0.1, 0], abs=1e-7)
    assert {clip_range(s, 10, 0.2, "constant") for s in (1, 5, 10)} == {0.2}
    with pytest.raises(InputError, match="choose from product, linear, cosine, constant"):
        clip_range(1, 10, 0.2, "sudden")


def test_advantages_by_hand():
    torch.testing.assert_close(compute_advantages([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.0, 1.0]))
    by_hand = torch.tensor([-0.5, -0.5, -0.5, 1.5])  # the std is 0.5: squares over n - 1
    torch.testing.assert_close(compute_advantages([0.0, 0.0, 0.0, 1.0]), by_hand)
    assert torch.equal(compute_advantages([-0.3] * 5), torch.zeros(5))


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope, cut",
    [
        (1.0, 2.0, -2.0, -2.0, None),
        (1.1, 2.0, -2.2, -2.2, None),
        (1.5, 2.0, -2.4, 0.0, "clipped_high"),
        (
            0.5,
            2.0,
            -1.0,
            -1.0,
            None,
        ),  # a good token that became rare is pulled back at full strength
        (1.0, -2.0, 2.0, 2.0, None),
        (0.9, -2.0, 1.8, 1.8, None),
        (0.5, -2.0, 1.6, 0.0, "clipped_low"),
        (1.5, -2.0, 3.0, 3.0, None),
    ],
)  # where clip(K) A alone, or a maximum, would give 2.4 and no gradient
def test_policy_loss_by_hand(ratio, advantage, loss, slope, cut):
    new = torch.tensor([math.log(ratio) - 1.0], requires_grad=True)
    got, counts = policy_loss(new, torch.tensor([-1.0]), torch.tensor([advantage]), 0.2)
    got.backward()  # d loss / d new = K d loss / d K
    assert (got.item(), new.grad.item()) == pytest.approx((loss, slope), rel=1e-5)
    assert {name for name in ("clipped_high", "clipped_low") if counts[name]} == (
        {cut} if cut else set()
    )
    assert counts["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)


def test_policy_loss_sums_over_tokens_and_learns_on_policy_at_clip_zero():
    new = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    loss, counts = policy_loss(
        new, new.detach(), advantages, 0.0
    )  # the last step of a decaying schedule
    loss.backward()
    assert loss.item() == 0.5 and torch.equal(new.grad, -advantages)
    assert counts == {"clipped_high": 0, "clipped_low": 0, "approx_kl": 0}


@pytest.fixture(scope="module")
def nets(world):
    """The policy, and the policy some updates ago."""
    net, old = qwen.load(str(world / "sft")), qwen.load(str(world / "sft"))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=noise))
    return net, old


@pytest.fixture(scope="module")
def groups(world, encoder):
    """Groups of 4 invented completions: one without spread, the others with, one of these with a picture."""
    noise, made = torch.Generator().manual_seed(1), []
    samples = {s.modality: s for s in read_samples([str(world / "train.jsonl")])}
    kinds = [("text", [1.0, 1, 1, 1]), ("image", [0.0, 1, 2, 3]), ("text", [0.0, 0, 0, 1])]
    for position, (modality, rewards) in enumerate(kinds):
        ids = [torch.randint(0, 500, (n,), generator=noise).tolist() for n in (3, 9, 5, 7)]
        done = [qwen.Completion(x, torch.zeros(len(x)), True) for x in ids]
        advantages, sample = compute_advantages(rewards), samples[modality]
        made.append(
            grpo.Group(position, sample, encoder.prompt(sample), done, [""] * 4, [], advantages)
        )
    return made


def with_old_logprobs(net, groups, encoder, cfg) -> list[grpo.MicroBatch]:
    batches = grpo.pack_groups(groups, cfg.pack_tokens)
    with torch.no_grad():
        old = [net(b.row, cfg.temperature, encoder.banned_ids)[0] for b in batches]
    return [replace(b, old_logprobs=logprobs) for b, logprobs in zip(batches, old)]


def packed(nets, groups, encoder, cfg):
    """Loss and gradients the way the trainer takes them, and the rows it took."""
    net, old = nets
    batches = with_old_logprobs(old, groups, encoder, cfg)
    new = [net(b.row, cfg.temperature, encoder.banned_ids)[0] for b in batches]
    loss = sum(policy_loss(n, b.old_logprobs, b.advantages, 0.05)[0] for n, b in zip(new, batches))
    gradients = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
    return loss, gradients, [b.row for b in batches]


def one_by_one(nets, groups, encoder, cfg):
    """The same from every completion of every group in a row of its own, prompt included, by Eq. (6)."""
    loss, clipped = 0.0, 0
    for g in groups:
        for completion, advantage in zip(g.completions, g.advantages):
            row = g.prompt.extend([completion.ids])
            row = replace(row, segments=(Segment(0, len(row)),))
            new, old = (net(row, cfg.temperature, encoder.banned_ids)[0] for net in nets)
            ratio = (new - old.detach()).exp()
            chosen = torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.05) * advantage)
            clipped += int((chosen != ratio * advantage).sum())
            loss = loss - chosen.sum()
    assert clipped > 5  # the comparison covers it
    return loss, torch.autograd.grad(loss, list(nets[0].parameters()))


def test_packing_splitting_and_leaving_groups_out_change_nothing(nets, groups, encoder, config):
    expected = one_by_one(nets, groups, encoder, config())
    longest = max(len(g.prompt) for g in groups)
    for pack_tokens in (
        1,
        longest + 16,
        10_000,
    ):  # a completion a row, groups cut in two, all in one row
        cfg = config(pack_tokens=pack_tokens)
        loss, gradients, rows = packed(nets, groups, encoder, cfg)
        torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-4)
        for got, wanted in zip(gradients, expected[1]):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
        used = 2 * 4  # the group without spread is not run
        assert sum(s.prefix is not None for row in rows for s in row.segments) == used
        assert len(rows) == {1: used, 10_000: 1}.get(pack_tokens, len(rows))
        assert pack_tokens == 1 or max(map(len, rows)) <= pack_tokens


def test_a_batch_without_any_spread_is_still_run_for_the_other_ranks(nets, groups, encoder, config):
    loss, gradients, rows = packed(nets, [groups[0]], encoder, config())
    assert loss.item() == 0 and len(rows) == 1 and not any(g.any() for g in gradients)


def test_the_trainer_sees_the_log_probabilities_of_the_sampler(world, nets, encoder, config):
    cfg, net = config(), nets[0]
    prompts = dict(enumerate(read_samples(cfg.data)[:6]))
    groups = grpo.rollout(net, encoder, prompts, cfg, 1)
    assert [g.position for g in groups] == list(prompts) and {
        len(g.completions) for g in groups
    } == {4}
    groups = [replace(g, advantages=torch.ones(4)) for g in groups]  # none is left out
    batches = with_old_logprobs(net, groups, encoder, cfg)
    assert sum(len(b.old_logprobs) for b in batches) == sum(
        len(c.ids) for g in groups for c in g.completions
    )
    for batch in batches:
        torch.testing.assert_close(batch.old_logprobs, batch.sampler_logprobs, rtol=0, atol=1e-4)


def mean(values):
    values = list(values)
    return pytest.approx(sum(values) / len(values))


def test_what_a_run_writes(world, encoder, config):
    cfg = config(validation=[str(world / "easy.jsonl")], eval_every=1)
    grpo.main(cfg)
    (before, *lines), groups = metrics(cfg.out), rollouts(cfg.out)
    assert (
        before["step"] == 0
        and {"val_f1_prompt", "val_f1_response"} <= before.keys() <= lines[0].keys()
    )
    labels = {s.id: s for s in read_samples(cfg.data)}
    assert sorted(g["id"] for g in groups) == sorted(labels)  # one epoch: every prompt once
    for g in groups:
        truth = labels[g["id"]]
        assert (g["request_label"], g["response_label"]) == (
            truth.request_label,
            truth.response_label,
        )
        assert (
            g["clip"] == clip_range(g["step"], 2, 0.2, "product") and len(g["outputs"]) == cfg.group
        )
        for o in g["outputs"]:
            again = (
                truth.request_label,
                truth.response_label,
                encoder.count,
                cfg.max_new_tokens,
                1.0,
                cfg.floor,
            )
            assert o["reward"] == vars(reward.score(o["output"], *again))
        advantages = compute_advantages([o["reward"]["total"] for o in g["outputs"]])
        assert [o["advantage"] for o in g["outputs"]] == pytest.approx(advantages.tolist())
    for step, line in enumerate(lines, 1):
        outputs = [o for g in groups if g["step"] == step for o in g["outputs"]]
        assert line["step"] == step and line["clip"] == clip_range(step, 2, 0.2, "product")
        for name, part in (
            ("reward", "total"),
            ("format", "format"),
            ("request_accuracy", "request"),
        ):
            assert line[name] == mean(o["reward"][part] for o in outputs)
        assert line["tokens"] == mean(o["n_tokens"] for o in outputs)
        assert line["truncated"] == mean(not o["finished"] for o in outputs)
        assert (
            line["logprob_diff_max"] < 1e-4
            and line["grad_norm"] > 0
            and line["skipped"] == 0
            and line["approx_kl"] > 0
        )
    assert {o["finished"] for g in groups for o in g["outputs"]} == {True, False}
    assert Encoder(cfg.out).instruction == toy.INSTRUCTION and not same(
        weights(cfg.model), weights(cfg.out)
    )
    assert not any("mfu" in line for line in lines)  # on a CPU
    whole = [json.loads(line) for line in Path(cfg.out, "metrics.jsonl").read_text().splitlines()][
        1:
    ]
    for step, line in enumerate(whole, 1):
        assert set(grpo.SHOWN.split()) - {"mfu"} <= line.keys()
        mine = [g for g in groups if g["step"] == step]
        sampled = sum(o["n_tokens"] for g in mine for o in g["outputs"])
        assert line["sampled_tokens_per_second"] == pytest.approx(sampled / line["seconds_rollout"])
        spread = [g for g in mine if any(o["advantage"] for o in g["outputs"])]
        prompts = sum(
            len(encoder.prompt(labels[g["id"]])) for g in spread
        )  # each is run once, for all its completions
        trained = prompts + sum(o["n_tokens"] for g in spread for o in g["outputs"])
        least = trained / line["seconds_update"]  # which also holds what is done around the passes
        assert 0.999 * least < line["trained_tokens_per_second"] < 2 * least


def test_the_screen_and_the_progress_bars(world, config, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_PROGRESS", "1")  # as if stderr were a terminal
    grpo.main(config(validation=[str(world / "easy.jsonl")], eval_every=1))
    out, err = capsys.readouterr()
    before, first, second = [line for line in out.splitlines() if line.startswith("step")]
    assert re.fullmatch(r"step 0/2  val_f1 \S+  val_f1_prompt \S+  val_f1_response \S+", before)
    names = "reward request_accuracy response_accuracy format tokens truncated entropy approx_kl clip grad_norm sampled/s trained/s"
    assert re.findall("  ([a-z_/1]+)", second) == [
        "left",
        *names.split(),
        "seconds_rollout",
        "seconds_update",
        "val_f1",
        "val_f1_prompt",
        "val_f1_response",
    ]
    assert first.startswith("step 1/2  left 0:00:") and second.startswith(
        "step 2/2  left 0:00:00  reward "
    )
    assert (
        err.count("0/24 ") >= 2 and "validation samples/s" in err
    )  # 6 prompts x 4 completions, in each step
    assert "\n" not in err  # the bars are rewritten in place, and removed


def test_one_update_per_rollout_batch_is_on_policy(config):
    cfg = config(update_batch=6, steps=1)
    grpo.main(cfg)
    (line,) = metrics(cfg.out)
    assert (line["approx_kl"], line["clipped_high"], line["clipped_low"]) == pytest.approx(
        (0, 0, 0), abs=1e-6
    )


def test_loss_and_grad_norm_are_means_over_the_updates(config, monkeypatch):
    done = []
    update_metrics = grpo.update_metrics

    def noting(losses, grad_norms, *rest):
        done.extend([losses, grad_norms])
        return update_metrics(losses, grad_norms, *rest)

    monkeypatch.setattr(grpo, "update_metrics", noting)
    cfg = config(steps=1)
    grpo.main(cfg)
    (line,), (losses, grad_norms) = metrics(cfg.out), done
    assert len(set(losses)) == len(grad_norms) == 2
    assert line["loss"] == mean(losses)
    assert line["grad_norm"] == mean(grad_norms)


def test_a_run_that_stops_and_goes_on_is_the_run_that_never_stopped(config):
    whole, halted = config("whole"), config("halted", steps=1)
    grpo.main(whole)
    grpo.main(halted)
    for name in ("metrics.jsonl", "rollouts.jsonl"):  # killed after step 2, before its checkpoint
        with open(Path(halted.out, name), "a") as file:
            file.write('{"step": 2, "id": "x"}\n{"ste')
    grpo.main(replace(halted, steps=None))
    assert same(weights(whole.out), weights(halted.out))
    assert metrics(whole.out) == metrics(halted.out) and rollouts(whole.out) == rollouts(halted.out)


def test_eco_under_torchrun_is_eco_in_one_process(config, tmp_path):
    cfg = config("eco", eco=True, steps=1)
    assert (cfg.beta, config().beta) == (1 / 6, 1)
    grpo.main(cfg)
    torchrun(tmp_path, 1, str(ROOT / "grpo.py"), *flags(cfg, out=None))
    eco = tmp_path / "out" / "guard-eco"  # its own default place
    assert metrics(eco) == metrics(cfg.out) and rollouts(eco) == rollouts(cfg.out)
    wrong = [
        o["reward"]["total"]
        for g in rollouts(eco)
        for o in g["outputs"]
        if not o["reward"]["safety"]
    ]
    assert (
        -100.1 < min(wrong) <= max(wrong) < -35.9
    )  # length pays no more from 1 / beta^2 on, Eq. (10)


def test_two_ranks_train_as_one(config, tmp_path):
    # Each update has two groups on one rank and one on the other, in rows of about a group.
    uneven = dict(pack_tokens=150)
    alone, two, halted = (
        config("one", **uneven),
        config("two", **uneven),
        config("halted", **uneven, steps=1),
    )
    on_two_ranks(tmp_path, "grpo", [two, halted, replace(halted, steps=None)])
    grpo.main(alone)
    assert rollouts(two.out)[:6] == rollouts(alone.out)[:6]
    one, both = metrics(alone.out)[0], metrics(two.out)[0]
    for name in ("reward", "tokens", "zero_std_groups", "loss", "grad_norm", "approx_kl"):
        assert both[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert both["logprob_diff_max"] < 1e-4
    assert same(weights(two.out), weights(halted.out)) and metrics(two.out) == metrics(halted.out)


def test_the_reward_goes_up(world, config):
    cfg = config(
        data=[str(world / "easy.jsonl")],
        rollout_batch=2,
        update_batch=2,
        group=16,
        floor=1.0,
        lr=3e-3,
        max_new_tokens=32,
        epochs=100,
        steps=12,
        clip_schedule="constant",
    )
    grpo.main(cfg)
    rewards = [line["reward"] for line in metrics(cfg.out)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"group": 1}, "--group"),
        ({"update_batch": 4}, "multiple"),
        ({"max_prompt_tokens": 5}, "^0 prompts .*--max-prompt-tokens"),
        ({"rollout_batch": 24, "update_batch": 24}, "12 prompts"),
        ({"rollout_batch": 24, "update_batch": 24, "epochs": 2}, "12 prompts"),
        ({"clip_schedule": "sudden"}, "choose from product"),
        ({"epochs": 0}, "nothing trains"),
        ({"epochs": 0.4}, "not one step"),
        ({"eco": True, "floor": 0.2}, "--floor 0.2 is above beta, 0.167"),
    ],
)
def test_settings_that_cannot_work(config, fields, message):
    with pytest.raises(InputError, match=message):
        grpo.main(config(**fields))


@pytest.mark.parametrize(
    "flag, value, accepted",
    [
        ("temperature", "1.2", True),
        ("temperature", "0", True),
        ("temperature", "1e-310", False),  # logits divided by it are infinite
        ("temperature", "1e-4", False),
        ("temperature", "1e9", False),
        ("temperature", "-1", False),
        ("top-p", "1", True),
        ("top-p", "1.01", False),
        ("floor", "nan", False),
        ("floor", "0", False),
        ("floor", "1e999", False),
        ("lr", "2", False),
        ("weight-decay", "-0.1", False),
        ("seed", "4294967295", True),
        ("seed", "-1", False),
        ("seed", "4294967296", False),
        ("group", "9" * 30, False),
    ],
)
def test_the_range_of_flags(flag, value, accepted):
    cfg = grpo.Config(**vars(Parser(grpo.Config).parse_args([f"--{flag}={value}"])))
    if accepted:
        check_numbers(cfg)
        assert getattr(cfg, flag.replace("-", "_")) == float(value)
    else:
        with pytest.raises(
            InputError, match=rf"--{flag}: \S+ is not (0, or )?a number from .* to "
        ):
            check_numbers(cfg)


def test_a_run_of_skipped_updates_is_no_success(config, monkeypatch):
    def diverged(new, *inputs):
        loss, metrics = policy_loss(new, *inputs)
        return loss * math.nan, metrics

    cfg = config(steps=1)
    monkeypatch.setattr(grpo, "policy_loss", diverged)
    with pytest.raises(InputError, match="every step was skipped"):
        grpo.main(cfg)
    assert not Path(cfg.out, "model.safetensors").exists()
    (line,) = metrics(cfg.out)
    assert line["skipped"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_with_the_rollouts(config, groups):
    run = sft.Run(config(), ALONE, [])
    Path(run.folder, "rollouts.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="rollouts.jsonl: cannot be written .*space"):
        grpo.write_rollouts(run, groups, 1, 0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_on_the_gpu(config, encoder):
    cfg = config(steps=1, device="cuda", dtype="bfloat16")
    grpo.main(cfg)
    (line,) = metrics(cfg.out)
    assert math.isfinite(line["loss"]) and line["logprob_diff_mean"] < 0.05
    here, there = qwen.load(cfg.model), qwen.load(cfg.model, "cuda")
    for sample in read_samples(cfg.data)[:3]:
        row = encoder.prompt(sample).extend([[5, 6, 7], [8, 9]])
        torch.testing.assert_close(there(row)[0].cpu(), here(row)[0], rtol=1e-3, atol=1e-3)
