"""Files that people hand us: what is whole is read, and a fault is one line that says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from d3po_bench.errors import UserError
from d3po_bench.feedback import schema
from d3po_bench.feedback.agreement import read_label_files
from d3po_bench.feedback.questions import KINDS
from d3po_bench.feedback.rounds import Item, Round
from tests.feedback_round import claiming, new_round, picture

STRANGE: tuple[Any, ...] = (
    None, True, 0, -1, 9, 10**30, 1.5, "", "x", "x" * 5000, "a\0b", "é\u202e", "\ud800", "a\\b.png",
    "/etc/passwd", "../outside.png", [], {}, [[]], [None], [True], [0, 0], ["x"] * 50, {"a": 1},
)  # fmt: skip
"""Values that some field does not expect; "\\ud800" is half a character."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A round of two grids, beside files that must not be taken for its pictures."""
    made = tmp_path / "round"
    new_round(made, "tags", 2, images=3, size=4)
    (tmp_path / "outside.png").write_bytes(picture(1))
    (made / "link.png").symlink_to(tmp_path / "outside.png")
    (made / "circle.png").symlink_to(made / "circle.png")
    (made / "text.png").write_text("no picture at all, but long enough")
    (made / "cut.png").write_bytes(picture(1)[:-20])
    (made / "empty.png").touch()
    (made / "short.png").write_bytes(picture(1)[:8] + picture(1)[-8:])
    (made / "huge.png").write_bytes(claiming(picture(1), 13_000, 13_000))
    return made


def changed(whole: Any, place: str, value: Any) -> Any:
    """A copy with another value at a place such as items/1/id."""
    copy = json.loads(json.dumps(whole))
    *way, last = [int(part) if part.isdigit() else part for part in place.split("/")]
    inner = copy
    for part in way:
        inner = inner[part]
    inner[last] = value
    return copy


def fault(read: Callable[[], object], path: Path) -> str:
    """What is said of a malformed file: one line of a sensible length, which names the file."""
    with pytest.raises(UserError) as problem:
        read()
    said = str(problem.value)
    assert said.startswith(f"{path}: ")
    assert said.isprintable()
    assert len(said) < len(str(path)) + 300
    return said.removeprefix(f"{path}: ")


# ---- round.json


@pytest.mark.parametrize(("kind", "gold"), [("tags", (0, 2)), ("tags", ()), ("pairs", "tie")])
def test_a_round_is_read_as_it_was_written(tmp_path: Path, kind: Any, gold: Any) -> None:
    made = new_round(tmp_path / "r", kind, 3, gold={1: gold}, size=4, prompt="a “cat” {}")
    assert Round.read(tmp_path / "r") == made
    assert [item.gold for item in made.items] == [None, gold, None]
    assert made.parts[0].images_per_item == (7 if kind == "tags" else 2)


def test_the_file_has_the_form_that_earlier_versions_wrote(tmp_path: Path) -> None:
    new_round(tmp_path, "tags", 1, images=2, size=4, gold={0: (1,)})
    assert (
        (tmp_path / "round.json").read_text()
        == """{
 "kind": "tags",
 "question": "deformed",
 "blurred": false,
 "items": [
  {
   "id": "0000",
   "prompt": "prompt number 0",
   "images": [
    "images/0000-0.png",
    "images/0000-1.png"
   ],
   "gold": [
    1
   ]
  }
 ]
}
"""
    )


FAULTS: dict[str, tuple[Any, ...]] = {
    "kind": ("grid", ["tags"], None),
    "question": (None, "nice"),
    "blurred": (1, "no"),
    "items": ([], {}, "cat"),
    "extra": (1,),
    "items/1": ("x", None),
    "items/1/extra": (1,),
    "items/1/id": ("a/b", 1, "", "x" * 65, "a\n"),
    "items/1/prompt": (None, 3),
    "items/1/images": ("images", ["images/0001-0.png"], ["images/0001-0.png"] * 10),
    "items/1/images/2": (
        "/etc/passwd", "../outside.png", "images/../../outside.png", "images/../images/0000-0.png",
        "link.png", "circle.png", "a\\b.png", "a\0b.png", "", "images", "images/none.png",
        "text.png", "cut.png", "empty.png", "short.png", "huge.png", "x" * 5000, 3,
    ),
    "items/1/gold": ("a", [3], [-1], [0, 0]),
    "items/1/gold/0": (True, 0.5, "0"),
}  # fmt: skip
"""Place -> values that are refused, naming it."""


def test_a_malformed_round_is_refused_and_the_place_named(folder: Path) -> None:
    path = folder / "round.json"
    whole = changed(json.loads(path.read_text()), "items/1/gold", [0])
    for place, values in FAULTS.items():
        named = place.replace("/", ".").replace(".0", "[0]").replace(".1", "[1]")
        for value in values:
            path.write_text(json.dumps(changed(whole, place, value)))
            said = fault(lambda: Round.read(folder), path)
            assert said.startswith(named.replace(".2", "[2]") + ": "), said
    for name in ("tags", "a\nb", "\x1b[31m", "x" * 5000):
        path.write_text(json.dumps(changed(whole, name, 1)))
        assert "extra inputs are not permitted" in fault(lambda: Round.read(folder), path)
    twins = changed(whole, "items/1/id", "0000")
    fewer = changed(whole, "items/1/images", ["images/0001-0.png"] * 2)
    for value in (twins, fewer):
        path.write_text(json.dumps(value))
        assert "items[1]" in fault(lambda: Round.read(folder), path)


