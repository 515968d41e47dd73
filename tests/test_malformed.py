"""Whatever is malformed ends in one line, exit 2 or 1, no traceback, and nothing written."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from PIL import Image

from d3po_bench.cli import cli, main
from d3po_bench.feedback.agreement import read_label_files
from d3po_bench.feedback.rounds import Round
from eval.verify import folder as verify
from tests import malformed
from tests.feedback_round import new_round
from tests.malformed import Base, Case
from tests.test_cli import run_of, seed_folder

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "results" / malformed.RUN
FAMILIES = malformed.families()
PROGRESS = re.compile(r"\d+ of \d+ pieces|.* +0%  evaluating the base model|scoring no-fine-tune")
"""What a command may have told before it came to what is malformed."""
CASES = [case for family in FAMILIES.values() for case in family]


@pytest.fixture(scope="module")
def bases(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Base, Path]:
    """Whole folders that the cases begin with."""
    home = tmp_path_factory.mktemp("bases")
    makers: dict[Base, Callable[[Path], None]] = {
        "nothing": lambda folder: None,
        "run": lambda folder: _copy(PUBLISHED, folder / "runs" / malformed.RUN),
        "half": lambda folder: _half(micro, folder),
        "lora": lambda folder: _copy(
            seed_folder(home / "half" / "runs", micro) / "lora", folder / "lora"
        ),
        "model": lambda folder: _copy(micro, folder / "model"),
        "results": _results,
        "table1": _table1,
        "pictures": _pictures,
        "round": lambda folder: _round(folder / "round"),
    }
    for name, make in makers.items():
        (home / name).mkdir()
        make(home / name)
    return {name: home / name for name in makers}


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)


def _half(micro: Path, folder: Path) -> None:
    main(run_of(micro, "--out", folder / "runs"))
    path = seed_folder(folder / "runs", micro) / "provenance.json"
    facts = json.loads(path.read_text())
    del facts["ended"]
    path.write_text(json.dumps(facts))


def _results(folder: Path) -> None:
    _copy(PUBLISHED, folder / "results" / malformed.RUN)
    verify.record(folder / "results")


def _table1(folder: Path) -> None:
    rows = "steps,sampler,prompt,index,jpeg_size,weights\n" + "".join(
        f"10,eta1,{prompt},0,1.{n},jpeg_size=code\n" for n, prompt in enumerate(("cat", "dog"))
    )
    (folder / "table1" / "rows").mkdir(parents=True)
    for name in ("no-fine-tune", "d3po-0"):
        (folder / "table1" / "rows" / f"{name}.csv").write_text(rows)
    shares = "drawn/no-fine-tune-0,0.4,0,1,people\ndrawn/d3po-0,0.6,0,1,people\n"
    (folder / "table1" / "choices").mkdir()
    (folder / "table1" / "choices" / "seed-0.csv").write_text(
        "source,share,low,high,raters\n" + shares
    )
    signal = {"objective": "incompress", "column": "jpeg_size"}
    (folder / "table1" / "signal.json").write_text(json.dumps(signal))


def _pictures(folder: Path) -> None:
    (folder / "pictures").mkdir()
    Image.effect_noise((32, 32), 90).save(folder / "pictures" / "0.png")
    (folder / "pictures" / "metadata.csv").write_text("file_name,text\n0.png,a cat\n")


def _round(folder: Path) -> None:
    new_round(folder, number=2)


@pytest.fixture(autouse=True)
def _readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands for what is read by library calls alone, so that they go through `main`, too."""
    place = click.Argument(["folder"], type=click.Path(path_type=Path))
    for name, reader in {"read-round": Round.read, "read-labels": read_label_files}.items():
        command = click.Command(name, params=[place], callback=lambda folder, r=reader: r(folder))
        monkeypatch.setitem(cli.commands, name, command)


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, with a hash of what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file() else "folder"
        for path in folder.rglob("*")
    }  # fmt: skip


def arguments(case: Case, micro: Path) -> list[str]:
    if case.command == malformed.GO_ON:
        return run_of(micro)
    return [part.replace("{model}", str(micro)) for part in case.command]


def prepared(case: Case, bases: dict[Base, Path], micro: Path, folder: Path) -> None:
    shutil.copytree(bases[case.base], folder, dirs_exist_ok=True)
    malformed.put(folder, case, str(seed_folder(Path("runs"), micro)))


def called(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr; what `main` lets through is a traceback to people."""
    capsys.readouterr()
    code = 0
    try:
        main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


@pytest.fixture
def _in_time() -> Iterator[None]:
    """Ten seconds for a case: what goes on for longer would have begun to work."""
    before = signal.signal(signal.SIGALRM, _late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _late(number: int, frame: object) -> None:
    raise TimeoutError("a malformed input was worked on for ten seconds")


# ---- the corpus


def test_there_are_200_different_cases_of_every_family() -> None:
    assert len(CASES) >= 200
    assert len({case.name for case in CASES}) == len(CASES)
    assert {name: len(family) > 10 for name, family in FAMILIES.items()} == dict.fromkeys(
        FAMILIES, True
    )
    assert [c.name for c in malformed.settings()] == [c.name for c in FAMILIES["settings"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.usefixtures("_in_time")
def test_it_ends_in_one_line_and_writes_nothing(
    case: Case, bases: dict[Base, Path], micro: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    prepared(case, bases, micro, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    code, out, err = called(arguments(case, micro), capsys)
    said = [ln for ln in err.splitlines() if ln.startswith("error: ")]
    assert code in (1, 2), (code, out, err)
    assert len(said) == 1, err
    assert err.splitlines()[-1] == said[0]
    assert not [ln for ln in err.splitlines()[:-1] if not PROGRESS.fullmatch(ln)]
    assert "Traceback" not in out + err
    assert contents(tmp_path) == before


# ---- the bases are whole: what is refused is refused for what was changed


@pytest.mark.parametrize(
    ("base", "command"),
    [
        ("run", ("plot", "runs")),
        ("run", ("show", f"runs/{malformed.RUN}")),
        ("half", malformed.GO_ON),
        ("lora", next(c.command for c in FAMILIES["safetensors"] if c.base == "lora")),
        ("model", tuple(run_of("model", rounds=1))),
        ("results", ("verify", "results")),
        ("table1", ("table1", "--redraw", "--out", "table1")),
        ("pictures", ("evaluate", "pictures", "--scorers", "jpeg_size", "--device", "cpu")),
        ("round", ("read-round", "round")),
    ],
)
def test_a_base_is_whole(
    base: Base, command: tuple[str, ...], bases: dict[Base, Path], micro: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    case = Case("whole", command, base)
    prepared(case, bases, micro, tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = called(arguments(case, micro), capsys)
    assert code == 0, (out, err)


def test_a_whole_grid_and_whole_labels_are_read(tmp_path: Path) -> None:
    from d3po_bench.launch import grid

    (tmp_path / "grid.toml").write_text(malformed.GRID)
    assert grid.read(tmp_path / "grid.toml").seeds == [0, 1]
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.json").write_text("[[0, -1]]")
    assert read_label_files(tmp_path / "labels").tolist() == [[0, -1]]
