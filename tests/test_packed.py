"""Many runs as one file, and what is made of the comparison on version 2 that lies in one."""

from __future__ import annotations

import io
import lzma
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from scipy.stats import ttest_rel

from d3po_bench.errors import UserError
from d3po_bench.runs import packed
from d3po_bench.runs.packed import PACKED
from d3po_bench.runs.run import RunFolder, find_runs
from eval.analysis.report import report
from eval.analysis.runs import read_groups
from eval.analysis.tables import Table
from results import devices, make, sizes, version2
from results import measure as measuring
from tests.commands import Command, contents, refused
from tests.made_up import add_columns, write_run

GAINS = {
    "d3po_of_two": ((1.0, 1.2, 1.4), -0.5), "ddpo": ((0.2, 0.3, 0.6), -0.5),
    "grpo": ((3.0, 3.201), -0.5), "d3po_random": ((0.1, -0.1, 0.0), 0.0),
}  # fmt: skip
"""Method -> what each seed gains on incompress, in kB, and what all gain on compress."""

DRIFTS = {"grpo": "0.3", "d3po_of_two": "0.04"}
"""At the end; 0.2 of all others."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of ten rounds; GRPO has two of the three seeds."""
    home = tmp_path_factory.mktemp("packed")
    for method, (up, down) in GAINS.items():
        for seed, gain in enumerate(up, 1000):
            for objective, end in (("incompress", gain), ("compress", down)):
                run = write_run(home, objective, method, seed, gain=end / 10)
                costs = dict.fromkeys(("unet_forwards", "score_mean", "loss", "grad_norm"), 1)
                add_columns(run, costs, drift=DRIFTS.get(method, "0.2"))
                (run / "provenance.json").write_text("{}")
                (run / "weights").write_text("not published")
    (home / "tiny" / "diversity.csv").write_text("objective,method,seed,of\n")
    return home / "tiny"


