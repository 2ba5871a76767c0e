"""Read an output of the guard and turn it into one number (Eq. 8 to 10).

In: the text of a completion, the true labels, a function that measures length. Out: a Verdict (what
the output says) and a Reward (its value). Malformed output is an outcome, never an exception.
Mining, RL and evaluation all read outputs with `parse`; the reward also requires the format.

The released code only logs the format. Its reward reads the first result block; its mining and
evaluation read the first label anywhere in the output. Here:
- r_safety is 0 unless the format is right; labels are read from the last complete result block;
- length is the length of the reasoning (in tokens, in training), scaled to [0, 1]. A floor keeps an
  empty output from dividing by zero, and a very short wrong one from swamping its group;
- a task without a true label is not scored, and the other task then carries the whole weight.

    python reward.py        # print the rewards of wrong outputs of several lengths
"""

import re
import string
from collections.abc import Callable
from dataclasses import dataclass, field

HARMFUL, UNHARMFUL = "harmful", "unharmful"
MEANINGS = dict.fromkeys(("harmful", "unsafe", "1"), HARMFUL)
MEANINGS |= dict.fromkeys(("unharmful", "safe", "harmless", "none", "0"), UNHARMFUL)
TAGS = ("<think>", "</think>", "<result>", "</result>")
FLOOR = 0.02  # smallest l_norm: 61 of 3072 tokens; the paper's reasoning takes about 200


@dataclass(frozen=True)
class Reward:
    """One reward and its parts. A task that is not scored has None in `request` or `response`."""

    total: float  # r of Eq. (10)
    format: float  # I_format of Eq. (9), 1 or 0
    request: float | None  # 1 if the request label is right, else 0
    response: float | None  # 1 if the response label is right, else 0
    safety: float  # r_safety of Eq. (8), in [0, 1]
    length: float  # l_norm of Eq. (10) after the floor, before beta


def score(
    output: str,
    request_label: str | None,
    response_label: str | None,
    count: Callable[[str], int],
    max_new_tokens: int = 3072,
    beta: float = 1.0,
    floor: float = FLOOR,
) -> Reward:
    """The length-aware safety reward: r = (-1 + r_safety) / min(l_norm, beta)^2, Eq. (8) to (10).

    r <= 0. A right answer gets 0 at any length. A wrong answer loses less the longer it reasons, up
    to l_norm = beta (1, Eco 1/6). A task whose label is None is not scored; ValueError if both are.
    count: measures a text in tokens (the encoder's `count`) or in characters (`len`, as released).
    floor: the smallest l_norm; |r| is at most 1 / floor^2. A floor above the usual l_norm switches
    Eq. (10) off: choose it anew with max_new_tokens (toy: 0.08 * 128 = 10 tokens, of about 48).
    """
    truths = (request_label, response_label)
    if set(truths) - {HARMFUL, UNHARMFUL, None} or truths == (None, None):
        raise ValueError(f"cannot score against the labels {truths}: want harmful or unharmful")
    verdict = parse(output)

    # Eq. (8): the share of true labels that the output names; 0 if the format is wrong, Eq. (9).
    request = None if request_label is None else float(verdict.request == request_label)
    response = None if response_label is None else float(verdict.response == response_label)
    scored = [right for right in (request, response) if right is not None]
    safety = verdict.format_ok * sum(scored) / len(scored)

    # Eq. (10): l_norm measures the reasoning, or the whole output if no think block is complete.
    text = output if verdict.reasoning is None else verdict.reasoning
    text = " ".join(text.split())  # else line feeds would be the cheapest way to be long
    length = max(min(count(text) / max_new_tokens, 1.0), floor)
    total = (-1.0 + safety) / min(length, beta) ** 2
    return Reward(total, float(verdict.format_ok), request, response, safety, length)


