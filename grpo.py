"""Online RL with GRPO, Eq. (6) to (10): a guard that reasons better, or with --eco in fewer tokens.

In:  an SFT checkpoint and rl.jsonl from augment.py (labels, no reasoning).
Out: DIR, a checkpoint directory; DIR/run.json, DIR/metrics.jsonl, DIR/rollouts.jsonl (every group
     with outputs, reward parts, advantages and clip value), DIR/checkpoints/ (the last two).

No KL term and no reference model. A step samples one rollout batch and updates in mini-batches.
A prompt and its G completions are one packed row: sampling encodes the prompt once, and so does
every forward pass of the update. The first mini-batch takes one pass; the others take two, since
their log P_old must be known before the first update. A group longer than --pack-tokens is cut into
parts, and each part has its own copy of the prompt.

The state of a run is weights, optimizer and step. A completion depends only on (weights, seed,
step, position in the rollout batch, index of the completion). So the same weights give the same
outputs in one process or many, and a resumed run goes on as if it had never stopped. (On CUDA this
holds in distribution only: the order of sums in kernels varies, so last bits, then tokens, differ.)

Deviations: the clipped loss is min(K A, clip(K) A), as released and as usual, while the paper
prints A outside the min; K is per token, as released; the loss is the mean over all tokens of the
global mini-batch (the release averages the means of micro-batches); the clip range really decays
(in the release it never reaches the workers).

    torchrun --nproc-per-node 8 grpo.py --model out/sft --data out/rl.jsonl --out out/guard
"""

import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

import data
import sft
from data import Encoder, Flags, InputError, Sample, option, pack, prefetch, progress
from evaluate import compute_metrics, evaluate_samples, sample_fields
from model import Completion, QwenVL, Ranks, Row, generate, replica
from reward import FLOOR, Reward, score

# The metrics on the screen.
SHOWN = (
    "reward request_accuracy response_accuracy tokens truncated zero_std_groups entropy"
    " grad_norm sampled_tokens_per_second trained_tokens_per_second val_f1"
)


@dataclass(frozen=True)
class GRPOFlags(Flags):
    model: str = option("out/sft", "checkpoint or hub id")
    data: list[str] = option(["out/rl.jsonl"], "JSONL files of labelled samples, from augment.py")
    validation: list[str] = option([], "JSONL files for F1 during training")
    out: str | None = option(
        None, "directory of the run and checkpoint; default: out/guard, with --eco out/guard-eco"
    )
    eco: bool = option(False, "train the Eco variant: beta 1/6 instead of 1, Eq. (10)")
    fresh: bool = option(False, "start over, discarding the run in --out")

    epochs: float = option(1.0, "passes over the data, may be fractional")
    steps: int | None = option(None, "stop after this step; the same command without it goes on")
    eval_every: int = option(5, "steps between evaluations on --validation, also before the first")
    save_every: int = option(5, "steps between checkpoints")

    rollout_batch: int = option(512, "prompts per rollout batch, over all ranks")
    group: int = option(16, "completions per prompt, G")
    temperature: float = option(1.2, "of sampling and of all log-probabilities")
    top_p: float = option(1.0, "nucleus sampling of rollouts")
    max_new_tokens: int = option(
        3072, "longest completion; l_norm is the reasoning's length over this"
    )
    max_prompt_tokens: int = option(3072, "longer prompts are left out and counted")
    floor: float = option(
        FLOOR, "smallest l_norm (ours): else short wrong outputs swamp their group"
    )

    update_batch: int = option(128, "prompts per optimizer step (the paper: 256)")
    lr: float = option(1e-6, "learning rate, constant")
    weight_decay: float = option(0.01, "AdamW weight decay")
    max_norm: float = option(1.0, "gradient norm is clipped to this")
    clip: float = option(0.2, "initial clip range, epsilon of Eq. (7)")
    clip_schedule: Literal["product", "constant"] = option("product", "product is Eq. (7)")
    freeze: list[str] = option(["none"], "parts that do not train: vision, merger, decoder, none")

    pack_tokens: int = option(16384, "tokens per forward pass (ours: sets memory, not results)")
    max_branches: int = option(256, "completions sampled at once on each rank (sets memory)")
    checkpointing: bool = option(True, "recompute activations in the backward pass")

    @property
    def beta(self) -> float:
        """The bound on l_norm in Eq. (10)."""
        return 1 / 6 if self.eco else 1.0


