"""Every stage, from SFT to a single verdict, on the pretend GPU (pretend_gpu.py): nothing mixes
devices, losses, gradients and tokens are those of the CPU, and launches and waits are counted.

The checks are tests in a process of their own, since the pretend GPU changes all of torch:

    python -m pytest tests/test_pretend_gpu.py
    python tests/test_pretend_gpu.py [-k gradients -s ...]      # the checks alone, with pytest's flags
"""

import io
import os
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]

import pretend_gpu
import reference_varlen  # noqa: F401  (it registers the kernels)
import torch
import torch.nn.functional as F
import toy
from safetensors.torch import load_file
from torch.nn.attention.varlen import varlen_attn

import augment
import evaluate
import grpo
import model as qwen
import sft
from data import Encoder, read_records, read_samples, write_samples

# What things may cost in bfloat16, as measured; to be lowered when the code gets better. Of a decode
# step of four branches of one prompt: launches in each layer and beside the layers, and waits.
DECODING = (22, 38, 1)
UPDATE_WAITS = 27  # of an update of GRPO: one row of two prompts, one of them with an image

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
DEVICES = ("cpu", "pretend")
SIZES = toy.TINY | dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)


def test_on_the_pretend_gpu():
    """All functions below that are called check_..., in a process of their own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    how = dict(capture_output=True, text=True, timeout=900)
    ran = subprocess.run([sys.executable, HERE], env=env, **how)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-20000:] + ran.stderr[-4000:]


def test_three_kernel_paths_agree_on_cuda(tmp_path):
    if not torch.cuda.is_available():  # asked only now: above, it would start CUDA for the checks
        pytest.skip("needs CUDA")
    toy.build_checkpoint(tmp_path, **SIZES)
    assert_three_paths_agree(tmp_path, "cuda")


def assert_three_paths_agree(folder: Path, device: str) -> None:
    """Decoding one completion, sixteen of one prompt, and the packed forward pass take different
    ways through the kernels of attention; log-probabilities must be equal but for rounding."""
    net = qwen.load(str(folder), device, BFLOAT16)
    for layer in net.model.layers:  # so that much hangs on what is seen: a lost key costs 0.05
        layer.self_attn.q_proj.weight.data.mul_(2)
        layer.self_attn.o_proj.weight.data.mul_(3)
    ids = torch.randint(20, 300, (70,), generator=torch.Generator().manual_seed(0))
    positions, nothing = torch.arange(70).expand(3, -1), torch.zeros(70, dtype=torch.bool)
    prompt = qwen.Row(ids, positions, (qwen.Segment(0, 70),), nothing, torch.zeros(0, 1176))
    banned = (net.config.image_token_id,)
    for n in (1, 16):
        how = dict(n=n, max_new_tokens=40, banned=banned)
        [(_, drawn)] = qwen.generate(net, [(0, prompt)], **how)
        row = prompt.extend([completion.ids for completion in drawn])
        with torch.no_grad():
            packed, _ = net(row, banned=banned)
        far = packed.cpu() - torch.tensor(sum([completion.logprobs for completion in drawn], []))
        assert far.abs().mean() < 0.02


# ------------------------------------------------------------------------------ the pretend GPU


def there(*shape: int) -> torch.Tensor:
    """A tensor on the device."""
    return torch.randn(*shape).to("pretend")


def check_what_cuda_refuses_is_refused():
    x, cpu, index = there(3, 4), torch.randn(4), torch.tensor([0, 1])
    index_there, ends = index.to("pretend"), torch.tensor([0, 3]).int().to("pretend")
    row = there(3, 2, 8)
    half, generator = row.bfloat16(), torch.Generator()
    refused = {
        "addition": lambda: x + cpu,
        "a list": lambda: torch.cat([x, cpu[None]]),
        "values to write": lambda: x.index_put_((index_there,), torch.zeros(2, 4)),
        "a CPU tensor by an index from the device": lambda: cpu[index_there],
        "a generator of the CPU": lambda: torch.rand(3, generator=generator, device="pretend"),
        "attention in float32": lambda: varlen_attn(row, row, row, ends, ends, 3, 3),
        "lengths on the CPU": lambda: varlen_attn(half, half, half, index.int(), ends, 3, 3),
    }
    for operation in refused.values():
        with pytest.raises(pretend_gpu.Refused, match="^tests/test_pretend_gpu.py:"):
            operation()
    assert torch.accelerator.current_accelerator().type == "pretend"  # and no real card
    assert torch.equal((x + torch.tensor(1.0)).cpu(), (x + 1.0).cpu())  # a number is allowed


def check_launches_and_waits_are_counted():
    x, mask, q = there(3, 4), (there(3, 4) > 0), there(1, 2, 3, 8)
    index, repeats = torch.tensor([0, 1]), torch.tensor([1, 2]).to("pretend")
    row, ends = there(3, 2, 8).bfloat16(), torch.tensor([0, 3]).int().to("pretend")
    wanted = {
        "an addition": (1, 0, lambda: x + 1),
        "views": (0, 0, lambda: [x.T[..., 1:].unsqueeze(0), *x.split(1), x.detach(), x.view(-1)]),
        "memory": (0, 0, lambda: torch.empty_like(x)),
        "what is there already": (0, 0, lambda: x.to("pretend", torch.float32)),
        "a norm": (1, 0, lambda: F.rms_norm(x, (4,))),
        "attention": (1, 0, lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)),
        "varlen attention": (1, 0, lambda: varlen_attn(row, row, row, ends, ends, 3, 3)),
        ".item()": (1, 1, lambda: x[0, 0].item()),
        "if any()": (3, 1, lambda: 1 if (x > 0).any() else 0),
        ".cpu()": (1, 1, lambda: x.cpu()),
        "copy_ to the host": (1, 1, lambda: torch.zeros(3, 4).copy_(x)),
        "to the device": (1, 1, lambda: index.to("pretend")),
        "to the device, non_blocking": (1, 0, lambda: index.to("pretend", non_blocking=True)),
        "torch.tensor": (1, 1, lambda: torch.tensor([1, 2], device="pretend")),
        "a boolean index": (1, 1, lambda: x[mask]),
        "an index on the device": (1, 0, lambda: x[repeats]),
        "an index on the CPU": (2, 1, lambda: x[index]),
        "repeat_interleave": (2, 1, lambda: x[:2].repeat_interleave(repeats, 0)),
        "a number in a row": (1, 0, lambda: x.__setitem__(0, 1.0)),
    }
    for what, (launches, waits, operation) in wanted.items():
        with pretend_gpu.counting() as tally:
            operation()
        found = pretend_gpu.total(tally, "launches"), pretend_gpu.total(tally, "waits")
        assert found == (launches, waits), what


# ------------------------------------------------------------------------------ the stages


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """12 exchanges with a word of reasoning in train.jsonl; three of them, one of each modality, in
    mixed.jsonl; a random model in base/, and in start/ one that has learnt the format."""
    folder = tmp_path_factory.mktemp("world")
    toy.make_world(folder, sizes={"train": 4, "val": 1, "test": 1})
    toy.build_checkpoint(folder / "base", **SIZES)
    samples, _ = read_samples([str(folder / "train.jsonl")])
    short = [replace(sample, reasoning="fine") for sample in samples]
    write_samples(folder / "train.jsonl", short)
    write_samples(folder / "mixed.jsonl", {s.modality: s for s in short}.values())
    learning = dict(model="base", data="train", batch_size=6, epochs=100, steps=25)
    sft.main(flags_of(sft.SFTFlags, folder, "cpu", out=str(folder / "start"), **learning))
    return folder


MAIN = {sft.SFTFlags: sft.main, grpo.GRPOFlags: grpo.main}
MAIN |= {augment.AugmentFlags: augment.main, evaluate.EvaluateFlags: evaluate.main}
TRAINING = (sft.SFTFlags, grpo.GRPOFlags)
SFT = dict(batch_size=3, epochs=4)
GRPO = dict(rollout_batch=2, update_batch=1, group=3, floor=0.1, data="train")


def flags_of(kind: type, folder: Path, device: str, model="start", data="mixed", **more):
    """The flags of a small run of a stage on the device."""
    out = folder / f"{kind.__name__}-{device}-{more.get('dtype')}"
    usual = dict(model=str(folder / model), data=[str(folder / f"{data}.jsonl")], out=str(out))
    usual |= dict(instruction=str(folder / "instruction.txt"), device=device)
    usual |= dict(lr=1e-3, freeze=["none"]) if kind in TRAINING else {}
    usual |= dict(max_new_tokens=24) if kind is not sft.SFTFlags else {}
    return kind(**usual | more)


def run(kind: type, folder: Path, device: str, **more) -> Path:
    """Run a stage on the device, training for two steps, of which the second goes on from a
    checkpoint. Returns --out."""
    for stop in [dict(steps=1), dict(steps=2)] if kind in TRAINING else [{}]:
        flags = flags_of(kind, folder, device, **stop | more)
        MAIN[kind](flags)
    return Path(flags.out)


def metrics(out: Path) -> list[dict]:
    """The run's metrics, without times and speeds."""
    records = read_records(out / "metrics.jsonl")
    return [{name: x for name, x in line.items() if "second" not in name} for line in records]


