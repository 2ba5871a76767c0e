"""Proof that model.py is Qwen2.5-VL: transformers is the reference, on tiny random models in float32.

Covers logits, gradients and greedy continuations; reading and writing checkpoints in every layout in the
wild; packed rows with shared prefixes against a dense mask; chunked log-probabilities against full logits;
sampling against explicit loops and distributions.
Run: python -m pytest tests/test_model.py
"""

import copy
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import reference_varlen  # noqa: F401  (registers the kernel by which the path of CUDA runs on a CPU)
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import model as ours
from data import Row, Segment

VOCAB, TEXT, VISION_START, VISION_END, IMAGE, VIDEO = 300, 280, 288, 289, 290, 291
BANNED = (IMAGE, VIDEO)
MROPE = [2, 3, 3]  # half of the head dimension 16, cut in three
# Image sizes in 14-px patches; a window is 8 patches wide, so most leave ragged windows at the borders.
SMALL, RAGGED, EXACT, WIDE, TALL = (4, 6), (10, 12), (16, 8), (4, 34), (26, 6)


# ---------------------------------------------------------------- the reference


def reference_config(tied=False, **text):
    """A Qwen2_5_VLConfig with every structural feature of the published ones, in miniature. Values differ
    from the defaults (theta, eps, full-attention blocks), so that one that is not read shows."""
    rope = dict(rope_type="default", rope_theta=5e4, mrope_section=MROPE)
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-2,
            bos_token_id=None,
            eos_token_id=None,
            rope_parameters=rope,
        )
        | text,
        vision_config=dict(
            depth=4,
            hidden_size=32,
            num_heads=2,
            intermediate_size=48,
            out_hidden_size=64,
            fullatt_block_indexes=[1, 3],
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
        attn_implementation="eager",
        dtype="float32",
    )


def reference_model(tied=False):
    """The reference with weights large enough that every part of the network moves the logits."""
    hf = Qwen2_5_VLForConditionalGeneration(reference_config(tied)).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            draw = torch.randn(weight.shape, generator=noise)
            if "norm" in name or "ln_q" in name:
                weight.copy_(1 + 0.2 * draw)
            elif weight.ndim == 1 or "embed_tokens" in name or "lm_head" in name:
                weight.copy_(0.3 * draw)
            else:
                weight.copy_(draw / weight[0].numel() ** 0.5)
    hf.generation_config = GenerationConfig()  # a released one carries a repetition penalty
    return hf


def published_names(tensors):
    """Internal names of transformers -> the names in the published files."""
    return {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in tensors.items()
    }


def published_tensors(hf):
    tensors = {name: tensor.detach().clone() for name, tensor in hf.state_dict().items()}
    if hf.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return published_names(tensors)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path_factory):
    """(the reference, ours loaded from the folder that the reference saved)"""
    folder = tmp_path_factory.mktemp("reference")
    hf = reference_model(request.param)
    hf.save_pretrained(folder)
    return hf, ours.load(str(folder))


@pytest.fixture(params=["run by run", "one call"])
def back_end(request, monkeypatch):
    """Both ways to compute attention: scaled_dot_product_attention, and variable-length attention as on CUDA."""
    monkeypatch.setattr(ours, "has_varlen", lambda x: request.param == "one call")


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """Ours alone, untied."""
    folder = tmp_path_factory.mktemp("net")
    reference_model().save_pretrained(folder)
    return ours.load(str(folder))


