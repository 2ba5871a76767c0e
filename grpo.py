"""Online RL with GRPO, Eq. (6) to (10): a guard that reasons better, or with --eco in fewer tokens.

In:  an SFT checkpoint and rl.jsonl from augment.py (labels, no reasoning).
Out: DIR, a checkpoint directory; DIR/run.json, DIR/metrics.jsonl, DIR/rollouts.jsonl (every group
     with outputs, reward parts, advantages and clip value), DIR/checkpoints/ (the last two).

No KL term and no reference model. A prompt and its G completions are one packed row: the prompt is
encoded once in sampling and once in every update. A step is one rollout batch, updated on in
several mini-batches. State is weights, optimizer and step: what a step samples is a function of
(weights, seed, step, position in the rollout batch, branch: a completion while it is generated), so
one process and many draw the same outputs, and a resumed run needs its checkpoint only. (On CUDA
that holds in distribution: kernels sum in an order of their own, so last bits and then tokens
differ.)

Deviations: the clipped loss is min(K A, clip(K) A), as released and as usual, where the paper
prints A outside; K is per token, as released; the loss is the mean over all tokens of the global
mini-batch (the release averaged means of micro-batches); the clip range really decays (in the
release it never reached the workers).

    torchrun --nproc-per-node 8 grpo.py --model out/sft --data out/rl.jsonl --out out/guard
"""

import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

import sft
from data import (
    Encoder,
    InputError,
    Row,
    Sample,
    append_records,
    cli,
    halved,
    option,
    pack,
    prefetch,
    progress,
    read_samples,
    saving_memory,
)
from evaluate import compute_metrics, evaluate_samples
from model import Completion, QwenVL, Ranks, generate, replica, start_ranks
from reward import FLOOR, Reward, score

# The metrics on the screen.
SHOWN = (
    "reward request_accuracy response_accuracy format tokens truncated entropy approx_kl clip"
    " grad_norm sampled_tokens_per_second trained_tokens_per_second mfu"
    " seconds_rollout seconds_update val_f1 val_f1_prompt val_f1_response"
)


@dataclass(frozen=True)
class Config:
    model: str = option("out/sft", "checkpoint or hub id", group="what it reads and writes")
    data: list[str] = option(["out/rl.jsonl"], "JSONL files of labelled samples, from augment.py")
    validation: list[str] = option([], "JSONL files for F1 during training")
    out: str | None = option(
        None, "directory of the run and checkpoint; default: out/guard, with --eco out/guard-eco"
    )
    eco: bool = option(False, "train the Eco variant: beta 1/6 instead of 1, Eq. (10)")
    fresh: bool = option(False, "start over, discarding the run in --out")
    instruction: str | None = option(None, "file whose text replaces the system instruction")
    min_pixels: int | None = option(None, "smallest image area; default: SFT's; release: 262144")
    max_pixels: int | None = option(None, "largest image area; default: SFT's; release: 4194304")
    skip_bad: bool = option(False, "set bad rows aside instead of stopping")

    epochs: float = option(1.0, "passes over the data, may be fractional", group="how long")
    steps: int | None = option(None, "stop after this step; the same command without it goes on")
    eval_every: int = option(5, "steps between evaluations on --validation, also before the first")
    save_every: int = option(5, "steps between checkpoints")

    rollout_batch: int = option(512, "prompts per rollout batch, over all ranks", group="rollout")
    group: int = option(16, "completions per prompt, G")
    temperature: float = option(1.2, "of sampling and of all log-probabilities")
    top_p: float = option(1.0, "nucleus sampling of rollouts")
    max_new_tokens: int = option(3072, "longest completion; l_norm is the length divided by this")
    max_prompt_tokens: int = option(3072, "longer prompts are left out and counted")
    seed: int = option(0, "of the data order and of sampling")

    floor: float = option(
        FLOOR, "smallest l_norm (ours): else short wrong outputs swamp their group", group="reward"
    )
    length_unit: Literal["tokens", "chars"] = option("tokens", "of l_norm; chars as in the release")

    update_batch: int = option(128, "prompts per optimizer step (the paper: 256)", group="update")
    lr: float = option(1e-6, "learning rate, constant")
    weight_decay: float = option(0.01, "AdamW weight decay")
    max_norm: float = option(1.0, "gradient norm is clipped to this")
    clip: float = option(0.2, "initial clip range, epsilon of Eq. (7)")
    clip_schedule: Literal["product", "linear", "cosine", "constant"] = option("product", "Eq. (7)")
    freeze: list[str] = option([], "parts that do not train; of vision, merger, decoder")

    pack_tokens: int = option(
        16384, "tokens per forward pass (ours: sets memory, not results)", group="memory and device"
    )
    max_branches: int = option(256, "completions sampled at once on each rank (sets memory only)")
    checkpointing: bool = option(True, "recompute activations in the backward pass")
    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of computation; not of weights")

    @property
    def to_save_memory(self) -> str:
        """What to try when memory runs out in the update; a row is a prompt and a completion."""
        longest = self.max_prompt_tokens + self.max_new_tokens
        shorter = halved("--pack-tokens", self.pack_tokens, longest)
        return f"{shorter or halved('--max-new-tokens', self.max_new_tokens)}, or more ranks"

    @property
    def to_save_rollout_memory(self) -> str:
        """What to try when memory runs out while sampling; a prompt's completions run together."""
        fewer = halved("--max-branches", self.max_branches, self.group)
        return f"{fewer or halved('--max-new-tokens', self.max_new_tokens)}, or more ranks"

    @property
    def beta(self) -> float:
        """The bound on l_norm in Eq. (10)."""
        return 1 / 6 if self.eco else 1.0