@dataclass(frozen=True)
class Group:
    """One prompt, its G completions, and their rewards. Each list has one entry per completion."""

    position: int  # of the prompt in the global rollout batch
    sample: Sample
    prompt: Row
    completions: list[Completion]  # token ids, and their log-probabilities as the sampler saw them
    outputs: list[str]  # the completions as text
    rewards: list[Reward]
    advantages: Tensor  # [G]

    @property
    def tokens(self) -> int:
        """The tokens of all completions."""
        return sum(len(completion.ids) for completion in self.completions)


@dataclass(frozen=True)
class MicroBatch:
    """One packed row for one forward and backward pass, and what else the loss needs for the S
    completion tokens of the row."""

    row: Row
    advantages: Tensor  # [S]
    sampler_logprobs: Tensor  # [S]
    # log P_old [S], computed by the trainer with the weights that sampled. None in the first
    # mini-batch: its own forward pass computes them, since nothing has been updated yet.
    old_logprobs: Tensor | None = None


SPARE = MicroBatch(sft.SPARE_ROW, torch.zeros(0), torch.zeros(0))  # none of its tokens counts


# ---------------------------------------------------------------------- the method


def clip_range(step: int, total: int, epsilon: float, schedule: str) -> float:
    """B_s of step s = 1 .. total. "product" follows Eq. (7), and reaches 0 in the last step."""
    if schedule == "constant":
        return epsilon
    return epsilon * math.prod((total - i) / total for i in range(1, step + 1))


def compute_advantages(rewards: list[float]) -> Tensor:
    """A_i = (r_i - mean) / (std + 1e-6) of one group [G], Eq. (7); std is unbiased, as released."""
    r = torch.tensor(rewards)
    if r.max() == r.min():  # no completion is better than another: nothing to learn
        return torch.zeros_like(r)
    return (r - r.mean()) / (r.std() + 1e-6)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, dict]:
    """Eq. (6), summed over S tokens: - min(K A, clip(K, 1 - B_s, 1 + B_s) A). All inputs are [S].

    The caller divides by the tokens of the mini-batch. A token has no gradient if its K has moved
    far enough: A > 0 and K > 1 + B_s, or A < 0 and K < 1 - B_s. Else it has the full gradient.
    (In the range K A and clip(K) A are equal. torch.minimum gives each half of the gradient, and
    clamp passes its half on: together it is whole.)
    In the last step of Eq. (7), B_s is 0. Then the first mini-batch learns in full: its K is 1 by
    construction. Later ones learn only from tokens whose K has not moved, or has moved against A.

    The metrics are sums over tokens whose advantage is not 0.
    """
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()  # K of Eq. (7), per token
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -torch.minimum(unclipped, clipped).sum()
    with torch.no_grad():
        is_clipped = clipped < unclipped
        metrics = {
            "clipped_high": (is_clipped & (advantages > 0)).sum().item(),
            "clipped_low": (is_clipped & (advantages < 0)).sum().item(),
            "approx_kl": (ratio - 1 - log_ratio)[advantages != 0].sum().item(),
        }
    return loss, metrics


