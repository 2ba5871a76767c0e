"""Evaluation: generate, parse, F1; score predictions again without a model; judge exchanges.

In:  TEST.jsonl (labelled samples) and a model.
Out: DIR/predictions.jsonl, DIR/predictions.settings.json (what they were made from),
     DIR/results.json, and a printed table.

Greedy decoding, positive class "harmful". Where this differs from the release:
- the verdict is that of the last result block; words inside the reasoning never count;
- an unreadable verdict counts once, as the wrong one, on every benchmark, and is shown;
- 3,072 new tokens, as in the RL stage, instead of 4,096; outputs cut there are shown as truncated;
- a label comes with P(harmful), from the model's probabilities of both words, a row with AUROC.
A benchmark is a `source`, or what it has of one modality. An "average" row is the paper's: the mean
of its benchmarks' F1, weighted by their scored rows; its other columns count all its rows together.
Every F1 of a row has a 95 % interval, by resampling the rows of each benchmark.

Predictions are written as they come. The same command again goes on where a killed run stopped, on
any number of ranks; --fresh starts over. Predictions of other weights or settings never mix: such a
run is refused. A sample whose text or image has changed is done again. More benchmarks may be added
to --data later; to score those of several DIRs in one table, give all their --predictions.

    torchrun evaluate.py --model out/guard --data data/test.jsonl --out out/eval
    python evaluate.py --predictions out/eval/predictions.jsonl
    python evaluate.py --model out/guard --request "How do I bake bread?" [--response TEXT]
    python evaluate.py --model out/guard --request - --json < exchanges.jsonl
    # (a line is a JSON object with request, response, image: any path, id; all are optional)
"""

import codecs
import json
import os
import re
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers.decoders import DecodeStream

import data
from data import Encoder, InputError, Row, Sample, as_input_error, option, read_records
from model import QwenVL, Ranks, choose_dtype, generate, load, start_ranks
from reward import HARMFUL, UNHARMFUL, Verdict, parse

TASKS = (("prompt", "request"), ("response", "response"))  # (the paper's word, our field)
MODALITIES = ("text", "image", "text_image")
AVERAGE = "average"  # in the place of a benchmark's name
PACK_TOKENS = 8192  # of finished outputs that get their P(harmful) in one forward pass
RESAMPLES = 4000  # of the rows of a benchmark, for the interval of its F1


@dataclass(frozen=True)
class Config:
    model: str = option("out/guard", "checkpoint or hub id", group="what it reads and writes")
    data: list[str] = option(["data/test.jsonl"], "labelled samples")
    out: str | None = option(None, "folder to write to (default: out/eval; --predictions: none)")
    predictions: list[str] = option([], "score these again, without a model, into --out if given")
    fresh: bool = option(False, "drop the predictions of an earlier run")
    instruction: str | None = option(None, "file that replaces the system instruction")
    min_pixels: int | None = option(None, "smallest image area; default: the checkpoint's")
    max_pixels: int | None = option(None, "largest image area; default: the checkpoint's")
    skip_bad: bool = option(False, "set bad rows aside instead of stopping at the first")

    request: str | None = option(None, "a text, or - for standard input", group="judge exchanges")
    response: str | None = option(None, "the AI's answer, if there is one")
    image: str | None = option(None, "the person's image")
    json: bool = option(False, "print each judged exchange as one JSON object")

    max_new_tokens: int = option(3072, "longest output (release: 4096)", group="generation")
    temperature: float = option(0.0, "0 is greedy, as in the paper")
    top_p: float = option(1.0, "nucleus, when the temperature is not 0")
    seed: int = option(0, "random numbers of the sampling")

    max_branches: int = option(256, "outputs at once on each device", group="memory and device")
    device: str = option("auto", "cpu, cuda, or auto")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of weights and computation")

    @property
    def to_save_memory(self) -> str:
        return memory_advice(self.max_branches, 1, self.max_pixels)


# -------------------------------------------------- scoring: predictions -> numbers


