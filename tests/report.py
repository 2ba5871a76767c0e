"""A page to look at runs (curves, the F1 table, what the guard wrote), and the README's figures.

In:  folders of sft.py and grpo.py (run.json, metrics.jsonl, rollouts.jsonl) and of evaluate.py
     (results.json, predictions.jsonl).
Out: one HTML file that holds everything and loads nothing (its frame is report.html), or PNG
     figures (draw.py).

Outputs and requests may be hostile: all text is escaped, the browser runs no script but the page's
own, and images are blurred until they are clicked. The gallery is bounded; the page says what it
leaves out.

    python tests/report.py out/sft out/guard out/eval --out out/report.html
    python tests/report.py out/toy/seed-*/{grpo,eco} --curves tests/figures/curves.png
    python tests/report.py out/toy/seed-31/eval-grpo --exchange tests/figures/exchange.png
    python tests/report.py --packed-row tests/figures/packed_row.png
"""

import argparse
import base64
import html
import io
import json
import os
import re
import secrets
import statistics
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from string import Template

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import draw  # noqa: E402

import data  # noqa: E402  (the repository is importable only from here on)
import reward  # noqa: E402

SETTINGS = ("model", "data", "seed", "eco", "lr", "device", "threads", "torch", "commit")
WORDS = ("run", "task", "benchmark", "modality")  # columns of the F1 table; the others are numbers
NUMBERS = (
    *("n", "f1", "precision", "recall", "false_positive_rate", "auroc"),
    *("unparseable", "truncated", "mean_tokens"),
)
MAX_CARDS = 300  # exchanges in the page, of all runs together: this bounds its size
MAX_CHARACTERS = 3000  # that the page shows of a request, a response or an output
MAX_SIDE = 256  # pixels of an embedded image

# ---- runs


@dataclass(frozen=True)
class Run:
    """What one folder holds; a file that is not there is empty here."""

    name: str
    folder: Path
    settings: dict  # run.json
    metrics: list[dict]
    rollouts: list[dict]
    predictions: list[dict]
    results: dict


def read_runs(folders: list[str]) -> list[Run]:
    """The runs, named by their paths below a common folder. InputError if one is no run."""
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    common = os.path.commonpath([path.parent for path in paths]) if paths else "."
    return [read_run(path, str(path.relative_to(common))) for path in paths]


def read_run(folder: Path, name: str) -> Run:
    """The run in a folder. InputError if it holds no file of a run, or one that cannot be read."""
    settings, results = (
        data.read_json(folder / file) if (folder / file).is_file() else {}
        for file in ("run.json", "results.json")
    )
    metrics = data.read_records(folder / "metrics.jsonl", ["step"])
    rollouts = data.read_records(folder / "rollouts.jsonl", ["step", "id", "outputs"])
    predictions = data.read_records(folder / "predictions.jsonl", ["id", "file", "output"])
    if not (metrics or rollouts or predictions or results):
        raise data.InputError(f"{folder}: holds no metrics, rollouts, predictions or results")
    return Run(name, folder, settings, metrics, rollouts, predictions, results)


def find_samples(files: list[str], ids: set[str]) -> dict[str, data.Sample]:
    """{id: sample} of the samples with these ids, as far as the data files still hold them.

    A row that cannot be read was set aside by the run (--skip-bad), so no rollout is about it. An
    id that occurs twice is left out: a rollout does not say which of the samples it is about.
    """
    found: dict[str, list[data.Sample]] = {}
    for path in (Path(file) for file in files if Path(file).is_file()):
        for line in path.read_bytes().split(b"\n"):
            with suppress(ValueError, LookupError, TypeError, RecursionError):
                row = json.loads(line)
                if row["id"] in ids:
                    found.setdefault(row["id"], []).append(data.from_json(row, path.parent))
    return {id: samples[0] for id, samples in found.items() if len(samples) == 1}


# ---- what the gallery shows


@dataclass(frozen=True)
class Card:
    """One exchange and the outputs about it: a group of rollouts, or a single prediction."""

    run: str
    where: str  # such as "step 12"
    id: str
    sample: data.Sample | None  # None: the run's data files do not hold it
    labels: dict[str, str | None]  # of "request" and "response"
    outputs: list[dict]  # records of rollouts.jsonl or predictions.jsonl


