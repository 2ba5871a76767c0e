"""Every stage, from SFT to a single verdict, on the pretend GPU (pretend_gpu.py): nothing mixes
devices, losses, gradients and tokens are those of the CPU, and launches and waits are counted.

The checks run in a process of their own; the tests assert on what it leaves in a JSON file. Run
by hand, that process prints what it found, with the line of every wait:

    python -m pytest tests/test_pretend_gpu.py
    python tests/test_pretend_gpu.py
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

# What things may cost, as measured. To be lowered when the code gets better.
# One decode step of four branches of one prompt: launches in each layer, and beside the layers.
DECODING = {"float32": (35, 36), "bfloat16": (29, 38)}
DECODING_WAITS = 1
# The forward pass of a row of one prompt and six completions that all differ in length.
FORWARD = {"float32": (37, 42), "bfloat16": (26, 34)}
FORWARD_WAITS = 7
# An update of GRPO in bfloat16: one row with an image, run for the old policy and for the new one.
UPDATE_WAITS = 45

HERE = Path(__file__).resolve()
CHECKS: dict[str, Callable] = {}  # what the process runs, by name


def check(function: Callable) -> Callable:
    CHECKS[function.__name__] = function
    return function


# ------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """What the checks found, by name: {"value"} or {"error"}."""
    folder = tmp_path_factory.mktemp("pretend")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE), str(folder)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    said = f"status {ran.returncode}: {ran.stdout[-2000:]}{ran.stderr[-4000:]}"
    assert ran.returncode == 0 and (folder / "found.json").exists(), said
    return json.loads((folder / "found.json").read_text())


@pytest.fixture
def found(process):
    """found(name): what the check found. If it failed, so does the test, with its traceback."""

    def get(name: str):
        assert "error" not in process[name], process[name]["error"]
        return process[name]["value"]

    return get


def assert_close(first: dict, second: dict) -> None:
    """Equal names, and numbers that are equal to five digits."""
    assert first.keys() == second.keys()
    for name in first:
        assert first[name] == pytest.approx(second[name], rel=1e-5, abs=1e-5), name


def test_the_pretend_gpu_refuses_what_cuda_refuses(found):
    refused = found("refusals")
    allowed = ["a number", "a tensor without dimensions", "a copy there", "a copy back"]
    assert refused.pop("allowed") == allowed
    for what, message in refused.items():
        assert message.startswith("tests/test_pretend_gpu.py:"), f"{what}: {message}"
    assert "a CPU tensor of shape [4]" in refused["addition"]


def test_the_pretend_gpu_counts_launches_and_waits(found):
    results = found("counts").items()
    wrong = {what: counts for what, counts in results if counts["got"] != counts["wanted"]}
    assert not wrong


def test_the_pretend_gpu_names_the_line_and_forgives_on_request(found):
    lines = HERE.read_text().splitlines()
    for what, place in found("places").items():
        file, _, number = place.partition(":")
        assert file == "tests/test_pretend_gpu.py"
        assert f"# here: {what}" in lines[int(number) - 1]


def test_autocast_casts_as_on_cuda(found):
    assert found("autocast") == {
        "a product": "bfloat16",
        "attention": "bfloat16",
        "silu": "bfloat16",
        "a sum": "float32",
        "a sum of columns": "float32",
        "softmax": "float32",
        "cumsum": "float32",
        "exp": "float32",
        "a norm": "float32",
        "addcmul": "float32",
        "outside": "float32",
    }


def test_what_changes_a_tensor_behind_its_back_is_seen(found):
    assert found("conversions") == {
        "to bfloat16": "bfloat16",
        "assigned data": 0.0,
        "copied": True,
        "moved": "pretend:0",
        "still trains": True,
    }


def test_gradients_are_those_of_the_cpu_with_and_without_checkpointing(found):
    for distance in found("gradients").values():
        assert distance["loss"] < 1e-5 and distance["gradient"] < 1e-5


def test_gradients_in_bfloat16_are_near_those_of_float32(found):
    for distance in found("gradients_in_bfloat16").values():
        assert distance["loss"] < 0.02 and distance["gradient"] < 0.1


def test_sft_is_that_of_the_cpu_resumed_and_saved(found):
    stage = found("sft_stage")
    assert len(stage["cpu"]) == 2
    for cpu, pretend in zip(stage["cpu"], stage["pretend"], strict=True):
        assert_close(pretend, cpu)
    assert stage["weights"] < 1e-5 and stage["type"] == "torch.float32"


def test_mining_samples_what_the_cpu_samples(found):
    stage = found("mining_stage")
    assert stage["cpu"] and stage["pretend"] == stage["cpu"]


def test_sampled_tokens_and_logprobs_are_those_of_the_cpu(found):
    distance = found("sampling")
    assert distance["other tokens"] == 0 and distance["logprobs"] < 1e-5


def test_sampled_tokens_in_bfloat16_are_those_of_the_cpu_but_for_rounding(found):
    distance = found("sampling_in_bfloat16")
    assert distance["other tokens"] < 0.1 * distance["completions"] and distance["logprobs"] < 0.05


def test_grpo_is_that_of_the_cpu_resumed_and_saved(found):
    stage = found("grpo_stage")
    assert len(stage["cpu"]) == 3  # before the first step, and two steps
    for cpu, pretend in zip(stage["cpu"], stage["pretend"], strict=True):
        assert_close(pretend, cpu)
    assert stage["same rollouts"]
    assert any(line.get("grad_norm") for line in stage["cpu"])


def test_verdicts_and_their_odds_are_those_of_the_cpu(found):
    stage = found("evaluation_stage")
    assert stage["outputs"]["cpu"] == stage["outputs"]["pretend"]
    assert len(stage["odds"]["cpu"]) > 1
    assert stage["odds"]["pretend"] == pytest.approx(stage["odds"]["cpu"], abs=1e-5)


def test_a_single_verdict_is_that_of_the_cpu(found):
    said = found("single_verdict")
    assert said["pretend"] == said["cpu"] and "P(harmful) 0." in said["cpu"]


def test_every_stage_runs_in_bfloat16(found):
    ran = found("stages_in_bfloat16")
    assert ran["sft"]["loss"] == pytest.approx(ran["sft on the cpu"]["loss"], rel=0.02)
    assert ran["grpo"]["skipped"] == 0 and ran["grpo"]["logprob_diff_max"] < 0.2
    assert ran["verdicts"] > 0 and ran["type"] == "torch.bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_decode_step_costs(found, dtype):
    cost = found("decode_step")[dtype]
    print(dtype, json.dumps(cost, indent=1))
    assert cost["waits per layer"] == 0 and cost["waits beside"] <= DECODING_WAITS
    launches = cost["launches per layer"], cost["launches beside"]
    assert launches[0] <= DECODING[dtype][0] and launches[1] <= DECODING[dtype][1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_forward_pass_costs(found, dtype):
    cost = found("forward_pass")[dtype]
    print(dtype, json.dumps(cost, indent=1))
    assert cost["waits per layer"] == 0 and cost["waits beside"] <= FORWARD_WAITS
    launches = cost["launches per layer"], cost["launches beside"]
    assert launches[0] <= FORWARD[dtype][0] and launches[1] <= FORWARD[dtype][1]


def test_what_a_grpo_update_waits_for_does_not_grow_with_completions(found):
    waits = found("grpo_update")
    print(json.dumps(waits, indent=1))
    assert waits["of 3 completions"] == waits["of 6 completions"] <= UPDATE_WAITS


# ------------------------------------------------------------------------------ the process

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]

    import pretend_gpu
    import reference_varlen  # noqa: F401  (it registers the kernels)
    import torch
    import torch.nn.functional as F
    import toy
    from safetensors.torch import load_file
    from test_sft import metrics
    from torch.nn.attention.varlen import varlen_attn

    import augment
    import evaluate
    import grpo
    import model as qwen
    import sft
    from data import Encoder, read_samples, write_samples

    torch.set_num_threads(1)

DEVICES = ("cpu", "pretend")
SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
    vision_config=dict(
        depth=2, fullatt_block_indexes=[1], hidden_size=16, intermediate_size=24, num_heads=1
    ),
)


def there(*shape: int) -> "torch.Tensor":
    """A tensor on the device."""
    return torch.randn(*shape).to("pretend")


def name_of(dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the pretend GPU itself


@check
def refusals(folder: Path) -> dict:
    """What each operation that CUDA refuses says here; "allowed": neighbours that are not."""
    x, cpu, index = there(3, 4), torch.randn(4), torch.tensor([0, 1])
    index_there, zero_there = index.to("pretend"), torch.tensor([0, 3]).int().to("pretend")
    row, generator = there(3, 2, 8), torch.Generator()
    half = row.bfloat16()
    operations = {
        "addition": lambda: x + cpu,
        "addition, the other way": lambda: cpu + x,
        "a list": lambda: torch.cat([x, cpu[None]]),
        "gather": lambda: x.gather(1, torch.zeros(3, 1, dtype=torch.long)),
        "index_select": lambda: x.index_select(0, index),
        "values to write": lambda: x.index_put_((index_there,), torch.zeros(2, 4)),
        "a CPU tensor by an index from the device": lambda: cpu[index_there],
        "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], ""),
        "a generator of the CPU": lambda: torch.rand(3, generator=generator, device="pretend"),
        "attention in float32": lambda: varlen_attn(row, row, row, zero_there, zero_there, 3, 3),
        "lengths on the CPU": lambda: varlen_attn(half, half, half, index.int(), zero_there, 3, 3),
    }
    said = {}
    for what, operation in operations.items():
        try:
            said[what] = f"nothing: {operation()}"
        except pretend_gpu.Refused as error:
            said[what] = str(error)
    allowed = {
        "a number": lambda: x + 1.0,
        "a tensor without dimensions": lambda: x + torch.tensor(1.0),
        "a copy there": lambda: x.clone().copy_(torch.randn(3, 4)),
        "a copy back": lambda: cpu.copy_(x[0]),
    }
    return {**said, "allowed": [what for what in allowed if allowed[what]() is not None]}


@check
def counts(folder: Path) -> dict:
    """{what: {"wanted", "got"}}, each [launches, waits]."""
    x, mask, q = there(3, 4), (there(3, 4) > 0), there(1, 2, 3, 8)
    index, repeats = torch.tensor([0, 1]), torch.tensor([1, 2]).to("pretend")
    row, sizes = there(3, 2, 8).bfloat16(), torch.tensor([0, 3]).int().to("pretend")
    varlen = (row, row, row, sizes, sizes, 3, 3)
    norm = torch.nn.RMSNorm(4).to("pretend")

    def write(where, value: float) -> None:
        x[where] = value

    def views() -> list:
        one = x.T.unflatten(0, (2, 2)).transpose(0, 1)[..., 1:].unsqueeze(0).expand(3, -1, -1, -1)
        return [one, *x.split(1), *x.unbind(1), x.detach(), x.view(-1), x.contiguous()]

    operations = {
        "an addition": (1, 0, lambda: x + 1),
        "an addition in place": (1, 0, lambda: x.add_(1)),
        "views": (0, 0, views),
        "memory": (0, 0, lambda: torch.empty_like(x)),
        "what is there already": (0, 0, lambda: x.to("pretend", torch.float32)),
        "zeros": (1, 0, lambda: torch.zeros(3, device="pretend")),
        "a product": (1, 0, lambda: F.linear(x, x)),
        "a cast": (1, 0, lambda: x.bfloat16()),
        "a norm": (1, 0, lambda: F.rms_norm(x, (4,))),
        "the module of a norm": (1, 0, lambda: norm(x)),
        "attention": (1, 0, lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)),
        "attention of variable length": (1, 0, lambda: varlen_attn(*varlen)),
        ".item()": (1, 1, lambda: x[0, 0].item()),
        "float()": (1, 1, lambda: float(x[0, 0])),
        "bool()": (1, 1, lambda: bool(x[0, 0])),
        "if any()": (3, 1, lambda: 1 if (x > 0).any() else 0),
        ".tolist()": (1, 1, lambda: x.tolist()),
        ".cpu()": (1, 1, lambda: x.cpu()),
        ".to('cpu', another type)": (1, 1, lambda: x.to("cpu", torch.float64)),
        "copy_ to the host": (1, 1, lambda: torch.zeros(3, 4).copy_(x)),
        "to the device": (1, 1, lambda: index.to("pretend")),
        "to the device, non_blocking": (1, 0, lambda: index.to("pretend", non_blocking=True)),
        "copy_ to the device": (1, 1, lambda: x.copy_(torch.zeros(3, 4))),
        "copy_, non_blocking": (1, 0, lambda: x.copy_(torch.zeros(3, 4), non_blocking=True)),
        "torch.tensor": (1, 1, lambda: torch.tensor([1, 2], device="pretend")),
        "nonzero": (1, 1, lambda: mask.nonzero()),
        "unique": (1, 1, lambda: x.unique()),
        "a boolean index": (1, 1, lambda: x[mask]),
        "an index on the device": (1, 0, lambda: x[repeats]),
        "an index on the CPU": (2, 1, lambda: x[index]),
        "a list as index": (2, 1, lambda: x[[0, 1]]),
        "repeat_interleave": (2, 1, lambda: x[:2].repeat_interleave(repeats, 0)),
        "a number under a mask": (1, 0, lambda: write(mask, 1.0)),
        "a number in a row": (1, 0, lambda: write(0, 1.0)),
        "a number in one place": (1, 1, lambda: write((0, 1), 1.0)),
        "a number in a list of places": (3, 2, lambda: write([0, 1], 1.0)),
    }
    found = {}
    for what, (launches, waits, operation) in operations.items():
        with pretend_gpu.counting() as tally:
            operation()
        got = [sum(tally.launches.values()), sum(tally.waits.values())]
        found[what] = {"wanted": [launches, waits], "got": got}
    return found


@check
def places(folder: Path) -> dict:
    """Where a launch, a wait in a backward pass, and a forgiven mix are said to be."""
    x, leaf, found = there(3, 4), there(3).requires_grad_(), {}

    class Read(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad.sum().item()  # here: a wait
            return grad

    with pretend_gpu.counting() as tally:
        x + 1  # here: a launch
    [(found["a launch"], _)] = tally.launches
    with pretend_gpu.counting() as tally:
        Read.apply(leaf).sum().backward()
    [(found["a wait"], _)] = tally.waits
    with pretend_gpu.counting(forgiving=True) as tally:
        x + torch.ones(4)  # here: a mix
    [(found["a mix"], _)] = tally.mixes
    return found


@check
def autocast(folder: Path) -> dict:
    """The types of results under autocast."""
    x, weight, q = there(3, 4), there(4, 4), there(1, 2, 3, 8)
    with torch.autocast("pretend", torch.bfloat16):
        product = F.linear(x, weight)
        made = {
            "a product": product,
            "attention": F.scaled_dot_product_attention(q, q, q),
            "silu": F.silu(product),
            "a sum": product.sum(),
            "a sum of columns": product.sum(-1),
            "softmax": product.softmax(-1),
            "cumsum": product.cumsum(-1),
            "exp": product.exp(),
            "a norm": F.rms_norm(product, (4,)),
            "addcmul": torch.addcmul(x, product, product),
        }
    made["outside"] = F.linear(x, weight)
    return {what: name_of(tensor.dtype) for what, tensor in made.items()}


@check
def conversions(folder: Path) -> dict:
    """Modules that change their type, parameters that get other data, copies."""
    layer = torch.nn.Linear(4, 4).to("pretend").to(torch.bfloat16)
    twin = torch.load(io.BytesIO(saved(layer.weight)), weights_only=True)
    same = torch.equal(twin, layer.weight.cpu())
    dtype = name_of(layer(there(2, 4).bfloat16()).dtype)
    layer.weight.data = torch.zeros(4, 4, device="pretend", dtype=torch.bfloat16)
    moved = torch.nn.Linear(4, 4)
    moved.weight.data = moved.weight.data.to("pretend")
    return {
        "to bfloat16": dtype,
        "assigned data": layer.weight.sum().item(),
        "copied": same,
        "moved": str(moved.weight.device),
        "still trains": moved.weight.requires_grad,
    }


def saved(tensor) -> bytes:
    file = io.BytesIO()
    torch.save(tensor.detach(), file)
    return file.getvalue()


# ---- the stages


def make_world(folder: Path) -> None:
    """12 exchanges with a word of reasoning in train.jsonl; three of them, one of each modality,
    in mixed.jsonl; a random model in base/, and in start/ one that has learnt the format."""
    toy.make_world(folder, sizes={"train": 4, "val": 1, "test": 1})
    toy.build_checkpoint(folder / "base", **SIZES)
    short = [replace(s, reasoning="fine") for s in read_samples([str(folder / "train.jsonl")])]
    write_samples(folder / "train.jsonl", short)
    write_samples(folder / "mixed.jsonl", {s.modality: s for s in short}.values())
    sft.main(
        config(
            sft,
            folder,
            "start",
            "cpu",
            model="base",
            data="train",
            batch_size=6,
            epochs=100,
            steps=25,
        )
    )


def config(stage, folder: Path, name: str, device: str, model="start", data="mixed", **fields):
    """The configuration of a small run of a stage on the device, in folder/name."""
    usual = dict(
        model=str(folder / model),
        data=[str(folder / f"{data}.jsonl")],
        out=str(folder / name),
        instruction=str(folder / "instruction.txt"),
        device=device,
    )
    if stage in (sft, grpo):
        usual |= {"lr": 1e-3, "freeze": []}
    return stage.Config(**usual | fields)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def fused_attention():
    """Within, half precision goes through variable-length attention everywhere, as on CUDA."""
    before = getattr(qwen, "has_varlen", None)
    if before is not None:
        qwen.has_varlen = lambda x: x.dtype in pretend_gpu.HALF
    try:
        yield
    finally:
        if before is not None:
            qwen.has_varlen = before


def gradients_of(folder: Path, device: str, compute, checkpointing=False) -> tuple[float, dict]:
    """The loss of a row with all modalities, and all gradients, brought to the CPU."""
    net = qwen.load(str(folder / "start"), device, torch.float32)
    net.checkpointing = net.visual.checkpointing = checkpointing
    encoder = Encoder(str(folder / "start"))
    samples = read_samples([str(folder / "mixed.jsonl")])
    first, *others = [encoder.example(sample) for sample in samples]
    loss = sft.sft_loss(net, first.join(*others), compute)
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in net.named_parameters()}


def distance_of_gradients(folder: Path, compute) -> dict:
    """How far loss and gradients on the device are from those of the CPU in float32, relatively;
    of the gradients that of the worst parameter, in the Euclidean norm."""
    loss, gradient = gradients_of(folder, "cpu", torch.float32)
    found = {}
    for checkpointing in (False, True):
        got_loss, got = gradients_of(folder, "pretend", compute, checkpointing)
        worst = 0.0
        for name, right in gradient.items():
            far = (got[name] - right).norm() / right.norm().clamp(min=1e-3)
            worst = max(worst, float(far))
        found[f"checkpointing {checkpointing}"] = {
            "loss": abs(got_loss / loss - 1),
            "gradient": worst,
        }
    return found


@check
def gradients(folder: Path) -> dict:
    return distance_of_gradients(folder, torch.float32)


@check
def gradients_in_bfloat16(folder: Path) -> dict:
    with fused_attention():
        return distance_of_gradients(folder, torch.bfloat16)


@check
def sft_stage(folder: Path) -> dict:
    """metrics.jsonl by device, how far nearly all the weights left are from each other, and their
    type. (Adam gives noise a full step: a few weights whose gradient is zero may differ.)"""
    found, weights = {}, []
    for device in DEVICES:
        for steps in (1, 2):  # the second run goes on from the checkpoint of the first
            sft.main(
                config(
                    sft,
                    folder,
                    f"sft-{device}",
                    device,
                    batch_size=3,
                    epochs=4,
                    steps=steps,
                    validation=[str(folder / "mixed.jsonl")],
                )
            )
        found[device] = metrics(folder / f"sft-{device}")
        weights.append(load_file(folder / f"sft-{device}" / "model.safetensors"))
    cpu, pretend = weights
    apart = torch.cat([(cpu[name] - pretend[name]).abs().flatten() for name in cpu])
    types = {str(tensor.dtype) for tensor in pretend.values()}
    return {**found, "weights": float(apart.quantile(0.999)), "type": ", ".join(types)}


@check
def mining_stage(folder: Path) -> dict:
    found = {}
    for device in DEVICES:
        augment.main(
            config(
                augment,
                folder,
                f"rl-{device}.jsonl",
                device,
                samples=2,
                max_new_tokens=24,
                max_correct=2,
            )
        )
        records = lines(folder / f"rl-{device}.jsonl.parts" / "predictions.jsonl")
        found[device] = {record["id"]: record["outputs"] for record in records}
    return found


def completions_of(folder: Path, dtype) -> dict:
    """Completions of the random model, whose tokens depend on many digits; places free up and are
    filled again, with and without top-p. How many completions differ between the devices, and how
    far apart the log-probabilities of the others are."""
    encoder, drawn = Encoder(str(folder / "base")), {}
    samples = read_samples([str(folder / "train.jsonl")])[:4]
    prompts = [encoder.prompt(sample) for sample in samples]
    for device in DEVICES:
        net, drawn[device] = qwen.load(str(folder / "base"), device, dtype), {}
        for top_p in (1.0, 0.9):
            for key, completions in qwen.generate(
                net, enumerate(prompts), n=3, max_new_tokens=12, top_p=top_p, seed=1,
                stop_ids=tuple(encoder.stop_ids), banned=encoder.banned_ids, max_branches=6,
            ):  # fmt: skip
                for branch, completion in enumerate(completions):
                    drawn[device][top_p, key, branch] = completion
    cpu, pretend = drawn["cpu"], drawn["pretend"]
    assert cpu.keys() == pretend.keys() and len(cpu) == 2 * 3 * len(prompts)
    same = [key for key in cpu if cpu[key].ids == pretend[key].ids]
    far = [float((cpu[key].logprobs - pretend[key].logprobs).abs().max()) for key in same]
    return {"completions": len(cpu), "other tokens": len(cpu) - len(same), "logprobs": max(far)}


@check
def sampling(folder: Path) -> dict:
    return completions_of(folder, torch.float32)


@check
def sampling_in_bfloat16(folder: Path) -> dict:
    with fused_attention():
        return completions_of(folder, torch.bfloat16)


@check
def grpo_stage(folder: Path) -> dict:
    found, drawn = {}, {}
    for device in DEVICES:
        out = folder / f"grpo-{device}"
        for steps in (1, 2):
            grpo.main(
                config(
                    grpo,
                    folder,
                    out.name,
                    device,
                    data="train",
                    rollout_batch=2,
                    update_batch=1,
                    group=3,
                    max_new_tokens=24,
                    floor=0.1,
                    steps=steps,
                    eval_every=2,
                    validation=[str(folder / "mixed.jsonl")],
                )
            )
        found[device] = metrics(out)
        groups = lines(out / "rollouts.jsonl")
        drawn[device] = [[one["output"] for one in group["outputs"]] for group in groups]
    return {**found, "same rollouts": drawn["cpu"] == drawn["pretend"]}


def predictions(folder: Path, device: str, dtype=None) -> list[dict]:
    """Greedy predictions for all samples, with P(harmful)."""
    net, encoder = qwen.load(str(folder / "start"), device, dtype), Encoder(str(folder / "start"))
    samples = read_samples([str(folder / "train.jsonl")])
    sampling = {"max_new_tokens": 24, "temperature": 0.0}
    made = dict(evaluate.predict(net, encoder, samples, range(len(samples)), **sampling))
    return [made[i] for i in range(len(samples))]


@check
def evaluation_stage(folder: Path) -> dict:
    outputs, odds = {}, {}
    for device in DEVICES:
        made = predictions(folder, device)
        both = [p for one in made for p in (one["request_p"], one["response_p"])]
        outputs[device] = [one["output"] for one in made]
        odds[device] = [p for p in both if p is not None]
    return {"outputs": outputs, "odds": odds}


@check
def single_verdict(folder: Path) -> dict:
    """What is printed about one exchange, odds to four digits."""
    said = {}
    for device in DEVICES:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            evaluate.main(
                config(
                    evaluate,
                    folder,
                    "unused",
                    device,
                    max_new_tokens=24,
                    request="What may I bring?",
                )
            )
        said[device] = out.getvalue()
    return said


@check
def stages_in_bfloat16(folder: Path) -> dict:
    """What the stages report in bfloat16."""
    small = dict(dtype="bfloat16", epochs=4, steps=1)
    with fused_attention():
        for device in DEVICES:
            sft.main(config(sft, folder, f"sft-half-{device}", device, batch_size=3, **small))
        grpo.main(
            config(
                grpo,
                folder,
                "grpo-half",
                "pretend",
                rollout_batch=2,
                update_batch=2,
                group=3,
                max_new_tokens=24,
                floor=0.1,
                **small,
            )
        )
        made = predictions(folder, "pretend", torch.bfloat16)
    kept = load_file(folder / "sft-half-pretend" / "model.safetensors")
    return {
        "sft on the cpu": lines(folder / "sft-half-cpu" / "metrics.jsonl")[0],
        "sft": lines(folder / "sft-half-pretend" / "metrics.jsonl")[0],
        "grpo": lines(folder / "grpo-half" / "metrics.jsonl")[0],
        "verdicts": sum(one["format_ok"] for one in made),
        "type": ", ".join({str(tensor.dtype) for tensor in kept.values()}),
    }


# ---- what things cost


def by_line(counter: Counter) -> dict[str, int]:
    return {f"{place} {operator}": count for (place, operator), count in counter.items()}


def cost_of(measure: Callable, folder: Path) -> dict:
    """By type: launches and waits in each layer, as the slope over two depths, and beside the
    layers; the operators of a layer; the lines of all waits. measure(net, prompt) -> Tally."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        tallies = []
        for depth in (2, 4):
            path = folder / f"depth-{depth}"
            toy.build_checkpoint(path, **SIZES | {"num_hidden_layers": depth})
            net = qwen.load(str(path), "pretend", dtype)
            encoder = Encoder(str(path), str(folder / "instruction.txt"))
            sample = read_samples([str(folder / "train.jsonl")])[0]
            with fused_attention():
                tallies.append(measure(net, encoder.prompt(sample)))
        few, many = tallies
        cost, in_layer = {}, Counter()
        for kind in ("launches", "waits"):
            low, high = (sum(getattr(tally, kind).values()) for tally in tallies)
            cost[f"{kind} per layer"] = (high - low) / 2
            cost[f"{kind} beside"] = low - (high - low)
        for (_, operator), count in (many.launches - few.launches).items():
            in_layer[operator] += count / 2
        cost["in a layer"] = dict(in_layer.most_common())
        cost["waits"] = by_line(few.waits)
        found[name_of(dtype)] = cost
    return found


