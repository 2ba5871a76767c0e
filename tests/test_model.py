"""Proof that model.py is Qwen2.5-VL: transformers is the reference, on tiny random models in float32.

Logits, gradients and greedy continuations; reading and writing checkpoints in every layout in the wild;
packed rows with shared prefixes against a dense mask; log-probabilities against full logits; sampling
against explicit loops and distributions.

    python -m pytest tests/test_model.py
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import reference_varlen  # noqa: F401  (registers the kernel by which the path of CUDA runs on a CPU)
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import model as ours
from model import InputError, Row, Segment

ROOT = Path(ours.__file__).parent
VOCAB, TEXT, VISION_START, VISION_END, IMAGE, VIDEO = 300, 280, 288, 289, 290, 291
BANNED = (IMAGE, VIDEO)
# Image sizes in 14-px patches; a window is 8 patches wide, so most leave ragged windows at the borders.
SMALL, RAGGED, EXACT, WIDE, TALL = (4, 6), (10, 12), (16, 8), (4, 34), (26, 6)


# ---- the reference


def reference_config(tied=False):
    """A Qwen2_5_VLConfig with every structural feature of the published ones, in miniature. Values differ
    from the defaults (theta, eps, full-attention blocks), so that one that is not read shows."""
    text = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-2)
    rope = dict(rope_type="default", rope_theta=5e4, mrope_section=[2, 3, 3])
    vision = dict(depth=4, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64)
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO)
    ids |= dict(vision_start_token_id=VISION_START, vision_end_token_id=VISION_END)
    return Qwen2_5_VLConfig(
        text_config=text | dict(rope_parameters=rope, bos_token_id=None, eos_token_id=None),
        vision_config=vision | dict(fullatt_block_indexes=[1, 3]),
        tie_word_embeddings=tied,
        attn_implementation="eager",
        dtype="float32",
        **ids,
    )


def reference_model(tied=False):
    """The reference with weights large enough that every part of the network moves the logits."""
    hf = Qwen2_5_VLForConditionalGeneration(reference_config(tied)).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            draw = torch.randn(weight.shape, generator=noise)
            scale = 0.3 if weight.ndim == 1 else weight[0].numel() ** -0.5
            weight.copy_(draw * scale + ("norm" in name or "ln_q" in name))
    hf.generation_config = GenerationConfig()  # a released one carries a repetition penalty
    return hf


def published_names(tensors):
    """Internal names of transformers -> the names in the published files."""
    pairs = (("model.visual.", "visual."), ("model.language_model.", "model."))
    return {name.replace(*pairs[0]).replace(*pairs[1]): tensor for name, tensor in tensors.items()}


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


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """Ours alone, untied."""
    return ours.load(write_checkpoint(tmp_path_factory.mktemp("net"), reference_model()))


@pytest.fixture(params=["segment by segment", "one call"])
def back_end(request, monkeypatch):
    """Both ways to compute attention; one call for the whole row is that of CUDA."""
    monkeypatch.setattr(ours, "has_varlen", lambda x: request.param == "one call")


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
    pixels = torch.randn(sum(h * w for _, h, w in grids), 1176, generator=draw)
    return Row(ids, positions, (Segment(0, len(ids)),), supervised, pixels, tuple(grids))


def reference_inputs(row):
    """One sequence as transformers takes it, which works out positions and mask by itself."""
    inputs = dict(input_ids=row.ids[None], mm_token_type_ids=(row.ids == IMAGE)[None].int())
    if row.grids:
        inputs |= dict(pixel_values=row.pixels, image_grid_thw=torch.tensor(row.grids))
    return inputs


def reference_logits(hf, row):
    """[T, V]."""
    return hf(**reference_inputs(row)).logits[0]


@torch.no_grad()
def full_logits(net, row):
    """Logits [T, V] of every token of a row, by our model."""
    return F.linear(net.hidden_states(row).float(), net.head.float())


def full_scores(logits, row, temperature=1.0, banned=()):
    """(log-probabilities, entropies) [S] of the supervised tokens from full logits [T, V]."""
    before = torch.arange(len(row)) - 1  # the place that predicts each token
    for start, _, prefix in row.segments:
        before[start] = -1 if prefix is None else sum(row.segments[prefix][:2]) - 1
    targets = row.supervised.nonzero()[:, 0]
    assert (before[targets] >= 0).all()
    logits = logits[before[targets]].index_fill(1, torch.tensor(banned, dtype=int), -torch.inf)
    logp = torch.log_softmax(logits / temperature, -1)
    entropy = torch.special.entr(logp.exp()).sum(-1)
    return logp.gather(1, row.ids[targets][:, None])[:, 0], entropy


def assert_close(got, want, atol=1e-4):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def gradients(network, logprobs):
    """Of every weight, of a loss with random weights, so that no token's share can hide behind another's."""
    network.zero_grad()
    mix = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(0))
    (logprobs * mix).sum().backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    return published_names({name: grad.clone() for name, grad in grads.items() if grad is not None})


def assert_same_scores(network, scores, other, wanted, atol=1e-4):
    """Log-probabilities and entropies, and the gradient of every weight."""
    for one, two in zip(scores, wanted):
        assert_close(one, two, atol)
    got, want = gradients(network, scores[0]), gradients(other, wanted[0])
    assert got.keys() == want.keys() and len(want) == len(list(other.parameters()))
    for name, gradient in want.items():
        error = (got[name].reshape(gradient.shape) - gradient).abs().max() / gradient.abs().max()
        assert error < atol, f"gradient of {name} off by {error:.1e} relative"


# ---- parity with transformers

SAMPLES = {
    "text": make_row(33, seed=1),
    "one image": make_row(5, RAGGED, 9, seed=2),
    "two images": make_row(3, WIDE, 4, TALL, 8, seed=3),
    "whole windows": make_row(1, EXACT, 6, seed=4),
    "image smaller than a window": make_row(2, SMALL, 3, seed=5),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_logits_equal_transformers(back_end, pair, name):
    hf, mine = pair
    assert_close(full_logits(mine, SAMPLES[name]), reference_logits(hf, SAMPLES[name]))


# ---- reading checkpoints


def nested_scaling(config):
    """Some 4.5x releases: text_config holding rope_scaling and the tying."""
    text = config["text_config"]
    text["rope_scaling"] = text.pop("rope_parameters")
    text["rope_theta"] = text["rope_scaling"].pop("rope_theta")
    text["tie_word_embeddings"] = config.pop("tie_word_embeddings")
    return config


def flat(config):
    """As published: text fields at top level, theta beside the sections."""
    text = nested_scaling(config).pop("text_config")
    text["rope_scaling"]["type"] = text["rope_scaling"].pop("rope_type")
    return config | text | {"model_type": "qwen2_5_vl"}


def flat_beside_nulls(config):
    """As some fine-tunes are saved: text_config is there, but says nothing."""
    names = "vocab_size hidden_size num_hidden_layers rms_norm_eps rope_theta rope_scaling".split()
    return flat(config) | {"text_config": dict.fromkeys([*names, "tie_word_embeddings"])}


LAYOUTS = [flat, nested_scaling, dict]  # the last: as current transformers writes it
INDEX, NORM = "model.safetensors.index.json", "model.norm.weight"


def write_json(path, content):
    path.write_text(json.dumps(content))


def write_checkpoint(folder, hf, layout=dict, tensors=None, shards=1):
    """A checkpoint folder by hand; `tensors` defaults to the published ones."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", layout(json.loads(hf.config.to_json_string(use_diff=False))))
    tensors, weight_map = tensors or published_tensors(hf), {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard}-of-{shards}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        write_json(folder / INDEX, {"weight_map": weight_map})
    return str(folder)


