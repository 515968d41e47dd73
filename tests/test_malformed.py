"""Whatever is malformed ends in one line, exit 2 or 1, no traceback, and nothing written.

Each fault is tried on the call that reads the file; the commands that read it, on some of them.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from d3po_bench.errors import UserError
from d3po_bench.feedback.agreement import read_label_files
from d3po_bench.feedback.rounds import Round
from d3po_bench.models.adapters import Training
from d3po_bench.models.sources import Source, load
from d3po_bench.pictures import read_pictures
from d3po_bench.prompts import read_prompts
from d3po_bench.runs.run import RunFolder
from d3po_bench.runs.store import RunStore
from eval.analysis import table1
from eval.analysis.runs import read_run
from eval.verify import folder as verify
from tests import malformed
from tests.commands import PUBLISHED, Command, Outcome, contents, run_of, seed_folder
from tests.conftest import CPU
from tests.feedback_round import new_round
from tests.malformed import BROKEN, Base, Change, cut, edited, gone, holds

RUN = f"runs/{malformed.RUN}"
AGAIN = "again"
"""Stands for the command that the base `half` was made with."""
PROGRESS = re.compile(r"\d+ of \d+ pieces|.* +0%  evaluating the base model|scoring no-fine-tune")
"""What a command may have told before it came to what is malformed."""

Fault = Mapping[str, Change]
"""Path below the base's folder -> how it is changed; {half} stands for that base's run folder."""


@dataclass(frozen=True)
class Family:
    """What can be wrong with a kind of file, and what reads it."""

    base: Base
    faults: Mapping[str, Fault]
    read: Callable[[Path], object] | None = None
    """Given the base's folder; None where every fault is tried on the commands."""
    commands: tuple[str, ...] = ()


def each(path: str, changes: Mapping[str, Change]) -> dict[str, Fault]:
    return {name: {path: change} for name, change in changes.items()}


RESUMED: dict[str, Fault] = {
    "half a config": {"{half}/config.json": cut(0.5)},
    "a config without run_id": {"{half}/config.json": edited(run_id=...)},
    "a newer version": {"{half}/provenance.json": edited(**malformed.NEWER)},
    "inputs of a list": {"{half}/provenance.json": edited(inputs=[])},
    "a line of text": {"{half}/metrics.jsonl": malformed.METRICS["a line of text"]},
    "a round of text": {"{half}/eval.csv": malformed.ROWS["round of text"]},
    "no whole checkpoint": {
        f"{{half}}/checkpoints/{part}.safetensors": malformed.HEADERS["header of garbage"]
        for part in ("last", "previous")
    },
}

RESULTS: dict[str, Fault] = {
    **each("results/manifest.json", BROKEN),
    "unknown method": {f"results/{malformed.RUN}/config.json": edited(method="nonsense")},
    "no run_id": {f"results/{malformed.RUN}/config.json": edited(run_id=...)},
    "seed of text": {f"results/{malformed.RUN}/config.json": edited(seed="0")},
    **each(f"results/{malformed.RUN}/metrics.jsonl", {
        f"metrics: {n}": malformed.METRICS[n] for n in ("a line of a list", "round of text", "deep")
    }),
    **each(f"results/{malformed.RUN}/eval.csv", {
        f"rows: {n}": malformed.ROWS[n]
        for n in ("no sampler", "score of text", "too few fields", "a null byte")
    }),
}  # fmt: skip

OTHER = '{"model": "x", "objective": "y", "method": "z", "seed": 0}'
LORA = "lora/pytorch_lora_weights.safetensors"
EVALUATE = "evaluate pictures --scorers jpeg_size --device cpu"
REDRAW = "table1 --redraw --out table1"


def read_lora(micro: Path, folder: Path) -> None:
    load(Source(path=str(micro)), CPU, Training()).load_saved(folder / "lora")