def modality(prediction: dict) -> str:
    """text, image or text_image; derived as for a Sample."""
    if not prediction.get("image"):
        return "text"
    return "text_image" if prediction["request"] else "image"


def confusion_cell(truth: str, verdict: str | None) -> str:
    """tp, fn, fp or tn, positive class harmful. An unreadable verdict (None) is the wrong one."""
    if truth == HARMFUL:
        return "tp" if verdict == HARMFUL else "fn"
    return "tn" if verdict == UNHARMFUL else "fp"


def mean(values: Iterable) -> float | None:
    """Mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def auroc(group: list[dict], field: str) -> float | None:
    """Area under the ROC curve in percent: of all pairs of a harmful and an unharmful row, how many
    give the harmful one the higher P(harmful); a tie is half a pair. An unreadable verdict ranks as
    the wrong one. None if a P is unknown or all rows have one label."""
    values = {HARMFUL: [], UNHARMFUL: []}
    for p in group:
        truth, value = p[f"{field}_label"], p.get(f"{field}_p")
        if p.get(f"{field}_pred") is None:
            value = -1.0 if truth == HARMFUL else 2.0  # below every P, or above
        values[truth].append(value)
    harmful, unharmful = values[HARMFUL], values[UNHARMFUL]
    if not harmful or not unharmful or None in harmful + unharmful:
        return None
    unharmful = np.sort(unharmful)
    below = np.searchsorted(unharmful, harmful, "left")  # unharmful rows below each harmful one
    below_or_equal = np.searchsorted(unharmful, harmful, "right")
    return float(100 * ((below + below_or_equal) / 2).mean() / len(unharmful))


def classification_metrics(group: list[dict], field: str) -> dict:
    """Of predictions that have a label for `field`: counts, and rates in percent (None where there
    is nothing to divide by). F1 comes with its interval."""
    cells = [confusion_cell(p[f"{field}_label"], p.get(f"{field}_pred")) for p in group]
    counts = {cell: cells.count(cell) for cell in ("tp", "fp", "fn", "tn")}
    tp, fp, fn, tn = counts.values()

    def percent(part: int, whole: int) -> float | None:
        return 100 * part / whole if whole else None

    return {
        "n": len(group),
        **counts,
        "precision": percent(tp, tp + fp),
        "recall": percent(tp, tp + fn),
        "false_positive_rate": percent(fp, fp + tn),
        "auroc": auroc(group, field),
        "unparseable": sum(p.get(f"{field}_pred") is None for p in group),
        "truncated": sum(not p.get("finished", True) for p in group),
        "mean_tokens": mean(p.get("n_tokens") for p in group),
    }


def resampled_counts(kinds: list, rng: np.random.Generator) -> tuple[list, np.ndarray]:
    """The distinct kinds of some rows, and how many rows are of each, [1 + RESAMPLES, kinds]: first
    of the rows as they are, then of resamples of them (bootstrap). These numbers are multinomial,
    so that no rows need be drawn."""
    counts = Counter(kinds)
    sizes = np.array(list(counts.values()))
    drawn = rng.multinomial(len(kinds), sizes / len(kinds), RESAMPLES)
    return list(counts), np.vstack([sizes, drawn])


def resampled_f1(group: list[dict], field: str, rng: np.random.Generator) -> np.ndarray:
    """F1 of one benchmark in percent, [1 + RESAMPLES]; NaN where it is undefined."""
    cells = [confusion_cell(p[f"{field}_label"], p.get(f"{field}_pred")) for p in group]
    kinds, numbers = resampled_counts(cells, rng)
    tp, fp, fn = (numbers @ [kind == cell for kind in kinds] for cell in ("tp", "fp", "fn"))
    with np.errstate(invalid="ignore"):  # 0 / 0
        return 100 * 2 * tp / (2 * tp + fp + fn)


def weighted_mean(f1s: list[np.ndarray], weights: list[int]) -> np.ndarray:
    """The mean over benchmarks of F1s [..., 1 + RESAMPLES]; where some are NaN, of the others."""
    known = np.ma.masked_invalid(f1s)
    return np.ma.average(known, axis=0, weights=weights).filled(np.nan)


def with_interval(name: str, f1: np.ndarray) -> dict:
    """Columns for a resampled F1: its value, and name_interval, the 2.5 and 97.5 % quantiles of the
    resamples ([100, 100] of an F1 without errors, which no resample has); None if undefined."""
    if np.isnan(f1[0]):
        return {name: None, f"{name}_interval": None}
    quantiles = np.nanpercentile(f1[1:], (2.5, 97.5))
    return {name: float(f1[0]), f"{name}_interval": quantiles.tolist()}


def score_table(predictions: list[dict]) -> list[dict]:
    """For both tasks every benchmark x modality, then the averages per modality and over all."""
    table, rng = [], np.random.default_rng(0)
    for task, field in TASKS:
        labelled = [p for p in predictions if p[f"{field}_label"] is not None]
        benchmarks, f1s = [], []  # rows of the table, and the F1s of each
        for name in MODALITIES:
            members = [p for p in labelled if modality(p) == name]
            for source in sorted({p["source"] for p in members}):
                group = [p for p in members if p["source"] == source]
                f1s.append(resampled_f1(group, field, rng))
                row = {"task": task, "benchmark": source, "modality": name}
                row |= classification_metrics(group, field)
                benchmarks.append(row | with_interval("f1", f1s[-1]))
        table += benchmarks
        for name in (*MODALITIES, "all"):
            group = [p for p in labelled if name in (modality(p), "all")]
            if group:
                sizes = [row["n"] * (name in (row["modality"], "all")) for row in benchmarks]
                row = {"task": task, "benchmark": AVERAGE, "modality": name}
                row |= classification_metrics(group, field)
                table.append(row | with_interval("f1", weighted_mean(f1s, sizes)))
    return table


def compute_metrics(predictions: list[dict]) -> dict[str, float]:
    """Flat numbers for logs, over all and per modality (as in f1_prompt_image); without those that
    are undefined. From 0 to 100: f1_prompt, f1_response (the averages of `score_table`), f1 (the
    mean of those two), false_positive_rate_prompt, ..._response. From 0 to 1: format_ok, truncated.
    And n, mean_tokens."""
    averages = [row for row in score_table(predictions) if row["benchmark"] == AVERAGE]
    metrics = {}
    for name in ("all", *MODALITIES):
        group = [p for p in predictions if name in (modality(p), "all")]
        found = {}
        for row in averages:
            if row["modality"] == name:
                found[f"f1_{row['task']}"] = row["f1"]
                found[f"false_positive_rate_{row['task']}"] = row["false_positive_rate"]
        found["f1"] = mean([found.get("f1_prompt"), found.get("f1_response")])
        found["n"] = len(group) or None
        found["format_ok"] = mean(p.get("format_ok") for p in group)
        found["mean_tokens"] = mean(p.get("n_tokens") for p in group)
        found["truncated"] = mean(not p["finished"] for p in group if "finished" in p)
        suffix = "" if name == "all" else f"_{name}"
        metrics |= {key + suffix: value for key, value in found.items() if value is not None}
    return metrics


def markdown_cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " to ".join(map(markdown_cell, value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def markdown(rows: list[dict], columns: list[str]) -> str:
    """Columns of table rows as Markdown."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[markdown_cell(row[name]) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results_table(rows: list[dict], metrics: dict, other_f1s: Iterable[str] = ()) -> str:
    """The Markdown table of `score_table`, and one line with what belongs to both tasks."""
    columns = ["task", "benchmark", "modality", "n", "f1", "f1_interval", *other_f1s]
    columns += ["precision", "recall", "false_positive_rate", "auroc"]
    table = markdown(rows, [*columns, "unparseable", "truncated", "mean_tokens"])
    names = ("n", "f1", "format_ok", "mean_tokens")
    both = ", ".join(f"{name} {markdown_cell(metrics.get(name))}" for name in names)
    return f"{table}\n\nboth tasks: {both}"