def renamed(tensors):
    """Published names -> the names of some 4.5x releases."""
    pairs = (("model.", "model.language_model."), ("visual.", "model.visual."))
    return {name.replace(*pairs[0]).replace(*pairs[1]): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("naming, shards", [(dict, 1), (renamed, 3)])
@pytest.mark.parametrize("layout", [*LAYOUTS, flat_beside_nulls])
def test_every_layout_loads(pair, tmp_path, layout, naming, shards):
    hf, mine = pair
    tensors = naming(published_tensors(hf))
    again = ours.load(write_checkpoint(tmp_path, hf, layout, tensors, shards))
    assert torch.equal(
        full_logits(again, SAMPLES["one image"]), full_logits(mine, SAMPLES["one image"])
    )


@pytest.mark.parametrize("top", [True, False, None])
@pytest.mark.parametrize("nested", [True, False, None])
def test_the_config_is_read_as_transformers_reads_it(top, nested):
    """Whether the head is tied, from either place; the 3B's vision_config names five fields, and leaves depth,
    heads, MLP, windows and full-attention blocks to the defaults."""
    config = reference_config().to_dict()
    for part, tied in ((config, top), (config["text_config"], nested)):
        part.pop("tie_word_embeddings", None)
        part |= {} if tied is None else {"tie_word_embeddings": tied}
    config["vision_config"] = dict(hidden_size=1280, in_chans=3, out_hidden_size=2048)
    config["vision_config"] |= dict(spatial_patch_size=14, tokens_per_second=2)
    got, want = ours.Config.from_json(copy.deepcopy(config)), Qwen2_5_VLConfig(**config)
    assert got.tie_word_embeddings == want.tie_word_embeddings
    for name, value in vars(got.vision).items():
        assert value == getattr(want.vision_config, name)


def test_beside_a_tied_config_the_head_may_only_be_an_equal_copy(tmp_path):
    """One that was trained separately would be lost in silence."""
    hf = reference_model(tied=True)
    tensors, row = published_tensors(hf), SAMPLES["text"]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    mine = ours.load(write_checkpoint(tmp_path, hf, tensors=tensors))
    assert_close(full_logits(mine, row), reference_logits(hf, row))
    tensors["lm_head.weight"][7, 7] += 1e-3
    with pytest.raises(InputError, match="lm_head.weight is not .*tie_word_embeddings"):
        ours.load(write_checkpoint(tmp_path, hf, tensors=tensors))


REFUSED = {  # what is told: a change to the folder, or to its tensors
    "Missing .*lm_head.weight": lambda _, tensors: tensors.pop("lm_head.weight"),
    "Unexpected .*layers.2.x": lambda _, tensors: tensors.update({"layers.2.x": torch.ones(1)}),
    "adapter": lambda folder, _: write_json(folder / "adapter_config.json", {}),
    f"{NORM} is in another file": lambda folder, tensors: save_file(
        {NORM: tensors[NORM]}, folder / "model-00001-of-00002.safetensors"
    ),
    "no weights": lambda folder, _: (folder / "model.safetensors").unlink(),
}


@pytest.mark.parametrize("told", REFUSED)
def test_the_model_that_is_named_is_the_one_that_is_loaded(tmp_path, told):
    hf = reference_model()
    tensors, folder = published_tensors(hf), tmp_path / "model"
    ours.load(write_checkpoint(folder, hf))
    REFUSED[told](folder, tensors)
    if (folder / "model.safetensors").exists():
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=told):
        ours.load(str(folder))