FAMILIES = {
    "config": Family(
        "run", each(f"{RUN}/config.json", {**BROKEN, **malformed.CONFIGS}),
        lambda folder: RunFolder(folder / RUN).config,
        ("plot runs", f"show {RUN}", f"evaluate {RUN}"),
    ),
    "provenance": Family(
        "run", each(f"{RUN}/provenance.json", malformed.FACTS),
        lambda folder: RunFolder(folder / RUN).facts, ("plot runs", f"show {RUN}"),
    ),
    "metrics": Family(
        "run", each(f"{RUN}/metrics.jsonl", malformed.METRICS),
        lambda folder: read_run(RunFolder(folder / RUN)), ("plot runs",),
    ),
    "seconds": Family(
        "run", each(f"{RUN}/timing.jsonl", malformed.TIMES),
        lambda folder: read_run(RunFolder(folder / RUN)), ("plot runs --x seconds",),
    ),
    "rows": Family(
        "run", each(f"{RUN}/eval.csv", malformed.ROWS),
        lambda folder: read_run(RunFolder(folder / RUN)), ("plot runs", f"show {RUN}"),
    ),
    "a run to resume": Family("half", RESUMED, None, (AGAIN,)),
    "checkpoints": Family(
        "half",
        {
            name: {f"{{half}}/checkpoints/{n}.safetensors": change for n in ("last", "previous")}
            for name, change in malformed.HEADERS.items()
        },
        lambda folder: [RunStore(p.parent).load_checkpoint() for p in folder.rglob("eval.csv")],
    ),
    "results": Family("results", RESULTS, None, ("verify results",)),
    "rows of Table 1": Family(
        "table1", each("table1/rows/d3po-0.csv", malformed.TABLE1)
        | {"no base": {"table1/rows/no-fine-tune.csv": gone}},
        lambda folder: table1.write(folder / "table1"), (REDRAW,),
    ),
    "signal of Table 1": Family(
        "table1", each("table1/signal.json", malformed.SIGNAL),
        lambda folder: table1.write(folder / "table1"), (REDRAW,),
    ),
    "choices": Family(
        "table1", each("table1/choices/seed-0.csv", malformed.CHOICES) | {"other models": {
            "table1/choices/seed-1.csv": holds("source,share,raters\nno-fine-tune,1,people\n")
        }},
        lambda folder: table1.write(folder / "table1"), (REDRAW,),
    ),
    "pictures": Family(
        "pictures", each("pictures/metadata.csv", malformed.PICTURES),
        lambda folder: read_pictures(folder / "pictures"), (EVALUATE,),
    ),
    "a picture": Family(
        "pictures",
        each("pictures/0.png", {"cut": cut(0.5), "empty": holds(""), "text": holds("cat")}),
        None, (EVALUATE,),
    ),
    "prompts": Family(
        "nothing", each("list.txt", malformed.PROMPTS),
        lambda folder: read_prompts(str(folder / "list.txt")),
        (
            "run --method d3po --objective incompress --set prompts=list.txt",
            "evaluate tiny --scorers jpeg_size --prompts list.txt",
        ),
    ),
    "rounds": Family(
        "round", each("round/round.json", {**malformed.ROUNDS, "missing": gone})
        | {"a picture cut off": {"round/images/0000-0.png": cut(0.5)}},
        lambda folder: Round.read(folder / "round"), ("feedback status round",),
    ),
    "sources of a round": Family(
        "round", each("round/sources.json", malformed.SOURCES), None,
        ("feedback choices round --out choices.csv",),
    ),
    "label files": Family(
        "nothing", each("labels/a.json", malformed.LABELS) | {
            "none": {"labels/a.txt": holds("")},
            "of two widths": {
                "labels/a.json": holds("[[0, 0]]"), "labels/b.json": holds("[[0, 0, 0]]")
            },
        },
        lambda folder: read_label_files(folder / "labels"),
    ),
    "runs that lack a part": Family(
        "run",
        {
            "no evaluation": {f"{RUN}/eval.csv": gone},
            "two models": {f"{RUN}/../seed-1/config.json": holds(OTHER)},
        },
        None, ("plot runs",),
    ),
}  # fmt: skip

ALONE: dict[str, tuple[Base, Fault]] = {
    f"show {RUN}": ("run", {f"{RUN}/config.json": gone}),
    "plot runs --x seconds": ("run", {f"{RUN}/timing.jsonl": gone}),
    f"evaluate {RUN}": ("run", {}),  # which has no LoRA
    "table1 runs": ("run", {}),
    "verify results --rerun -1": ("results", {}),
    "verify results --rerun x": ("results", {}),
    "verify results --rerun 99": ("results", {}),
    "evaluate lora --model {model} --scorers jpeg_size --prompts animals --count 1 --steps 2 "
    "--device cpu": ("lora", {LORA: malformed.HEADERS["header of garbage"]}),
}
"""Commands that are given what they cannot take."""