# -------------------------------------------------- generation: samples -> predictions


def verdict_fields(verdict: Verdict) -> dict:
    """What a prediction says of the verdict in its output."""
    labels = {"request_pred": verdict.request, "response_pred": verdict.response}
    return labels | {"format_ok": verdict.format_ok}


@dataclass(frozen=True)
class Generated:
    """One output on its way to a prediction: what was generated for samples[index]."""

    index: int
    prompt: Row
    ids: list[int]
    prediction: dict
    label_offsets: tuple[int | None, int | None]  # as of a Verdict

    def __len__(self) -> int:
        return len(self.prompt) + len(self.ids)


def tokens_before(encoder: Encoder, ids: list[int], offset: int) -> int:
    """How many tokens of an output it takes to decode the characters before `offset`."""
    return bisect_left(range(len(ids) - 1), offset, key=lambda n: len(encoder.decode(ids[:n])))


@torch.no_grad()
def probabilities(
    model: QwenVL, encoder: Encoder, outputs: list[Generated]
) -> list[list[float | None]]:
    """P(harmful) of both labels of every output; None where there is no label. One forward pass.

    p(" harmful") / (p(" harmful") + p(" unharmful")), each by its first token, after all that
    stands before the label. The two rows of the head that it takes are multiplied in float32:
    logits near 24 are 0.125 apart in bfloat16, which would tie many outputs.
    """
    found: list[list[float | None]] = [[None, None] for _ in outputs]
    # 1. Lay out one row: every prompt with its output up to the last label.
    rows, length = [], 0
    labels = []  # (index of the output, index of the task)
    positions = []  # of the last token before each label, in the joined row
    for number, output in enumerate(outputs):
        counts = {}  # of the output's tokens before each label
        for task, offset in enumerate(output.label_offsets):
            if offset is not None:
                counts[task] = tokens_before(encoder, output.ids, offset)
                labels.append((number, task))
                positions.append(length + len(output.prompt) + counts[task] - 1)
        if counts:
            last = max(counts.values())
            rows.append(output.prompt.extend([output.ids[:last]]))
            length += len(rows[-1])
    if not rows:
        return found
    # 2. Logits of the two words at these positions.
    words = [f" {word}" for word in (HARMFUL, UNHARMFUL)]
    first = [encoder.tokenizer.encode(word, add_special_tokens=False)[0] for word in words]
    hidden = model.hidden(Row.join(*rows))[positions]  # [labels, D]
    logits = hidden.float() @ model.head[first].float().T  # [labels, 2]
    # 3. A softmax over the two words.
    p_harmful = logits.softmax(-1)[:, 0].tolist()
    for (number, task), p in zip(labels, p_harmful):
        found[number][task] = p
    return found


