"""grpo.py: clip range, advantages and loss worked by hand; packed groups against completions run one by one; the files
of a run; resuming bit by bit; learning. What several ranks share is in test_ranks.py.

    python -m pytest tests/test_grpo.py
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
import toy
from test_sft import ALONE, metrics, same, same_runs, small_run, tiny_world, weights

import grpo
import model as qwen
import reward
import sft
from data import Encoder, InputError, read_records, read_samples, write_samples
from grpo import clip_range, compute_advantages, policy_loss

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with a tiny model that has half learnt to answer in the format."""
    folder = tiny_world(tmp_path_factory.mktemp("world"), short=True)
    samples, _ = read_samples([folder / "train.jsonl"])
    same_label = {"request_label": "harmful", "response_label": "harmful"}
    easy = [replace(s, **same_label) for s in samples if s.image is None and s.response]
    write_samples(folder / "easy.jsonl", easy)
    usual = dict(batch_size=6, epochs=100, steps=15)
    sft.main(small_run(sft.SFTFlags, folder, folder / "sft", **usual))
    return folder


@pytest.fixture(scope="module")
def encoder(world):
    return Encoder(str(world / "sft"))


@pytest.fixture
def run_flags(world, tmp_path):
    """run_flags(name, **fields): a run of 2 steps of 6 prompts in tmp_path/name."""

    def make(name="out", **fields):
        usual = dict(model=str(world / "sft"), instruction=None, lr=1e-3, floor=0.1)
        usual |= dict(rollout_batch=6, update_batch=3, group=4, max_new_tokens=24)
        return small_run(grpo.GRPOFlags, world, tmp_path / name, **usual | fields)

    return make


def rollouts(out: str) -> list[dict]:
    return [json.loads(line) for line in Path(out, "rollouts.jsonl").read_text().splitlines()]


# ---- by hand


def test_the_clip_range_is_eq_7():
    table = {1: 0.191, 2: 0.175, 3: 0.152, 5: 0.098, 8: 0.033, 10: 0.011, 15: 1.7e-4, 23: 0}
    for step, printed in table.items():  # of the release's 23 steps, rounded
        assert clip_range(step, 23, 0.2, "product") == pytest.approx(printed, rel=0.04)
    assert {clip_range(s, 10, 0.2, "constant") for s in (1, 5, 10)} == {0.2}


def test_advantages_by_hand():
    torch.testing.assert_close(compute_advantages([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.0, 1.0]))
    by_hand = torch.tensor([-0.5, -0.5, -0.5, 1.5])  # the std is 0.5: squares over n - 1
    torch.testing.assert_close(compute_advantages([0.0, 0.0, 0.0, 1.0]), by_hand)
    assert torch.equal(compute_advantages([-0.3] * 5), torch.zeros(5))


LOSSES = [
    (1.1, 2.0, -2.2, -2.2, None),
    (1.5, 2.0, -2.4, 0.0, "clipped_high"),
    (0.5, 2.0, -1.0, -1.0, None),  # a good token that became rare is pulled back in full
    (0.9, -2.0, 1.8, 1.8, None),
    (0.5, -2.0, 1.6, 0.0, "clipped_low"),
    (1.5, -2.0, 3.0, 3.0, None),  # clip(K) A alone, or a maximum, would give 2.4 and no slope
]


@pytest.mark.parametrize("ratio, advantage, loss, slope, cut", LOSSES)
def test_policy_loss_by_hand(ratio, advantage, loss, slope, cut):
    new = torch.tensor([math.log(ratio) - 1.0], requires_grad=True)
    got, counts = policy_loss(new, torch.tensor([-1.0]), torch.tensor([advantage]), 0.2)
    got.backward()  # d loss / d new = K d loss / d K
    assert (got.item(), new.grad.item()) == pytest.approx((loss, slope), rel=1e-5)
    assert [name for name in ("clipped_high", "clipped_low") if counts[name]] == [cut] * bool(cut)
    assert counts["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)


def test_at_clip_zero_a_token_learns_if_its_k_is_1_or_has_moved_against_its_advantage():
    old = torch.tensor([-1.0, -2.0, -3.0, -1.0, -1.0, -1.0, -1.0])
    moved = torch.tensor([0.0, 0.0, 0.0, -0.1, 0.1, -0.1, 0.1])
    advantages = torch.tensor([1.0, -2.0, 0.5, 1.0, 1.0, -1.0, -1.0])
    new = (old + moved).requires_grad_()
    loss, counts = policy_loss(new, old, advantages, 0.0)
    loss.backward()
    learns = torch.tensor([1, 1, 1, 1, 0, 0, 1])  # in full, at the tie as well
    torch.testing.assert_close(new.grad, -advantages * moved.exp() * learns, rtol=1e-5, atol=1e-7)
    assert (counts["clipped_high"], counts["clipped_low"]) == (1, 1)


# ---- packed groups


@pytest.fixture(scope="module")
def nets(world):
    """The policy, and the policy some updates ago."""
    net, old = (qwen.load(str(world / "sft")) for _ in range(2))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=noise))
    return net, old