def make_row(*parts, seed=0):
    """One segment out of text lengths (int) and image sizes (rows, columns of patches). Positions come from
    transformers' own rule; every text token but the first is supervised."""
    draw = torch.Generator().manual_seed(seed)
    ids, grids = [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(TEXT, (part,), generator=draw).tolist()
        else:
            ids += [VISION_START] + [IMAGE] * (part[0] * part[1] // 4) + [VISION_END]
            grids.append((1, *part))
    ids = torch.tensor(ids)
    positions = torch.arange(len(ids)).expand(3, -1).contiguous()
    if grids:
        with torch.device("meta"):
            hf = Qwen2_5_VLForConditionalGeneration(reference_config())
        kinds = (ids == IMAGE)[None].int()
        positions = hf.model.get_rope_index(ids[None], kinds, torch.tensor(grids))[0][:, 0]
    supervised = ids < TEXT
    supervised[0] = False
    patches = sum(rows * columns for _, rows, columns in grids)
    return Row(
        ids=ids,
        positions=positions,
        segments=(Segment(0, len(ids), None),),
        supervised=supervised,
        pixels=torch.randn(patches, 1176, generator=draw),
        grids=tuple(grids),
    )


def reference_logits(hf, row):
    """[T, V] of one sample, transformers working out positions and mask by itself."""
    inputs = dict(input_ids=row.ids[None], mm_token_type_ids=(row.ids == IMAGE)[None].int())
    if row.grids:
        inputs |= dict(pixel_values=row.pixels, image_grid_thw=torch.tensor(row.grids))
    return hf(**inputs).logits[0]


def dense_logits(hf, row):
    """[T, V] of a packed row, through a full T x T mask and plain softmax attention."""
    allowed = torch.zeros(len(row), len(row), dtype=torch.bool)
    for start, length, prefix in row.segments:
        own = slice(start, start + length)
        allowed[own, own] = torch.ones(length, length, dtype=torch.bool).tril()
        if prefix is not None:
            first, size, _ = row.segments[prefix]
            allowed[own, first : first + size] = True
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)[None, None]
    inputs = dict(input_ids=row.ids[None], position_ids=row.positions[:, None], attention_mask=mask)
    return hf(**inputs, pixel_values=row.pixels, image_grid_thw=torch.tensor(row.grids)).logits[0]


def full_scores(logits, row, temperature=1.0, banned=()):
    """(log-probabilities, entropies) [S] of the supervised tokens from full logits [T, V]."""
    before = torch.arange(len(row)) - 1  # the place that predicts each token
    for start, _, prefix in row.segments:
        before[start] = -1 if prefix is None else sum(row.segments[prefix][:2]) - 1
    targets = row.supervised.nonzero()[:, 0]
    assert (before[targets] >= 0).all()
    logits = logits[before[targets]].clone()
    logits[:, list(banned)] = -torch.inf
    logp = torch.log_softmax(logits / temperature, -1)
    entropy = torch.special.entr(logp.exp()).sum(-1)
    return logp.gather(1, row.ids[targets][:, None])[:, 0], entropy


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    return published_names({name: grad.clone() for name, grad in grads.items() if grad is not None})


def assert_same_gradients(got, want, tolerance=1e-4):
    assert got.keys() == want.keys()
    for name, reference in want.items():
        error = (got[name].reshape(reference.shape) - reference).abs().max() / reference.abs().max()
        assert error < tolerance, f"gradient of {name} off by {error:.1e} relative"


def weighting(size, seed=0):
    """A random upstream gradient, so that no token's share can hide behind another's."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- parity with transformers

SAMPLES = {
    "text": make_row(33, seed=1),
    "one image": make_row(5, RAGGED, 9, seed=2),
    "two images": make_row(3, WIDE, 4, TALL, 8, seed=3),
    "whole windows": make_row(1, EXACT, 6, seed=4),
    "image smaller than a window": make_row(2, SMALL, 3, seed=5),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_logits_equal_transformers(pair, name):
    hf, mine = pair
    with torch.no_grad():
        want = reference_logits(hf, SAMPLES[name])
        torch.testing.assert_close(mine.logits(SAMPLES[name]), want, atol=1e-4, rtol=0)


def test_packed_samples_equal_transformers_one_by_one(back_end, pair):
    hf, mine = pair
    first, *others = SAMPLES.values()
    with torch.no_grad():
        alone = torch.cat([reference_logits(hf, row) for row in (first, *others)])
        torch.testing.assert_close(mine.logits(first.join(*others)), alone, atol=1e-4, rtol=0)


def test_every_gradient_equals_transformers(back_end, pair):
    hf, mine = pair
    first, *others = SAMPLES.values()
    logp, _ = mine(first.join(*others))
    weights = weighting(len(logp))
    alone = torch.cat([full_scores(reference_logits(hf, row), row)[0] for row in (first, *others)])
    want = gradients(hf, (alone * weights).sum())
    assert len(want) == len(list(hf.parameters()))
    assert_same_gradients(gradients(mine, (logp * weights).sum()), want)


def test_greedy_continuation_equals_transformers(pair):
    hf, mine = pair
    prompts = [SAMPLES["text"], SAMPLES["one image"], SAMPLES["two images"]]
    greedy = GenerationConfig(max_new_tokens=64, do_sample=False, suppress_tokens=list(BANNED))
    got = collect(mine, prompts, max_new_tokens=64, temperature=0, banned=BANNED)
    for key, row in enumerate(prompts):
        inputs = dict(
            input_ids=row.ids[None],
            mm_token_type_ids=(row.ids == IMAGE)[None].int(),
            attention_mask=torch.ones_like(row.ids)[None],
        )
        if row.grids:
            inputs |= dict(pixel_values=row.pixels, image_grid_thw=torch.tensor(row.grids))
        want = hf.generate(**inputs, generation_config=greedy)[0, len(row) :].tolist()
        assert len(want) == 64 and got[key][0].ids == want


def test_image_tokens_must_match_the_patches(net):
    row = SAMPLES["one image"]
    wrong = Row(
        ids=row.ids,
        positions=row.positions,
        segments=row.segments,
        supervised=row.supervised,
        pixels=row.pixels[:-8],
        grids=((1, RAGGED[0], RAGGED[1] - 2),),
    )
    told = "30 image tokens in the row, but its images give 25 features"
    with pytest.raises(ValueError, match=told), torch.no_grad():
        net.logits(wrong)


# ---------------------------------------------------------------- checkpoints


def flat(config):
    """As published: text fields at top level, theta beside the sections."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    return (
        config
        | text
        | {
            "model_type": "qwen2_5_vl",
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        }
    )


def nested_scaling(config):
    """Some 4.5x releases: text_config holding rope_scaling and the tying."""
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"rope_type": "default", "mrope_section": rope["mrope_section"]},
        "tie_word_embeddings": config.pop("tie_word_embeddings"),
    }
    return config


