"""The report page: what it shows, of whom, and in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from d3po_bench.errors import UserError
from eval.analysis.gains import records
from eval.analysis.leaderboard import boards
from eval.analysis.runs import read_groups
from eval.figures import sheets, vector
from eval.figures.curves import plot
from eval.figures.html import page
from eval.figures.strips import pairs_of
from tests.commands import ROOT, Command, edit_json
from tests.made_up import write_opposites, write_run

EVIL = "</style></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'"


class Page(HTMLParser):
    """What a browser makes of a page: its elements, and their text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str, **having: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and having.items() <= a.items()]


def write_samples(folder: Path, *names: str, rounds: tuple[int, ...] = (0, 10)) -> None:
    for n in rounds:
        place = folder / "samples" / f"round-{n:05d}"
        place.mkdir(parents=True)
        for name in names:
            Image.new("RGB", (32, 32), (n * 20, 100, 50)).save(place / f"{name}.png")


def unfinished(folder: Path, rounds: int = 10) -> None:
    edit_json(folder / "config.json", lambda config: config.update(rounds=rounds))


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods on two opposite objectives; not to be changed."""
    return write_opposites(tmp_path_factory.mktemp("known") / "runs")


@pytest.fixture(scope="module")
def source(known: Path) -> str:
    """The page of these runs."""
    return page([known])


@pytest.fixture
def runs(known: Path, tmp_path: Path) -> Path:
    """A copy of these runs."""
    return Path(shutil.copytree(known, tmp_path / "runs"))


# ---- the page


def test_the_page_has_the_numbers_of_report(source: str, known: Path) -> None:
    made = Page(source)
    shown = {(a["data-method"], a["data-objective"]) for a in made.all("tr") if "data-row" in a}
    found = records(read_groups([known]))
    assert shown == {(r["method"], r["objective"]) for r in found}
    values = {float(a["data-value"] or "nan") for a in made.all("td") if "data-value" in a}
    for record in found:
        assert {record[k] for k in ("gain", "end", "kl", "images", "unet_forwards")} <= values
    assert "+0.550−0.085 to +1.185" in made.words  # ddpo: gains of 0.5 and 0.6
    assert "--seed-start 0" in made.words
    axes = [a["value"] for a in made.all("input", name="axis")]
    assert axes == ["rounds", "images", "scorer_calls", "unet_forwards", "seconds"]
    assert len(made.all("dialog")) == 4
    assert page([known]) == source


def test_the_page_loads_nothing_and_allows_only_its_own_script(source: str) -> None:
    policy = Page(source).all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy is not None
    assert "default-src 'none'; img-src data:" in policy
    assert "unsafe" not in policy
    assert re.findall(r"""(?:src|href)=["'](?!data:|#)|url\(|@import|\sstyle=""", source) == []


def test_what_a_stranger_wrote_is_text(runs: Path) -> None:
    folder = runs / "tiny" / "compress" / "d3po" / "seed-0"
    facts = {"commit": EVIL, "cpu": EVIL, "packages": {EVIL: EVIL}, "ended": EVIL}
    (folder / "provenance.json").write_text(json.dumps(facts))
    for path in runs.rglob("eval.csv"):
        path.write_text(path.read_text().replace("cat", "<script>alert(3)</script>"))
    write_samples(folder, "cat", "<script>alert(4)<-script>")
    other = write_run(runs, "incompress", model=f"{EVIL}/{EVIL}", seed=7)
    made = Page(page([runs]))
    assert (other / "config.json").is_file()
    assert len(made.all("script")) == len(made.all("style")) == 1
    assert [a for a in made.all("img") if not (a["src"] or "").startswith("data:image/webp")] == []
    assert not any(name.startswith("on") for _, attrs in made.elements for name in attrs)
    assert EVIL[:70] in made.words
    assert "<script>alert(4)< script>" in made.words


def test_runs_of_two_models_are_not_compared(runs: Path) -> None:
    for seed in (0, 1):
        write_run(runs, "incompress", "ddpo", seed, model="another/model", gain=2)
    one, two = boards([runs])[0]
    assert [one.model, two.model] == ["another/model", "tiny"]
    assert one.entries[0].record["difference"] != one.entries[0].record["difference"]
    made = Page(page([runs]))
    assert [a["value"] for a in made.all("input", name="model")] == ["another/model", "tiny"]


