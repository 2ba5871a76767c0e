"""The paper's claims in the toy world: a model for each of VARIANTS, over several seeds, one table.

In:  nothing. Out, under --out DIR: seed-N/ with the world, every model and its evaluation, forks/
with changed copies of the sources, tables.md (by claims.py), and differences.png.

Per seed: base checkpoint -> R-SFT -> mining and concatenation -> GRPO. A variant changes one thing:
some flags, the data, or, where there is no flag, a few lines of code. Three trials have a starting
point of their own: RFT goes on with SFT on the model's right outputs (rft.py); the rare and the
short world have other training rows (toy.py), and so another R-SFT. A *fork* of the code is a diff,
tests/forks/NAME.diff: it is applied to a copy of the sources, and the variant is trained by these.
All of a seed are judged on the same held-out test set, by the sources as they are. For an idea of
your own: change a file, `git diff > tests/forks/NAME.diff`, undo the change, and add a line to VARIANTS.

Every stage takes one thread, and two run at a time: each variant over all seeds, then the next one,
so that a table exists long before the end. The same command goes on where it was stopped:
a stage that has ended is not run again, unless its command, the code, or a stage before it is
another one than then. The settings below were chosen on the validation split of seed 100.

    python tests/ablations.py                                    # all of it: some three hours
    python tests/ablations.py --seeds 1 --only grpo rft          # as demo.sh: some 7 minutes
    python tests/ablations.py --tables                           # of what has ended: runs nothing
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import claims  # these need the repository, which is importable only from here on
import draw
import toy

from data import InputError, changed, lock, read_json, read_records, write_atomic

FORKS = ROOT / "tests" / "forks"
SLOTS = 2  # stages that run side by side
FIRST = 41  # seeds 3 to 7, 21, 22, 31 to 35 and 100 have been looked at before
# glibc then keeps large freed blocks: else each step pays for fresh pages.
KEEP_FREED = {
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
    "MALLOC_MMAP_MAX_": "0",
}

# ---------------------------------------------------------------------- what is run

COMMON = "--dtype float32 --device cpu"
LIMIT = "--max-new-tokens 128"
SETTINGS = {
    "sft.py": (
        "--freeze none --batch-size 64 --lr 2e-3 --no-checkpointing --epochs 10 --save-every 1000"
    ),
    "augment.py": f"{LIMIT} --size 1200 --max-correct 3 --random-share 0.25",
    "grpo.py": (
        f"{LIMIT} --rollout-batch 32 --update-batch 8 --group 8 --lr 2e-4 --floor 0.08"
        " --no-checkpointing --epochs 1 --save-every 1000"
    ),
    "evaluate.py": LIMIT,
}
# Fixed in advance, so that they can run beside GRPO (compare `seconds` in the table): the control is
# SFT for at least as long as mining and GRPO; RFT, which needs the mining, too, for about as long as
# GRPO, and RFT_LONG for as long as the control.
CONTROL = "--epochs 11"
RFT = "--epochs 5"
RFT_LONG = "--epochs 8.5"
GRPO_LONG = "--epochs 3.5"  # as long as two rounds of RFT; fixed when their time was known
FEW = "--epochs 0.334"  # a third of the steps, with the clip range of Eq. (7) over these
SIXTEEN = "--update-batch 2 --lr 5e-5"  # mini-batches of a rollout batch, where SETTINGS has four


@dataclass(frozen=True)
class Pool:
    """An RL set that a model mines of its training rows."""

    model: str = "sft"
    data: str = "world/train"
    flags: str = ""  # added to the settings of augment.py
    parts: str = ""  # the pool whose sampled outputs it takes, instead of sampling again


RARE = Pool("rare-sft", "rare/train")
SHORT = Pool("short-sft", "short/train")
POOLS = {
    "rl": Pool(),
    "rl-unjoined": Pool(flags="--augmented-share 0", parts="rl"),
    "rl-of-rft": Pool("rft"),
    "rare-rl": RARE,
    "rare-rl-random": replace(RARE, flags="--random-share 1", parts="rare-rl"),
    "rare-rl-balanced": replace(RARE, flags="--random-share 0.5 --no-keep-images", parts="rare-rl"),
    "short-rl": SHORT,
    "short-rl-unjoined": replace(SHORT, flags="--augmented-share 0", parts="short-rl"),
}
CHAINS = {"rft-rows": "rl", "rft-rows-2": "rl-of-rft"}  # rows of rft.py: the pool of their outputs


@dataclass(frozen=True)
class Variant:
    """One model of the table. Its paths are in the seed's folder, and begin with a stage's name."""

    name: str
    claim: str
    script: str = "grpo.py"
    start: str = "sft"  # the checkpoint
    data: str = "rl"  # the JSONL file, without its suffix
    flags: str = ""  # added to SETTINGS
    fork: bool = False  # the code is changed by tests/forks/NAME.diff
    against: str = "grpo"  # what it is compared with, seed by seed


BASE, TRAIN = "world/base", "world/train"
RL_HELPS = "RL improves on R-SFT, on as much more SFT, and on SFT with the labels that RL uses"
LENGTH_TERM = "the length term makes reasoning grow; Eco saves tokens at little loss of F1"
REASONING_HELPS = "reasoning before the verdict helps"
MODALITIES = "each modality helps; images alone degrade text"
MINING = "mined hard rows matter (where few rows hold what is to be learned)"
JOINING = "concatenation helps (most where the test is more crowded than training)"
CLIP = "the dynamic clip helps (under sixteen mini-batches)"
CLAIMS = (RL_HELPS, LENGTH_TERM, REASONING_HELPS, MODALITIES, MINING, JOINING, CLIP)

VARIANTS = [  # in the order in which they run
    Variant("sft", RL_HELPS, "sft.py", BASE, TRAIN),
    Variant("control", RL_HELPS, "sft.py", "sft", TRAIN, CONTROL),
    Variant("grpo", RL_HELPS),
    Variant("rft", RL_HELPS, "sft.py", "sft", "rft-rows", RFT),
    Variant("eco", LENGTH_TERM, flags="--eco"),
    Variant("unjoined", JOINING, data="rl-unjoined"),
    Variant("rare-sft", MINING, "sft.py", BASE, "rare/train", "--epochs 4", against="rare-random"),
    Variant("rare-random", MINING, start="rare-sft", data="rare-rl-random", against="rare-random"),
    Variant("rare-balanced", MINING, start="rare-sft", data="rare-rl-balanced", against="rare-random"),
    Variant("rare-released", MINING, start="rare-sft", data="rare-rl", against="rare-random"),
    Variant("short-sft", JOINING, "sft.py", BASE, "short/train", against="short-unjoined"),
    Variant("short-joined", JOINING, start="short-sft", data="short-rl", against="short-unjoined"),
    Variant("short-unjoined", JOINING, start="short-sft", data="short-rl-unjoined", against="short-unjoined"),
    Variant("rft-long", RL_HELPS, "sft.py", "sft", "rft-rows", RFT_LONG),
    Variant("clip-product", CLIP, flags=SIXTEEN, against="clip-constant"),
    Variant("clip-constant", CLIP, flags=f"{SIXTEEN} --clip-schedule constant", against="clip-constant"),
    Variant("clip-none", CLIP, flags=f"{SIXTEEN} --clip-schedule constant --clip 1e9", against="clip-constant"),
    Variant("rare-random-few", MINING, "grpo.py", "rare-sft", "rare-rl-random", FEW, against="rare-random-few"),
    Variant("rare-balanced-few", MINING, "grpo.py", "rare-sft", "rare-rl-balanced", FEW, against="rare-random-few"),
    Variant("accuracy-only", LENGTH_TERM, fork=True),
    Variant("labels-only", REASONING_HELPS, "sft.py", BASE, TRAIN, fork=True, against="sft"),
    # As many epochs as "sft"; sft-third has as many steps as they.
    Variant("sft-text", MODALITIES, "sft.py", BASE, f"{TRAIN}-text", against="sft"),
    Variant("sft-image", MODALITIES, "sft.py", BASE, f"{TRAIN}-image", against="sft"),
    Variant("sft-text-image", MODALITIES, "sft.py", BASE, f"{TRAIN}-text_image", against="sft"),
    Variant("sft-third", MODALITIES, "sft.py", BASE, TRAIN, "--epochs 3.333", against="sft"),
    Variant("rft-twice", RL_HELPS, "sft.py", "rft", "rft-rows-2", RFT),
    Variant("grpo-long", RL_HELPS, flags=GRPO_LONG, against="rft-twice"),
]  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One command of one seed. Its output goes to NAME.log; NAME.stage.json says that it ended."""

    name: str
    folder: Path
    command: str  # a script of `sources`, and its flags
    needs: tuple["Stage", ...] = ()
    sources: Path = ROOT
    threads: int = 1
    copied: tuple[Path, Path] | None = None  # a folder, and where a copy of it is wanted before

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def record(self) -> Path:
        return self.folder / f"{self.name}.stage.json"

    def settings(self) -> dict:
        """What its result depends on."""
        return {
            "command": self.command,
            "threads": self.threads,
            "code": code_digest(self.sources),
            **{f"stage {need.name}": digest(need.settings()) for need in self.needs},
        }

    def is_done(self) -> bool:
        """Whether it has ended with the same settings, and all that it needs has, too."""
        if not self.record.is_file() or not all(need.is_done() for need in self.needs):
            return False
        return read_json(self.record)["settings"] == self.settings()

    def seconds(self) -> float:
        """Of a core, for this stage alone: not by the clock, as other work may run beside it."""
        return read_json(self.record)["seconds"]