@dataclass(frozen=True)
class Group:
    """One prompt, its G completions, and what they earned. A list has one entry a completion."""

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
    """One packed row, for one forward and backward pass, and what the loss needs for the S tokens
    of its completions."""

    row: Row
    advantages: Tensor  # [S]
    sampler_logprobs: Tensor  # [S]
    old_logprobs: Tensor | None = None  # [S], of the same policy, as the trainer computes them


# ---------------------------------------------------------------------- the method


def clip_range(step: int, total: int, epsilon: float, schedule: str) -> float:
    """B_s for step s = 1 .. total; "product" is that of Eq. (7)."""
    left = {
        "product": math.prod((total - i) / total for i in range(1, step + 1)),
        "linear": (total - step) / total,
        "cosine": 0.5 * (1 + math.cos(math.pi * step / total)),
        "constant": 1.0,
    }
    if schedule not in left:
        raise InputError(f"--clip-schedule {schedule}: choose from {', '.join(left)}")
    return epsilon * left[schedule]


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

    The caller divides by the tokens of the mini-batch. In the last step the clip range is 0. In its
    first update K is exactly 1, and every token learns; in later ones a token learns only if its K
    has moved against its advantage (K < 1 with A > 0, or K > 1 with A < 0). The metrics are sums
    over tokens that have an advantage.
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
    policy: QwenVL, encoder: Encoder, samples: dict[int, Sample], cfg: Config, step: int, show=False
) -> list[Group]:
    """Generate G completions of each {position: sample}, with their rewards and advantages.

    show: with a progress bar, which moves by G completions when the last of a prompt is finished.
    """
    prompts = dict(zip(samples, prefetch(encoder.prompt, samples.values())))  # {position: row}
    finished = generate(
        policy,
        prompts.items(),
        cfg.group,
        cfg.max_new_tokens,
        cfg.temperature,
        cfg.top_p,
        stop_ids=encoder.stop_ids,
        banned=encoder.banned_ids,
        seed=cfg.seed * 1_000_003 + step,  # another one for every step of every --seed
        max_branches=cfg.max_branches,
    )
    count = encoder.count if cfg.length_unit == "tokens" else len
    groups = []
    with progress(None, len(samples) * cfg.group, "completions", show) as bar:
        for position, completions in finished:
            prompt, sample = prompts[position], samples[position]
            labels = sample.request_label, sample.response_label
            outputs = [encoder.decode(completion.ids) for completion in completions]
            rewards = [  # Eq. (8) to (10)
                score(output, *labels, count, cfg.max_new_tokens, cfg.beta, cfg.floor)
                for output in outputs
            ]
            advantages = compute_advantages([reward.total for reward in rewards])  # Eq. (7)
            groups.append(
                Group(position, sample, prompt, completions, outputs, rewards, advantages)
            )
            bar.update(cfg.group)
    return sorted(groups, key=lambda group: group.position)