def nested_parameters(config):
    """As current transformers writes it."""
    return config


def write_checkpoint(folder, hf, layout=nested_parameters, tensors=None, shards=1):
    """A checkpoint folder by hand; `tensors` defaults to the published ones."""
    config = layout(json.loads(hf.config.to_json_string(use_diff=False)))
    (folder / "config.json").write_text(json.dumps(config))
    tensors = published_tensors(hf) if tensors is None else tensors
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def renamed(tensors):
    """Published names -> the names of some 4.5x releases."""
    return {
        name.replace("model.", "model.language_model.").replace("visual.", "model.visual."): tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("naming", [dict, renamed])
@pytest.mark.parametrize("layout", [flat, nested_scaling, nested_parameters])
def test_every_layout_loads(pair, tmp_path, layout, naming, shards):
    hf, mine = pair
    tensors = naming(published_tensors(hf))
    again = ours.load(str(write_checkpoint(tmp_path, hf, layout, tensors, shards)))
    with torch.no_grad():
        assert torch.equal(again.logits(SAMPLES["one image"]), mine.logits(SAMPLES["one image"]))


def test_a_tied_matrix_may_be_stored_twice(tmp_path):
    hf = reference_model(tied=True)
    tensors = published_tensors(hf)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    mine, row = ours.load(str(write_checkpoint(tmp_path, hf, tensors=tensors))), SAMPLES["text"]
    with torch.no_grad():
        torch.testing.assert_close(mine.logits(row), reference_logits(hf, row), atol=1e-4, rtol=0)


def test_published_minimal_vision_config(tmp_path):
    """The 3B names five vision fields; depth, heads, MLP, windows and full-attention blocks are defaults."""
    config = reference_config().to_dict()
    config["vision_config"] = dict(
        model_type="qwen2_5_vl",
        hidden_size=64,
        in_chans=3,
        out_hidden_size=64,
        spatial_patch_size=14,
        tokens_per_second=2,
    )
    config = flat(config)
    with torch.device("meta"):
        parsed = Qwen2_5_VLConfig(
            **json.loads(json.dumps(config))
        )  # a copy: it empties what it gets
        shapes = Qwen2_5_VLForConditionalGeneration(parsed).state_dict()
    assert "model.visual.blocks.31.mlp.up_proj.weight" in shapes
    noise = torch.Generator().manual_seed(1)
    tensors = {
        name: 0.08 * torch.randn(shape.shape, generator=noise)
        for name, shape in published_names(shapes).items()
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    row = SAMPLES["one image"]
    with torch.no_grad():
        got = ours.load(str(tmp_path)).logits(row)
        torch.testing.assert_close(got, reference_logits(hf, row), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", [flat, nested_scaling, nested_parameters])
def test_transformers_loads_what_we_save(pair, tmp_path, layout):
    hf, mine = pair
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write_checkpoint(source, hf, layout)
    extras = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "generation_config.json": "{}",
        "preprocessor_config.json": '{"patch_size": 14}',
        "chat_template.json": '{"a": "x"}',
    }
    for name, text in extras.items():
        (source / name).write_text(text)
    ours.save(ours.load(str(source)), str(target), str(source))
    files = {path.name: path for path in Path(target).iterdir()}
    assert {name: files[name].read_text() for name in extras} == extras
    saved = {}
    for path in Path(target).glob("*.safetensors"):
        saved |= load_file(path)
    published = published_tensors(hf)
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in published.items())
    back, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        target, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        row = SAMPLES["two images"]
        assert torch.equal(reference_logits(back.eval(), row), reference_logits(hf, row))
        assert torch.equal(ours.load(str(target)).logits(row), mine.logits(row))


def test_saving_over_a_sharded_checkpoint_replaces_it(tmp_path):
    folder = str(write_checkpoint(tmp_path, reference_model(), shards=3))
    mine = ours.load(folder)
    with torch.no_grad():
        mine.model.norm.weight.mul_(2)
    ours.save(mine, folder, folder)
    assert torch.equal(ours.load(folder).model.norm.weight, mine.model.norm.weight)


def test_precision_is_kept_or_converted(tmp_path):
    hf = reference_model()
    with torch.no_grad():
        for weight in hf.parameters():
            weight.copy_(weight.bfloat16())  # representable in both
    tensors = {name: tensor.bfloat16() for name, tensor in published_tensors(hf).items()}
    folder = str(write_checkpoint(tmp_path, hf, tensors=tensors))
    assert {p.dtype for p in ours.load(folder).parameters()} == {torch.bfloat16}
    wide = ours.load(folder, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    with torch.no_grad():
        row = SAMPLES["one image"]
        torch.testing.assert_close(wide.logits(row), reference_logits(hf, row), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "fault, name",
    [
        ("missing", "model.layers.1.mlp.up_proj.weight"),
        ("missing", "visual.merger.ln_q.weight"),
        ("missing", "lm_head.weight"),
        ("unexpected", "model.layers.0.self_attn.q_norm.weight"),
        ("unexpected", "model.layers.2.mlp.up_proj.weight"),
        ("shape", "visual.blocks.3.attn.qkv.bias"),
        ("shape", "model.embed_tokens.weight"),
    ],
)
def test_a_faulty_tensor_is_named(tmp_path, fault, name, shards):
    hf = reference_model()
    tensors = published_tensors(hf)
    if fault == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(7) if fault == "unexpected" else tensors[name][1:].clone()
    with pytest.raises(ours.CheckpointError, match=name.replace(".", r"\.")):
        ours.load(str(write_checkpoint(tmp_path, hf, tensors=tensors, shards=shards)))


def test_a_folder_without_a_model_is_one_clear_error(tmp_path):
    with pytest.raises(ours.CheckpointError, match=rf"{tmp_path}/config\.json: missing"):
        ours.load(str(tmp_path))
    with pytest.raises(ours.CheckpointError, match="nowhere: no such checkpoint directory"):
        ours.load(str(tmp_path / "nowhere"))


def test_replica_follows_the_model(tmp_path):
    mine = ours.load(str(write_checkpoint(tmp_path, reference_model())))
    assert ours.replica(mine, torch.float32) is mine
    half = ours.replica(mine, torch.bfloat16)
    with torch.no_grad():
        for weight in mine.parameters():
            weight.add_(1)
    half = ours.replica(mine, torch.bfloat16)
    for mirror, weight in zip(half.parameters(), mine.parameters(), strict=True):
        assert torch.equal(mirror, weight.bfloat16())


LOADING = """# Each rank of torchrun loads a model for training; the first one prints how much memory that took.
import json, re, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import torch
import model

def private() -> int:  # bytes; without the pages of mapped files, which all ranks share
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    global peak
    while True:
        peak = max(peak, private())
        time.sleep(0.001)

torch.distributed.init_process_group("gloo")
ranks = model.Ranks(torch.distributed.get_rank(), 2, torch.device("cpu"))
model.shard(model.load(sys.argv[3]), ranks, torch.float32)  # a small one, so that libraries take what they take
before = peak = private()
threading.Thread(target=watch, daemon=True).start()
net = model.shard(model.load(sys.argv[2]), ranks, torch.float32)
held = sum(p.to_local().nbytes for p in net.parameters())
ranks.barrier()
if ranks.rank == 0:
    print(json.dumps({"peak": peak - before, "kept": private() - before, "held": held}))
torch.distributed.destroy_process_group()
"""


def large_checkpoint(folder):
    """A checkpoint in bfloat16 whose weights are nearly all in 24 like layers; returns its size in bytes."""
    config = reference_config(hidden_size=512, intermediate_size=2048, num_hidden_layers=24)
    config.vision_config.out_hidden_size = 512
    config.text_config.rope_parameters["mrope_section"] = [16, 24, 24]
    with torch.device("meta"):
        hf = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    shapes = published_names(hf.state_dict())
    tensors = {name: torch.zeros(shape.shape, dtype=shape.dtype) for name, shape in shapes.items()}
    write_checkpoint(folder, hf, tensors=tensors)
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_two_ranks_load_without_a_second_copy(tmp_path):
    """Each converts the mapped file block by block into its half of the float32 weights, here as large as the file
    itself, as the device is the host; on a GPU node these live on the cards, and the host keeps nothing."""
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
    size = large_checkpoint(tmp_path / "large")
    hf = reference_model()
    write_checkpoint(tmp_path / "small", hf)
    (tmp_path / "loading.py").write_text(LOADING)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(tmp_path / "loading.py"),
        str(Path(ours.__file__).parent),
        str(tmp_path / "large"),
        str(tmp_path / "small"),
    ]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "MALLOC_MMAP_THRESHOLD_": str(2**17),
    }  # freed memory goes back to the system at once, and is not counted
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert size > 150 * 2**20 and abs(found["held"] / size - 1) < 0.01
    assert found["peak"] < 1.1 * size and found["kept"] < 1.05 * size, (found, size)