# ---- writing checkpoints


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_loads_what_we_save(pair, tmp_path, layout):
    hf, mine = pair
    source, target = tmp_path / "source", tmp_path / "target"
    write_checkpoint(source, hf, layout, shards=2)
    for name in ("tokenizer.json", "merges.txt", "run.json"):
        (source / name).write_text("old")
    files = {"merges.txt": "new", "note.txt": "new"}
    ours.save(ours.load(str(source)), target, source, files=files)
    assert (target / "tokenizer.json").read_text() == "old"
    assert (target / "merges.txt").read_text() == (target / "note.txt").read_text() == "new"
    assert not (target / "run.json").exists() and not (target / INDEX).exists()
    assert load_file(target / "model.safetensors").keys() == published_tensors(hf).keys()
    load = Qwen2_5_VLForConditionalGeneration.from_pretrained
    back, report = load(target, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    row = SAMPLES["two images"]
    assert torch.equal(reference_logits(back.eval(), row), reference_logits(hf, row))
    assert torch.equal(full_logits(ours.load(str(target)), row), full_logits(mine, row))


def test_weights_come_last_and_whole(net, tmp_path, monkeypatch):
    """Everything else that a model needs is there before them, and all files have the same permissions."""
    target, files = tmp_path / "target", {"instruction.txt": "Judge."}
    source = write_checkpoint(tmp_path / "source", reference_model())

    def fail(tensors, path, **options):
        Path(path).write_bytes(b"half")
        raise ours.SafetensorError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="the disk is full"):
        patch.setattr(ours, "save_file", fail)
        ours.save(net, target, source, files=files)
    assert (target / "instruction.txt").exists() and not (target / "model.safetensors").exists()
    ours.save(net, target, source, files=files)
    modes = {path.name: path.stat().st_mode for path in target.iterdir()}
    assert len(modes) == 3 and len(set(modes.values())) == 1