def test_runs_that_have_not_ended_are_marked(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0)
    unfinished(write_run(tmp_path, seed=1, rounds=(0, 5), gain=9.0))
    for seed, rounds in ((0, (0, 5)), (1, (0, 5, 8))):
        unfinished(write_run(tmp_path, method="ddpo", seed=seed, rounds=rounds, gain=0.2))
    (write_run(tmp_path, method="dpok") / "eval.csv").unlink()
    (board,), waiting = boards([tmp_path])
    d3po, ddpo = board.entries
    assert (d3po.record["gain"], d3po.record["seeds"], d3po.unfinished) == (pytest.approx(1), 1, 1)
    assert (ddpo.record["gain"], ddpo.record["images"], ddpo.rounds) == (pytest.approx(1), 320, 5)
    assert ddpo.record["difference"] != ddpo.record["difference"]  # NaN: with whom, so early?
    assert [path.parent.name for path in waiting] == ["dpok"]
    words = Page(page([tmp_path])).words
    assert "1 more not finished" in words
    assert "not finished: round 5 of 10" in words
    assert "1 run (incompress/dpok/seed-0)" in words


def test_seeds_without_a_common_evaluation(tmp_path: Path) -> None:
    unfinished(write_run(tmp_path, seed=0, rounds=(0, 5)))
    folder = write_run(tmp_path, seed=1, rounds=(0, 5))
    unfinished(folder)
    rows = (folder / "eval.csv").read_text()
    (folder / "eval.csv").write_text(re.sub(r"^0,", "4,", rows, flags=re.M).replace("\n5,", "\n3,"))
    with pytest.raises(UserError, match="no evaluation after the same round"):
        boards([tmp_path])


def test_settings_that_methods_do_not_share(tmp_path: Path) -> None:
    write_run(tmp_path, method="d3po", learning_rate=1e-3)
    write_run(tmp_path, method="ddpo", learning_rate=3e-3)
    write_run(tmp_path, method="dpok", learning_rate=1e-3)
    (board,), _ = boards([tmp_path])
    assert ("learning_rate", "0.001", "0.001 or 0.003") in board.entries[0].apart
    assert not any(key == "rounds" for key, _, _ in board.entries[0].apart)


# ---- pictures


def cut(runs: Path, figures: Path) -> Any:
    ((group, members),) = read_groups([runs]).items()
    return pairs_of(group, members, [figures])