# ---------------------------------------------------------------- packed rows


def completions(*lengths):
    """Random completions of the given lengths."""
    draw = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(TEXT, (length,), generator=draw).tolist() for length in lengths]


# Groups over shared prefixes, with and without images, some completions of one length, some of a single
# token; between them plain training samples, two of them of one length.
GROUPS = [
    (SAMPLES["one image"], completions(1, 9, 9, 4)),
    (make_row(17, seed=6), completions(21, 1, 1, 17)),
    (make_row(17, seed=7), completions(17)),
    (SAMPLES["two images"], completions(5, 5)),
]
PLAIN = [SAMPLES["whole windows"], make_row(17, seed=11), make_row(17, seed=12)]
PACKED = (
    GROUPS[0][0]
    .extend(GROUPS[0][1])
    .join(*PLAIN, *(prompt.extend(group) for prompt, group in GROUPS[1:]))
)
ALONE = (
    [GROUPS[0][0].extend([ids]) for ids in GROUPS[0][1]]
    + PLAIN
    + [prompt.extend([ids]) for prompt, group in GROUPS[1:] for ids in group]
)


def test_packed_row_equals_dense_attention(back_end, pair):
    hf, mine = pair
    with torch.no_grad():
        torch.testing.assert_close(mine.logits(PACKED), dense_logits(hf, PACKED), atol=1e-4, rtol=0)
    got = mine(PACKED, 0.7, BANNED)
    want = full_scores(dense_logits(hf, PACKED), PACKED, 0.7, BANNED)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    weights = weighting(len(got[0]))
    assert_same_gradients(
        gradients(mine, (got[0] * weights).sum()), gradients(hf, (want[0] * weights).sum())
    )