def pack_groups(groups: list[Group], pack_tokens: int) -> list[MicroBatch]:
    """Groups as packed rows of at most pack_tokens tokens (or one completion over its prompt). A
    longer group is cut into parts, each with its prompt.

    A group whose rewards are all equal has no gradient and is left out (but for one, if there is
    nothing else: every rank must run something). Its tokens still count in the mean, so this
    changes the cost, not the update.
    """
    trained = [group for group in groups if group.advantages.any()]
    parts = []
    for group in trained or groups[:1]:
        ids = [completion.ids for completion in group.completions]
        for chosen in pack(ids, pack_tokens - len(group.prompt)):
            row = group.prompt.extend([ids[i] for i in chosen])
            advantages = [group.advantages[i].expand(len(ids[i])) for i in chosen]
            logprobs = [group.completions[i].logprobs for i in chosen]
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
    model, optimizer, groups: list[Group], encoder, cfg: Config, clip: float, compute, ranks
) -> dict:
    """Eq. (6) on a rollout batch: an optimizer step per update_batch prompts. Returns metrics."""
    began = time.perf_counter()

    def forward(row: Row) -> tuple[Tensor, Tensor]:
        """log P of the row's completion tokens, and the entropies, both [S]."""
        with sft.compute_in(compute, model):
            return model(row, cfg.temperature, encoder.banned_ids)

    # 1. Cut the rollout batch into mini-batches of packed rows, with log P_old of Eq. (7): before
    # the first update, and by this forward pass, so that K is then exactly 1. (The sampler's own
    # log-probabilities are rounded otherwise: metric logprob_diff_mean.)
    minibatches = []  # of each, the batches of this rank, and the completion tokens of all ranks
    for start in range(0, cfg.rollout_batch, cfg.update_batch):
        chosen = [g for g in groups if start <= g.position < start + cfg.update_batch]
        tokens = ranks.reduce(sum(group.tokens for group in chosen))  # of left-out groups, too
        batches = pack_groups(chosen, cfg.pack_tokens)
        with torch.no_grad():
            old = [forward(batch.row)[0] for batch, _ in sft.lockstep(batches, ranks)]
        # The turns of lockstep beyond this rank's own batches come last: zip drops them.
        batches = [replace(b, old_logprobs=logprobs) for b, logprobs in zip(batches, old)]
        minibatches.append((batches, tokens))

    # 2. Take one optimizer step on each.
    losses, grad_norms, sums = [], [], Counter()
    for batches, tokens in minibatches:
        total = 0.0
        for batch, is_real in sft.lockstep(batches, ranks):
            logprobs, entropy = forward(batch.row)
            advantages = batch.advantages.to(ranks.device)
            loss, loss_metrics = policy_loss(logprobs, batch.old_logprobs, advantages, clip)
            loss = loss * is_real / tokens  # the mean over the tokens of all ranks
            sft.backward(loss, ranks)
            total += loss.item()
            if is_real:
                has_advantage = advantages != 0
                sums.update(loss_metrics)
                sums["entropy"] += entropy[has_advantage].sum().item()
                sums["tokens"] += int(has_advantage.sum())
        grad_norms.append(sft.optimizer_step(optimizer, cfg.lr, cfg.max_norm))
        losses.append(ranks.reduce(total))

    # 3. Report.
    batches = [batch for of_one_step, _ in minibatches for batch in of_one_step]
    seconds = time.perf_counter() - began
    metrics = {"clip": clip, "lr": cfg.lr, "seconds_update": seconds}
    metrics |= update_metrics(losses, grad_norms, sums, batches, ranks)
    rows = [batch.row for batch in batches]  # forward also for P_old
    return metrics | sft.training_speed(model, rows, seconds, ranks, forwards=2)