def test_missing_fields_are_named(folder: Path) -> None:
    path = folder / "round.json"
    whole = json.loads(path.read_text())
    for name in ("kind", "question", "blurred", "items"):
        path.write_text(json.dumps({k: v for k, v in whole.items() if k != name}))
        assert fault(lambda: Round.read(folder), path).startswith(f"{name}: ")
    for name in ("id", "prompt", "images", "gold"):
        first = {k: v for k, v in whole["items"][0].items() if k != name}
        path.write_text(json.dumps(changed(whole, "items/0", first)))
        assert fault(lambda: Round.read(folder), path).startswith(f"items[0].{name}: ")


def test_of_pairs_two_images_and_a_choice_are_expected(tmp_path: Path) -> None:
    new_round(tmp_path, "pairs", 1, size=4, gold={0: "a"})
    path = tmp_path / "round.json"
    whole = json.loads(path.read_text())
    for place, value in (("gold", [0]), ("gold", "c"), ("images", ["images/0000-0.png"] * 3)):
        path.write_text(json.dumps(changed(whole, f"items/0/{place}", value)))
        assert fault(lambda: Round.read(tmp_path), path).startswith(f"items[0].{place}: ")


def test_whatever_stands_in_a_field_a_round_is_read_or_refused_in_one_line(folder: Path) -> None:
    path = folder / "round.json"
    whole = json.loads(path.read_text())
    places = ["kind", "question", "blurred", "items", "items/0", "items/0/images/0"]
    places += [f"items/0/{name}" for name in ("id", "prompt", "images", "gold")]
    refusals = 0
    for place in places:
        for value in STRANGE:
            path.write_text(json.dumps(changed(whole, place, value)))
            try:
                Round.read(folder)
            except UserError:
                refusals += 1
                fault(lambda: Round.read(folder), path)
    assert refusals > 200


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\udcff", "[]", "3", "null"])
def test_what_is_not_an_object_is_refused(folder: Path, text: str) -> None:
    path = folder / "round.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    fault(lambda: Round.read(folder), path)


def test_a_folder_without_a_round_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no round\.json in"):
        Round.read(tmp_path)


def test_a_round_that_could_not_be_read_is_not_written(folder: Path) -> None:
    path = folder / "round.json"
    before = path.read_bytes()
    wrong = replace(Round.read(folder), groups=(Item("a", "b", ("images/none.png",) * 3),))
    assert fault(lambda: wrong.write(folder), path).startswith("items[0].images[0]: ")
    assert path.read_bytes() == before


def test_answers_are_checked() -> None:
    asked: dict[str, Any] = {kind: made(name=kind) for kind, made in KINDS.items()}
    assert asked["tags"].check(7, [6, 0]) == (0, 6)
    assert asked["pairs"].check(2, "bad") == "bad"
    assert asked["scale"].check(1, 5) == 5
    assert asked["ranking"].check(3, [2, 0, 1]) == (2, 0, 1)
    wrong = [
        ("tags", "a"), ("tags", None), ("pairs", [0]), ("pairs", "c"), ("scale", 0), ("scale", 6),
        ("scale", True), ("scale", "1"), ("ranking", [0]), ("ranking", [0, 0]), ("ranking", [0, 2]),
    ]  # fmt: skip
    for kind, answer in wrong:
        with pytest.raises(ValueError, match="an answer "):
            asked[kind].check(2, answer)


# ---- label files and sources


def test_malformed_label_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ann.json"
    texts = [
        "", "{}", "[]", "[1]", "[[1]]", "[[0, 1], [0]]", '[["0", 1]]', "[[0, NaN]]", "[[0, true]]",
        "[[0, 1e999]]", "[[0, null]]", "[" * 100_000, "[[]]", "[[0]]", "[[0, 1]]", "[[0, -2]]",
        "[[0, -0.5]]", f"[[0, {'9' * 5000}]]", "[[0, -1], [0]]", '{"a": [[0, -1]]}',
    ]  # fmt: skip
    for text in texts:
        path.write_text(text)
        said = fault(lambda: read_label_files(tmp_path), path)
        assert said.endswith(" Correct the file.")
    path.write_text("[[0, 0], [0, 1]]")
    said = fault(lambda: read_label_files(tmp_path), path)
    assert said == "[1][1]: input should be 0 or -1, got 1. Correct the file."


def test_label_files_must_belong_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There are no label files"):
        read_label_files(tmp_path)
    (tmp_path / "a.json").write_text("[[0, -1.0]]")
    assert read_label_files(tmp_path).tolist() == [[0, -1]]
    (tmp_path / "b.json").write_text("[[0, -1, 0]]")
    with pytest.raises(UserError, match="for 2 and 3 images a prompt"):
        read_label_files(tmp_path)


def test_malformed_sources_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sources.json"
    for text in ("", "{}", "[]", '["a"]', '["a", 1]', '["a", null]', "[" * 100_000, '"ab"'):
        path.write_text(text)
        fault(lambda: schema.read(schema.SOURCES, path, "Make it again."), path)
    path.write_text('["a", "b"]')
    assert schema.read(schema.SOURCES, path, "") == ["a", "b"]