def test_packed_row_equals_every_sequence_alone(back_end, net):
    packed = net(PACKED)
    alone = [net(row) for row in ALONE]
    for part in (0, 1):  # log-probabilities, entropies
        together = torch.cat([result[part] for result in alone])
        torch.testing.assert_close(packed[part], together, atol=1e-4, rtol=0)
    weights = weighting(len(packed[0]))
    want = gradients(net, (torch.cat([logp for logp, _ in alone]) * weights).sum())
    assert_same_gradients(gradients(net, (packed[0] * weights).sum()), want)


@pytest.mark.parametrize(
    "temperature, banned", [(1.0, ()), (0.6, BANNED), (1.7, (3, 4, 5, *BANNED))]
)
def test_chunked_scores_equal_full_logits(net, temperature, banned):
    row = make_row(700, RAGGED, 900, seed=8)  # several chunks of the head
    row = Row(
        **vars(row) | {"supervised": row.supervised & ~torch.isin(row.ids, torch.tensor([3, 4, 5]))}
    )
    got = net(row, temperature, banned)
    want = full_scores(net.logits(row), row, temperature, banned)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
    weights = weighting(len(got[0]))
    assert_same_gradients(
        gradients(net, (got[0] * weights).sum()), gradients(net, (want[0] * weights).sum())
    )


def test_the_head_computes_alike_forward_and_backward_under_autocast(net, monkeypatch):
    seen, plain = [], ours.scaled_logits
    monkeypatch.setattr(
        ours, "scaled_logits", lambda h, *rest: seen.append(h.dtype) or plain(h, *rest)
    )
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = net(PACKED)
    gradients(net, logprobs.sum())
    assert len(seen) >= 2 and set(seen) == {torch.bfloat16}


def test_the_heads_gradient_is_added_up_in_float32(net):
    """Over many chunks, also for a head in bfloat16, as under FSDP2: rounded once, not after every chunk."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(4096, 64, generator=draw).bfloat16()
    targets = torch.randint(300, (4096,), generator=draw)
    head = torch.randn(300, 64, generator=draw).bfloat16().requires_grad_()

    def gradient(chunk: int, head: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        logprobs, _ = ours.ChunkedLogprobs.apply(hidden, targets, head, 1.0, (), chunk)
        return torch.autograd.grad(logprobs.sum(), head)[0].float()

    exact = gradient(4096, head.detach().float().requires_grad_(), hidden.float())
    error = [(gradient(chunk, head, hidden) - exact).norm() / exact.norm() for chunk in (4096, 16)]
    assert error[1] < 1.1 * error[0]


def test_the_residual_stream_is_in_the_compute_type(net):
    """Under autocast, that is on one rank, as on several and as in the sampler."""
    seen = []
    layer = net.model.layers[1]
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        net(PACKED)
        net.visual.blocks[1].register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0].dtype)
        )
        net(PACKED)
    hook.remove()
    net.visual.blocks[1]._forward_pre_hooks.clear()
    assert seen == [torch.bfloat16] * 3


def test_recomputing_activations_changes_nothing(back_end, net):
    weights = weighting(int(PACKED.supervised.sum()))
    want = gradients(net, (net(PACKED)[0] * weights).sum())
    net.checkpointing = net.visual.checkpointing = True
    got = gradients(net, (net(PACKED)[0] * weights).sum())
    net.checkpointing = net.visual.checkpointing = False
    assert_same_gradients(got, want, tolerance=1e-5)


def test_a_row_with_nothing_supervised(net):
    row = SAMPLES["text"]
    logp, entropy = net(Row(**vars(row) | {"supervised": torch.zeros(len(row), dtype=torch.bool)}))
    assert logp.shape == entropy.shape == (0,)


ROWS = {  # lengths of segments, their prefixes, causal
    "one sequence": ([13], [None], True),
    "samples": ([5, 1, 9, 9], [None] * 4, True),
    "a prompt and completions": ([7, 3, 3, 1, 4], [None, 0, 0, 0, 0], True),
    "two prompts and a sample": ([4, 2, 2, 6, 5, 5, 1, 5], [None, 0, 0, None, None, 4, 4, 4], True),
    "windows": ([16, 16, 16, 8, 4], [None] * 5, False),
    "images": ([24, 8], [None] * 2, False),
}


def dense_attention(q, k, v, lengths, prefixes, causal):
    """The definition: one mask over the whole row, softmax in float32."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    allowed = torch.zeros(len(q), len(q), dtype=torch.bool)
    for start, length, prefix in zip(starts, lengths, prefixes):
        own = torch.ones(length, length, dtype=torch.bool)
        allowed[start : start + length, start : start + length] = own.tril() if causal else own
        if prefix is not None:
            allowed[start : start + length, starts[prefix] : starts[prefix] + lengths[prefix]] = (
                True
            )
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", ROWS)
def test_attention_and_its_gradients_equal_a_dense_mask(back_end, kind, dtype, tolerance):
    lengths, prefixes, causal = ROWS[kind]
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(sum(lengths), heads, 16, generator=draw).to(dtype) for heads in (4, 2, 2)]
    upstream = torch.randn(sum(lengths), 4, 16, generator=draw)

    def run(attention, *leaves):
        out = attention(*leaves)
        return out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))

    attend = ours.PackedAttention(lengths, prefixes, causal, "cpu")
    got = run(attend, *(x.clone().requires_grad_() for x in inputs))
    want = run(
        lambda q, k, v: dense_attention(q, k, v, lengths, prefixes, causal),
        *(x.float().requires_grad_() for x in inputs),
    )
    for one, other in zip(got, want):
        assert one.dtype == dtype
        assert (one.float() - other).abs().max() < tolerance * other.abs().max()


