"""A page to look at runs: what came out, curves, what the guard wrote; and the README's figures.

In:  folders of sft.py and grpo.py (run.json, metrics.jsonl, rollouts.jsonl) and of evaluate.py
     (settings.json, predictions.jsonl).
Out: one HTML file that holds everything and loads nothing (its frame is report.html), or PNG
     figures (draw.py).

Outputs and requests may be hostile: they reach the page as data, of which its script, the only one
that the browser runs, makes text; images are blurred until they are clicked. A request or an image
stands beside an output only if the data still are what the run has read. Damaged records are named.

    python tests/report.py out/sft out/guard out/eval --out out/report.html
    python tests/report.py out/toy/seed-*/{grpo,eco} --curves tests/figures/curves.png
    python tests/report.py out/toy/seed-41/eval-grpo --id test-00002 --exchange exchange.png
    python tests/report.py --packed-row tests/figures/packed_row.png
"""

import base64
import io
import json
import os
import secrets
import statistics
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from string import Template

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import audit
import compare
import draw

import data
import evaluate
from data import option
from reward import HARMFUL, UNHARMFUL, parse

MAX_CARDS = 60  # exchanges that the page shows of one run
TOY = ("toy", "concat")  # sources whose chains audit.py can read
CHANGED = "the run's data are not found, or have changed"
NOT_SETTINGS = ("flags", "fingerprint", "images", "metrics", "lines")  # of what a run leaves
MAX_CHARACTERS = 3000  # that the page shows of a request, a response or an output

# What the page needs of a record: a type, one of several values, a list, or a dict of such.
NUMBER, LABEL = int | float, (HARMFUL, UNHARMFUL, None)
LABELS = {"request_label": LABEL, "response_label": LABEL}
OUTPUT = {"output": str, "n_tokens": NUMBER, "finished": bool}
PAID = OUTPUT | {"reward": {"total": NUMBER}, "advantage": NUMBER}
JUDGED = OUTPUT | {"request_pred": LABEL, "response_pred": LABEL}
JUDGED |= {"request_p": NUMBER | None, "response_p": NUMBER | None}
EXCHANGE = {"id": str, "source": str, "request": str, "response": str | None, "image": str | None}
EXCHANGE |= LABELS | {"folder": str, "key": str}
SHAPES = {
    "metrics": {"step": NUMBER},
    "rollouts": EXCHANGE | {"step": NUMBER, "outputs": [PAID]},
    "predictions": EXCHANGE | JUDGED,
}


@dataclass(frozen=True)
class Run:
    """What one folder holds; a file that is not there is empty here."""

    name: str
    folder: Path
    settings: dict  # run.json; of an evaluation settings.json and results.json
    metrics: list[dict]
    rollouts: list[dict]
    predictions: list[dict]
    damaged: list[str]  # a line for each record that is left out


def read_runs(folders: list[str]) -> list[Run]:
    """The runs, named by their paths below a common folder. InputError if one is no run."""
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    common = os.path.commonpath([path.parent for path in paths]) if paths else "."
    return [read_run(path, str(path.relative_to(common))) for path in paths]


def read_run(folder: Path, name: str) -> Run:
    """The run in a folder. InputError if it holds none, or its settings cannot be read."""
    settings, damaged = {}, []
    for path in (folder / file for file in ("results.json", "settings.json", "run.json")):
        settings |= data.read_json(path) if path.is_file() else {}
    if "flags" in settings and not fits(settings, {"flags": dict}):
        raise data.InputError(f"{folder}/run.json: damaged; nothing can be shown of this run")
    records = [read_records(folder / f"{kind}.jsonl", SHAPES[kind], damaged) for kind in SHAPES]
    if not any(records):
        raise data.InputError(f"{folder}: holds no metrics, rollouts or predictions")
    return Run(name, folder, settings, *records, damaged)


def read_records(path: Path, shape: dict, damaged: list[str]) -> list[dict]:
    """The records of a file that have this shape; the others are named in `damaged`."""
    records = []
    for number, line in data.read_lines(path) if path.is_file() else ():
        try:
            record = data.decode_json(line)
            if not fits(record, shape):
                raise data.InputError(f"want a JSON object with {', '.join(shape)}")
            records.append(record)
        except data.InputError as error:
            damaged.append(data.printable(f"{path}:{number}: damaged, and left out: {error}"))
    return records