def labels_of(record: dict) -> dict[str, str | None]:
    """The true labels in a line of rollouts.jsonl or predictions.jsonl."""
    return {task: record.get(f"{task}_label") for task in ("request", "response")}


def verdicts_of(output: dict) -> dict[str, str | None]:
    """What an output says, read afresh; None where that is unreadable."""
    verdict = reward.parse(output["output"])
    return {"request": verdict.request, "response": verdict.response}


def is_right(output: dict, labels: dict[str, str | None]) -> bool:
    """Whether every verdict for which there is a label agrees with it."""
    verdicts = verdicts_of(output)
    return all(label in (None, verdicts[task]) for task, label in labels.items())


def error_size(prediction: dict) -> float:
    """How sure the guard is of its worst error: the probability of the wrong verdict; 1 if that is
    unreadable or has no probability, 0 if nothing is wrong."""
    verdicts, size = verdicts_of(prediction), 0.0
    for task, label in labels_of(prediction).items():
        p_harmful = prediction.get(f"{task}_p")
        if label in (None, verdicts[task]):
            continue
        if verdicts[task] is None or p_harmful is None:
            return 1.0
        size = max(size, p_harmful if verdicts[task] == reward.HARMFUL else 1 - p_harmful)
    return size


def mean_reward(group: dict) -> float:
    return statistics.fmean(output["reward"]["total"] for output in group["outputs"])