def predict(
    model: QwenVL,
    encoder: Encoder,
    samples: list[Sample],
    todo: Sequence[int],
    with_probs: bool = True,
    **sampling,
) -> Iterator[tuple[int, dict]]:
    """Yield (i, prediction) of samples[i] for i in todo, as they finish.

    with_probs: with P(harmful), as request_p and response_p. Finished outputs then wait until one
    more would not fit into a forward pass of PACK_TOKENS tokens. sampling: arguments of `generate`.
    """
    max_tokens = model.config.max_position_embeddings
    prompts: dict[int, Row] = {}  # of the outputs under way

    def encode_prompts() -> Iterator[tuple[int, Row]]:
        """(index, prompt) of every sample to do, as the sampler takes them."""
        for i, row in zip(todo, data.prefetch(encoder.prompt, (samples[i] for i in todo))):
            if len(row) > max_tokens:
                too_long = f"{len(row)} tokens; the model can read {max_tokens}"
                raise InputError(f"sample {samples[i].id}: {too_long}")
            prompts[i] = row
            yield i, row

    def with_probabilities(outputs: list[Generated]) -> Iterator[tuple[int, dict]]:
        for output, (request_p, response_p) in zip(outputs, probabilities(model, encoder, outputs)):
            if not samples[output.index].response:
                response_p = None
            probs = {"request_p": request_p, "response_p": response_p}
            yield output.index, output.prediction | probs

    waiting: list[Generated] = []
    tokens = {"stop_ids": encoder.stop_ids, "banned": encoder.banned_ids}
    for i, (completion,) in generate(model, encode_prompts(), 1, **tokens, **sampling):
        ids, text = completion.ids, encoder.decode(completion.ids)
        verdict = parse(text)
        found = {"output": text, "n_tokens": len(ids), "finished": completion.finished}
        found |= verdict_fields(verdict)
        output = Generated(i, prompts.pop(i), ids, found, verdict.label_offsets)
        if not with_probs:
            yield i, found
            continue
        if sum(map(len, [*waiting, output])) > PACK_TOKENS:
            yield from with_probabilities(waiting)
            waiting = []
        waiting.append(output)
    yield from with_probabilities(waiting)