def test_precision_is_kept_or_converted(net, tmp_path):
    source, half = write_checkpoint(tmp_path / "source", reference_model()), tmp_path / "half"
    ours.save(net, half, source, torch.bfloat16)
    stored = json.loads((half / "config.json").read_text())
    assert stored["dtype"] == stored["text_config"]["dtype"] == "bfloat16"
    narrow, wide = ours.load(str(half)), ours.load(str(half), dtype=torch.float32)
    assert ours.replica(net, torch.float32) is net
    copies = (narrow, wide, ours.replica(net, torch.bfloat16), ours.replica(wide, torch.bfloat16))
    for weight, a, b, c, d in zip(net.parameters(), *(one.parameters() for one in copies)):
        assert torch.equal(a, weight.bfloat16()) and torch.equal(b, a.float())
        assert torch.equal(c, a) and torch.equal(d, a)


def test_importing_starts_no_compiler():
    """torch._dynamo takes more than a second to import, of every --help and every error."""
    code = "import sys, model, evaluate; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- packed rows


def group(prompt, *lengths):
    """A prompt and random completions of the given lengths: as one row, and each as a row of its own."""
    draw = torch.Generator().manual_seed(sum(lengths))
    made = [torch.randint(TEXT, (length,), generator=draw).tolist() for length in lengths]
    return prompt.extend(made), [prompt.extend([ids]) for ids in made]


# Groups over shared prefixes, with and without images, some completions of one length, some of a single
# token; between them plain samples, two of them of one length.
GROUPS = [
    group(SAMPLES["one image"], 1, 9, 9, 4),
    *((row, [row]) for row in (*SAMPLES.values(), make_row(17, seed=11), make_row(17))),
    group(make_row(17, seed=6), 200, 1, 1, 17),  # more tokens than a chunk of the head
    group(SAMPLES["two images"], 5, 5),
]
PACKED = Row.join(*(row for row, _ in GROUPS))
ALONE = [row for _, rows in GROUPS for row in rows]


@pytest.mark.parametrize("temperature, banned, recompute", [(1.0, (), False), (0.7, BANNED, True)])
def test_packed_row_equals_transformers_one_by_one(back_end, pair, temperature, banned, recompute):
    """Every sample by itself, and every completion behind its prompt by itself."""
    hf, mine = pair
    mine.checkpointing = mine.visual.checkpointing = recompute
    alone = [full_scores(reference_logits(hf, row), row, temperature, banned) for row in ALONE]
    want = list(map(torch.cat, zip(*alone)))
    assert_same_scores(mine, mine(PACKED, temperature, banned), hf, want)