@pytest.fixture(scope="module")
def published(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(runs, tmp_path_factory.mktemp("published") / "tiny2", "--pack")


def publish(runs: Path, target: Path, *how: str) -> Path:
    words = ["publish", str(runs), str(target), "--no-sheets", *how]
    done = CliRunner().invoke(measuring.main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return target


# ---- one file in place of many


def test_packed_runs_are_read_as_their_folders(runs: Path, published: Path) -> None:
    assert sorted(path.name for path in published.iterdir()) == ["diversity.csv", PACKED]
    tables = ["gains", "contrast", "cost", "runs"]
    assert report([published], tables) == report([runs], tables).replace(str(runs), str(published))
    places = [run.place.relative_to(published) for run in find_runs([published])]
    assert places == [run.folder.relative_to(runs) for run in find_runs([runs])]


def test_a_part_of_packed_runs_is_named_as_if_it_stood_there(
    runs: Path, published: Path, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(published, tmp_path / "tiny2")
    there, part = tmp_path / "tiny2", Path("incompress", "ddpo")
    assert report([there / part]) == report([runs / part])
    seed = part / "seed-1000"
    assert command("show", there / seed).out == command("show", runs / seed).out != ""
    (there / part / "plots").mkdir(parents=True)  # as `plot` leaves them
    assert find_runs([there / part])[0].place == there / seed
    refused(command("show", there / part), "is not a run folder")
    refused(command("report", there / "nowhere"), "There are no run folders")


def test_the_same_runs_give_the_same_bytes_there_and_back(
    runs: Path, published: Path, tmp_path: Path
) -> None:
    before = (published / PACKED).read_bytes()
    shutil.copytree(published, tmp_path / "folders")
    publish(tmp_path / "folders", tmp_path / "folders")  # in place
    assert not (tmp_path / "folders" / PACKED).exists()
    text = {name: data for name, data in contents(runs).items() if not name.endswith("weights")}
    assert contents(tmp_path / "folders") == text
    publish(tmp_path / "folders", tmp_path / "folders", "--pack")
    assert contents(tmp_path / "folders") == contents(published)
    assert (published / PACKED).read_bytes() == before


def entry(name: str, kind: bytes = tarfile.REGTYPE) -> Callable[[], bytes]:
    def made() -> bytes:
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:xz") as tar:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        return data.getvalue()

    return made


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        (entry("../../config.json"), "outside"),
        (entry("a/" * 1500 + "config.json"), "recursion|too long"),
        (entry("a/config.json", tarfile.SYMTYPE), "'a/config.json' is no file"),
        (entry("a/config.json", tarfile.LNKTYPE), "'a/config.json' is no file"),
        (entry("a/config.json", tarfile.FIFOTYPE), "'a/config.json' is no file"),
        (lambda: lzma.compress(bytes(2000)), "holds more than 1,000 bytes"),
        (lambda: entry("a/config.json")()[:-9], "cut short"),
        (lambda: lzma.compress(b"text"), "truncated header"),
        (lambda: b"text", "not supported"),
    ],
)
def test_an_archive_that_nobody_packed_is_refused(
    archive: Callable[[], bytes], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = archive()
    if "1,000" in said:
        monkeypatch.setattr(packed, "LARGEST", 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / PACKED).write_bytes(data)
    with pytest.raises(UserError, match=said) as told:
        find_runs([tmp_path])
    assert f"{tmp_path / PACKED} cannot be unpacked: " in str(told.value)
    assert "\n" not in str(told.value)
    assert not [*tmp_path.rglob("config.json")]


# ---- version 2


def test_methods_rank_alike_on_other_sizes(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "ANIMAL", dict.fromkeys(("half", "double"), "animal"))
    tables = sizes.tables({"half": published, "double": published})
    assert sizes.tables({"half": published, "double": tmp_path}) == {}
    found = tables["v2-sizes"]()
    shown = {
        row["UNet"]: row for row in map(dict, rows_of(found)) if row["method"] == "d3po_of_two"
    }
    assert shown["double"]["S (95 % interval)"] == "+0.850 (+0.602 to +1.098)"
    assert [row["rank"] for row in rows_of(found)] == ["1", "2"] * 2
    (row,) = tables["v2-ranks"]().records
    assert (row["sizes"], row["tau"]) == ("half, double", 1)


def rows_of(table: Table) -> list[dict[str, str]]:
    """Heading -> cell, for each row."""
    return [{name: show(r) for name, show in table.columns.items()} for r in table.records]


def cells(table: Table) -> dict[str, dict[str, str]]:
    """Method -> heading -> cell."""
    return {row["method"]: row for row in rows_of(table)}


def test_rewards_of_version_2_by_hand(published: Path) -> None:
    tables = version2.tables(published, make.front)
    found = cells(tables["v2-contrast"]())
    assert [*found] == ["d3po_of_two", "ddpo"]
    assert found["d3po_of_two"]["S, by the reward (95 % interval)"] == "+0.850 (+0.602 to +1.098)"
    within = {method: row["seeds within the search's bounds"] for method, row in found.items()}
    assert within == {"d3po_of_two": "3 of 3", "ddpo": "0 of 3"}  # drift of at most 0.05
    test = ttest_rel([0.35, 0.40, 0.55], [0.75, 0.85, 0.95])
    low, high = test.confidence_interval()
    ddpo = found["ddpo"]
    assert ddpo["S minus that of d3po_of_two (95 % interval)"] == (
        f"-0.417 ({low:+.3f} to {high:+.3f})"
    )
    assert ddpo["p of that, Holm"] == f"{test.pvalue:.2g}"
    kept = "recognised minus that of d3po_of_two (95 % interval)"
    assert (found["d3po_of_two"][kept], ddpo[kept]) == ("", "+0.000 (+0.000 to +0.000)")
    # Of a row with two seeds those two are compared, of which the rival has 0.75 and 0.85.
    more = cells(tables["v2-further-contrast"]())
    assert [*more] == ["d3po_of_two", "grpo"]
    test = ttest_rel([1.75, 1.8505], [0.75, 0.85])
    assert more["grpo"]["p of that, Holm"] == f"{test.pvalue:.2g}"
    assert cells(tables["v2-control"]())["d3po_random"]["seeds"] == "3"


def test_what_another_device_changes_by_hand(published: Path, tmp_path: Path) -> None:
    for objective, gain in (("incompress", 0.03), ("compress", -0.01)):
        run = write_run(tmp_path / "cpu", objective, "ddpo", 901, gain=gain)
        rate = RunFolder(run).config.learning_rate
        add_columns(run, {}, drift="0.06")
    (tmp_path / "trials.csv").write_text(TRIALS.replace("0.01,0.001,", f"0.01,{rate},"))
    (row,) = devices.trials(tmp_path / "cpu", tmp_path / "trials.csv").records
    assert (row["trial"], row["s_card"], row["s_cpu"]) == ("0", 0.1, pytest.approx(0.2))
    assert (row["kept_card"], row["kept_cpu"]) == ("yes", "no")

    here = read_groups([published])
    group = ("tiny", "incompress", "ddpo")
    first = {group: [run for run in here[group] if run.seed > 1000]}
    (test,) = devices.tests(here, first).records
    assert (test["seeds"], test["cpu"], test["thousandths"]) == (2, pytest.approx(0.45), 0)


def test_every_table_of_version_2_is_made(published: Path, tmp_path: Path) -> None:
    (published / "trials.csv").write_text(TRIALS)
    tables = version2.tables(published, make.front)
    assert {*version2.NAMED} < {*tables}
    heads = {name: table() for name, table in tables.items()}
    assert "difference to d3po_of_two (95 % interval)" in heads["v2-gains"].columns
    assert "probability to end better than d3po_of_two" in heads["v2-efficiency"][0].columns
    assert len(heads["v2-drift"]) == 2
    shown = {name: [r["method"] for r in heads[name].records] for name in (
        "v2-front", "v2-further-front")}  # fmt: skip
    assert shown == {"v2-front": ["d3po_of_two", "d3po_random", "ddpo"],
                     "v2-further-front": ["d3po_of_two", "grpo"]}  # fmt: skip
    assert version2.tables(tmp_path, make.front) == version2.sentences(tmp_path) == {}


def test_a_row_without_an_objective_has_an_empty_cell_on_the_front(published: Path) -> None:
    groups = read_groups([published])
    del groups["tiny", "compress", "grpo"]
    row = cells(make.front(groups))["grpo"]
    shown = [row[f"gain on {name}, kB (95 % interval)"] for name in ("incompress", "compress")]
    assert shown[0].startswith("+3.1")
    assert shown[1] == ""


def test_what_is_said_of_version_2(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = ttest_rel([0.35, 0.40, 0.55], [0.75, 0.85, 0.95]).pvalue
    # the two smallest of four, S and D of both
    first = 4 * ttest_rel([0.75, 0.85, 0.95], [0, 0, 0]).pvalue
    second = 3 * ttest_rel([0.35, 0.40, 0.55], [0, 0, 0]).pvalue
    write_grids(published)
    monkeypatch.setattr(version2, "OBJECTIVES", ("incompress", "compress"))
    seeds = {"grid.toml": range(1000, 1003), "further.toml": range(1000, 1002)}
    monkeypatch.setattr(version2, "SEEDS", seeds)
    said = version2.sentences(published)["v2-claims"]().splitlines()
    follow = (
        f"- Follow the reward, by S above 0: d3po_of_two (p = {first:.2g}). S is not shown to "
        f"differ from 0: ddpo (p = {second:.2g}). A difference of 0.68 kB would be shown with 80 % "
        "power."
    )
    # Twice the p of d3po_of_two's D would be less than the one before, which Holm does not allow.
    drift = f"- D is not shown to differ from 0: d3po_of_two, ddpo (p at least {second:.2g})."
    drift += " A difference of 0.65 to 0.68 kB would be shown with 80 % power."
    both = "- Gain on both objectives, by the 95 % interval of each, which S above 0 does not say: "
    assert said[:5] == [
        "- The control's S is +0.000 (-0.124 to +0.124) kB, which includes 0.",
        follow,
        drift,
        f"{both}d3po_of_two.",
        f"- **S.** Shown to gain less than d3po_of_two: ddpo (p = {p:.2g}).",
    ]
    assert said[5].startswith("- **compress.** No difference to d3po_of_two is shown: ddpo")
    assert said[6].startswith("- **incompress.** Shown to gain less than d3po_of_two: ddpo (p = ")
    far = version2.sentences(published)["v2-further-claims"]()
    unsure = "Not ranked against d3po_of_two: grpo. They gain more, but their network has moved far"
    assert far.count(unsure) == 2
    assert "Shown to gain more" not in far


def write_grids(folder: Path) -> None:
    for name, methods in (("grid", ["d3po_of_two", "ddpo", "d3po_random"]), ("further", ["grpo"])):
        (folder / f"{name}.toml").write_text(f"methods = {methods}\nmodel = 'tiny'")


def test_nothing_is_said_of_half_a_table(published: Path) -> None:
    write_grids(published)
    assert version2.sentences(published)["v2-claims"]() == (
        "- 18 of the 120 runs that the protocol asks for, of these rows on incompress, compress, "
        "have been made. Nothing is claimed before all are there."
    )


def test_of_a_table_without_an_objective_s_alone_is_spoken_of(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_grids(published)
    monkeypatch.setattr(version2, "SEEDS", {"grid.toml": range(1000, 1003)})
    said = version2.sentences(published)["v2-claims"]().splitlines()
    assert [line.split()[1] for line in said] == [
        "The", "Follow", "D", "Gain", "**S.**", "**Gains.**",
    ]  # fmt: skip
    assert "18 of the 27 runs" in said[-1]


def test_the_margin_is_a_quarter_of_the_rivals_reward_in_the_search(tmp_path: Path) -> None:
    assert version2.margin_of(tmp_path) == 0
    (tmp_path / "trials.csv").write_text(TRIALS.replace("ddpo", "d3po_of_two"))
    assert version2.margin_of(tmp_path) == pytest.approx(0.2 / 4)


def test_nothing_is_said_where_the_control_follows_its_coin(published: Path) -> None:
    groups = {
        (model, objective, {"ddpo": "d3po_random"}.get(method, method)): members
        for (model, objective, method), members in read_groups([published]).items()
        if method != "d3po_random"
    }
    assert version2.claimed(groups, version2.main_rows) == (
        "- The control's S is +0.433 (+0.175 to +0.692) kB, which excludes 0: the measure is at "
        "fault. Nothing is claimed."
    )
    without = {group: members for group, members in groups.items() if group[2] != "d3po_random"}
    said = version2.claimed(without, version2.main_rows)
    assert said == "- The control has not been run. Nothing is claimed."


TRIALS = """\
method,trial,state,chosen,value,why,"gain, seed 901",recognised,drift,learning_rate,clip_range
ddpo,0,complete,,0.1,,0.1,0.6,0.01,0.001,0.1
ddpo,1,pruned,,,"drift 0.060, above 0.05",0.4,0.6,0.06,0.01,0.2
ddpo,2,complete,yes,0.2,,0.2,0.5,0.02,0.002,0.1
raft,0,pruned,,,"recognised 0.100, below 0.466",0.3,0.1,0.03,0.003,
raft,1,pruned,,,"recognised 0.200, below 0.466",0.1,0.2,0.02,0.004,
raft,2,fail,,,The update is not finite.,,,,0.005,
"""


WINDOW = "rates with S above 0, within the bounds"


def test_the_search_of_version_2_by_hand(tmp_path: Path) -> None:
    (tmp_path / "trials.csv").write_text(TRIALS)
    found = cells(version2.tables(tmp_path, make.front)["v2-tuning"]())
    assert found == {
        "ddpo": {
            "method": "ddpo", "trials": "3", "kept the bounds": "2 of 3", "S": "+0.200",
            WINDOW: "0.001 to 0.002 (2 trials)",
            "recognised": "0.50", "drift": "0.0200", "chosen": "learning_rate=0.002 clip_range=0.1",
        },
        "raft": {
            "method": "raft", "trials": "3",
            "kept the bounds": "0 of 3: the least drifting is taken", "S": "+0.100",
            WINDOW: "none",
            "recognised": "0.20", "drift": "0.0200", "chosen": "learning_rate=0.004",
        },
    }  # fmt: skip