def test_one_call_of_attention_a_layer(net, monkeypatch):
    """Whatever the segments of a row: one for every layer of the decoder, one for every block of the tower."""
    calls, real = [], ours.varlen_attn
    monkeypatch.setattr(ours, "has_varlen", lambda x: True)
    monkeypatch.setattr(
        ours, "varlen_attn", lambda *args, **options: calls.append(1) or real(*args, **options)
    )
    with torch.no_grad():
        net(PACKED)
    assert len(calls) == net.config.num_hidden_layers + net.config.vision.depth


def test_variable_length_attention_is_for_cuda_in_half_precision(monkeypatch):
    class OnCuda:
        is_cuda = True

        def __init__(self, dtype):
            self.dtype = dtype

    assert ours.has_varlen(OnCuda(torch.bfloat16)) and ours.has_varlen(OnCuda(torch.float16))
    assert not ours.has_varlen(OnCuda(torch.float32)) and not ours.has_varlen(
        torch.zeros(1).bfloat16()
    )


# ---------------------------------------------------------------- sampling

PROMPTS = [
    SAMPLES["text"],
    SAMPLES["one image"],
    make_row(4, seed=9),
    SAMPLES["two images"],
    make_row(50, seed=10),
    SAMPLES["image smaller than a window"],
]


def collect(network, prompts, **options):
    """{key: completions}, keys counting the prompts"""
    return dict(ours.generate(network, enumerate(prompts), **options))


def tokens(results):
    return {key: [completion.ids for completion in group] for key, group in results.items()}


@torch.no_grad()
def greedy_loop(network, prompt, steps, stop=(), banned=BANNED):
    """Argmax over full logits, the whole sequence again for every token."""
    ids = []
    while len(ids) < steps and not (ids and ids[-1] in stop):
        logits = network.logits(prompt.extend([ids]) if ids else prompt)[-1]
        logits[list(banned)] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids


def test_greedy_equals_an_argmax_loop(back_end, net):
    """Two stop ids taken from the free continuations, so that some end early and free their slots."""
    free = [greedy_loop(net, prompt, 20) for prompt in PROMPTS]
    stop = (free[0][6], free[3][0])
    want = [greedy_loop(net, prompt, 20, stop) for prompt in PROMPTS]
    assert len({len(ids) for ids in want}) > 2
    options = dict(temperature=0, stop_ids=stop, banned=BANNED, max_new_tokens=20)
    got = collect(net, PROMPTS, n=2, max_branches=5, **options)
    assert tokens(got) == {key: [ids, ids] for key, ids in enumerate(want)}
    for key, ids in enumerate(want):
        assert all(completion.finished == (ids[-1] in stop) for completion in got[key])


SAMPLING = dict(n=3, max_new_tokens=15, stop_ids=tuple(range(40, 55)), banned=BANNED, seed=5)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.9)])
def test_log_probabilities_equal_the_training_forward(back_end, net, temperature, top_p):
    """Also under truncation: what is returned is the policy that training scores, not the truncated one."""
    got = collect(net, PROMPTS, temperature=temperature, top_p=top_p, max_branches=7, **SAMPLING)
    assert sorted(got) == list(range(len(PROMPTS)))
    lengths = {len(completion.ids) for group in got.values() for completion in group}
    assert len(lengths) > 5, "branches of one batch must be of different ages"
    for key, prompt in enumerate(PROMPTS):
        assert len(got[key]) == 3
        with torch.no_grad():
            want, _ = net(
                prompt.extend([completion.ids for completion in got[key]]), temperature, BANNED
            )
        returned = torch.cat([torch.as_tensor(completion.logprobs) for completion in got[key]])
        torch.testing.assert_close(returned.float().cpu(), want, atol=1e-4, rtol=0)


