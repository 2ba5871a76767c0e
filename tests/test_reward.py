"""Reward and parser: Eq. (8) to (10), and what the release reads or counts otherwise.

python -m pytest -q tests/test_reward.py
"""

import statistics

import pytest

import reward
from reward import HARMFUL, UNHARMFUL, Verdict, label, parse, score

H, U = HARMFUL, UNHARMFUL
RESULT = "<result>\nAnswers:\nRequest: {}\nResponse: {}\n</result>"


def output(request=H, response=U, reasoning="Step 1: look.", before="", between="\n\n", after=""):
    result = RESULT.format(request, response)
    return f"{before}<think>\n{reasoning}\n</think>{between}{result}{after}"


def words(text):
    return len(text.split())


def test_label():
    harmful = ["harmful", "Harmful", " HARMFUL.\n", "**harmful**", "`harmful`", "unsafe", 1, "1"]
    unharmful = ["unharmful", "Unharmful", "harmless", "safe", "None", "none", 0, "0"]
    neither = [None, True, "", "refusal", "not harmful", "harmful or unharmful", "un harmful"]
    for meaning, texts in ((H, harmful), (U, unharmful), (None, neither)):
        assert {label(text) for text in texts} == {meaning}


def test_a_well_formed_output():
    assert parse(output()) == Verdict("Step 1: look.", H, U, True)
    assert parse(output("unharmful", "None")) == Verdict("Step 1: look.", U, U, True)
    assert parse("\n " + output(between="") + "\n\n").format_ok
    assert parse(output().replace("Answers:\n", "")).format_ok  # the header may be absent
    assert parse(output().replace("Answers:", "**Answers:** ")).format_ok
    assert parse(output(reasoning="\u5b89")).format_ok  # a letter of any script
    assert parse(output(reasoning="...")).reasoning == ""  # nothing to read


@pytest.mark.parametrize(
    "text, request_said, response_said",
    [
        ("", None, None),
        ("Request: harmful\nResponse: harmful", None, None),  # no tags at all
        (output(after=" And so on."), H, U),
        (output(between=" then "), H, U),  # reasoning outside its tags
        (output().partition("</think>")[2], H, U),  # no think block
        (output() + output(U, H), U, H),  # two of each: the last one is read
        (output(after="<result>\nRequest: unharmful\n"), H, U),  # the last complete block
        (output().replace("</result>", ""), None, None),
        (output().replace("Response: unharmful\n", ""), H, None),
        (output("harmful or unharmful"), None, U),
        (output("harmful\nConfidence: high"), H, U),  # what would escape the length term
        (output("harmful\nRequest: harmful"), None, U),  # a field twice, if both agree,
        (output("harmful\n> **Request: unharmful"), None, U),  # in any list form,
        (output(response="The request: harmful"), None, None),  # or beside the other
        (output(reasoning="#\u200b\n" * 200), H, U),  # reasoning without a letter or a digit
    ],
)
def test_malformed_outputs(text, request_said, response_said):
    verdict = parse(text)
    assert not verdict.format_ok
    assert (verdict.request, verdict.response) == (request_said, response_said)
    scored = score(text, request_said or H, response_said or U, words)
    assert scored.safety == 0  # Eq. (8): the format gates the accuracy


def test_a_verdict_inside_the_reasoning_is_not_the_answer():
    planted = "The user wrote Request: unharmful and " + RESULT.format(U, U)
    assert (parse(output(H, H, planted)).request, parse(output(H, H, planted)).response) == (H, H)
    assert parse(f"<think>{planted} and then") == Verdict(None, None, None, False)  # cut off here
    assert parse(output(H, H, "Request: unharmful")).format_ok  # words alone do not matter


def test_a_label_must_have_its_own_line():
    block = "<think>x</think><result>{}</result>"
    assert parse(block.format("Request: harmful, Response: harmful")).request is None
    assert parse(block.format("\nThe Request: harmful\n")).request is None
    listed = "\n- **Request:** Harmful\n- **Response:** None\n"
    for lines in (listed, "\nrequest : harmful\r\nRESPONSE: safe\r\n"):
        assert parse(block.format(lines)) == Verdict("x", H, U, True)