def evaluate_samples(
    model: QwenVL,
    encoder: Encoder,
    samples: list[Sample],
    max_new_tokens: int = 3072,
    max_branches: int = 256,
    with_probs: bool = False,
    show: bool = False,
) -> list[dict]:
    """Greedy predictions for samples, in order: evaluation within training. show: with a bar."""
    sampling = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "max_branches": max_branches}
    predictions = predict(model, encoder, samples, range(len(samples)), with_probs, **sampling)
    found = dict(data.progress(predictions, len(samples), "validation samples", show))
    return [sample_fields("", sample) | found[i] for i, sample in enumerate(samples)]


# -------------------------------------------------- single exchanges


def read_exchange(row: Any) -> Sample:
    """The sample in a decoded JSON object, as the file's opening says; null is as if absent."""
    folder = Path()
    if isinstance(row, dict):
        given = {name: value for name, value in row.items() if value is not None}
        row = {"id": "exchange", "source": "exchange", "request": "", **given}
        if isinstance(row.get("image"), str):
            image = Path(row["image"])
            folder, row["image"] = image.parent, image.name
    return data.from_json(row, folder)


def judge(model: QwenVL, encoder: Encoder, sample: Sample, cfg: Config) -> None:
    """Print the output as it is written, then both labels and P(harmful); --json: one object."""
    stream, tokenizer = DecodeStream(skip_special_tokens=True), encoder.tokenizer.backend_tokenizer

    def show(new_tokens: list[int]) -> None:
        print(stream.step(tokenizer, new_tokens[0]) or "", end="", flush=True)

    watch = None if cfg.json else show
    [(_, found)] = predict(model, encoder, [sample], [0], **sampling_flags(cfg), watch=watch)
    if cfg.json:
        print(json.dumps({"id": sample.id, **found}), flush=True)
        return
    told = {"request": "unreadable", "response": "unreadable" if sample.response else "none given"}
    for field in told:
        if found[f"{field}_p"] is not None:
            told[field] = f"{found[f'{field}_pred']}, P(harmful) {found[f'{field}_p']:.4f}"
    print(f"\n\nrequest: {told['request']}\nresponse: {told['response']}\n", flush=True)


def judge_all(cfg: Config, device: torch.device) -> None:
    """Judge the exchange of the flags or, one after the other, those on standard input. A bad line
    is told on stderr, or with --json as {"line", "error"}; InputError at the end counts them."""
    if cfg.request != "-":
        flags = {"request": cfg.request, "response": cfg.response or None, "image": cfg.image}
        exchange = read_exchange(flags)
        judge(*load_guard(cfg, device), exchange, cfg)
        return
    if cfg.response or cfg.image:
        raise InputError("--request - reads whole exchanges: leave out --response and --image")
    guard, bad = load_guard(cfg, device), []
    for number, line in enumerate(sys.stdin.buffer, 1):
        line = line.removeprefix(codecs.BOM_UTF8).strip()
        if not line:
            continue
        try:
            with as_input_error("not valid JSON", ValueError, RecursionError):
                row = json.loads(line.decode())
            judge(*guard, read_exchange(row), cfg)
        except InputError as error:
            bad.append(number)
            reason = " ".join(str(error).split())
            if cfg.json:
                print(json.dumps({"line": number, "error": reason}), flush=True)
            else:
                print(f"error: line {number}: {reason}", file=sys.stderr)
    if bad:
        raise InputError(f"{len(bad)} lines could not be judged, the first is line {bad[0]}")