def in_half(network):
    """A copy that computes in bfloat16, with logits of some 20 to 60, and a list that collects what its head
    gets: the final hidden states [., D] of every pass."""
    half, seen = copy.deepcopy(network), []
    with torch.no_grad():
        half.head.mul_(12)
    half.compute = torch.bfloat16
    half.model.norm.register_forward_hook(lambda module, inputs, out: seen.append(out.detach()))
    return half, seen


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_logits_and_the_heads_gradient_are_float32(net, weights):
    """Against float64 products of the same bfloat16 numbers, also where float32 weights compute in bfloat16.
    In that, logits are rounded to eighths, and a sum over many chunks of tokens after each of them."""
    (half, seen), row = in_half(net), make_row(3000, seed=13)
    logp, _ = half.to(weights)(row)
    assert seen[0].dtype == torch.bfloat16  # so is the residual stream, as in the sampler
    exact = torch.nn.Linear(64, VOCAB, bias=False, dtype=torch.float64)
    exact.weight.data.copy_(half.head.bfloat16())
    logits = exact(seen[0].double())
    assert logits.abs().max() > 40
    want, _ = full_scores(logits, row)
    assert_close(logp.double(), want)
    got = gradients(half, logp)["lm_head.weight"].double()
    want = gradients(exact, want)["weight"]
    assert (got - want).norm() < 1.1 * (want.bfloat16() - want).norm()  # as rounded once


# ---- sampling

PROMPTS = [make_row(4, seed=9), make_row(50, seed=10)]
PROMPTS += [SAMPLES[name] for name in SAMPLES if name != "whole windows"]
SAMPLING = dict(n=3, max_new_tokens=15, stop_ids=tuple(range(0, 300, 20)), banned=BANNED, seed=5)


def collect(network, prompts, **options):
    """{key: completions}, keys counting the prompts"""
    return dict(ours.generate(network, enumerate(prompts), **options))


def tokens(results):
    return {key: [completion.ids for completion in made] for key, made in results.items()}


def test_greedy_continuations_equal_transformers(back_end, pair):
    """Two stop ids are taken from the free continuations, so that some end early and free their slots. A stop
    token ends a completion and belongs to it; without one, the completion is cut and says so."""
    hf, mine = pair
    greedy = GenerationConfig(max_new_tokens=40, do_sample=False, suppress_tokens=list(BANNED))
    free = []
    for row in PROMPTS:
        inputs = reference_inputs(row) | {"attention_mask": torch.ones_like(row.ids)[None]}
        free.append(hf.generate(**inputs, generation_config=greedy)[0, len(row) :].tolist())
    stop = (free[0][6], free[3][0])
    ends = [min([i + 1 for i, id in enumerate(ids) if id in stop] + [40]) for ids in free]
    assert len(set(ends)) > 2
    options = dict(temperature=0, stop_ids=stop, banned=BANNED, max_new_tokens=40)
    got = collect(mine, PROMPTS, n=2, max_branches=5, **options)
    assert tokens(got) == {key: [ids[:end]] * 2 for key, (ids, end) in enumerate(zip(free, ends))}
    for key, ids in enumerate(free):
        assert all(made.finished == (made.ids[-1] in stop) for made in got[key])


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.9)])
def test_what_is_recorded_equals_a_plain_forward(back_end, pair, temperature, top_p):
    """Also under truncation the log-probabilities are those of all tokens; P(harmful) is the softmax over
    two logits, whatever the temperature, before the token that was drawn."""
    hf, mine = pair
    options = dict(temperature=temperature, top_p=top_p, max_branches=7, label_ids=(7, 8))
    got = collect(mine, PROMPTS, **SAMPLING | options)
    every = [(prompt, made) for key, prompt in enumerate(PROMPTS) for made in got[key]]
    lengths = {len(made.ids) for _, made in every}
    assert len(every) == 18 and len(lengths) > 3, "branches of one batch must differ in age"
    for prompt, made in every:
        row = prompt.extend([made.ids])
        logits = reference_logits(hf, row)
        assert_close(torch.tensor(made.logprobs), full_scores(logits, row, temperature, BANNED)[0])
        before = logits[len(prompt) - 1 : -1, [7, 8]]
        assert_close(torch.tensor(made.p_harmful), before.softmax(-1)[:, 0])


