"""`feedback agreement`: how often scorers rank pictures as people did, worked out by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from d3po_bench.experience import dataset
from d3po_bench.experience.dataset import Group, Table
from d3po_bench.feedback.handout import hand_out
from d3po_bench.feedback.invitations import find_rater, invite
from d3po_bench.feedback.shares import clustered
from d3po_bench.feedback.store import HandoutSettings, open_labels
from d3po_bench.feedback.votes import cast_vote
from eval.analysis import agreement
from tests.commands import Command, refused

BRIGHT = '''"""Prefers the brighter picture."""
unit, direction = "grey", "maximize"
def reward(images, prompts):
    return images.double().mean((1, 2, 3))
'''


class Grey:
    """The same, and remembers what it was asked."""

    unit = "grey"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        found = images[:, 0, 0, 0].double()
        self.asked += [f"{p} {int(g)}" for p, g in zip(prompts, found, strict=True)]
        return found


def untold(done: float, total: float) -> None:
    """Progress that nobody looks at."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Flat pictures 0.png to 9.png, each brighter than the one before; two sizes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bright.py").write_text(BRIGHT)
    (tmp_path / "images").mkdir()
    for n in range(14):
        side = 8 + n % 2
        grey = Image.fromarray(np.full((side, 8, 3), 10 * n, dtype=np.uint8))
        grey.save(tmp_path / f"{n}.png")
        grey.save(tmp_path / "images" / f"{n:05d}.png")
    return tmp_path


def votes(path: Path, *items: tuple[str, str, str]) -> Path:
    """A file as the page exports it: prompt, pictures and answers of Ann, Bob and Cy, by item."""
    rows = [
        {"prompt": prompt, "rater": rater, "item": item, "repeat": 0, "answer": answer,
         "images": pictures, "group": prompt}
        for item, (prompt, pictures, answers) in enumerate(items)
        for rater, answer in zip(("Ann", "Bob", "Cy"), answers.split(), strict=False)
    ]  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


BY_HAND = (
    ("cat", "1.png 2.png", "b b a"),  # people b, the scorer b
    ("cat", "3.png 1.png", "a tie"),  # a, a
    ("dog", "4.png 5.png", "a a"),  # a, b
    ("dog", "2.png 2.png", "a"),  # nobody can: one picture twice
    ("dog", "6.png images/00006.png", "a"),  # a, a tie
    ("fox", "6.png 7.png", "a b"),  # even
)