def rollout_cards(run: Run, count: int) -> tuple[list[Card], str]:
    """At most `count` groups of rollouts, half newest and half worst, and what is left out."""
    split = max(0, len(run.rollouts) - count // 2)
    worst = sorted(run.rollouts[:split], key=mean_reward)[: count // 2]
    chosen = [(group, "newest") for group in reversed(run.rollouts[split:])]
    chosen += [(group, "lowest mean reward") for group in worst]
    files = run.settings.get("config", {}).get("data", [])
    samples = find_samples(files, {group["id"] for group, _ in chosen})
    cards = []
    for group, why in chosen:
        where, sample = f"step {group['step']} ({why})", samples.get(group["id"])
        cards.append(Card(run.name, where, group["id"], sample, labels_of(group), group["outputs"]))
    note = (
        f"{run.name}: {len(cards)} of {len(run.rollouts)} groups of rollouts, the newest and, "
        "of the others, those with the lowest mean reward; "
        f"{len(run.rollouts) - len(cards)} are left out."
    )
    if missing := sum(card.sample is None for card in cards):
        note += (
            f" {missing} come without their request, which is not (or twice) in {', '.join(files)}."
        )
    return cards, note


def prediction_cards(run: Run, count: int) -> tuple[list[Card], str]:
    """At most `count` predictions, two thirds surest errors, one right, and what is left out."""
    right = [p for p in run.predictions if is_right(p, labels_of(p))]
    wrong = [p for p in run.predictions if not is_right(p, labels_of(p))]
    shown_right = right[: count // 3]
    shown_wrong = sorted(wrong, key=error_size, reverse=True)[: count - len(shown_right)]
    cards = []
    for p in shown_wrong + shown_right:
        fields = {key: p.get(key) for key in data.KEYS}
        file = (run.folder / p["file"]).resolve()  # it is written relative to the folder
        sample = data.Sample(**fields, folder=file.parent)
        cards.append(Card(run.name, sample.source, p["id"], sample, labels_of(p), [p]))
    note = (
        f"{run.name}: {len(cards)} of {len(run.predictions)} predictions, {len(shown_wrong)} of "
        f"the {len(wrong)} wrong ones, the surest first, and {len(shown_right)} of the "
        f"{len(right)} right ones; {len(run.predictions) - len(cards)} are left out."
    )
    return cards, note


def gallery_cards(runs: list[Run]) -> tuple[list[Card], list[str]]:
    """The cards of all runs, at most MAX_CARDS, and notes on what is left out of each gallery."""
    galleries = [(rollout_cards, run) for run in runs if run.rollouts]
    galleries += [(prediction_cards, run) for run in runs if run.predictions]
    cards, notes = [], []
    for make, run in galleries:
        found, note = make(run, MAX_CARDS // len(galleries))
        cards += found
        notes.append(note)
    return cards, notes


# ---- the page


def escaped(value: object) -> str:
    """A value as HTML text, also within quotes; control characters and halves of surrogate pairs,
    which no HTML file can hold, become U+FFFD."""
    text = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\ufffd", str(value))
    return html.escape(text, quote=True)


def excerpt(text: str) -> str:
    """A text as HTML; what comes after MAX_CHARACTERS is only counted."""
    missing = len(text) - MAX_CHARACTERS
    ending = f" [... and {missing} more characters]" if missing > 0 else ""
    return escaped(text[:MAX_CHARACTERS] + ending)


def image_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(path: Path) -> str:
    """An image file as a small JPEG in a URL. InputError if it cannot be decoded."""
    image, file = data.open_image(path), io.BytesIO()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image.save(file, "JPEG", quality=85)
    return image_url(file.getvalue(), "jpeg")


def number(value: float | None, places: str = ".3g") -> str:
    """A number as text: counts in full, the others as `places` says, a dash for None."""
    if value is None:
        return "-"
    return f"{value:{places}}" if isinstance(value, float) else str(value)


def output_html(output: dict, labels: dict[str, str | None]) -> str:
    """One output: its verdicts, its length, what it was paid, and its text."""
    lines = []
    for task, verdict in verdicts_of(output).items():
        line = f"{task}: {verdict or 'unreadable'} (label: {labels[task] or 'none'})"
        if output.get(f"{task}_p") is not None:
            line += f", P(harmful) {output[f'{task}_p']:.3f}"
        lines.append(line)
    ending = "" if output.get("finished", True) else ", cut off"
    lines.append(f"{output.get('n_tokens', '?')} tokens{ending}")
    if "reward" in output:
        parts = ", ".join(f"{name} {number(value)}" for name, value in output["reward"].items())
        lines += [f"reward: {parts}", f"advantage: {number(output['advantage'])}"]
    kind = "right" if is_right(output, labels) else "wrong"
    shown = "".join(f'<p class="note">{escaped(line)}</p>' for line in lines)
    text = excerpt(output["output"])
    return f'<div class="output" data-verdict="{kind}">{shown}<pre>{text}</pre></div>'


def card_html(card: Card, urls: dict[Path, str]) -> str:
    """One exchange, its image blurred, and all outputs about it.

    An image is added to `urls`, once; the card holds its number there, and the page's script puts
    it in its place.
    """
    sample, image, exchange = card.sample, "", ""
    modality = "unknown" if sample is None else sample.modality
    if sample is not None:
        for name, text in (("Request", sample.request), ("Response", sample.response)):
            exchange += f"<b>{name}</b><pre>{excerpt(text or '(none)')}</pre>"
    if sample is not None and sample.image is not None:
        try:
            path = data.find_image(sample.image, sample.folder)
            if path not in urls:
                urls[path] = thumbnail(path)
            image = f'<img class="blurred" data-image="{list(urls).index(path)}" alt="image">'
            image = f'<div class="frame" title="click to see the image">{image}</div>'
        except data.InputError as error:
            exchange += f'<p class="note">{escaped(error)}</p>'
    outputs = "".join(output_html(output, card.labels) for output in card.outputs)
    return (
        f'<article class="card" data-run="{escaped(card.run)}" data-modality="{modality}">'
        f"<h3>{excerpt(f'{card.run}, {card.where}: {card.id} ({modality})')}</h3>"
        f'<div class="exchange">{image}<div>{exchange}</div></div>'
        f'<div class="outputs">{outputs}</div></article>'
    )


def f1_text(row: dict) -> str:
    """F1 and, where the row has it, its 95 % interval: f1_interval, or f1_low and f1_high."""
    low, high = row.get("f1_interval") or (row.get("f1_low"), row.get("f1_high"))
    interval = "" if low is None or high is None else f" ({low:.1f} to {high:.1f})"
    return "-" if row.get("f1") is None else f"{row['f1']:.1f}{interval}"


def results_html(runs: list[Run]) -> str:
    """The rows of all results.json as one table, the runs of a benchmark and modality together."""
    rows = [{"run": run.name, **row} for run in runs for row in run.results.get("rows", [])]
    rows.sort(key=lambda row: (row["task"], row["benchmark"], row["modality"]))
    lines = "".join(f'<th class="word">{name}</th>' for name in WORDS)
    lines += "".join(f"<th>{name.replace('_', ' ')}</th>" for name in NUMBERS)
    for row in rows:
        numbers = {name: number(row.get(name), ".1f") for name in NUMBERS} | {"f1": f1_text(row)}
        lines += "</tr>\n<tr>"
        lines += "".join(f'<td class="word">{escaped(row[name])}</td>' for name in WORDS)
        lines += "".join(f"<td>{escaped(numbers[name])}</td>" for name in NUMBERS)
    table = f'<div class="scroll"><table><tr>{lines}</tr></table></div>'
    return f"<h2>F1 (%)</h2>{table}" if rows else ""


def run_html(run: Run) -> str:
    """One line on what a run was started with."""
    settings = run.settings | run.settings.get("config", {}) | run.results
    known = [f"{name} {settings[name]}" for name in SETTINGS if settings.get(name) is not None]
    return f"<p><b>{escaped(run.name)}</b>: {escaped(', '.join(known))}</p>"


def select_html(name: str, values: list[str]) -> str:
    options = "".join(f'<option value="{escaped(v)}">{escaped(v)}</option>' for v in values)
    return f'{name} <select name="{name}"><option value="">all</option>{options}</select>'


def page(runs: list[Run], figures: dict[str, bytes]) -> str:
    """The whole page. figures: the curves, {title: PNG}."""
    cards, notes = gallery_cards(runs)
    urls: dict[Path, str] = {}
    gallery = "\n".join(card_html(card, urls) for card in cards)
    filters = {
        "run": sorted({card.run for card in cards}),
        "modality": ["text", "image", "text_image", "unknown"],
        "verdict": ["right", "wrong"],
    }
    curves = ""
    for title, png in figures.items():
        curves += f"<h2>{title}</h2>"
        curves += f'<img class="curves" alt="curves of {title}" src="{image_url(png, "png")}">'
    frame = Template(Path(__file__).with_suffix(".html").read_text("utf-8"))
    return frame.substitute(
        nonce=secrets.token_hex(16),
        runs="".join(run_html(run) for run in runs),
        curves=curves,
        results=results_html(runs),
        notes="".join(f'<p class="note">{escaped(note)}</p>' for note in notes),
        filters="".join(select_html(name, values) for name, values in filters.items()),
        cards=len(cards),
        gallery=gallery,
        images=json.dumps(list(urls.values())),
    )


def typical_card(runs: list[Run], id: str | None) -> Card:
    """The prediction with this id; by default the first that is right about a harmful request with
    text and image. InputError if there is none."""
    for run in runs:
        for card in prediction_cards(run, 3 * len(run.predictions))[0]:
            harmful = card.labels["request"] == reward.HARMFUL
            typical = harmful and card.sample.modality == "text_image"
            typical = typical and is_right(card.outputs[0], card.labels)
            if card.id == id or (id is None and typical):
                return card
    raise data.InputError("these folders hold no such prediction; name one with --id")


# ---- command line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", metavar="DIR", help="of a run, as it was its --out")
    parser.add_argument("--out", help="write the page, an HTML file")
    parser.add_argument(
        "--curves", help="write reward, accuracy, F1 and tokens over steps, a PNG file"
    )
    parser.add_argument("--exchange", help="write one prediction with its exchange, a PNG file")
    parser.add_argument("--id", help="of that prediction (default: a harmful one, judged rightly)")
    parser.add_argument("--packed-row", help="write who sees whom in a packed row, a PNG file")
    args = parser.parse_args(arguments)
    about_runs = args.out or args.curves or args.exchange
    if not (about_runs or args.packed_row) or (about_runs and not args.folders):
        parser.error("want DIR and --out, --curves or --exchange, or want --packed-row")
    try:
        runs = read_runs(args.folders)
        if args.out:
            write(args.out, page(runs, draw.stage_figures(runs)))
        if args.curves:
            write(args.curves, draw.curves(runs, draw.README_PANELS))
        if args.exchange:
            card = typical_card(runs, args.id)
            write(args.exchange, draw.exchange(card.sample, card.outputs[0]))
        if args.packed_row:
            write(args.packed_row, draw.packed_row())
    except (data.InputError, OSError) as error:
        data.end_process(2, f"error: {' '.join(str(error).split())}\n")


def write(path: str, content: str | bytes) -> None:
    data.check_output(path, [])
    data.write_atomic(path, content)
    print(f"{path}: written, {Path(path).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