def test_generating_in_half_precision_without_its_kernels(net):
    """As on a CPU in bfloat16, where attention is the plain formula in float32."""
    half = copy.deepcopy(net).bfloat16()
    options = dict(n=2, max_new_tokens=6, stop_ids=(), max_branches=2)
    got = collect(half, PROMPTS[:2], **SAMPLING | options)
    for key, prompt in enumerate(PROMPTS[:2]):
        with torch.no_grad():
            want, _ = half(prompt.extend([completion.ids for completion in got[key]]), 1.0, BANNED)
        returned = torch.cat([completion.logprobs for completion in got[key]])
        torch.testing.assert_close(returned, want, atol=0.2, rtol=0)


def test_endings(net):
    """A stop token ends a completion and belongs to it; without one, the completion is cut and says so."""
    stop, limit = set(SAMPLING["stop_ids"]), SAMPLING["max_new_tokens"]
    every = [
        completion
        for group in collect(net, PROMPTS, **SAMPLING | {"n": 16}).values()
        for completion in group
    ]
    assert {completion.finished for completion in every} == {True, False}
    for completion in every:
        assert not stop & set(completion.ids[:-1])
        assert completion.finished == (completion.ids[-1] in stop)
        assert completion.finished or len(completion.ids) == limit
        assert 1 <= len(completion.ids) <= limit and len(completion.logprobs) == len(completion.ids)


def test_same_seed_same_tokens_however_batched(back_end, net):
    want = tokens(collect(net, PROMPTS, max_branches=256, **SAMPLING))
    for width in (1, 7, 10):
        assert tokens(collect(net, PROMPTS, max_branches=width, **SAMPLING)) == want
    backwards = list(enumerate(PROMPTS))[::-1]
    assert tokens(dict(ours.generate(net, backwards, max_branches=8, **SAMPLING))) == want
    assert tokens(dict(ours.generate(net, backwards[:1], **SAMPLING))) == {
        5: want[5]
    }  # a shard of the prompts
    flat_want = [tuple(ids) for group in want.values() for ids in group]
    assert len(set(flat_want)) > 0.8 * len(flat_want)  # branches are different draws
    assert tokens(collect(net, PROMPTS, **SAMPLING | {"seed": 6})) != want
    twice = tokens(collect(net, [PROMPTS[2], PROMPTS[2]], **SAMPLING))
    assert twice[0] != twice[1]  # the key, not the text, keys the draws


def filled_cache(network, keys, values, lengths, counts):
    """A cache whose layer 1 holds keys and values [R, t, K, d]."""
    cache = ours.KVCache(network)
    cache.resize(counts, keys.shape[1])
    cache.layers[1].copy_(torch.stack([keys, values]))
    cache.set_lengths(lengths, torch.tensor(lengths))
    return cache


def test_decoding_attention_equals_the_dense_one(back_end, net):
    """Rows of a cache of different lengths, asked by one, two and three branches; normalisers included."""
    draw = torch.Generator().manual_seed(0)
    lengths, row_of = [5, 1, 9], [0, 1, 1, 1, 2, 2]
    q, keys, values = (
        torch.randn(*shape, 16, generator=draw) for shape in ((6, 4), (3, 12, 2), (3, 12, 2))
    )
    out, lse = filled_cache(net, keys, values, lengths, [1, 3, 2]).attend(q, layer=1)
    for i, row in enumerate(row_of):
        k, v = (x[row, : lengths[row]].repeat_interleave(2, dim=1) for x in (keys, values))
        scores = torch.einsum("hd,thd->ht", q[i], k) / 4
        torch.testing.assert_close(lse[i], scores.logsumexp(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            out[i], torch.einsum("ht,thd->hd", scores.softmax(-1), v), atol=1e-5, rtol=0
        )


def test_decoding_in_half_precision_keeps_scores_in_float32(net):
    """Scores near 24 would be an eighth apart in bfloat16: the trainer's kernels do not round them either."""
    draw = torch.Generator().manual_seed(0)
    q = 6 * torch.randn(2 * 3, 4, 16, generator=draw).bfloat16()
    k, v = (torch.randn(2, 40, 2, 16, generator=draw).bfloat16() for _ in range(2))
    half, exact = (
        filled_cache(network, k, v, [40, 40], [3, 3]).attend(q.to(t), layer=1)
        for network, t in ((copy.deepcopy(net).bfloat16(), torch.bfloat16), (net, torch.float32))
    )
    torch.testing.assert_close(half[1], exact[1], atol=1e-5, rtol=0)
    assert torch.equal(half[0], exact[0].bfloat16())


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.resize([1] * 64, 512),
        lambda cache: cache.resize([1] * 32, 256, list(range(0, 64, 2))),
        lambda cache: cache.resize([1] * 80, 256),
    ],
    ids=["grow", "compact", "append"],
)
def test_two_whole_caches_never_exist(change):
    """The peak is at most 1.1 times the larger cache; live storages are counted at every operation."""
    with torch.device("meta"):
        deep = ours.QwenVL(ours.Config.from_json(reference_config(num_hidden_layers=12).to_dict()))
    cache = ours.KVCache(deep)
    cache.layers = [layer.new_zeros(layer.shape, device="cpu") for layer in cache.layers]
    cache.resize([1] * 64, 256)
    before = sum(layer.nbytes for layer in cache.layers)
    with LiveBytes() as live:
        live.watch(*cache.layers)
        change(cache)
    sizes = [before, sum(layer.nbytes for layer in cache.layers)]
    assert live.peak <= 1.1 * max(sizes), (live.peak, sizes)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those watched or made within."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def watch(self, *tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.alive.values()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.watch(
            *(
                x
                for x in (out if isinstance(out, (tuple, list)) else [out])
                if isinstance(x, torch.Tensor)
            )
        )
        return out