def found_in(command: Command, *arguments: str) -> dict[str, Any]:
    done = command("feedback", "agreement", *arguments, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_shares_and_intervals_by_hand(folder: Path, command: Command) -> None:
    path = votes(folder / "votes.csv", *BY_HAND)
    found = found_in(command, str(path), "--scorers", "./bright.py")
    assert (found["layout"], found["clustered_by"]) == ("our page", "prompt")
    assert (found["items"], found["pairs"], found["even"]) == (6, 5, 1)
    bright = found["scorers"]["bright"]
    # hits 1, 1 of cat and 0, 1/2 of dog: p = 5/8; sums about it 3/4 and -3/4, so that
    # v = 2/1 (9/16 + 9/16) / 16 = 9/64, n = p (1 - p) / v = 5/3; t(1) = 12.706
    assert bright["people"]["value"] == 5 / 8
    assert bright["people"]["pairs"] == 4
    assert bright["people"]["clusters"] == 2
    assert bright["people"]["low"] == pytest.approx(0.0040, abs=1e-4)
    assert bright["people"]["high"] == pytest.approx(0.9985, abs=1e-4)
    assert bright["ties"] == 1
    # 2/3, 1 (Bob's tie says nothing), 0, 1/2, 1/2
    assert bright["votes"]["value"] == pytest.approx(8 / 15)
    # Ann and Bob, but neither with Cy: 1/3; one judgement; 1; one; 0
    assert found["raters"]["value"] == pytest.approx(4 / 9)
    assert found["raters"]["pairs"] == 3


def test_the_table_says_the_same(folder: Path, command: Command) -> None:
    path = votes(folder / "votes.csv", *BY_HAND)
    done = command("feedback", "agreement", str(path), "--scorers", "./bright.py")
    lines = done.out.splitlines()
    assert " ".join(lines[1].split()) == "bright 62.5% (0.4% to 99.9%) 53.3% (6.4% to 95.1%) 4 1"
    assert lines[2].split()[:3] == ["another", "rater", "44.4%"]
    assert "5 pairs of 6 items (our page); 1 came out even" in done.err


def test_a_round_and_its_export_say_the_same(folder: Path, command: Command) -> None:
    for source, shift in (("a", 0), ("b", 4)):
        (folder / source).mkdir()
        lines = [f"{n}.png,a cat {n}" for n in range(4)]
        (folder / source / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
        for n in range(4):
            (folder / source / f"{n}.png").write_bytes(
                (folder / f"{2 * n + shift}.png").read_bytes()
            )
    new = ("feedback", "new", "duel", "--kind", "pairs", "--pictures", "a", "--pictures", "b")
    assert command(*new).code == 0
    refused(command("feedback", "agreement", "duel", "--scorers", "jpeg_size"), "Nobody has voted")
    with open_labels(Path("duel"), None, HandoutSettings(2), new=True) as store:
        for name in ("Ann", "Bob"):
            rater = find_rater(store, token=invite(store, name))
            while rater and (hand := hand_out(store, rater.id)):
                cast_vote(store, rater.id, hand.id, "b", 900, hand.step)
    assert command("feedback", "export", "duel").code == 0
    both = [found_in(command, p, "--scorers", "./bright.py") for p in ("duel", "duel/labels.csv")]
    assert all(found.pop("content") for found in both)
    assert both[0] == both[1]
    assert (both[0]["items"], both[0]["raters"]["value"]) == (4, 1)
    assert both[0]["scorers"]["bright"]["people"]["value"] == 1


def studio(*sides: str) -> dict[str, Any]:
    results = [[{"type": "pairwise", "value": {"selected": side}}] for side in sides]
    data = {"prompt": "cat", "image1": "1.png", "image2": "2.png"}
    return {"id": 1, "data": data, "annotations": [{"result": result} for result in results]}


def db(key: str, *ranked: tuple[int, int]) -> list[dict[str, Any]]:
    return [
        {"image_path": f"{n}.png", "prompt_id": key, "prompt": f"a {key}", "rank": rank}
        for n, rank in ranked
    ]


PICK = [
    {"caption": "cat", "jpg_0": "1.png", "jpg_1": "2.png", "label_0": 0, "label_1": 1},
    {"caption": "dog", "jpg_0": "3.png", "jpg_1": "4.png", "label_0": 1, "label_1": 0},
    {"caption": "fox", "jpg_0": "3.png", "jpg_1": "4.png", "label_0": 0.5, "label_1": 0.5},
]
THREE = ["3.png", "2.png", "5.png"]


@pytest.mark.parametrize(
    ("name", "rows", "layout", "even", "people", "raters"),
    [
        ("t.json", PICK, "Pick-a-Pic", 1, 1 / 2, None),
        ("t.json", [{"prompt": "cat", "image_path": THREE, "rank": [2, 3, 1]}], "HPD", 0, 1, None),
        ("t.json", [{"prompt": "cat", "image_path": THREE[:2], "human_preference": [0, 1]}], "HPD",
         0, 0, None),
        ("t.json", [{"prompt": "cat", "generations": THREE, "ranking": [1, 2, 3]}], "ImageReward",
         0, 1 / 3, None),
        ("t.json", db("x", (1, 2), (2, 1)) + db("y", (3, 1), (4, 2), (5, 2)), "ImageRewardDB", 1,
         1 / 3, None),
        ("t.json", [studio("right", "right", "left"), studio("left")], "Label Studio", 0, 1 / 2,
         1 / 3),
        ("t.json", [[0, -1, 0, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0, 0]], "the D3PO authors' labels",
         15 + 15, 11 / 12, None),
    ],
)  # fmt: skip
def test_every_layout_is_read(
    name: str, rows: list[Any], layout: str, even: int, people: float, raters: float | None,
    folder: Path,
) -> None:  # fmt: skip
    (folder / "prompt.json").write_text(json.dumps(["cat", "dog"]))
    (folder / name).write_text(json.dumps(rows))
    found = agreement.compare(dataset.read(folder / name), {"grey": Grey()}, untold)
    assert (found["layout"], found["even"]) == (layout, even)
    assert found["scorers"]["grey"]["people"]["value"] == pytest.approx(people)
    assert (found["raters"] or {}).get("value") == pytest.approx(raters)


@pytest.mark.parametrize(
    ("hits", "clusters", "expected"),
    [
        # Wilson with t(3) = 3.1824 and n = 4: all right, one pair in each prompt
        ([1, 1, 1, 1], "abcd", (4 / (4 + 3.1824**2), 1)),
        # the same prompt twice over says no more than once
        ([1, 1, 1, 1] * 2, "abcd" * 2, (4 / (4 + 3.1824**2), 1)),
        ([1, 0], "aa", (float("nan"), float("nan"))),
    ],
)
def test_intervals_at_the_ends(
    hits: list[float], clusters: str, expected: tuple[float, float]
) -> None:
    assert clustered(hits, clusters) == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        right = rng.beta(7, 3, 30)  # prompts differ in how hard they are: 70 % on average
        hits = rng.random((30, 4)) < right[:, None]
        low, high = clustered(hits.ravel().astype(float).tolist(), np.repeat(range(30), 4).tolist())
        held += low <= 0.7 <= high
    assert 0.93 <= held / 400 <= 0.98


def test_a_picture_is_scored_once_for_its_prompt(folder: Path) -> None:
    table = Table("t", "pairs", [
        Group("cat", (folder / "1.png", folder / "2.png"), (1, 0)),
        Group("cat", (folder / "2.png", folder / "3.png"), (1, 0)),
        Group("dog", (folder / "2.png",), (1,)),
    ], "", None)  # fmt: skip
    grey = Grey()
    found = agreement.scores_of(table, {"grey": grey}, untold)
    assert sorted(grey.asked) == ["cat 10", "cat 20", "cat 30", "dog 20"]
    assert [row.tolist() for row in found["grey"]] == [[10, 20], [20, 30], [20]]


def test_what_cannot_be_compared_is_refused(folder: Path, command: Command) -> None:
    even = votes(folder / "even.csv", ("fox", "6.png 7.png", "a b"))
    ask = ("feedback", "agreement", str(even), "--scorers")
    refused(command(*ask, "./bright.py"), "No two pictures of an item were judged differently")
    refused(command(*ask, "clipp"), "Did you mean 'clip'?")
    refused(command(*ask, "pick_score"), "Missing: config.json", "weights fetch pick_score clip-w")
    refused(command(*ask, "./bright.py", "--labels", "sqlite://"), "Leave out --labels")