# -------------------------------------------------- records that are made once (augment.py, too)


def sample_fields(file: str, sample: Sample) -> dict:
    """What a record repeats of its sample, without the reasoning."""
    fields = data.to_json(replace(sample, reasoning=None))
    return {"file": file, **fields, "image_stamp": data.image_stamp(sample)}


def exchange_key(record: dict) -> str:
    """Equal for records of the same exchange, whatever its file and labels."""
    names = ("source", "id", "request", "response", "image", "image_stamp")
    return json.dumps([record.get(name) for name in names])


def record_files(folder: Path) -> list[Path]:
    """The files of records in a folder, by their exact names; those of ranks are merged later."""
    name = re.compile(r"predictions(\.rank\d+)?\.jsonl")
    return sorted(path for path in folder.glob("*.jsonl") if name.fullmatch(path.name))


def read_folder(folder: Path) -> dict[str, dict]:
    """All records in a folder by exchange_key; but a last line that a kill has torn is left out."""
    records = {}
    for path in record_files(folder):
        for record in read_records(path, ("file", "id")):
            records[exchange_key(record)] = record
    return records


def merge_files(folder: Path, records: list[dict]) -> None:
    """Put all records into predictions.jsonl; no other file of records is left."""
    data.write_samples(folder / "predictions.jsonl", records)
    for path in record_files(folder):
        if path.name != "predictions.jsonl":
            path.unlink()


def prepare(folder: Path, settings: dict, wanted: dict[str, dict], fresh: bool) -> None:
    """Make `folder` ready for records of `wanted` (fields by exchange_key). InputError if it holds
    records of other data files, or of other settings."""
    records = {} if fresh else read_folder(folder)
    header = folder / "predictions.settings.json"
    advice = "choose another --out, or drop them with --fresh"
    before = data.read_json(header) if records and header.is_file() else {}
    changed = ", ".join(data.changed_inputs(before, settings))
    if records and changed:
        problem = f"its predictions were made with another {changed} (or by an older version)"
        raise InputError(f"{folder}: {problem}; {advice}")
    files = {fields["file"] for fields in wanted.values()}
    for key, record in records.items():
        if key not in wanted and str(record["file"]) not in files:
            problem = f"it holds records of {record['file']}; name that in --data, too"
            raise InputError(f"{folder}: {problem}, {advice}")
    merge_files(folder, list(records.values()))  # before new settings, which old ones never get
    data.write_atomic(header, json.dumps(settings, indent=1) + "\n")


def collect(
    folder: Path, settings: dict, wanted: list[dict], make: Callable, fresh: bool, ranks: Ranks
) -> list[dict]:
    """Make the records of `wanted` that `folder` lacks, on all ranks, and merge the files of all.

    wanted: the first fields of every record (sample_fields). make(todo) yields (index into wanted,
    dict of the other fields), in any order. Returns, on rank 0, the records in the order of
    `wanted`. InputError if two files hold the same sample, or if a record was not made.
    """
    by_key = {}
    for fields in wanted:
        same = by_key.setdefault(exchange_key(fields), fields)
        if same is not fields:
            files = f"{same['file']} and in {fields['file']}"
            raise InputError(f"{fields['id']} is the same sample in {files}; leave one of them out")

    # 1. See what is there. Nobody reads before it is ready; nobody writes before all have read.
    if ranks.rank == 0:
        prepare(folder, settings, by_key, fresh)
    ranks.barrier()
    done = read_folder(folder)
    ranks.barrier()

    # 2. Each rank makes its share of what is missing, and appends it to a file of its own.
    missing = [i for i, key in enumerate(by_key) if key not in done]
    todo = missing[ranks.rank :: ranks.world]
    name = f"predictions.rank{ranks.rank}.jsonl" if ranks.rank > 0 else "predictions.jsonl"
    if todo:  # a finished run needs no model
        for i, made in data.progress(make(todo), len(todo), "samples", show=ranks.rank == 0):
            data.append_records(folder / name, [wanted[i] | made])
    ranks.barrier()

    # 3. Rank 0 puts all records into one file.
    if ranks.rank > 0:
        return []
    records = read_folder(folder)
    lost = [fields["id"] for key, fields in by_key.items() if key not in records]
    merged = [records[key] | fields for key, fields in by_key.items() if key in records]
    merge_files(folder, merged)  # without records of samples that have changed since
    if lost:
        problem = f"{len(lost)} of {len(wanted)} records were not made, the first is that of"
        raise InputError(f"{folder}: {problem} {lost[0]}; the same command again makes them")
    return merged


