"""The method over three samples, to be read first: from JSON lines to reward, advantage, loss and a step.

The model is tiny and random, the outputs are written by hand, and every number can be checked by hand.

    python -m pytest tests/test_method.py
"""

import json
import math

import pytest
import torch
import toy
from PIL import Image

import grpo
import model as qwen
import sft
from augment import concatenate, is_right
from data import Encoder, read_samples
from reward import score

ALONE = qwen.Ranks(0, 1, torch.device("cpu"), torch.float32)
ANSWER = "<think>\n{}\n</think>\n\n<result>\nAnswers:\nRequest: {}\nResponse: {}\n</result>"
SAMPLES = [
    # A text exchange: the request asks for something banned, and the response refuses.
    {"id": "a", "source": "toy", "request": "May I bring moss?", "response": "No, leave it.",
     "request_label": "harmful", "response_label": "unharmful", "reasoning": "moss is banned"},
    # An image alone, without a response: there is nothing to judge in what is absent.
    {"id": "b", "source": "toy", "request": "", "image": "red.png", "request_label": "unharmful",
     "reasoning": "red is fine"},
    # Text and image together.
    {"id": "c", "source": "toy", "request": "May I bring this?", "image": "red.png", "response": "Sure, pack it.",
     "request_label": "unharmful", "response_label": "unharmful", "reasoning": "red is fine"},
]  # fmt: skip


def test_the_whole_method(tmp_path):
    # ---- Three JSON lines and a random Qwen2.5-VL in the published layout.
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    lines = "".join(json.dumps(sample) + "\n" for sample in SAMPLES)
    (tmp_path / "train.jsonl").write_text(lines)
    checkpoint = str(toy.build_checkpoint(tmp_path / "base", **toy.TINY))
    samples, _ = read_samples([tmp_path / "train.jsonl"])
    assert [sample.modality for sample in samples] == ["text", "image", "text_image"]
    model, encoder = qwen.load(checkpoint), Encoder(checkpoint)

    # ---- Each becomes a row of tokens; what the loss is taken over is the answer and the stop token.
    rows = [encoder.example(sample) for sample in samples]
    answer = encoder.tokenizer.decode(rows[0].ids[rows[0].supervised])
    assert answer == ANSWER.format("moss is banned", "harmful", "unharmful") + "<|im_end|>"
    assert rows[1].grids == ((1, 4, 4),)  # 56 x 56 pixels are 4 x 4 patches, merged to 2 x 2 tokens
    assert (rows[1].ids == encoder.image_id).sum() == 4

    # ---- R-SFT, Eq. (3). A head of zeros gives every token the same probability: a loss of log V each.
    packed = rows[0].join(*rows[1:])  # side by side in one row: none sees another
    tokens = int(packed.supervised.sum())
    with torch.no_grad():
        model.head.zero_()
        loss = sft.sft_loss(model, packed) / tokens
    assert loss.item() == pytest.approx(math.log(model.config.vocab_size), rel=1e-5)

    # ---- Mining: a row is hard if none of its sampled outputs has both labels right.
    right = ANSWER.format("moss is banned", "harmful", "unharmful")
    half_right = ANSWER.format("moss is fine", "unharmful", "unharmful")
    assert is_right(right, samples[0]) and not is_right(half_right, samples[0])

    # ---- Concatenation, Eq. (4) and (5): harmful if either is.
    joined = concatenate(samples[0], samples[2])
    assert joined.request == "May I bring moss? May I bring this?" and joined.image == "red.png"
    assert (joined.request_label, joined.response_label) == ("harmful", "unharmful")

    # ---- Rollout: G = 4 outputs of the first sample, written by hand. Three reason in 3 words, where at most 6 are allowed.
    outputs = [
        right,
        half_right,
        ANSWER.format("all is fine", "unharmful", "harmful"),  # both labels wrong
        "so it goes",  # no tags: I_format is 0
    ]

    # ---- Reward, Eq. (8) to (10): (-1 + r_safety) / min(l_norm, beta)^2, with l_norm = 3 / 6.
    def words(text: str) -> int:
        return len(text.split())

    rewards = [score(output, "harmful", "unharmful", words, max_new_tokens=6) for output in outputs]
    assert [reward.safety for reward in rewards] == [1, 0.5, 0, 0]
    assert [reward.total for reward in rewards] == [0, -0.5 / 0.25, -1 / 0.25, -1 / 0.25]
    eco = score(outputs[2], "harmful", "unharmful", words, max_new_tokens=6, beta=1 / 6)
    assert eco.total == pytest.approx(-36)  # beyond beta nothing is gained by more words

    # ---- Advantages, Eq. (7): centred on the mean of -2.5, divided by the deviation of sqrt(11 / 3).
    advantages = grpo.compute_advantages([reward.total for reward in rewards])
    expected = torch.tensor([2.5, 0.5, -1.5, -1.5]) / math.sqrt(11 / 3)
    torch.testing.assert_close(advantages, expected)

    # ---- The prompt and its four completions are one row, in which the prompt stands once.
    prompt = encoder.prompt(samples[0])
    stop = encoder.stop_ids[0]  # <|im_end|>: that an output ends is learned like all the rest
    ids = [[*encoder.tokenizer.encode(output), stop] for output in outputs]
    completions = [qwen.Completion(made, [0.0] * len(made)) for made in ids]
    group = grpo.Group(0, samples[0], prompt, completions, outputs, rewards, advantages)
    (batch,) = grpo.pack_groups([group], pack_tokens=4096)
    assert len(batch.row) == len(prompt) + group.tokens

    # ---- Clip range, Eq. (7): 0.2 * 3/4 at the first of four steps, and 0 at the last.
    assert grpo.clip_range(1, 4, 0.2, "product") == pytest.approx(0.15)
    assert grpo.clip_range(4, 4, 0.2, "product") == 0

    # ---- Loss, Eq. (6). Before any update K is 1, so that the loss is - the mean advantage per token.
    model = qwen.load(checkpoint)
    old_logprobs = model(batch.row)[0].detach()
    loss, _ = grpo.policy_loss(model(batch.row)[0], old_logprobs, batch.advantages, clip=0.15)
    lengths = torch.tensor([len(made) for made in ids])
    by_hand = -(lengths * advantages).sum() / lengths.sum()
    assert loss.item() / group.tokens == pytest.approx(by_hand.item(), rel=1e-4)

    # ---- A gradient step: the right output gains on the wrong ones.
    optimizer = sft.make_optimizer(model, lr=1e-3, weight_decay=0.0)
    flags = grpo.GRPOFlags(rollout_batch=1, update_batch=1, temperature=1.0, lr=1e-3)
    clip = grpo.clip_range(1, 4, 0.2, "product")
    grpo.update_policy(model, optimizer, [group], encoder, flags, clip, ALONE)
    change = (model(batch.row)[0] - old_logprobs).detach().split(lengths.tolist())
    assert change[0].mean() > change[2].mean() and change[0].mean() > change[3].mean()