@check
def decode_step(folder: Path) -> dict:
    """The median decode step of four branches of one prompt."""

    def measure(net, prompt) -> "pretend_gpu.Tally":
        tallies = []
        with pretend_gpu.counting() as tally:
            for _ in qwen.generate(
                net,
                [(0, prompt)],
                n=4,
                max_new_tokens=8,
                banned=(1, 2),
                watch=lambda tokens: tallies.append(tally.copy()),
            ):
                pass
        steps = [later - earlier for earlier, later in zip(tallies, tallies[1:])]
        return sorted(steps, key=lambda step: sum(step.launches.values()))[len(steps) // 2]

    return cost_of(measure, folder)


@check
def forward_pass(folder: Path) -> dict:
    """The forward pass of a row of one prompt and six completions that all differ in length."""

    def measure(net, prompt) -> "pretend_gpu.Tally":
        row = prompt.extend([list(range(5, 7 + i)) for i in range(6)])
        with pretend_gpu.counting() as tally, torch.no_grad():
            sft.sft_loss(
                net, row, torch.float32
            )  # that is, in the type of the weights: no autocast
        return tally

    return cost_of(measure, folder)


@check
def grpo_update(folder: Path) -> dict:
    """Waits of an update on two prompts in one packed row: in all, and by line."""
    found = {}
    for group in (3, 6):
        cfg = config(
            grpo,
            folder,
            "unused",
            "pretend",
            rollout_batch=2,
            update_batch=2,
            group=group,
            max_new_tokens=8,
            floor=0.1,
            dtype="bfloat16",
        )
        ranks = qwen.Ranks(0, 1, torch.device("pretend"))
        net, encoder, compute = sft.load_for_training(cfg, ranks)
        optimizer = sft.make_optimizer(net, cfg.lr, cfg.weight_decay)
        samples = read_samples([str(folder / "mixed.jsonl")])[:2]
        with fused_attention():
            policy = qwen.replica(net, compute)
            groups = grpo.rollout(policy, encoder, dict(enumerate(samples)), cfg, 1)
            some = torch.linspace(-1, 1, group)
            groups = [replace(g, advantages=some) for g in groups]  # so that no group is left out
            with pretend_gpu.counting() as tally:
                grpo.update_policy(net, optimizer, groups, encoder, cfg, 0.2, compute, ranks)
        found[f"of {group} completions"] = sum(tally.waits.values())
    return {**found, "waits": by_line(tally.waits)}


# ---- all of it


def run_checks(folder: Path) -> tuple[dict, "pretend_gpu.Tally"]:
    """What every check found, and what all of them together counted."""
    found = {}
    with pretend_gpu.counting() as tally:
        for name, function in CHECKS.items():
            began = time.process_time()
            try:
                found[name] = {"value": function(folder)}
            except Exception:  # whatever it is, it is this check's result, and the others still run
                found[name] = {"error": traceback.format_exc()}
            found[name]["seconds"] = time.process_time() - began
    return found, tally


def report(found: dict, tally: "pretend_gpu.Tally") -> None:
    for name, result in found.items():
        print(f"\n{name}, {result['seconds']:.1f} s of the processor")
        print(result.get("error") or json.dumps(result["value"], indent=1)[:3000])
    for kind in ("waits", "mixes"):
        print(f"\n{kind} in all of the above:")
        for (place, operator), count in sorted(getattr(tally, kind).items()):
            if not place.startswith("tests/"):
                print(f"{count:6} {place} {operator}")


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as work:
        make_world(Path(work))
        pretend_gpu.start()
        found, tally = run_checks(Path(work))
    if arguments:
        Path(arguments[0], "found.json").write_text(json.dumps(found))
    else:
        report(found, tally)


if __name__ == "__main__":
    main(sys.argv[1:])
    pretend_gpu.leave()