def test_the_caches_hold_no_more_than_they_may(net, monkeypatch):
    """Among many short prompts a long one: it does not multiply, and the tokens are the same."""
    prompts = [make_row(4, seed=i) for i in range(12)]
    prompts[5] = make_row(100, seed=99)
    want = tokens(collect(net, prompts, **SAMPLING))
    most, real = [], ours.DecodeBatch.step

    def step(self):
        caches = self.prompt_cache, self.own_cache
        held = [cache.layers[0][0].shape[:2].numel() for cache in caches]
        most.append((sum(held), len(self.prompts)))
        real(self)

    monkeypatch.setattr(ours.DecodeBatch, "step", step)
    assert tokens(collect(net, prompts, cache_tokens=400, **SAMPLING)) == want
    assert max(held for held, _ in most) <= 400 and max(count for _, count in most) >= 4
    most.clear()
    assert (
        tokens(collect(net, prompts, cache_tokens=1, **SAMPLING)) == want
    )  # one at a time, however small
    assert max(count for _, count in most) == 1


def test_logits_that_are_no_numbers_are_told(net):
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ours.CheckpointError, match="prompt 0: after 0 tokens .* no numbers"):
            collect(broken, PROMPTS[:1], max_new_tokens=3, temperature=temperature)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1e-12])
def test_the_nucleus_among_few_tokens_is_the_one_among_all(top_p):
    draw = torch.Generator().manual_seed(3)
    probs = (4 * torch.randn(64, 300, generator=draw)).softmax(-1)
    whole, everywhere = ours.nucleus(probs, top_p, 300)
    part, found = ours.nucleus(probs, top_p, 20)
    assert everywhere.all() and found.any()
    assert torch.equal(part[found], whole[found])
    ranked, ids = probs.sort(-1, descending=True)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
    assert torch.equal(whole, torch.zeros_like(probs).scatter(1, ids, ranked))


def test_a_flat_distribution_is_drawn_from_all_tokens(net, monkeypatch):
    """A nucleus that does not fit into the few most likely tokens is sought again among all."""
    options = dict(temperature=3.0, top_p=0.95, **SAMPLING)
    want = tokens(collect(net, PROMPTS, **options))
    monkeypatch.setattr(ours, "NUCLEUS_TOKENS", 4)
    assert tokens(collect(net, PROMPTS, **options)) == want


def test_prompts_are_consumed_as_slots_free_up(net):
    taken = []

    def prompts():
        for key in range(40):
            taken.append(key)
            yield key, PROMPTS[2]

    results = ours.generate(net, prompts(), n=2, max_new_tokens=3, max_branches=4)
    next(results)
    assert len(taken) < 20
    assert len(list(results)) == 39
    assert list(ours.generate(net, iter([]), n=2)) == []


@torch.no_grad()
def expected_distribution(network, prompt, temperature=1.0, top_p=1.0, banned=()):
    """[V] of the first token: temperature, then the smallest set that reaches p."""
    logits = network.logits(prompt)[-1].clone()
    logits[list(banned)] = -torch.inf
    probabilities, order = torch.softmax(logits / temperature, -1).sort(descending=True)
    probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0
    return torch.zeros(VOCAB).scatter(0, order, probabilities / probabilities.sum())


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=1.0),
        dict(temperature=0.5),
        dict(temperature=2.0),
        dict(top_p=0.6),
        dict(temperature=1.5, top_p=0.8),
        dict(temperature=1.2, top_p=0.05),
        dict(banned=tuple(range(0, 300, 2))),
    ],
    ids=str,
)
def test_first_tokens_follow_the_distribution(net, options):
    draws, prompt = 4000, SAMPLES["one image"]
    want = expected_distribution(net, prompt, **options) * draws
    group = collect(net, [prompt], n=draws, max_new_tokens=1, max_branches=1000, **options)[0]
    seen = torch.bincount(
        torch.tensor([completion.ids[0] for completion in group]), minlength=VOCAB
    ).float()
    assert seen.sum() == draws and not seen[want == 0].any()
    # Chi-square over the tokens expected at least 5 times; the rest, pooled, count if expected as often.
    common = want >= 5
    seen = torch.cat([seen[common], seen[~common].sum()[None]])
    want = torch.cat([want[common], want[~common].sum()[None]])
    seen, want = seen[want >= 5], want[want >= 5]
    chi2, freedom = ((seen - want) ** 2 / want).sum(), len(want) - 1
    assert chi2 <= freedom + 5 * (2 * freedom) ** 0.5, (
        f"chi-square {chi2:.1f}, {freedom} degrees of freedom"
    )