def rollout(
    policy: QwenVL, encoder: Encoder, samples: dict[int, Sample], flags: GRPOFlags, step, show=False
) -> list[Group]:
    """Generate G completions of each {position: sample}, with their rewards and advantages.

    show: draw a progress bar, which moves by G completions when all completions of a prompt end.
    """
    prompts = dict(zip(samples, prefetch(encoder.prompt, samples.values())))  # {position: row}
    finished = generate(
        policy,
        prompts.items(),
        flags.group,
        flags.max_new_tokens,
        flags.temperature,
        flags.top_p,
        stop_ids=encoder.stop_ids,
        banned=encoder.banned_ids,
        seed=flags.seed * 1_000_003 + step,  # differs in every step of every --seed
        max_branches=flags.max_branches,
    )
    groups = []
    with progress(None, len(samples) * flags.group, "completions", show) as bar:
        for position, completions in finished:
            prompt, sample = prompts[position], samples[position]
            labels = sample.request_label, sample.response_label
            limits = flags.max_new_tokens, flags.beta, flags.floor
            outputs = [encoder.decode(completion.ids) for completion in completions]
            rewards = [score(out, *labels, encoder.count, *limits) for out in outputs]  # Eq. (8-10)
            advantages = compute_advantages([reward.total for reward in rewards])  # Eq. (7)
            groups.append(
                Group(position, sample, prompt, completions, outputs, rewards, advantages)
            )
            bar.update(flags.group)
    return sorted(groups, key=lambda group: group.position)


def pack_groups(groups: list[Group], pack_tokens: int) -> list[MicroBatch]:
    """Pack groups into rows of at most pack_tokens tokens (more only for one completion and its
    prompt). A longer group is cut into parts, each with its own copy of the prompt.

    A group whose rewards are all equal has no gradient and is left out. Its tokens still count in
    the mean, so this changes the cost, not the update.
    """
    parts = []
    for group in groups:
        if not group.advantages.any():
            continue
        ids = [completion.ids for completion in group.completions]
        for chosen in pack(ids, pack_tokens - len(group.prompt)):
            row = group.prompt.extend([ids[i] for i in chosen])
            advantages = [group.advantages[i].expand(len(ids[i])) for i in chosen]
            logprobs = [torch.tensor(group.completions[i].logprobs) for i in chosen]
            parts.append(MicroBatch(row, torch.cat(advantages), torch.cat(logprobs)))
    batches = []
    for chosen in pack([part.row for part in parts], pack_tokens):
        joined = [parts[i] for i in chosen]
        row = Row.join(*(part.row for part in joined))
        advantages = torch.cat([part.advantages for part in joined])
        logprobs = torch.cat([part.sampler_logprobs for part in joined])
        batches.append(MicroBatch(row, advantages, logprobs))
    return batches


def update_policy(
    model, optimizer, groups: list[Group], encoder, flags: GRPOFlags, clip: float, ranks: Ranks
) -> dict:
    """Eq. (6) on a rollout batch: an optimizer step per update_batch prompts. Returns metrics."""
    began = time.perf_counter()
    # forward(row) returns log P and the entropy of the row's completion tokens, both [S].
    forward = partial(model, temperature=flags.temperature, banned=encoder.banned_ids)

    # 1. Cut the rollout batch into mini-batches of packed rows. All but the first need log P_old of
    # Eq. (7) before the first update. (The sampler's log P rounds differently: logprob_diff_mean.)
    minibatches = []  # of (micro-batches of this rank, number of completion tokens of all ranks)
    for start in range(0, flags.rollout_batch, flags.update_batch):
        chosen = [g for g in groups if start <= g.position < start + flags.update_batch]
        tokens = ranks.reduce(sum(group.tokens for group in chosen))  # counts left-out groups, too
        batches = sft.lockstep(pack_groups(chosen, flags.pack_tokens), SPARE, ranks)
        if start > 0:
            with torch.no_grad():
                batches = [replace(b, old_logprobs=forward(b.row)[0]) for b in batches]
        minibatches.append((batches, tokens))

    # 2. Take one optimizer step on each mini-batch.
    losses, grad_norms, differences, sums = [], [], [], Counter()
    for batches, tokens in minibatches:
        total = 0.0
        for batch in batches:
            logprobs, entropies = forward(batch.row)
            old_logprobs = batch.old_logprobs
            if old_logprobs is None:
                old_logprobs = logprobs.detach()  # K is 1
            advantages = batch.advantages.to(ranks.device)
            loss, loss_metrics = policy_loss(logprobs, old_logprobs, advantages, clip)
            loss = loss / tokens  # the mean over the tokens of all ranks
            sft.backward(loss, ranks)
            total += loss.item()
            sums.update(loss_metrics)  # a Counter adds
            sums["entropy"] += entropies[advantages != 0].sum().item()
            sums["tokens"] += int((advantages != 0).sum())
            sums["trained"] += len(batch.row)
            differences += (old_logprobs - batch.sampler_logprobs.to(ranks.device)).abs().tolist()
        grad_norms.append(sft.optimizer_step(optimizer, flags.lr, flags.max_norm))
        losses.append(ranks.reduce(total))

    # 3. Report.
    seconds = time.perf_counter() - began
    speed = ranks.reduce(sums["trained"]) / seconds
    metrics = {"clip": clip, "seconds_update": seconds, "trained_tokens_per_second": speed}
    return metrics | update_metrics(losses, grad_norms, differences, sums, ranks)


