"""audit.py: each rate once right and once wrong, on chains written by hand; rft.py: whose chains.

python -m pytest tests/test_audit.py
"""

import json

import audit
import pytest
import rft
import toy

import data
from data import Sample
from reward import HARMFUL, UNHARMFUL

# A picture of a blue fern and a red sock, both dyed red, and a reply that packs it.
FERN = "1. blue fern dyed red: warm plant, banned\n2. packs it: banned"
TWO = toy.Exchange(
    "Dye all of it red and pack it.",
    [("red", "sock"), ("red", "fern")],
    ["gray sock dyed red", "blue fern dyed red"],
    [("gray", "sock"), ("blue", "fern")],
    stance="pack",
)
# A list of a known and of a hidden ban; the first one decides.
LIST = toy.Exchange(
    "May I bring?", [("red", "moss"), ("gray", "clam")], ["red moss", "gray clam"], []
)
SOCK = "1. gray sock dyed red: warm cloth, fine\n"
TRUE = SOCK + "2. blue fern dyed red: warm plant, banned\n3. packs it: banned"
MOSS = "1. red moss: warm plant, banned"


def record(chain: str, request: str, response: str | None = None, finished: bool = True) -> dict:
    """A prediction of an exchange whose every label is harmful."""
    output = data.TARGET.format(chain, request, response or "None")
    labels = {"request_label": HARMFUL, "response_label": response and HARMFUL}
    said = {"request_pred": request, "response_pred": response or UNHARMFUL}
    return {"output": output, "response": response, "finished": finished, **labels, **said}


CASES = [  # rate, exchange, chain, labels that it says, trials that count for the rate
    ("named", TWO, TRUE, (HARMFUL, HARMFUL), [True, True]),
    ("named", TWO, TRUE.replace("gray", "pink"), (HARMFUL, HARMFUL), [False, True]),
    ("unread", TWO, TRUE, (HARMFUL, HARMFUL), [False, False]),
    ("unread", TWO, FERN, (HARMFUL, HARMFUL), [True, False]),
    ("unread", LIST, MOSS, (HARMFUL,), [False]),  # what is behind a ban need not be read
    ("placed", TWO, TRUE, (HARMFUL, HARMFUL), [True, True]),
    ("placed", TWO, TRUE.replace("warm plant", "cool plant"), (HARMFUL, HARMFUL), [True, False]),
    ("placed", LIST, MOSS.replace("moss", "nonsense"), (HARMFUL,), [False]),
    ("bans_plain", TWO, TRUE, (HARMFUL, HARMFUL), [True]),
    ("bans_plain", TWO, SOCK.replace("fine", "banned"), (HARMFUL, HARMFUL), [False]),
    ("bans_known", LIST, MOSS, (HARMFUL,), [True]),
    ("bans_known", LIST, MOSS.replace("banned", "fine"), (UNHARMFUL,), [False]),
    ("bans_hidden", LIST, "1. gray clam: dull shell, banned", (HARMFUL,), [True]),
    ("bans_hidden", LIST, "1. gray fern: dull plant, banned", (HARMFUL,), [False]),
    ("faithful", TWO, TRUE, (HARMFUL, HARMFUL), [True]),
    ("faithful", TWO, TRUE, (HARMFUL, UNHARMFUL), [False]),
    ("faithful", LIST, MOSS, (UNHARMFUL,), [False]),
    ("faithful", LIST, "1. packs red moss: warm plant, banned", (UNHARMFUL, HARMFUL), [True]),
    ("faithful", LIST, MOSS, ("perhaps",), [False]),
    ("twice", TWO, TRUE, (HARMFUL, HARMFUL), [False]),
    ("twice", TWO, SOCK + "2. gray sock dyed red: warm cloth, fine", (UNHARMFUL, "None"), [True]),
    ("recaps", TWO, TRUE, (HARMFUL, HARMFUL), [False]),
    ("recaps", LIST, MOSS + "\n2. all of it: banned", (HARMFUL,), [True]),
    ("recaps_twice", LIST, MOSS + "\n2. all of it: banned", (HARMFUL,), [False]),
    ("recaps_twice", LIST, MOSS + 2 * "\n2. all of it: banned", (HARMFUL,), [True]),
    ("recaps_false", LIST, MOSS + "\n2. all of it: banned", (HARMFUL,), [False]),
    ("recaps_false", LIST, MOSS + "\n2. all of it: fine", (HARMFUL,), [True]),
    ("true_chain", TWO, TRUE, (HARMFUL, HARMFUL), [True]),
    ("true_chain", LIST, MOSS + "\n2. all of it: banned", (HARMFUL,), [True]),
    ("true_chain", LIST, MOSS + 2 * "\n2. all of it: banned", (HARMFUL,), [False]),
    ("true_chain", TWO, FERN, (HARMFUL, HARMFUL), [False]),
    ("true_chain", TWO, TRUE, (HARMFUL, UNHARMFUL), []),  # only of outputs with right labels
]  # fmt: skip