@dataclass(frozen=True)
class Verdict:
    """What an output says."""

    reasoning: str | None  # between the think tags, stripped; "" if without a letter or digit
    request: str | None  # "harmful", "unharmful", or None where no label can be read
    response: str | None
    format_ok: bool  # I_format of Eq. (9)
    # For (request, response), None where no label can be read. words: the bare word, such as "none"
    # where the label is "unharmful". label_offsets: the index in the output just after its colon.
    words: tuple[str | None, ...] = field(default=(None, None), compare=False)
    label_offsets: tuple[int | None, ...] = field(default=(None, None), compare=False)


def bare(text: str | int) -> str:
    """A label in lower case, without surrounding space, markdown stars, quotes and full stops."""
    return str(text).strip(" \t\r\n*_`'\".").lower()


def label(text: str | int | None) -> str | None:
    """A label as a model writes it -> "harmful", "unharmful", or None if it is neither. The word
    "None" counts as unharmful: an absent request or response does no harm."""
    return None if text is None else MEANINGS.get(bare(text))


def parse(output: str) -> Verdict:
    """Read the reasoning, and the last complete result block after the last </think>.
    A label must stand on a line of its own (`Request: harmful`), in upper or lower case. If the
    block names a field twice, on any lines, its label is unreadable even if both labels agree: a
    guard that hedges has not answered.

    The format is right when the output is one think block with a letter or digit, then one result
    block with both labels. Nothing else may appear but a header line in the result block and ASCII
    white space: reasoning outside its tags would escape the length that Eq. (10) measures. An
    output that is cut off after its result block can still have the right format.
    """
    # 1. The reasoning ends at the last </think>. An output cut off while thinking has no answer: a
    # result block that the reasoning quotes is not an answer.
    before, closing, answer = output.rpartition("</think>")
    if "<think>" in output and not closing:
        answer = ""
    reasoning = None
    if "<think>" in before:
        reasoning = before.partition("<think>")[2].strip()
        if not any(character.isalnum() for character in reasoning):
            reasoning = ""

    # 2. The last complete result block, and the labels in it.
    block, block_start = "", 0
    # Within a block there is no other <result>.
    blocks = list(re.finditer(r"<result>((?:(?!<result>).)*?)</result>", answer, re.DOTALL))
    if blocks:
        block = blocks[-1][1]
        block_start = len(output) - len(answer) + blocks[-1].start(1)
    read = [_read_label(name, block, block_start) for name in ("request", "response")]
    words, offsets = zip(*read)

    # 3. The format: both blocks once, in order, with nothing around them or beside the labels.
    layout = r"\s*<think>.*</think>\s*<result>.*</result>\s*"
    lines = [line for line in block.split("\n") if line.strip(string.whitespace)]
    if lines and lines[0].strip(string.whitespace + "*#>:-").lower() in ("answer", "answers"):
        del lines[0]  # the header
    format_ok = (
        bool(reasoning)
        and None not in words
        and len(lines) == 2
        and all(output.count(tag) == 1 for tag in TAGS)
        and re.fullmatch(layout, output, re.DOTALL | re.ASCII) is not None
    )
    return Verdict(reasoning, *map(label, words), format_ok, words, offsets)


def _read_label(name: str, block: str, block_start: int) -> tuple[str | None, int | None]:
    """The word on a block's only line `name: label`, and the offset after the colon; or Nones."""
    flags = re.IGNORECASE | re.MULTILINE | re.ASCII
    mentions = re.findall(rf"{name}[\W_]*:", block, flags)  # anywhere on a line
    line = re.search(rf"^[ \t*#>-]*{name}[ \t*]*:(.*)$", block, flags)
    if line is None or len(mentions) != 1 or label(line[1]) is None:
        return None, None
    return bare(line[1]), block_start + line.start(1)


def audit() -> str:
    """A table: the reward of a wrong output, by its words. Half right gets half, right gets 0."""
    table = ["words        standard             Eco"]
    for n in (10, 50, 200, 512, 1024, 3072):
        line = f"{n:5}"
        for beta in (1.0, 1 / 6):
            reward = score("so " * n, HARMFUL, None, lambda s: len(s.split()), beta=beta)
            line += f"{reward.total:16.2f}"
        table.append(line)
    return "\n".join(table)


if __name__ == "__main__":
    print(audit())