def fits(value: object, shape) -> bool:
    """Whether a value has a shape; a number also has to be one that a float can hold, not NaN."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(fits(value.get(k), shape[k]) for k in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and value != [] and all(fits(v, shape[0]) for v in value)
    if isinstance(shape, tuple):
        return value in shape
    return isinstance(value, shape) and (not isinstance(value, NUMBER) or abs(value) < 1e300)


# ---- the exchanges that outputs are about


def samples_in(file: Path) -> list[data.Sample]:
    """The samples of a data file; a row that cannot be read is none of them."""
    samples = []
    for _, line in data.read_lines(file):
        with suppress(data.InputError):
            samples.append(data.from_json(data.decode_json(line), file.parent))
    return samples


def samples_by_key(run: Run, records: list[dict]) -> dict[str, data.Sample]:
    """{key: sample} of the data beside the images of some records. The key of a record holds the
    whole exchange and the size of its image."""
    samples = []
    for folder in {record["folder"] for record in records if record["image"] is not None}:
        with suppress(ValueError):  # a text that cannot be a path
            files = sorted((run.folder / folder).resolve().glob("*.jsonl"))
            samples += [sample for file in files for sample in samples_in(file)]
    return {evaluate.sample_fields(sample)["key"]: sample for sample in samples}


def image_url(sample: data.Sample | None) -> str:
    """The image of a sample, small, as a URL. InputError if there is none, if it cannot be decoded,
    or if it lies, by way of a link, outside of the data's folder."""
    if sample is None:
        raise data.InputError(CHANGED)
    path = sample.image_path.resolve()
    if not path.is_relative_to(sample.folder.resolve()):
        raise data.InputError(f"{sample.image} leads out of the data's folder")
    image, file = data.open_image(path), io.BytesIO()
    image.thumbnail((256, 256))
    image.save(file, "JPEG", quality=85)
    return as_url(file.getvalue(), "jpeg")


def as_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# ---- the page


def error_size(output: dict, record: dict) -> float:
    """How sure the guard is of its worst error: the probability of the wrong verdict, or 1 if that
    is unreadable or has no probability; -1 if every verdict agrees with the record's label."""
    size, said = -1.0, parse(output["output"])
    for task, verdict in (("request", said.request), ("response", said.response)):
        if record[f"{task}_label"] not in (None, verdict):
            p_harmful = output.get(f"{task}_p")
            if verdict is None or p_harmful is None:
                return 1.0
            size = max(size, p_harmful if verdict == HARMFUL else 1 - p_harmful)
    return size


def short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def excerpt(text: str | None) -> str:
    """A text; what comes after MAX_CHARACTERS is only counted."""
    text = text or "(none)"
    missing = len(text) - MAX_CHARACTERS
    return text if missing <= 0 else f"{text[:MAX_CHARACTERS]} [... and {missing} more characters]"


def shown_output(output: dict, record: dict) -> dict:
    """One output: its verdicts, its length, what it was paid, and its text."""
    lines, said = [], parse(output["output"])
    for task, verdict in (("request", said.request), ("response", said.response)):
        line = f"{task}: {verdict or 'unreadable'} (label: {record[f'{task}_label'] or 'none'})"
        if output.get(f"{task}_p") is not None:
            line += f", P(harmful) {output[f'{task}_p']:.3f}"
        lines.append(line)
    lines.append(f"{short(output['n_tokens'])} tokens{'' if output['finished'] else ', cut off'}")
    if "reward" in output:
        paid = output["reward"] | {"advantage": output["advantage"]}
        lines.append("reward: " + ", ".join(f"{name} {short(paid[name])}" for name in paid))
    shown = {"verdict": "wrong" if error_size(output, record) >= 0 else "right"}
    if is_unfaithful(output, record):
        lines.append("unfaithful: the labels do not follow from the steps")
        shown["unfaithful"] = True
    return shown | {"notes": lines, "text": excerpt(output["output"])}


def is_unfaithful(output: dict, record: dict) -> bool:
    """Of the toy world's chains, whose steps can be read: whether the labels contradict them."""
    has_response = record["response"] is not None
    return record["source"] in TOY and audit.is_faithful(output["output"], has_response) is False


def shown_card(run: str, where: str, record: dict, sample: data.Sample | None) -> dict:
    """One exchange and the outputs about it: a group of rollouts, or a single prediction. sample:
    the one that holds its image, None if not known."""
    outputs = [shown_output(output, record) for output in record.get("outputs", [record])]
    card = {"run": run, "where": where, "id": record["id"], "image": None, "outputs": outputs}
    card |= {"modality": evaluate.modality(record), "notes": []}
    card["texts"] = {name: excerpt(record[name]) for name in ("request", "response")}
    if record["image"] is not None:
        try:
            card["image"] = image_url(sample)
        except data.InputError as error:
            card["notes"] = [f"No image: {error}."]
    return card