def main(flags: GRPOFlags) -> None:
    """Check the flags, train, and save the model in flags.out."""
    if flags.out is None:
        flags = replace(flags, out="out/guard-eco" if flags.eco else "out/guard")
    if flags.group < 2 or not flags.temperature > 0:
        raise InputError("want --group above 1, and --temperature above 0")
    if flags.rollout_batch % flags.update_batch:
        raise InputError("--rollout-batch is no multiple of --update-batch")
    if not 0 < flags.floor <= flags.beta:
        raise InputError(f"--floor {flags.floor} is not in (0, {flags.beta:.3g}], beta of Eq. (10)")
    with sft.started(flags) as ranks:
        train(flags, ranks)


def train(flags: GRPOFlags, ranks: Ranks) -> None:
    """Train, from the last checkpoint in flags.out if any. No other run writes to this folder."""
    model, encoder = sft.load_for_training(flags, ranks)
    samples, left_out = sft.usable_samples(
        flags, ranks, encoder.prompt, flags.max_prompt_tokens, flags.data, complete=False
    )
    validation, bad_rows = data.read_samples(flags.validation, flags.skip_bad)
    total = sft.total_steps(flags.epochs, len(samples), flags.rollout_batch)
    optimizer = sft.make_optimizer(model, flags.lr, flags.weight_decay)
    run = sft.Run(flags, ranks, samples + validation, left_out + bad_rows)
    done = run.restore(model, optimizer)
    last = max(done, min(total, flags.steps or total))
    if validation and not done:
        policy = replica(model, ranks.compute)
        run.log(0, validate(policy, encoder, validation, flags, ranks), SHOWN, last)
        policy = None

    with sft.stop_signal(ranks) as stop:
        for step in range(done + 1, last + 1):
            # 1. Sample completions; rewards and advantages, Eq. (7) to (10).
            indices = sft.data_order(len(samples), step, flags.rollout_batch, flags.seed)
            positions = range(ranks.rank, flags.rollout_batch, ranks.world)  # this rank's share
            batch = {i: samples[indices[i]] for i in positions}
            began = time.perf_counter()
            policy = replica(model, ranks.compute)  # whole on every rank, to generate with
            groups = rollout(policy, encoder, batch, flags, step, show=ranks.rank == 0)
            metrics = rollout_metrics(groups, time.perf_counter() - began, ranks)
            policy = None  # frees its memory for the update
            # 2. Update the model, Eq. (6), with the clip range B_s of Eq. (7).
            clip = clip_range(step, total, flags.clip, flags.clip_schedule)
            torch.cuda.empty_cache()  # the update needs memory blocks of other sizes
            metrics |= update_policy(model, optimizer, groups, encoder, flags, clip, ranks)
            torch.cuda.empty_cache()  # and so does the sampler
            # 3. Evaluate, report, and save.
            if validation and (step % flags.eval_every == 0 or step == last):
                policy = replica(model, ranks.compute)
                metrics |= validate(policy, encoder, validation, flags, ranks)
                policy = None
            write_rollouts(run, groups, step, clip)
            run.log(step, metrics, SHOWN, last)
            stopped = stop()
            if step % flags.save_every == 0 or step == last or stopped:
                run.checkpoint(step)
            if stopped:
                sys.exit(128 + stopped)
    run.finish(last, total, model, optimizer, encoder)