def test_words_are_told_as_written_and_where():
    text = output("**Harmful**.", "None")
    verdict = parse(text)
    assert verdict.words == ("harmful", "none")
    said = [text[offset:].split()[0] for offset in verdict.label_offsets]
    assert said == ["**Harmful**.", "None"]
    assert parse("").words == parse("").label_offsets == (None, None)


def test_an_output_that_is_cut_off_behind_its_verdict_counts():
    """What the length limit has cut off there cannot be known, and is not punished."""
    whole = output()
    assert score(whole, H, U, words).total == 0
    assert all(score(whole[:cut], H, U, words).total < 0 for cut in range(len(whole)))


PAID = [
    ((H, U), (H, U), 1.0), ((H, H), (H, U), 0.5), ((U, H), (H, U), 0.0),
    (("Harmful", "None"), (H, U), 1.0),  # None counts as unharmful
    ((H, H), (H, None), 1.0), ((U, U), (H, None), 0.0), ((H, "None"), (None, H), 0.0),  # absent: not scored
]  # fmt: skip


@pytest.mark.parametrize("said, truths, safety", PAID)
def test_safety_is_half_for_each_task_or_all_for_the_only_one(said, truths, safety):
    scored = score(output(*said), *truths, words)
    assert scored.safety == safety and scored.format == 1.0
    assert [scored.request is None, scored.response is None] == [truth is None for truth in truths]


def test_nothing_to_score():
    for truths in ((None, None), ("Harmful", None)):
        with pytest.raises(ValueError, match="cannot score"):
            score(output(), *truths, words)


TOTALS = [  # the release's formula, with the length of the reasoning in the place of the output's
    ((H, H), 600, 1.0, -13.11), ((H, H), 600, 500 / 3072, -18.87),
    ((U, H), 300, 1.0, -104.86), ((U, H), 1000, 500 / 3072, -37.75), ((H, U), 2000, 1 / 6, 0.0),
    ((U, H), 6000, 1.0, -1.0),  # l_norm is in [0, 1]; the release goes on to -0.26
    ((U, H), 3072, 1 / 6, -36.0),  # Eco: flat above beta = 1/6 of 3072
]  # fmt: skip


@pytest.mark.parametrize("said, length, beta, total", TOTALS)
def test_total(said, length, beta, total):
    scored = score(output(*said, "x" * length), H, U, len, beta=beta)
    assert scored.total == pytest.approx(total, abs=0.005)
    assert scored.length == pytest.approx(min(length / 3072, 1))


def test_a_group_has_the_advantages_of_the_paper():
    outputs = [output(H, U, "x" * 900)] * 12 + [output(H, H, "x" * 600)] * 2
    rewards = [score(text, H, U, len).total for text in outputs]
    rewards += [score(output(U, H, "x" * 300), H, U, len).total] * 2
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    assert [round((rewards[i] - mean) / std, 2) for i in (0, 12, 14)] == [0.42, 0.05, -2.54]


def test_length_and_floor():
    assert score("", H, U, words).total == -1 / reward.FLOOR**2  # no division by zero
    assert score(output(U, H, "x"), H, U, len, floor=0.5, beta=0.25).total == -16.0
    # Without a think block it is the whole output, with one neither tags nor what follows.
    assert score("a b c d", H, U, words, max_new_tokens=8).length == 0.5
    assert score("<think>a b</think> c", H, U, words, max_new_tokens=8).length == 0.25


def test_white_space_is_no_length():
    """400 line feeds in a wrong answer were paid like 400 words: -1 where 12 words get -97."""
    few, many = (output(U, H, text) for text in ("one two", "one" + "\n" * 400 + "\t two"))
    for count in (len, words, lambda text: text.count("\n")):
        assert score(many, H, U, count) == score(few, H, U, count)
    assert score("\n" * 3072, H, U, len).total == -1 / reward.FLOOR**2


def test_the_audit_table_is_of_wrong_outputs():
    for line in reward.audit().splitlines()[1:]:
        n, standard, eco = map(float, line.split())
        length = max(n / 3072, reward.FLOOR)
        assert standard == pytest.approx(-1 / length**2, abs=0.01)
        assert eco == pytest.approx(-1 / min(length, 1 / 6) ** 2, abs=0.01)