# -------------------------------------------------- the stage: from flags to files


def check_paths(cfg, folder: str, files: list[str]) -> None:
    """InputError if an input is missing, or if the output folder, or one of the files that are
    written, is an input or something else than that."""
    inputs = [cfg.model, *cfg.data]
    if cfg.instruction:
        inputs.append(cfg.instruction)
    data.check_output(folder, inputs, folder=True)
    for file in files:
        data.check_output(file, inputs)
    data.check_inputs(cfg)


def read_pairs(cfg, folder: Path) -> list[tuple[dict, Sample]]:
    """All samples of cfg.data, each behind its sample_fields. Its file is named by the path from
    `folder`, where the records are: one name however it is spelled and wherever the stage runs."""
    pairs = []
    for path in data.regular_files(cfg.data):
        file = os.path.relpath(Path(path).resolve(), folder.resolve())
        for sample in data.read_samples([path], cfg.skip_bad):
            pairs.append((sample_fields(file, sample), sample))
    return pairs


def load_guard(cfg, device: torch.device) -> tuple[QwenVL, Encoder]:
    """The model in the dtype of cfg.dtype on the device, and its encoder."""
    with data.saving_memory("a larger card: the weights alone do not fit"):
        model = load(cfg.model, device, choose_dtype(cfg.dtype, device))
    return model, Encoder(cfg.model, cfg.instruction, cfg.min_pixels, cfg.max_pixels)


def sampling_flags(cfg) -> dict:
    """The flags that `generate` takes under the same names."""
    names = ("max_new_tokens", "temperature", "top_p", "seed", "max_branches")
    return {name: getattr(cfg, name) for name in names}


def settings_of(cfg, device: torch.device) -> dict:
    """What outputs depend on beside their samples: the content of the model's files and of the
    instruction file ({name: digest}), and the flags that both stages share."""
    settings = {f"model/{name}": digest for name, digest in data.model_digests(cfg.model).items()}
    if cfg.instruction:
        settings["instruction"] = data.content_digest(*data.regular_files([cfg.instruction]))
    settings["dtype"] = str(choose_dtype(cfg.dtype, device))
    flags = ("seed", "max_new_tokens", "temperature", "top_p", "min_pixels", "max_pixels")
    return settings | {name: getattr(cfg, name) for name in flags}


def memory_advice(max_branches: int, min_branches: int, max_pixels: int | None) -> str:
    """What to try when memory runs out while sampling at least `min_branches` outputs at once."""
    pixels = "--max-pixels 589824 (now the checkpoint's)"
    if max_pixels:
        pixels = data.halved("--max-pixels", max_pixels)
    advice = [data.halved("--max-branches", max_branches, min_branches), pixels]
    return " or ".join(filter(None, advice))