def digest(value: dict | list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@cache
def code_digest(sources: Path) -> str:
    """Of the Python files in a folder, toy.py and rft.py, as they were when first asked for."""
    files = [*sorted(sources.glob("*.py")), *(ROOT / "tests" / f for f in ("toy.py", "rft.py"))]
    return digest([file.read_text() for file in files])


def forked(name: str, folder: Path) -> Path:
    """A copy of the sources in `folder`, changed by NAME.diff. InputError if it does not apply."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    # Within another repository, git would leave out the files that this one ignores.
    apart = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    command = ["git", "apply", str(FORKS / f"{name}.diff")]
    applied = subprocess.run(command, cwd=folder, env=apart, capture_output=True, text=True)
    if applied.returncode or code_digest(folder) == code_digest(ROOT):
        raise InputError(f"tests/forks/{name}.diff does not apply to the sources: {applied.stderr}")
    return folder


def merged(flags: str, others: str) -> str:
    """The flags of both; where both have one, that of the others."""
    given = [flag.split() for flag in f"{flags} {others}".split("--")[1:]]
    values = {name: value for name, *value in given}
    return " ".join(" ".join([f"--{name}", *value]) for name, value in values.items())


def stages_of(seed: int, out: Path, variants: list[Variant], alone: bool) -> dict[str, Stage]:
    """The stages of one seed, each after those it needs. alone: no other seed runs beside it."""
    folder = out / f"seed-{seed}"
    shared = f"{COMMON} --seed {seed}"
    # Only these two would leave a core idle. Neither is compared with the seconds of another stage.
    first_threads = SLOTS if alone else 1
    world = f"tests/toy.py --out {folder}/world --seed {seed}"
    stages = {"world": Stage("world", folder, world, threads=first_threads)}

    def needed(*paths: str) -> tuple[Stage, ...]:
        """The stages that make these files; what is not there yet is added before."""
        names = sorted({path.split("/")[0] for path in paths})
        for name in names:
            if name not in stages:
                add(name)
        return tuple(stages[name] for name in names)

    def add(name: str) -> None:
        """The stage of a variant, of an RL set, of RFT's rows or of another world's rows."""
        if name in POOLS:
            stages[name] = mine(name, POOLS[name])
        elif name in CHAINS:
            command = (
                f"tests/rft.py --data {folder}/{TRAIN}.jsonl --out {folder}/{name}.jsonl"
                f" --outputs {folder}/{CHAINS[name]}.jsonl.parts/predictions.jsonl"
            )
            stages[name] = Stage(name, folder, command, needed(TRAIN, CHAINS[name]))
        elif name in toy.WORLDS:
            command = f"tests/toy.py --out {folder}/{name} --seed {seed} --rows {name}"
            stages[name] = Stage(name, folder, command)
        else:
            stages[name] = train(by_name[name])

    def train(variant: Variant) -> Stage:
        command = (
            f"{variant.script} --model {folder}/{variant.start}"
            f" --data {folder}/{variant.data}.jsonl --out {folder}/{variant.name}"
            f" {merged(SETTINGS[variant.script], variant.flags)} {shared} --fresh"
        )
        needs = needed(variant.start, variant.data)
        sources = forked(variant.name, out / "forks" / variant.name) if variant.fork else ROOT
        threads = first_threads if variant.name == "sft" else 1
        return Stage(variant.name, folder, command, needs, sources, threads)

    def mine(name: str, pool: Pool) -> Stage:
        command = (
            f"augment.py --model {folder}/{pool.model} --data {folder}/{pool.data}.jsonl"
            f" --out {folder}/{name}.jsonl {merged(SETTINGS['augment.py'], pool.flags)} {shared}"
        )
        if not pool.parts:
            return Stage(name, folder, command + " --fresh", needed(pool.model, pool.data))
        mined = (folder / f"{pool.parts}.jsonl.parts", folder / f"{name}.jsonl.parts")
        return Stage(name, folder, command, needed(pool.parts), copied=mined)

    by_name = {variant.name: variant for variant in VARIANTS}
    for variant in variants:
        needed(variant.name)
        name = f"eval-{variant.name}"
        command = (
            f"evaluate.py --model {folder}/{variant.name} --data {folder}/world/test.jsonl"
            f" --out {folder}/{name} {SETTINGS['evaluate.py']} {shared} --fresh"
        )
        stages[name] = Stage(name, folder, command, needed("world", variant.name))
    return stages


# ---------------------------------------------------------------------- running it


def start(stage: Stage) -> subprocess.Popen:
    """Begin a stage: its command is printed, its output goes to its log."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    if stage.record.is_file():
        other = changed(read_json(stage.record)["settings"], stage.settings())
        print(f"\n{stage.name} once more, with another {', '.join(other) or 'stage before it'}")
        stage.record.unlink()
    if stage.copied:
        shutil.copytree(*stage.copied, dirs_exist_ok=True)
    print(f"\n$ python {stage.command}", flush=True)
    environment = os.environ | KEEP_FREED | {"OMP_NUM_THREADS": str(stage.threads)}
    environment["PYTHONUNBUFFERED"] = "1"
    script, *flags = stage.command.split()
    command = [sys.executable, str(stage.sources / script), *flags]
    with open(stage.log, "wb") as log:
        output = {"stdout": log, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=ROOT, env=environment, **output)


def log_lines(stage: Stage) -> list[str]:
    """What a stage has said so far."""
    return stage.log.read_text(errors="replace").splitlines()


def ended_seconds() -> float:
    """Seconds of a core of all stages that have ended (and were waited for) so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def finish(stage: Stage, code: int, seconds: float) -> None:
    """Print the last lines of the log, leave the record. SystemExit if the stage failed."""
    lines = log_lines(stage)
    if code:
        print("\n".join([f"{stage.name} failed; {stage.log} ends with:", *lines[-30:]]))
        sys.exit(code)
    record = {"settings": stage.settings(), "seconds": round(seconds, 1)}
    write_atomic(stage.record, json.dumps(record, indent=1) + "\n")
    print("\n".join(lines[-2:]), f"\n({stage.name}: {seconds:.0f} s, {stage.log})", flush=True)


def run_all(stages: Iterable[Stage], every: float = 10.0) -> None:
    """Run the stages that are not done, SLOTS at a time: always the first whose needs are met.

    Meanwhile the newest line of every stage under way is printed every so many seconds. When a
    stage fails, the other one is stopped, and so is this process.
    """
    done = {stage for stage in stages if stage.is_done()}
    waiting = [stage for stage in stages if stage not in done]
    running, shown = {}, time.perf_counter()  # {stage: its process, and when it began}
    try:
        while waiting or running:
            ready = [stage for stage in waiting if done.issuperset(stage.needs)]
            for stage in ready[: SLOTS - len(running)]:
                waiting.remove(stage)
                running[stage] = start(stage), time.perf_counter()
            time.sleep(0.2)
            now = time.perf_counter()
            if now - shown >= every:
                shown = now
                for stage, (_, began) in running.items():
                    newest = (log_lines(stage) or ["starting"])[-1]
                    print(f"{now - began:4.0f} s  {stage.name}: {newest}", flush=True)
            for stage, (process, _) in list(running.items()):
                before = ended_seconds()
                if process.poll() is not None:
                    del running[stage]
                    finish(stage, process.returncode, ended_seconds() - before)
                    done.add(stage)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.wait()


# ---------------------------------------------------------------------- what came out


def training_seconds(stage: Stage) -> float:
    """Of training and, for RL and RFT, of mining: all stages that come after the world and R-SFT."""
    started_from = {"world", *toy.WORLDS, "sft", *(pool.model for pool in (RARE, SHORT))}
    found, waiting = {}, [stage]
    while waiting:
        one = waiting.pop()
        found[one.name] = one
        waiting += [need for need in one.needs if need.name not in started_from]
    return sum(one.seconds() for one in found.values())


def results_of(stages: dict[str, Stage], variants: list[Variant]) -> claims.Result:
    """What the evaluations of one seed found, as far as they have ended."""
    folder, scores = stages["world"].folder, {}
    ended = [variant for variant in variants if stages[f"eval-{variant.name}"].is_done()]
    for variant in ended:
        name = variant.name
        records = read_records(folder / f"eval-{name}" / "predictions.jsonl")
        truths = read_json(folder / "world" / "truth.json")
        scores[name] = claims.scores(records, truths)
        scores[name]["seconds"] = training_seconds(stages[name])
        scores[claims.ALWAYS] = claims.scores_of_always_harmful(records, truths)
    return scores


def write_tables(out: Path, results: dict[int, claims.Result], variants: list[Variant]) -> None:
    """Leave tables.md and, if there is something to compare, differences.png in `out`."""
    ordered = sorted(variants, key=lambda variant: list(CLAIMS).index(variant.claim))
    lines = [claims.Line(variant.claim, variant.name, variant.against) for variant in ordered]
    write_atomic(out / "tables.md", claims.report(results, lines))
    compared = [line for line in lines if claims.difference(results, line, "f1")]
    if compared:
        write_atomic(out / "differences.png", draw.differences(results, compared))
    print(f"\n{(out / 'tables.md').read_text()}\nwritten: {out / 'tables.md'}")


def main() -> None:
    names = [variant.name for variant in VARIANTS]
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", default="out/claims", help="folder to write")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--first", type=int, default=FIRST, help="the first seed")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="beside sft")
    parser.add_argument("--tables", action="store_true", help="of what has ended; run nothing")
    args = parser.parse_args()
    out, seeds = Path(args.out).resolve(), range(args.first, args.first + args.seeds)
    variants = [variant for variant in VARIANTS if variant.name in {"sft", *args.only}]
    try:
        with lock(out):
            stages = {seed: stages_of(seed, out, variants, alone=len(seeds) == 1) for seed in seeds}
            if not args.tables:
                by_variant = zip(*(of_seed.values() for of_seed in stages.values()))
                run_all([stage for of_all_seeds in by_variant for stage in of_all_seeds])
            results = {seed: results_of(stages[seed], variants) for seed in seeds}
            write_tables(out, results, variants)
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on")
        sys.exit(130)


if __name__ == "__main__":
    main()