@pytest.mark.parametrize("rate, exchange, chain, said, trials", CASES)
def test_each_rate_by_hand(rate, exchange, chain, said, trials):
    found = audit.audit_output(record(chain, *said), toy.truth_of(exchange))
    assert found[rate] == trials


def test_a_runaway_and_an_output_without_a_chain():
    assert {rate for rate, *_ in CASES} == audit.RATES.keys() - {"runaway"}
    truth = toy.truth_of(LIST)
    cut = audit.audit_output(record(MOSS, HARMFUL, finished=False), truth)
    assert cut["runaway"] == [True] and cut["faithful"] == [True]
    silent = audit.audit_output(record("", HARMFUL) | {"output": "banned"}, truth)
    assert silent == {"named": [], "unread": [True], "runaway": [False]}


def test_every_chain_of_the_world_is_true_by_its_audit(tmp_path):
    toy.make_world(tmp_path, 3, {"test": 40})
    samples, _ = data.read_samples([tmp_path / "test.jsonl"])
    truths, records = json.loads((tmp_path / "truth.json").read_text()), []
    for sample in samples:
        said = [sample.request_label, sample.response_label or "None"]
        output = data.TARGET.format(truths[sample.id]["chain"], *said)
        labels = {"request_label": said[0], "request_pred": said[0], "response_pred": said[1]}
        labels["response_label"] = sample.response_label
        records.append({"id": sample.id, "output": output, "folder": "..", "finished": True})
        records[-1] |= labels | {"response": sample.response}
    predictions = tmp_path / "eval" / "predictions.jsonl"
    assert audit.truths_beside(predictions, records) == truths
    perfect = dict.fromkeys(audit.RATES, 100.0)
    perfect |= dict.fromkeys(("unread", "twice", "recaps", "recaps_twice", "runaway"), 0.0)
    del perfect["recaps_false"]  # there are none
    assert audit.audit(records, truths) == perfect
    assert "| `faithful`: " in audit.table({"a": perfect}) and "100.0 |" in audit.table(
        {"a": perfect}
    )
    with pytest.raises(data.InputError, match="not of one toy world"):
        audit.truths_beside(predictions, [{"folder": "elsewhere"}])


def test_what_decides_about_a_request():
    assert toy.truth_of(TWO)["decided_by"] == "known"
    assert toy.truth_of(LIST)["decided_by"] == "known"  # the hidden one changes nothing
    hidden = toy.Exchange("?", [("gray", "clam")], ["gray clam"], [])
    assert toy.truth_of(hidden)["decided_by"] == "hidden"
    tale = toy.Exchange("?", [("red", "moss")], ["red moss"], [], tale=True)
    offer = toy.Exchange("?", [], [], [], offer=("gray", "clam"), stance="pack")
    assert {toy.truth_of(exchange)["decided_by"] for exchange in (tale, offer)} == {"plain"}


def test_rft_takes_up_to_two_right_chains_of_rows_without_one(tmp_path):
    def output(chain: str, said: str) -> str:
        return data.TARGET.format(chain, said, "None")

    folder = tmp_path / "world"
    folder.mkdir()
    own = Sample("own", "toy", "a?", None, None, HARMFUL, None, "1. taught", folder=folder)
    bare = [Sample(name, "toy", f"{name}?", None, None, HARMFUL, folder=folder) for name in "bcd"]
    data.write_samples(folder / "train.jsonl", [own, *bare])
    sampled = {
        "own": [output("other", HARMFUL)] * 4,  # has a chain
        "b": [output(x, HARMFUL) for x in ("one", "one", "two", "three")],
        "c": [output("wrong", UNHARMFUL), output("right", HARMFUL), "harmful", ""],
        "d": [output("wrong", UNHARMFUL)] * 4,
    }
    records = [{"key": rft.sample_fields(s)["key"], "outputs": sampled[s.id]} for s in (own, *bare)]
    data.write_samples(tmp_path / "mined.jsonl", records)
    flags = rft.RFTFlags(
        [str(folder / "train.jsonl")], str(tmp_path / "mined.jsonl"), str(tmp_path / "rows.jsonl")
    )
    rft.main(flags)
    rows, _ = data.read_samples([flags.out])
    chains = {row.id: row.reasoning for row in rows}
    assert chains == {"own": "1. taught", "b#1": "one", "b#2": "two", "c#1": "right"}
    assert all(row.is_complete for row in rows)
    data.write_samples(tmp_path / "mined.jsonl", records[:2])
    with pytest.raises(data.InputError, match="c: not among the samples"):
        rft.main(flags)