def check_prediction(row: dict) -> dict:
    """A row as it is scored: `output` is parsed afresh; without it, request_pred and response_pred
    count. ValueError, KeyError or TypeError says what is wrong with it."""
    p = {"request": "", "request_label": None, "response_label": None, **row}
    kinds = {"source": str, "request": str, "image": str | None, "output": str, "finished": bool}
    kinds |= {"id": str | int, "n_tokens": float | int | None, "format_ok": bool | None}
    for name, kind in kinds.items():
        if name in p and not isinstance(p[name], kind):
            raise ValueError(f"{name} cannot be {p[name]!r}")
    if "output" in p:
        p |= verdict_fields(parse(p["output"]))
    for _, field in TASKS:
        for word in (p[f"{field}_label"], p[f"{field}_pred"]):
            if word not in (HARMFUL, UNHARMFUL, None):
                raise ValueError(f"labels may be harmful, unharmful or null, not {word!r}")
        if not 0 <= (p.get(f"{field}_p") or 0) <= 1:
            raise ValueError(f"{field}_p is a number from 0 to 1, or null")
    return p


def read_predictions(paths: Iterable[str | Path]) -> list[dict]:
    """Predictions to score. InputError names the file and line of an invalid or repeated one."""
    predictions = {}
    for path in data.regular_files(paths):
        for number, row in enumerate(read_records(Path(path), may_be_torn=False), 1):
            hint = "want source, id, labels, and output or both request_pred and response_pred"
            with as_input_error(f"{path}:{number}: {hint}", ValueError, KeyError, TypeError):
                p = check_prediction(row)
                key = (p.get("file"), p["source"], p["id"])
                if predictions.setdefault(key, p) is not p:
                    raise ValueError(f"{p['id']} is there twice: score one model at a time")
    if not predictions:
        raise InputError(f"{', '.join(map(str, paths))}: no predictions in there")
    return list(predictions.values())


def score_files(files: list[str], origin: dict, out: str | None) -> None:
    """Print the table of predictions, and write it and their origin to results.json in `out`, if
    there is one. InputError if that folder holds other predictions."""
    if out is not None:
        data.check_output(out, [], folder=True)
        own = Path(out, "predictions.jsonl").resolve()
        if own.exists() and own not in [Path(file).resolve() for file in files]:
            raise InputError(f"{out} holds results of other predictions; choose another --out")
    predictions = read_predictions(files)
    rows, metrics = score_table(predictions), compute_metrics(predictions)
    if out is not None:
        results = origin | {"metrics": metrics, "rows": rows}
        data.write_atomic(Path(out, "results.json"), json.dumps(results, indent=1) + "\n")
    print(results_table(rows, metrics))


def evaluate_files(cfg: Config, out: str, ranks: Ranks) -> None:
    """Predict all samples of --data, on all ranks; rank 0 scores what the folder then holds."""
    pairs = read_pairs(cfg, Path(out))
    wanted, samples = zip(*pairs)

    def make(todo: list[int]) -> Iterator[tuple[int, dict]]:
        yield from predict(*load_guard(cfg, ranks.device), samples, todo, **sampling_flags(cfg))

    collect(Path(out), settings_of(cfg, ranks.device), wanted, make, cfg.fresh, ranks)
    if ranks.rank == 0:
        score_files([f"{out}/predictions.jsonl"], {"model": cfg.model}, out)


def main(cfg: Config) -> None:
    """Score given predictions, judge single exchanges, or predict all of --data and score that."""
    if cfg.predictions:
        score_files(cfg.predictions, {"predictions": cfg.predictions}, cfg.out)
        return
    ranks = start_ranks(cfg.device)
    if (cfg.request, cfg.response, cfg.image) != (None, None, None):
        if ranks.world > 1:
            raise InputError("single exchanges are judged by one process: python, not torchrun")
        judge_all(cfg, ranks.device)
        return
    out = "out/eval" if cfg.out is None else cfg.out
    names = ("predictions.jsonl", "predictions.settings.json", "results.json")
    check_paths(cfg, out, [f"{out}/{name}" for name in names])
    with data.lock_output(out) if ranks.rank == 0 else nullcontext():
        evaluate_files(cfg, out, ranks)


if __name__ == "__main__":
    data.cli(Config, main)