@pytest.fixture(scope="module")
def groups(world, encoder):
    """Groups of 4 invented completions: one without spread, the others with, one of these with a picture."""
    noise, made = torch.Generator().manual_seed(1), []
    samples = {s.modality: s for s in read_samples([world / "train.jsonl"])[0]}
    kinds = [("text", [1.0, 1, 1, 1]), ("image", [0.0, 1, 2, 3]), ("text", [0.0, 0, 0, 1])]
    for position, (modality, rewards) in enumerate(kinds):
        ids = [torch.randint(0, 500, (n,), generator=noise).tolist() for n in (3, 9, 5, 7)]
        done = [qwen.Completion(x, [0.0] * len(x)) for x in ids]
        sample = samples[modality]
        known = position, sample, encoder.prompt(sample), done, [""] * 4, []
        made.append(grpo.Group(*known, compute_advantages(rewards)))
    return made


def with_old_logprobs(net, groups, encoder, flags) -> list[grpo.MicroBatch]:
    batches = grpo.pack_groups(groups, flags.pack_tokens)
    with torch.no_grad():
        old = [net(b.row, flags.temperature, encoder.banned_ids)[0] for b in batches]
    return [replace(b, old_logprobs=logprobs) for b, logprobs in zip(batches, old)]


def one_by_one(nets, groups, encoder, flags):
    """Loss and gradients from every completion in a row of its own, prompt included, by Eq. (6)."""
    loss, clipped = 0.0, 0
    for g in groups:
        for completion, advantage in zip(g.completions, g.advantages):
            row = g.prompt.extend([completion.ids])
            row = replace(row, segments=(qwen.Segment(0, len(row)),))
            new, old = (net(row, flags.temperature, encoder.banned_ids)[0] for net in nets)
            ratio = (new - old.detach()).exp()
            chosen = torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.05) * advantage)
            clipped += int((chosen != ratio * advantage).sum())
            loss = loss - chosen.sum()
    assert clipped > 5  # the comparison covers it
    return loss, torch.autograd.grad(loss, list(nets[0].parameters()))


def test_packing_splitting_and_leaving_groups_out_change_nothing(nets, groups, encoder, run_flags):
    expected_loss, expected = one_by_one(nets, groups, encoder, run_flags())
    longest = max(len(g.prompt) for g in groups)
    # A completion a row, groups cut in two, all in one row.
    for pack_tokens in (1, longest + 16, 10_000):
        flags, loss = run_flags(pack_tokens=pack_tokens), 0.0
        batches = with_old_logprobs(nets[1], groups, encoder, flags)
        for b in batches:
            new, _ = nets[0](b.row, flags.temperature, encoder.banned_ids)
            loss = loss + policy_loss(new, b.old_logprobs, b.advantages, 0.05)[0]
        torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-4)
        for got, wanted in zip(torch.autograd.grad(loss, list(nets[0].parameters())), expected):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
        used = sum(s.prefix is not None for b in batches for s in b.row.segments)
        assert used == 2 * 4  # the group without spread is not run
        assert len(batches) == {1: used, 10_000: 1}.get(pack_tokens, len(batches))
        assert pack_tokens == 1 or max(len(b.row) for b in batches) <= pack_tokens


def test_the_first_mini_batch_needs_no_pass_of_its_own(groups, encoder, run_flags, monkeypatch):
    net, passes = qwen.load(run_flags().model), []
    hidden, optimizer = net.hidden_states, sft.make_optimizer(net, 1e-3, 0.0)
    counted = lambda row: passes.append(torch.is_grad_enabled()) or hidden(row)
    monkeypatch.setattr(net, "hidden_states", counted)
    flags = run_flags(rollout_batch=3, update_batch=3)
    line = grpo.update_policy(net, optimizer, groups, encoder, flags, 0.0, ALONE)
    assert passes == [True] and line["approx_kl"] == line["clipped_high"] == 0
    assert line["grad_norm"] > 0  # at clip 0, too
    flags = replace(flags, update_batch=1)  # the first group has no spread, and is in no row
    grpo.update_policy(net, optimizer, groups, encoder, flags, 0.2, ALONE)
    assert passes == [True, False, False, True, True]


# ---- runs