def main(cfg: Config) -> None:
    """Check the settings, and leave the model at cfg.out."""
    if cfg.out is None:
        cfg = replace(cfg, out="out/guard-eco" if cfg.eco else "out/guard")
    if cfg.group < 2 or not cfg.temperature or cfg.rollout_batch % cfg.update_batch:
        raise InputError(
            "want --group > 1, --temperature > 0, and --rollout-batch a multiple of --update-batch"
        )
    if cfg.floor > cfg.beta:
        raise InputError(f"--floor {cfg.floor} is above beta, {cfg.beta:.3g}, Eq. (10)")
    ranks = start_ranks(cfg.device)
    if cfg.update_batch < ranks.world:
        raise InputError(f"--update-batch {cfg.update_batch} is less than one for each rank")
    with sft.prepared(cfg, ranks):
        train(cfg, ranks)


def train(cfg: Config, ranks: Ranks) -> None:
    """The run in the folder cfg.out, which no other run writes to, from its last checkpoint on."""
    model, encoder, compute = sft.load_for_training(cfg, ranks)
    samples = filter_prompts(read_samples(cfg.data, cfg.skip_bad), encoder, cfg, ranks)
    validation = read_samples(cfg.validation, cfg.skip_bad) if cfg.validation else []
    total = int(cfg.epochs * len(samples)) // cfg.rollout_batch
    if len(samples) < cfg.rollout_batch or total == 0:
        raise InputError(
            f"{len(samples)} prompts with --rollout-batch {cfg.rollout_batch} and --epochs "
            f"{cfg.epochs}: not one step; check the labels and --max-prompt-tokens, too"
        )
    optimizer = sft.make_optimizer(model, cfg.lr, cfg.weight_decay)
    run = sft.Run(cfg, ranks, samples + validation)
    done = run.restore(model, optimizer)
    last = max(done, min(total, cfg.steps or total))
    if validation and not done:
        metrics = validate(replica(model, compute), encoder, validation, cfg, ranks)
        run.log(0, metrics, SHOWN, last)

    with sft.StopSignal(ranks) as stop:
        for step in range(done + 1, last + 1):
            # 1. Sample completions; rewards and advantages, Eq. (7) to (10).
            start = (step - 1) * cfg.rollout_batch
            indices = sft.data_order(len(samples), start, cfg.rollout_batch, cfg.seed)
            positions = range(ranks.rank, cfg.rollout_batch, ranks.world)  # this rank's share
            batch = {i: samples[indices[i]] for i in positions}
            began = time.perf_counter()
            policy = replica(model, compute)  # whole on every rank, to generate with
            with saving_memory(cfg.to_save_rollout_memory):
                groups = rollout(policy, encoder, batch, cfg, step, show=ranks.rank == 0)
            metrics = rollout_metrics(groups, time.perf_counter() - began, ranks)
            policy = None  # frees its memory for the update
            # 2. Update the model, Eq. (6), with the clip range B_s of Eq. (7).
            clip = clip_range(step, total, cfg.clip, cfg.clip_schedule)
            torch.cuda.empty_cache()  # the update needs memory blocks of other sizes
            metrics |= update_policy(model, optimizer, groups, encoder, cfg, clip, compute, ranks)
            torch.cuda.empty_cache()  # the sampler sizes its caches by what is free
            # 3. Evaluate, report, and save.
            if validation and (step % cfg.eval_every == 0 or step == last):
                metrics |= validate(replica(model, compute), encoder, validation, cfg, ranks)
            write_rollouts(run, groups, step, clip)
            run.log(step, metrics, SHOWN, last)
            stopped = stop.agreed()
            if step % cfg.save_every == 0 or step == last or stopped:
                run.checkpoint(step, model, optimizer)
            if stopped:
                sys.exit(128 + stopped)
    run.finish(last, total, model, optimizer, encoder, compute)


# ---------------------------------------------------------------------- what the loop needs