@pytest.fixture(scope="module")
def bases(finished: Path, micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each base, with what it begins with."""
    home = tmp_path_factory.mktemp("bases")
    (home / "nothing").mkdir()
    shutil.copytree(PUBLISHED, home / "run" / RUN)
    half = seed_folder(home / "half" / "runs", micro)
    shutil.copytree(finished, half)
    facts = json.loads((half / "provenance.json").read_text())
    del facts["ended"]
    (half / "provenance.json").write_text(json.dumps(facts))
    shutil.copytree(finished / "lora", home / "lora" / "lora")
    shutil.copytree(PUBLISHED, home / "results" / "results" / malformed.RUN)
    (home / "results" / "README.md").write_text("Nothing.\n")
    verify.record(home / "results" / "results")
    write_table1(home / "table1" / "table1")
    (home / "pictures" / "pictures").mkdir(parents=True)
    Image.effect_noise((32, 32), 90).save(home / "pictures" / "pictures" / "0.png")
    table = home / "pictures" / "pictures" / "metadata.csv"
    table.write_text("file_name,text\n0.png,a cat\n")
    new_round(home / "round" / "round", number=2)
    return home


def write_table1(folder: Path) -> None:
    rows = "steps,sampler,prompt,index,jpeg_size,weights\n" + "".join(
        f"10,eta1,{prompt},0,1.{n},jpeg_size=code\n" for n, prompt in enumerate(("cat", "dog"))
    )
    (folder / "rows").mkdir(parents=True)
    for name in ("no-fine-tune", "d3po-0"):
        (folder / "rows" / f"{name}.csv").write_text(rows)
    shares = "drawn/no-fine-tune-0,0.4,0,1,people\ndrawn/d3po-0,0.6,0,1,people\n"
    (folder / "choices").mkdir()
    (folder / "choices" / "seed-0.csv").write_text("source,share,low,high,raters\n" + shares)
    signal = {"objective": "incompress", "column": "jpeg_size"}
    (folder / "signal.json").write_text(json.dumps(signal))


class Damaged:
    """A copy of a base, in which one fault after the other is made and put right."""

    def __init__(self, base: Path, folder: Path, half: str) -> None:
        shutil.copytree(base, folder, dirs_exist_ok=True)
        self.folder, self.half = folder, half

    def try_on(self, fault: Fault, call: Callable[[], None]) -> None:
        """Make the fault, call, see that nothing was written, and put the fault right."""
        whole = contents(self.folder)
        for name, change in fault.items():
            path = self.folder / name.replace("{half}", self.half)
            data = change(path.read_bytes() if path.exists() else b"")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True) if data is None else path.write_bytes(data)
        before = contents(self.folder)
        call()
        assert contents(self.folder) == before
        for name in before.keys() - whole.keys():
            (self.folder / name).unlink()
        for name, data in whole.items():
            if before.get(name) != data:
                (self.folder / name).write_bytes(data)


@pytest.fixture
def damaged(bases: Path, micro: Path, tmp_path: Path) -> Callable[[Base], Damaged]:
    half = str(seed_folder(Path("runs"), micro))
    return lambda base: Damaged(bases / base, tmp_path, half)


@pytest.fixture
def tried(command: Command, micro: Path) -> Callable[[str], Outcome]:
    """Call the command line; its arguments with spaces between them."""

    def call(said: str) -> Outcome:
        return command(*(run_of(micro) if said == AGAIN else shlex.split(said)))

    return call


def require_one_line(done: Outcome) -> None:
    *before, last = done.err.splitlines()
    assert done.code in (1, 2), done
    assert last.startswith("error: "), done
    assert not [line for line in before if not PROGRESS.fullmatch(line)], done
    assert "Traceback" not in done.out


@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.read])
def test_every_fault_is_told_by_what_reads_the_file(
    name: str,
    damaged: Callable[[Base], Damaged],
) -> None:
    family = FAMILIES[name]
    read, copy = family.read, damaged(family.base)
    assert read is not None

    def call(fault: str) -> None:
        try:
            read(copy.folder)
        except UserError:
            return
        pytest.fail(f"{fault} is taken for whole")

    if family.base != "nothing":
        read(copy.folder)  # so it is refused for the fault alone
    for stray in copy.folder.rglob("table1.*"):
        stray.unlink()
    for fault, files in family.faults.items():
        copy.try_on(files, partial(call, fault))


def test_a_lora_that_is_no_lora_is_told(damaged: Callable[[Base], Damaged], micro: Path) -> None:
    copy = damaged("lora")
    read_lora(micro, copy.folder)

    def call() -> None:
        with pytest.raises(UserError):
            read_lora(micro, copy.folder)

    for fault in (
        "empty",
        "header past the end",
        "offsets backwards",
        "cut off",
        "strange tensors",
    ):
        copy.try_on({LORA: malformed.HEADERS[fault]}, call)


@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.commands])
def test_commands_refuse_what_is_malformed(
    name: str, damaged: Callable[[Base], Damaged], tried: Callable[[str], Outcome]
) -> None:
    """All faults where nothing but the command reads them, else the first and the last."""
    family = FAMILIES[name]
    copy, faults = damaged(family.base), list(family.faults.values())
    for said in family.commands:
        for fault in faults if family.read is None else (faults[0], faults[-1]):
            copy.try_on(fault, lambda said=said: require_one_line(tried(said)))  # type: ignore[misc]


@pytest.mark.parametrize("said", ALONE)
def test_commands_refuse_what_they_cannot_take(
    said: str, damaged: Callable[[Base], Damaged], tried: Callable[[str], Outcome], micro: Path
) -> None:
    base, fault = ALONE[said]
    damaged(base).try_on(
        fault, lambda: require_one_line(tried(said.replace("{model}", str(micro))))
    )


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("run", "plot runs"), ("run", f"show {RUN}"), ("half", AGAIN),
        ("results", "verify results"), ("table1", REDRAW), ("pictures", EVALUATE),
        ("round", "feedback status round"),
        ("lora", next(said for said in ALONE if said.startswith("evaluate lora"))),
    ],
)  # fmt: skip
def test_commands_take_what_is_whole(
    base: Base, said: str, damaged: Callable[[Base], Damaged], tried: Callable[[str], Outcome],
    micro: Path,
) -> None:  # fmt: skip
    damaged(base)
    done = tried(said.replace("{model}", str(micro)))
    assert done.code == 0, done