def test_sampling_has_float32_logits(net):
    """Against float64 products of the bfloat16 numbers, as in the forward pass above."""
    half, seen = in_half(net)
    [made] = collect(half.bfloat16(), PROMPTS[:1], max_new_tokens=20)[0]
    hidden = torch.stack([states[-1] for states in seen[:20]]).double()
    exact = (hidden @ half.head.double().T).log_softmax(-1)
    exact = exact.gather(1, torch.tensor(made.ids)[:, None])[:, 0]
    assert_close(torch.tensor(made.logprobs).double(), exact)


def test_same_seed_same_tokens_however_batched(back_end, net):
    want = tokens(collect(net, PROMPTS, max_branches=256, **SAMPLING))
    for width in (1, 7, 10):
        assert tokens(collect(net, PROMPTS, max_branches=width, **SAMPLING)) == want
    backwards = list(enumerate(PROMPTS))[::-1]
    assert tokens(dict(ours.generate(net, backwards, max_branches=8, **SAMPLING))) == want
    assert tokens(dict(ours.generate(net, backwards[:1], **SAMPLING))) == {5: want[5]}  # of a rank
    assert tokens(collect(net, PROMPTS, **SAMPLING | {"seed": 6})) != want
    twice = tokens(collect(net, [PROMPTS[0], PROMPTS[0]], **SAMPLING))
    assert twice[0] != twice[1]  # the key, not the text, keys the draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_attention_equals_the_dense_one(net, dtype):
    """Slots of different lengths. Scores near 24 would be an eighth apart in bfloat16: within the kernel they
    stay float32."""
    draw = torch.Generator().manual_seed(0)
    lengths, normal = [5, 1, 9], lambda *shape: torch.randn(*shape, 16, generator=draw).to(dtype)
    q, k, v, cache = 8 * normal(3, 4), normal(3, 2), normal(3, 2), normal(2, 3, 2, 12)
    batch = ours.DecodeBatch(copy.deepcopy(net).to(dtype), [], 1, 0, 0, 0)
    batch.cache[1], batch.slots = cache.clone(), torch.arange(3)
    seen = torch.arange(12) < torch.tensor(lengths)[:, None]
    mask = torch.zeros(3, 12, dtype=dtype).masked_fill(~seen, -torch.inf)[:, None, None]
    out = batch.attention(torch.tensor(lengths) - 1, mask, q, k, v, layer=1)
    for i, length in enumerate(lengths):
        before = cache[:, i, :, : length - 1].float()
        keys, values = torch.cat([before, torch.stack([k, v])[:, i, :, None].float()], dim=2)
        scores = torch.einsum("hd,htd->ht", q[i].float(), keys.repeat_interleave(2, 0)) / 4
        dense = torch.einsum("ht,htd->hd", scores.softmax(-1), values.repeat_interleave(2, 0))
        assert_close(out[i].float(), dense, atol=1e-5 if dtype == torch.float32 else 8e-3)