def both(kind: type, folder: Path, **more) -> list[Path]:
    """Two runs whose metrics are equal to five digits: on the CPU and on the pretend GPU."""
    outs = [run(kind, folder, device, **more) for device in DEVICES]
    for one, other in zip(*map(metrics, outs), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    return outs


def check_sft_is_that_of_the_cpu_resumed_and_saved(world):
    outs = both(sft.SFTFlags, world, **SFT, validation=[str(world / "mixed.jsonl")])
    assert len(metrics(outs[0])) == 2 and metrics(outs[0])[1]["validation_loss"] > 0
    cpu, pretend = [load_file(out / "model.safetensors") for out in outs]
    apart = torch.cat([(cpu[name] - pretend[name]).abs().flatten() for name in cpu])
    # Adam gives noise a full step: a few weights whose gradient is zero may differ.
    assert apart.quantile(0.999) < 1e-5 and {x.dtype for x in pretend.values()} == {FLOAT32}


def check_grpo_is_that_of_the_cpu_resumed_and_saved(world):
    validation = dict(eval_every=2, validation=[str(world / "mixed.jsonl")])
    outs = both(grpo.GRPOFlags, world, **GRPO, **validation)
    assert len(metrics(outs[0])) == 3 and any(line.get("grad_norm") for line in metrics(outs[0]))
    outputs = []
    for out in outs:
        groups = read_records(out / "rollouts.jsonl")
        outputs.append([x["output"] for group in groups for x in group["outputs"]])
    assert len(outputs[0]) == 2 * 2 * 3 and outputs[0] == outputs[1]


def check_mined_outputs_verdicts_and_their_odds_are_those_of_the_cpu(world):
    outputs, odds, said = [], [], []
    for device in DEVICES:
        mined = run(augment.AugmentFlags, world, device, samples=2, max_correct=2)
        records = read_records(Path(f"{mined}.parts") / "predictions.jsonl")
        out = run(evaluate.EvaluateFlags, world, device, data="train")
        predictions = read_records(out / "predictions.jsonl")
        outputs.append([r["outputs"] for r in records] + [p["output"] for p in predictions])
        odds.append([p[f"{field}_p"] for p in predictions for field in ("request", "response")])
        with redirect_stdout(io.StringIO()) as screen:
            run(evaluate.EvaluateFlags, world, device, request="What may I bring?")
        said.append(screen.getvalue().replace(device, "DEVICE"))
    assert (
        len(outputs[0]) == 3 + 12
        and outputs[0] == outputs[1]
        and sum(p is not None for p in odds[0]) > 1
    )
    assert odds[1] == pytest.approx(odds[0], abs=1e-5)
    assert said[0] == said[1] and "P(harmful) 0." in said[0]


def check_every_stage_runs_in_bfloat16(world):
    """Through variable-length attention, as on CUDA."""
    half = dict(dtype="bfloat16")
    cpu, pretend = [run(sft.SFTFlags, world, device, **SFT, **half) for device in DEVICES]
    assert metrics(pretend)[0]["loss"] == pytest.approx(metrics(cpu)[0]["loss"], rel=0.02)
    steps = metrics(run(grpo.GRPOFlags, world, "pretend", **GRPO, **half))
    assert all(step["skipped"] == 0 and step["logprob_diff_max"] < 0.2 for step in steps)
    judged = run(evaluate.EvaluateFlags, world, "pretend", **half) / "predictions.jsonl"
    assert any(prediction["format_ok"] for prediction in read_records(judged))
    kept = load_file(pretend / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {BFLOAT16}


# ------------------------------------------------------------------------------ the model


def gradients(folder: Path, device: str, compute, checkpointing: bool) -> tuple[float, dict]:
    """The loss of a row with all modalities, and all gradients, brought to the CPU."""
    ranks = qwen.Ranks(0, 1, torch.device(device), compute)
    net = qwen.shard(qwen.load(str(folder / "start")), ranks)
    net.checkpointing = net.visual.checkpointing = checkpointing
    encoder, (samples, _) = Encoder(str(folder / "start")), read_samples([folder / "mixed.jsonl"])
    loss = sft.sft_loss(net, qwen.Row.join(*map(encoder.example, samples)))
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in net.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compute, near", [(FLOAT32, (1e-5, 1e-5)), (BFLOAT16, (0.02, 0.1))])
def check_gradients_are_those_of_the_cpu(world, compute, near, checkpointing):
    """Of the CPU in float32; of all parameters the worst, relatively, in the Euclidean norm."""
    loss, gradient = gradients(world, "cpu", FLOAT32, False)
    got_loss, got = gradients(world, "pretend", compute, checkpointing)
    assert abs(got_loss / loss - 1) < near[0]
    for name, right in gradient.items():
        assert (got[name] - right).norm() / right.norm().clamp(min=1e-3) < near[1], name


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def check_sampled_tokens_and_logprobs_are_those_of_the_cpu(world, dtype):
    """Completions of the random model, whose tokens depend on many digits; places free up and are
    filled again, with and without top-p. In bfloat16 some tokens differ by rounding."""
    encoder, drawn = Encoder(str(world / "base")), {device: {} for device in DEVICES}
    samples, _ = read_samples([world / "train.jsonl"])
    prompts = [encoder.prompt(sample) for sample in samples[:4]]
    how = dict(n=3, max_new_tokens=12, seed=1, max_branches=6)
    how |= dict(stop_ids=encoder.stop_ids, banned=encoder.banned_ids)
    for device in DEVICES:
        net = qwen.load(str(world / "base"), device, dtype)
        for top_p in (1.0, 0.9):
            for key, completions in qwen.generate(net, enumerate(prompts), top_p=top_p, **how):
                for branch, completion in enumerate(completions):
                    drawn[device][top_p, key, branch] = completion
    cpu, pretend = drawn["cpu"], drawn["pretend"]
    assert cpu.keys() == pretend.keys() and len(cpu) == 2 * 3 * len(prompts)
    same = [key for key in cpu if cpu[key].ids == pretend[key].ids]
    others, most = (0, 1e-5) if dtype == FLOAT32 else (0.1, 0.05)
    assert len(same) >= (1 - others) * len(cpu)
    for key in same:
        apart = torch.tensor(cpu[key].logprobs) - torch.tensor(pretend[key].logprobs)
        assert apart.abs().max() < most


def check_three_kernel_paths_agree(world):
    assert_three_paths_agree(world / "base", "pretend")


# ------------------------------------------------------------------------------ what things cost


def median_step(net, prompt) -> Counter:
    """What a step of decoding four branches of one prompt costs."""
    tallies = []
    with pretend_gpu.counting() as tally:
        watch = lambda tokens: tallies.append(tally.copy())
        how = dict(n=4, max_new_tokens=8, banned=(1, 2), watch=watch)
        assert len(list(qwen.generate(net, [(0, prompt)], **how))) == 1
    steps = [later - earlier for earlier, later in zip(tallies, tallies[1:])]
    return sorted(steps, key=Counter.total)[len(steps) // 2]


def check_what_a_decode_step_costs(world):
    """Launches in each layer are the slope over two depths; no layer waits."""
    tallies, (samples, _) = [], read_samples([world / "train.jsonl"])
    for depth in (2, 4):
        sizes = SIZES | {"num_hidden_layers": depth}
        path = str(toy.build_checkpoint(world / f"depth-{depth}", **sizes))
        prompt = Encoder(path, str(world / "instruction.txt")).prompt(samples[0])
        tallies.append(median_step(qwen.load(path, "pretend", BFLOAT16), prompt))
    few, many = (pretend_gpu.total(tally, "launches") for tally in tallies)
    waits = [pretend_gpu.total(tally, "waits") for tally in tallies]
    found = ((many - few) / 2, few - (many - few), waits[0])
    print(found, *(tallies[1] - tallies[0]).items(), *tallies[0].items(), sep="\n")
    assert waits[0] == waits[1] and all(cost <= limit for cost, limit in zip(found, DECODING))


def check_what_a_grpo_update_waits_for_does_not_grow_with_completions(world):
    waits, ranks = [], qwen.Ranks(0, 1, torch.device("pretend"), BFLOAT16)
    for group in (3, 6):
        more = GRPO | dict(update_batch=2, group=group, max_new_tokens=8)
        flags = flags_of(grpo.GRPOFlags, world, "pretend", **more)
        net, encoder = sft.load_for_training(flags, ranks)
        optimizer = sft.make_optimizer(net, flags.lr, flags.weight_decay)
        samples, _ = read_samples([world / "mixed.jsonl"])
        policy = qwen.replica(net, BFLOAT16)
        groups = grpo.rollout(policy, encoder, dict(enumerate(samples[:2])), flags, 1)
        some = torch.linspace(-1, 1, group)
        groups = [replace(g, advantages=some) for g in groups]  # so that no group is left out
        with pretend_gpu.counting() as tally:
            grpo.update_policy(net, optimizer, groups, encoder, flags, 0.2, ranks)
        waits.append(pretend_gpu.total(tally, "waits"))
    print(waits, *tally.items(), sep="\n")
    assert waits[0] == waits[1] <= UPDATE_WAITS


if __name__ == "__main__":
    torch.set_num_threads(1)
    pretend_gpu.start()
    options = "-q --tb=short -o python_functions=check_* -p no:cacheprovider -p no:logging"
    pretend_gpu.leave(int(pytest.main([str(HERE), *options.split(), *sys.argv[1:]])))