# ---------------------------------------------------------------------- helpers of the loop


def validate(policy, encoder, samples: list[Sample], flags: GRPOFlags, ranks: Ranks) -> dict:
    """Greedy F1 and lengths on the validation samples, sharded over the ranks."""
    share = samples[ranks.rank :: ranks.world]  # this rank's
    limits = {"max_new_tokens": flags.max_new_tokens, "max_branches": flags.max_branches}
    predictions = evaluate_samples(policy, encoder, share, show=ranks.rank == 0, **limits)
    metrics = compute_metrics(ranks.gather(predictions))
    return {f"val_{name}": value for name, value in metrics.items()}


def rollout_metrics(groups: list[Group], seconds: float, ranks: Ranks) -> dict:
    """Means over all outputs, or groups, of all ranks; accuracies and shares are in [0, 1].
    seconds: the time this rank took to sample. The speed is computed from the slowest rank's."""
    completions = [completion for group in groups for completion in group.completions]
    rewards = [reward for group in groups for reward in group.rewards]
    stds = [torch.tensor([r.total for r in group.rewards]).std().item() for group in groups]
    values = {
        "reward": [r.total for r in rewards],
        "format": [r.format for r in rewards],
        "l_norm": [r.length for r in rewards],
        "request_accuracy": [r.request for r in rewards if r.request is not None],
        "response_accuracy": [r.response for r in rewards if r.response is not None],
        "tokens": [len(c.ids) for c in completions],
        "truncated": [not c.finished for c in completions],
        "reward_std": stds,
        "zero_std_groups": [not group.advantages.any() for group in groups],  # nothing to learn
    }
    metrics = {}
    for name, entries in values.items():
        metrics[name] = ranks.reduce(sum(entries)) / max(1.0, ranks.reduce(len(entries)))
    sampled = ranks.reduce(sum(values["tokens"]))
    metrics["sampled_tokens_per_second"] = sampled / ranks.reduce(seconds, "max")
    return {**metrics, "seconds_rollout": seconds}


def update_metrics(
    losses: list[float], grad_norms: list[float], differences: list[float], sums: Counter, ranks
) -> dict:
    """Means over the optimizer steps (`skipped` is a count), and over the tokens of all ranks
    whose advantage is not 0. differences: |trainer's - sampler's log P| of every packed token."""
    metrics = {
        "loss": sum(losses) / len(losses),
        "grad_norm": sum(grad_norms) / len(grad_norms),
        "skipped": sum(not math.isfinite(norm) for norm in grad_norms),
    }
    tokens = max(1.0, ranks.reduce(sums["tokens"]))
    for name in ("entropy", "approx_kl", "clipped_high", "clipped_low"):
        metrics[name] = ranks.reduce(sums[name]) / tokens
    total, count = ranks.reduce(sum(differences)), ranks.reduce(len(differences))
    metrics["logprob_diff_mean"] = total / max(1.0, count)
    metrics["logprob_diff_max"] = ranks.reduce(max(differences, default=0.0), "max")
    return metrics


def write_rollouts(run: sft.Run, groups: list[Group], step: int, clip: float) -> None:
    """Append the step's groups of all ranks to rollouts.jsonl, in the order of the data. The file
    shows a person why a group was updated as it was."""
    records = []  # (position, record)
    for group in groups:
        outputs = []
        results = zip(group.outputs, group.completions, group.rewards, group.advantages.tolist())
        for output, completion, reward, advantage in results:
            outputs.append(
                {
                    "output": output,
                    "n_tokens": len(completion.ids),
                    "finished": completion.finished,
                    "reward": asdict(reward),
                    "advantage": advantage,
                }
            )
        record = {"step": step, "clip": clip, **sample_fields(group.sample, run.folder)}
        records.append((group.position, record | {"outputs": outputs}))
    records = dict(run.ranks.gather(records))
    if run.ranks.rank == 0:
        ordered = [records[position] for position in sorted(records)]
        data.append_records(run.folder / "rollouts.jsonl", ordered)


if __name__ == "__main__":
    data.cli(GRPOFlags, main)