def test_the_cache_holds_no_more_than_it_may(net, monkeypatch):
    """Among many short prompts a long one: the tokens are the same, and a cache that had to hold it is small
    again afterwards."""
    prompts = [make_row(100 if i == 5 else 4, seed=i) for i in range(12)]
    want = tokens(collect(net, prompts, **SAMPLING))
    held, real = [], ours.DecodeBatch.step

    def step(self):
        longest = max(prompt.length for prompt, _ in self.branches)
        held.append((len(self.branches), longest, self.capacity))
        real(self)

    monkeypatch.setattr(ours.DecodeBatch, "step", step)
    monkeypatch.setattr(ours, "free_cache_tokens", lambda _: 400)
    assert tokens(collect(net, prompts, **SAMPLING)) == want
    limit, n = SAMPLING["max_new_tokens"], SAMPLING["n"]
    assert all(count * (longest + limit) <= 400 or count <= n for count, longest, _ in held)
    assert max(count for count, *_ in held) >= 4 * n
    assert {capacity for *_, capacity in held} == {64, 128} and held[-1][2] == 64
    held.clear()
    monkeypatch.setattr(ours, "free_cache_tokens", lambda _: 1)
    assert tokens(collect(net, prompts, **SAMPLING)) == want
    assert max(count for count, *_ in held) == n  # one prompt at a time, however small


def test_prompts_are_taken_as_slots_free_up(net):
    taken, steps = [], []
    prompts = ((taken.append(key) or key, PROMPTS[0]) for key in range(40))
    options = dict(n=2, max_new_tokens=3, max_branches=4, watch=steps.append)
    results = ours.generate(net, prompts, **options)
    next(results)
    assert len(taken) < 20 and len(list(results)) == 39
    assert [len(new) for new in steps] == [4] * 60  # a token of every branch
    assert list(ours.generate(net, iter([]), n=2)) == []


def smallest_set(probs, top_p, most=1024):
    """probs [..., V] without the tokens outside the smallest set that reaches top_p, of `most` at most."""
    ranked, ids = probs.sort(-1, descending=True)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
    ranked[..., most:] = 0
    return torch.zeros_like(probs).scatter(-1, ids, ranked)


@pytest.mark.parametrize("top_p", [1e-12, 0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("vocab, spread", [(300, 4.0), (3000, 0.1)])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(vocab, spread, top_p):
    """Of a nearly flat distribution it is the 1,024 likeliest tokens."""
    draw = torch.Generator().manual_seed(3)
    probs = (spread * torch.randn(64, vocab, generator=draw)).softmax(-1)
    assert torch.equal(ours.nucleus(probs, top_p), smallest_set(probs, top_p))


@pytest.mark.parametrize("options", [
    dict(temperature=1.0), dict(temperature=0.5), dict(temperature=2.0), dict(top_p=0.6),
    dict(temperature=1.5, top_p=0.8), dict(banned=tuple(range(0, 300, 2))),
], ids=str)  # fmt: skip
def test_first_tokens_follow_the_distribution(net, options):
    draws, prompt = 4000, SAMPLES["one image"]
    group = collect(net, [prompt], n=draws, max_new_tokens=1, max_branches=1000, **options)[0]
    seen = torch.bincount(torch.tensor([made.ids[0] for made in group]), minlength=VOCAB)
    logits = full_logits(net, prompt)[-1] / options.get("temperature", 1.0)
    logits[list(options.get("banned", []))] = -torch.inf
    want = smallest_set(logits.softmax(-1), options.get("top_p", 1.0))
    want *= draws / want.sum()
    assert seen.sum() == draws and not seen[want == 0].any()
    # Chi-square over the tokens expected at least 5 times; the rest, pooled, count if expected as often.
    common = want >= 5
    seen = torch.cat([seen[common], seen[~common].sum()[None]])
    want = torch.cat([want[common], want[~common].sum()[None]])
    seen, want = seen[want >= 5], want[want >= 5]
    chi2, freedom = ((seen - want) ** 2 / want).sum(), len(want) - 1
    assert chi2 <= freedom + 5 * (2 * freedom) ** 0.5, f"{chi2:.1f} of {freedom} degrees of freedom"