def filter_prompts(samples: list[Sample], encoder, cfg: Config, ranks: Ranks) -> list[Sample]:
    """The samples with a label and a prompt within the limit; the rest are counted on screen."""
    kept = [s for s in samples if s.request_label or s.response_label]
    share = range(ranks.rank, len(kept), ranks.world)  # this rank's
    prompts = zip(share, prefetch(encoder.prompt, (kept[i] for i in share)))
    fitting = ranks.gather([i for i, prompt in prompts if len(prompt) <= cfg.max_prompt_tokens])
    short = [kept[i] for i in sorted(fitting)]
    if ranks.rank == 0:
        left_out = f"{len(samples) - len(kept)} unlabelled, {len(kept) - len(short)} too long"
        print(f"{len(short)} prompts; left out: {left_out}")
    return short


def validate(policy, encoder, samples: list[Sample], cfg: Config, ranks: Ranks) -> dict:
    """Greedy F1 and lengths on the validation samples, sharded over the ranks."""
    share = samples[ranks.rank :: ranks.world]  # this rank's
    limits = cfg.max_new_tokens, cfg.max_branches
    with saving_memory(cfg.to_save_rollout_memory):
        found = evaluate_samples(policy, encoder, share, *limits, show=ranks.rank == 0)
    found = ranks.gather(found)
    return {f"val_{name}": value for name, value in compute_metrics(found).items()}


def rollout_metrics(groups: list[Group], seconds: float, ranks: Ranks) -> dict:
    """Means over all outputs, or groups, of the rollout batch of all ranks: shares in [0, 1],
    lengths in tokens. seconds: of sampling on this rank; the slowest rank counts for the speed."""
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
        "zero_std_groups": [not group.advantages.any() for group in groups],
    }
    metrics = {}
    for name, known in values.items():
        metrics[name] = ranks.reduce(sum(known)) / max(1.0, ranks.reduce(len(known)))
    sampled = ranks.reduce(sum(values["tokens"]))
    metrics["sampled_tokens_per_second"] = sampled / ranks.reduce(seconds, "max")
    return {**metrics, "seconds_rollout": seconds}


def update_metrics(
    losses: list[float], grad_norms: list[float], sums: Counter, batches: list[MicroBatch], ranks
) -> dict:
    """Means over the optimizer steps, and over the tokens of all ranks that have an advantage."""
    metrics = {
        "loss": sum(losses) / len(losses),
        "grad_norm": sum(grad_norms) / len(grad_norms),
        "skipped": sum(not math.isfinite(norm) for norm in grad_norms),
    }
    trained = max(1.0, ranks.reduce(sums["tokens"]))
    for name in ("entropy", "approx_kl", "clipped_high", "clipped_low"):
        metrics[name] = ranks.reduce(sums[name]) / trained
    sampler_logprobs = torch.cat([batch.sampler_logprobs for batch in batches]).to(ranks.device)
    difference = (torch.cat([batch.old_logprobs for batch in batches]) - sampler_logprobs).abs()
    total, count = ranks.reduce(difference.sum().item()), ranks.reduce(len(difference))
    metrics["logprob_diff_mean"] = total / count
    metrics["logprob_diff_max"] = ranks.reduce(difference.max().item(), "max")
    return metrics


def record(group: Group, step: int, clip: float) -> dict:
    """A record of rollouts.jsonl: what shows a person why a group was updated as it was."""
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
    return {
        "step": step,
        "id": group.sample.id,
        "request_label": group.sample.request_label,
        "response_label": group.sample.response_label,
        "clip": clip,
        "outputs": outputs,
    }


def write_rollouts(run: sft.Run, groups: list[Group], step: int, clip: float) -> None:
    """Append the step's groups of all ranks to rollouts.jsonl, in the order of the data."""
    of_this_rank = [(group.position, record(group, step, clip)) for group in groups]
    records = dict(run.ranks.gather(of_this_rank))
    if run.ranks.rank == 0:
        ordered = [records[position] for position in sorted(records)]
        append_records(run.folder / "rollouts.jsonl", ordered)


if __name__ == "__main__":
    cli(Config, main)