def rollout_cards(run: Run) -> list[dict]:
    """At most MAX_CARDS groups of rollouts: half the newest, half those with the worst reward."""

    def mean_reward(group: dict) -> float:
        return statistics.fmean(output["reward"]["total"] for output in group["outputs"])

    split = max(0, len(run.rollouts) - MAX_CARDS // 2)
    by_reward = sorted(run.rollouts[:split], key=mean_reward)
    shown = run.rollouts[split:][::-1] + by_reward[: MAX_CARDS // 2]
    samples = samples_by_key(run, shown)
    return [shown_card(run.name, f"step {g['step']}", g, samples.get(g["key"])) for g in shown]


def prediction_cards(run: Run) -> list[dict]:
    """At most MAX_CARDS predictions: at least two thirds the surest errors, then right ones, the
    unfaithful first."""
    by_size = sorted(run.predictions, key=lambda p: error_size(p, p), reverse=True)
    wrong = [p for p in by_size if error_size(p, p) >= 0]
    right = sorted(by_size[len(wrong) :], key=lambda p: not is_unfaithful(p, p))[: MAX_CARDS // 3]
    shown = wrong[: MAX_CARDS - len(right)] + right
    samples = samples_by_key(run, shown)
    return [shown_card(run.name, p["source"], p, samples.get(p["key"])) for p in shown]


def outcomes_of(runs: list[Run]) -> dict[str, list[dict]]:
    """{run: the averages of compare.py's table} of the runs with predictions."""
    found = {r.name: compare.score_by(r.predictions, compare.OURS) for r in runs if r.predictions}
    return {name: [x for x in table if x["is_average"]] for name, table in found.items()}


def outcome_cells(lines: list[dict]) -> dict[str, str]:
    """{task and modality: F1 with its interval, and tokens} of one run."""
    cells = {}
    for line in lines:
        numbers = line["f1"], *line["f1_interval"], line["mean_tokens"]
        text = "{:.1f} ({:.1f} to {:.1f})\n{:.1f} tokens".format(*numbers)
        cells[f"{line['task']}, {line['modality']}"] = text
    return cells


def audit_cells(run: Run) -> dict[str, str]:
    """{rate of audit.py: percent} of one run; {} if it was not on a toy world that is still there."""
    with suppress(data.InputError, KeyError):
        truths = audit.truths_beside(run.folder / "predictions.jsonl", run.predictions)
        rates = audit.audit(run.predictions, truths)
        return {audit.RATES[rate]: f"{value:.1f}" for rate, value in rates.items()}
    return {}


def setting_cells(run: Run) -> dict[str, str]:
    """{setting: value} of one run: flags, versions, and what was left out."""
    known = run.settings | run.settings.get("flags", {})
    names = [name for name in known if name not in NOT_SETTINGS and "/" not in name]
    return {name: excerpt(str(known[name])) for name in names}


def page(runs: list[Run], outcomes: dict[str, list[dict]], figures: dict[str, bytes]) -> str:
    """The whole page. outcomes: {run: lines}; figures: {title: PNG}."""
    cards, notes = [], [line for run in runs for line in run.damaged]
    for run in runs:
        found = rollout_cards(run) + prediction_cards(run)
        records = len(run.rollouts) + len(run.predictions)
        notes += [f"{run.name}: {len(found)} of {records} are shown."] if records else []
        cards += found
    content = {
        "runs": [run.name for run in runs],
        "outcome": {name: outcome_cells(lines) for name, lines in outcomes.items()},
        "audit": {run.name: cells for run in runs if (cells := audit_cells(run))},
        "figures": {title: as_url(png, "png") for title, png in figures.items()},
        "notes": notes,
        "cards": cards,
        "settings": {run.name: setting_cells(run) for run in runs},
    }
    frame = Template(Path(__file__).with_suffix(".html").read_text("utf-8"))
    # Without "<" no text can end the script element that holds it; half a surrogate pair is no text.
    safe = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    safe = safe.encode(errors="replace").decode()
    return frame.substitute(nonce=secrets.token_hex(16), content=safe)


@dataclass(frozen=True)
class ReportFlags:
    folders: list[str] = option([], "--out of runs; the name of this flag may be left out")
    out: str | None = option(None, "write the page, an HTML file")
    curves: str | None = option(None, "write reward, F1 and tokens over steps, a PNG file")
    exchange: str | None = option(None, "write one prediction with its exchange, a PNG file")
    id: str | None = option(None, "of that prediction")
    packed_row: str | None = option(None, "write who sees whom in a packed row, a PNG file")


def main(flags: ReportFlags) -> None:
    """Write what is asked for. InputError if it cannot be made; then nothing is written."""
    files, runs = {}, read_runs(flags.folders)
    for line in sum((run.damaged for run in runs), []):
        print(line, file=sys.stderr)
    if flags.out:
        outcomes = outcomes_of(runs)
        files[flags.out] = page(runs, outcomes, draw.page_figures(runs, outcomes))
    if flags.curves:
        files[flags.curves] = draw.curves(runs, draw.README_PANELS)
    if flags.exchange:
        found = [(run, p) for run in runs for p in run.predictions if p["id"] == flags.id]
        if not found:
            raise data.InputError("these folders hold no prediction with the --id")
        (run, p), *_ = found
        files[flags.exchange] = draw.exchange(p, samples_by_key(run, [p]).get(p["key"]))
    if flags.packed_row:
        files[flags.packed_row] = draw.packed_row()
    if not files:
        raise data.InputError("want DIR and --out, --curves or --exchange, or want --packed-row")
    for path, content in files.items():
        data.write_atomic(path, content)
        data.say(f"{path}: written, {len(content) / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--folders")
    data.cli(ReportFlags, main)