def test_what_a_run_writes(world, encoder, run_flags):
    flags = run_flags(validation=[str(world / "easy.jsonl")], eval_every=1)
    grpo.main(flags)
    before, *lines = read_records(Path(flags.out, "metrics.jsonl"))
    assert before.pop("step") == 0 and "val_f1_prompt" in before.keys() <= lines[0].keys()
    samples, groups = {s.id: s for s in read_samples(flags.data)[0]}, rollouts(flags.out)
    assert sorted(g["id"] for g in groups) == sorted(samples)  # one epoch: every prompt once
    for g in groups:
        labels = samples[g["id"]].request_label, samples[g["id"]].response_label
        assert (g["request_label"], g["response_label"], len(g["outputs"])) == (*labels, 4)
        for o in g["outputs"]:
            truth = *labels, encoder.count, flags.max_new_tokens, 1.0, flags.floor
            assert o["reward"] == vars(reward.score(o["output"], *truth))
        advantages = compute_advantages([o["reward"]["total"] for o in g["outputs"]])
        assert [o["advantage"] for o in g["outputs"]] == pytest.approx(advantages.tolist())
    for step, line in enumerate(lines, 1):
        mine = [g for g in groups if g["step"] == step]
        spread = [g for g in mine if any(o["advantage"] for o in g["outputs"])]
        outputs = [o for g in mine for o in g["outputs"]]
        assert line["step"] == step and len(mine) == 6
        assert line["clip"] == mine[0]["clip"] == clip_range(step, 2, 0.2, "product")
        assert 6 - len(spread) == pytest.approx(6 * line["zero_std_groups"])
        parts = {"reward": "total", "format": "format", "request_accuracy": "request"}
        for name, part in parts.items():
            assert line[name] == pytest.approx(fmean(o["reward"][part] for o in outputs))
        assert line["tokens"] == pytest.approx(fmean(o["n_tokens"] for o in outputs))
        assert line["logprob_diff_max"] < 1e-4  # between trainer and sampler
        assert line["grad_norm"] > 0 and line["skipped"] == 0
        assert line["approx_kl"] > 0
        trained = sum(o["n_tokens"] for g in spread for o in g["outputs"])
        trained += sum(len(encoder.prompt(samples[g["id"]])) for g in spread)  # once for all four
        assert line["trained_tokens_per_second"] * line["seconds_update"] == pytest.approx(trained)
    assert {o["finished"] for g in groups for o in g["outputs"]} == {True, False}
    assert Encoder(flags.out).instruction == toy.INSTRUCTION
    assert not same(weights(flags.model), weights(flags.out))


def test_the_screen_says_what_is_left_out_and_how_it_goes(world, run_flags, capsys, tmp_path):
    samples, _ = read_samples([world / "train.jsonl"])
    samples[0] = replace(samples[0], request_label=None, response_label=None)
    samples[1] = replace(samples[1], request="long " * 200)
    write_samples(world / "some.jsonl", samples)
    limits = dict(max_prompt_tokens=150, validation=[str(world / "easy.jsonl")], epochs=1.2)
    grpo.main(run_flags(data=[str(world / "some.jsonl")], **limits))
    out = capsys.readouterr().out
    left_out = "0 bad rows, 1 lacking a label, 1 of more than 150 tokens"
    assert f"some.jsonl: 10 samples; left out: {left_out}\n" in out
    before, _, second = [line for line in out.splitlines() if line.startswith("step")]
    assert re.fullmatch(r"step 0/2  val_f1 \S+", before)
    assert re.match("step 2/2  left 0:00:00  reward .*  zero_std_groups .*  val_f1 ", second)


def test_a_run_that_stops_and_goes_on_is_the_run_that_never_stopped(run_flags):
    whole, halted = run_flags("whole"), run_flags("halted")
    grpo.main(whole)
    grpo.main(replace(halted, steps=1))
    for name in ("metrics.jsonl", "rollouts.jsonl"):  # killed after step 2, before its checkpoint
        with open(Path(halted.out, name), "a") as file:
            file.write('{"step": 2, "id": "x"}\n{"ste')
    grpo.main(halted)
    assert same_runs(whole, halted) and rollouts(whole.out) == rollouts(halted.out)


def test_eco_pays_no_more_length_from_beta_on(run_flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = replace(run_flags(eco=True, steps=1), out=None)
    assert (flags.beta, run_flags().beta) == (1 / 6, 1)
    grpo.main(flags)
    outputs = [o["reward"] for g in rollouts("out/guard-eco") for o in g["outputs"]]
    wrong = [o["total"] for o in outputs if not o["safety"]]
    assert -100.1 < min(wrong) <= max(wrong) < -35.9  # 1 / floor^2 to 1 / beta^2, Eq. (10)


def test_the_reward_goes_up(world, run_flags):
    batch = dict(rollout_batch=2, update_batch=2, group=16, epochs=100, steps=12, max_new_tokens=32)
    learning = dict(floor=1.0, lr=3e-3, clip_schedule="constant")
    flags = run_flags(data=[str(world / "easy.jsonl")], **batch, **learning)
    grpo.main(flags)
    rewards = [line["reward"] for line in metrics(flags.out)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15


def test_settings_that_cannot_work(run_flags):
    wrong = {
        "--group": {"group": 1},
        "--temperature": {"temperature": 0.0},
        "multiple": {"update_batch": 4},
        "--floor 0.2": {"eco": True, "floor": 0.2},
    }
    for message, fields in wrong.items():
        with pytest.raises(InputError, match=message):
            grpo.main(run_flags(**fields))
    assert not Path(run_flags().out).exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_on_the_gpu(run_flags):
    flags = run_flags(steps=1, device="cuda", dtype="bfloat16")
    grpo.main(flags)
    (line,) = metrics(flags.out)
    assert math.isfinite(line["loss"]) and line["logprob_diff_mean"] < 0.05