def test_pictures_are_a_runs_own_or_cut_from_its_sheet(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs", seed=3)
    write_samples(folder, "sea-horse", "cat", rounds=(0, 5, 10))
    own = cut(tmp_path / "runs", tmp_path)
    assert (own.seed, own.last, own.sheet) == (3, 10, "")
    assert [pair.prompt for pair in own.pictures] == ["cat", "sea horse"]
    assert own.pictures[0].pixels
    ((group, members),) = read_groups([tmp_path]).items()
    place = tmp_path / "figures" / sheets.sheet_name(group)
    place.parent.mkdir()
    place.write_bytes(sheets.samples_sheet(members) or b"")
    shutil.rmtree(folder / "samples")
    sheet = cut(tmp_path / "runs", tmp_path)
    assert (sheet.seed, sheet.last, sheet.sheet) == (3, 10, place.name)
    assert [pair.prompt for pair in sheet.pictures] == ["cat", "sea horse"]
    assert sheet.pictures[0].before != sheet.pictures[0].after
    with Image.open(place) as picture:
        picture.copy().save(place)  # without the text that says where its pictures are
    assert cut(tmp_path / "runs", tmp_path) is None


def test_pictures_are_named_by_prompts_not_by_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs")
    rows = folder / "eval.csv"
    rows.write_text(rows.read_text().replace("sea horse", "Cat").replace("cat", "猫, <b>"), "utf-8")
    rows.write_text(rows.read_text("utf-8").replace("猫, <b>", '"猫, <b>"'), "utf-8")
    write_samples(folder, "b", "cat")
    assert [pair.prompt for pair in cut(folder, tmp_path).pictures] == ["猫, <b>", "Cat"]
    assert "猫, &lt;b&gt;</span>" in page([folder])
    sheet = tmp_path / "plots" / "samples-tiny-incompress-d3po.png"
    plot([folder], sheet.parent)
    shutil.rmtree(folder / "samples")
    found = cut(folder, tmp_path)
    assert found.sheet == sheet.name
    assert [pair.prompt for pair in found.pictures] == ["猫, <b>", "Cat"]


LAYOUT = {"seed": 0, "rounds": [0, 1], "prompts": ["cat"], "left": 0, "top": 0, "side": 8, "gap": 2}


@pytest.mark.parametrize(
    "layout",
    [
        "{", "[]", "null", '{"left": "a"}',
        *(json.dumps(LAYOUT | {k: v}) for k, v in (("side", 10**6), ("side", 0), ("left", 13),
                                                   ("top", -1), ("rounds", []))),
        json.dumps(LAYOUT | {"rounds": [], "prompts": []}),
    ],
)  # fmt: skip
def test_a_sheet_with_another_text_is_refused(layout: str, tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    folder = write_run(tmp_path / "runs")
    info = PngInfo()
    info.add_text(sheets.LAYOUT, layout)
    place = tmp_path / "plots" / "samples-tiny-incompress-d3po.png"
    place.parent.mkdir()
    Image.new("RGB", (20, 20)).save(place, pnginfo=info)
    with pytest.raises(UserError, match=re.escape(str(place))):
        cut(folder, tmp_path)


def test_published_sheets_say_where_their_pictures_are() -> None:
    for path in sorted((ROOT / "results" / "tiny" / "figures").glob("samples-*.png")):
        with Image.open(path) as sheet:
            found = json.loads(sheet.info[sheets.LAYOUT])
            step = found["side"] + found["gap"]
            right = found["left"] + len(found["prompts"]) * step
            assert (right, found["top"] + len(found["rounds"]) * step) == (
                sheet.width - found["gap"], sheet.height
            )  # fmt: skip
            x, y = found["left"], found["top"]
            cell = sheet.convert("RGB").crop((x, y, x + found["side"], y + found["side"]))
            assert cell.resize((32, 32), Image.Resampling.NEAREST).resize(
                cell.size, Image.Resampling.NEAREST
            ).tobytes() == cell.tobytes()  # fmt: skip


# ---- panels


@pytest.mark.parametrize(
    ("values", "whole", "ticks"),
    [
        ([0, 12], True, ["0", "2", "4", "6", "8", "10", "12"]),
        ([0, 1536], True, ["0", "250", "500", "750", "1,000", "1,250", "1,500"]),
        ([0.8, 0.8 + 1e-12], False, ["0.76", "0.78", "0.80", "0.82", "0.84"]),
        ([-1.0, 1.0], False, ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
        ([], False, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
    ],
)
def test_ticks_are_round_and_of_one_length(
    values: list[float], whole: bool, ticks: list[str]
) -> None:
    found = vector.scale(values, 52, 408, whole=whole)
    assert [label for _, label in found.ticks] == ticks
    assert all(52 <= found(value) <= 408 for value in values)


# ---- in a browser


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    if shutil.which("chromedriver") is None:
        pytest.skip("needs chromium and chromium-driver")
    from tests.feedback_browser import browser as opened

    with opened(tmp_path) as keyboard:
        yield keyboard


@pytest.mark.slow
def test_the_published_page_in_chromium(browser: Any, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "page.html"
    assert command("report", str(ROOT / "results" / "tiny"), "--out", str(out)).code == 0
    assert out.stat().st_size < 5_000_000
    driver = browser.driver
    driver.get(out.as_uri())
    run: Callable[..., Any] = driver.execute_script
    rows = "[...document.querySelectorAll('#main tbody tr:not([hidden])')]"

    def column(field: str) -> Any:
        return run(f"return {rows}.map(row => {field})")

    gains = "Number(row.querySelector('[data-column=\"0\"]').dataset.value)"
    button = driver.find_element("css selector", '#main [data-sort="0"]')
    button.send_keys("\n")
    assert column(gains) == sorted(column(gains), reverse=True)
    assert driver.find_element("css selector", "[aria-sort=descending]").text.startswith("Gain")
    button.send_keys("\n")
    assert column(gains) == sorted(column(gains))
    run("document.querySelector('#filters [value=ddpo]').click()")
    run("document.querySelector('#filters [value=aesthetic]').click()")
    assert len(column("1")) == 8
    assert set(column("row.dataset.method + row.dataset.objective")).isdisjoint(
        {"ddpocompress", "d3poaesthetic"}
    )
    assert run("return document.querySelectorAll('.chart:not([hidden])').length") == 12
    run("document.querySelector('[name=axis][value=seconds]').click()")
    panels = "[...document.querySelectorAll('.axis-seconds .panel')]"
    visible = f"{panels}.filter(panel => panel.getClientRects().length)"
    assert run(f"return {visible}.length") == 4
    run(f"{visible}[0].focus()")
    browser.press("\ue014")  # the right arrow
    assert "d3po: 1.314" in driver.find_element("id", "tip").text
    driver.find_element("css selector", "#main tbody tr:not([hidden]) .open").send_keys("\n")
    dialog = driver.find_element("css selector", "dialog[open]")
    assert "Each seed" in dialog.text
    assert "d3po-bench run --method" in dialog.text
    slider = dialog.find_element("css selector", "[type=range]")
    slider.send_keys("\ue010")  # End
    after = "getComputedStyle(document.querySelector('dialog[open] .after')).clipPath"
    assert "100%" in run(f"return {after}")
    assert browser.loaded
    browser.press("\ue00c")  # Escape
    assert run("return document.querySelector('dialog[open]')") is None
    for width in (390, 1280):
        browser.resize(width, 800)
        assert run("return document.documentElement.scrollWidth") <= width
