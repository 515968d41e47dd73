"""Agreement and scores by hand, against the krippendorff package and the published code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import pytest

from d3po_bench.feedback import agreement
from d3po_bench.feedback.agreement import Share
from d3po_bench.feedback.questions import Answer, Kind
from d3po_bench.feedback.rounds import Item, Part, Round, Vote
from d3po_bench.feedback.study import one_question


def a_round(
    kind: Kind, number: int, images: int, gold: Mapping[int, Answer] | None = None
) -> Round:
    names = tuple(f"{k}.png" for k in range(images))
    return Round(one_question(kind, "deformed"), tuple(
        Item(str(n), "cat", names, (gold or {}).get(n)) for n in range(number)
    ))  # fmt: skip


def vote(rater: str, item: int, answer: Answer, repeat: int = 0, milliseconds: int = 1000) -> Vote:
    return Vote(rater, str(item), repeat, (), answer, milliseconds, 0.0)


PAIRS = a_round("pairs", 4, 2)
CHOSEN = [
    vote("x", 0, "a"), vote("y", 0, "a"),
    vote("x", 1, "b"), vote("y", 1, "b"),
    vote("x", 2, "a"), vote("y", 2, "b"),
    vote("x", 3, "tie"),
]  # fmt: skip


def test_alpha_and_raw_agreement_by_hand() -> None:
    # Three units judged twice: aa, bb, ab. Coincidences: o_aa = 2, o_bb = 2, o_ab = o_ba = 1;
    # n_a = n_b = 3, n = 6. D_o = 2/6; D_e = 2 * 3 * 3 / (6 * 5) = 18/30.
    # alpha = 1 - (1/3) / (3/5) = 4/9. Agreement: 2 of 3.
    assert agreement.alpha(PAIRS.parts[0], CHOSEN) == pytest.approx(4 / 9)
    assert agreement.raw_agreement(PAIRS.parts[0], CHOSEN) == pytest.approx(2 / 3)


def test_known_answers_are_no_agreement_between_raters() -> None:
    part = a_round("pairs", 4, 2, gold={0: "a", 1: "b"}).parts[0]
    # of the items that both judged one is left, on which they differ: D_o = 1, D_e = 1
    assert agreement.alpha(part, CHOSEN) == pytest.approx(0)
    assert agreement.raw_agreement(part, CHOSEN) == 0
    assert agreement.summary(part, CHOSEN) == {
        "votes": 7, "raters": 2, "alpha": pytest.approx(0), "raw_agreement": 0,
    }  # fmt: skip


def test_alpha_of_a_published_example() -> None:
    # Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C: four observers,
    # twelve units, five values, missing data; nominal alpha 0.743.
    table = """
        1 2 3 3 2 1 4 1 2 . . .
        1 2 3 3 2 2 4 1 2 5 . 3
        . 3 3 3 2 3 4 2 2 5 1 .
        1 2 3 3 2 4 4 1 2 5 1 ."""
    units = zip(*(line.split() for line in table.strip().splitlines()), strict=True)
    counts = np.array([[unit.count(value) for value in "12345"] for unit in units])
    assert agreement.alpha_of_counts(counts) == pytest.approx(0.743, abs=5e-4)


def test_alpha_of_tags_is_that_of_their_images() -> None:
    rng = np.random.default_rng(0)
    round_ = a_round("tags", 10, 7)
    tagged = rng.random((3, 10, 7)) < 0.3
    votes = [
        vote(f"rater {r}", p, tuple(np.flatnonzero(tagged[r, p]).tolist()))
        for r in range(3)
        for p in range(10)
        if (r + p) % 4
    ]
    names, table = agreement.judgements(round_.parts[0], votes)
    assert names == ["rater 0", "rater 1", "rater 2"]
    assert table.shape == (3, 70)
    assert np.isnan(table[0, :7]).all()
    assert table[1, :7].tolist() == tagged[1, 0].tolist()
    assert agreement.alpha(round_.parts[0], votes) == pytest.approx(
        krippendorff.alpha(reliability_data=table, level_of_measurement="nominal")
    )
    # raw agreement again, pair by pair
    shares = []
    for unit in table.T:
        said = unit[~np.isnan(unit)]
        pairs = [(a, b) for i, a in enumerate(said) for b in said[i + 1 :]]
        if pairs:
            shares.append(np.mean([a == b for a, b in pairs]))
    assert agreement.raw_agreement(round_.parts[0], votes) == pytest.approx(np.mean(shares))


@pytest.mark.parametrize("votes", [[], CHOSEN[:1], CHOSEN[:2], [vote("x", 0, "a", 1)]])
def test_alpha_is_undefined_without_two_raters_or_two_values(votes: Sequence[Vote]) -> None:
    assert agreement.alpha(PAIRS.parts[0], votes) is None


def test_agreement_of_nobody_is_undefined() -> None:
    assert agreement.raw_agreement(PAIRS.parts[0], []) is None
    assert agreement.raw_agreement(PAIRS.parts[0], CHOSEN[:1]) is None
    assert agreement.quality(PAIRS, []) == []
    assert agreement.summary(PAIRS.parts[0], []) == {
        "votes": 0, "raters": 0, "alpha": None, "raw_agreement": None,
    }  # fmt: skip


def test_quality_by_hand() -> None:
    round_ = a_round("tags", 3, 3, gold={0: (0,), 1: ()})
    votes = [
        vote("x", 0, (0,), milliseconds=1000),  # gold: 3 of 3 images right
        vote("x", 1, (0, 1), milliseconds=9000),  # gold: 1 of 3
        vote("x", 2, (2,), milliseconds=2000),
        vote("x", 2, (1,), repeat=1, milliseconds=4000),  # 1 of 3 as before
        vote("y", 0, (0, 1), milliseconds=500),  # gold: 2 of 3; with x: 2 of 3
        vote("y", 1, (0, 1), milliseconds=500),  # gold: 1 of 3; with x: 3 of 3
        vote("z", 2, (2,), milliseconds=10),  # with x: 3 of 3
    ]
    x, y, z = agreement.quality(round_, votes)
    assert (x.rater, x.votes, x.gold, x.consistent) == ("x", 4, Share(4, 6), Share(1, 3))
    assert x.seconds == 3.0
    assert x.with_others == pytest.approx(8 / 9)
    assert (y.gold, y.consistent) == (Share(3, 6), Share(0, 0))
    assert y.with_others == pytest.approx(5 / 6)
    assert y.consistent.value is None
    assert (z.gold, z.with_others) == (Share(0, 0), 1.0)


def test_quality_of_a_rater_whose_only_vote_is_a_repeat() -> None:
    # the first judgement was undone or skipped, its repeat was not
    (alone,) = agreement.quality(PAIRS, [vote("x", 0, "a", repeat=1)])
    assert (alone.votes, alone.consistent, alone.with_others) == (1, Share(0, 0), None)


# ---- scores


def test_scores_of_tags_are_the_mean_over_raters() -> None:
    round_ = a_round("tags", 2, 3)
    votes = [vote("x", 0, (0, 2)), vote("y", 0, (2,)), vote("x", 0, (1,), repeat=1)]
    scores = agreement.scores(round_.parts[0], votes)
    assert scores[0].tolist() == [-0.5, 0.0, -1.0]
    assert np.isnan(scores[1]).all()
    # "tagged by one of two" against "tagged by both" is a pair too
    assert agreement.preferences(scores).tolist() == [[0, 1, 0], [0, 0, 2], [0, 1, 2]]


def test_scores_of_pairs_are_shares_and_equal_is_a_tie() -> None:
    votes = [
        vote("x", 0, "a"), vote("y", 0, "tie"),
        vote("x", 1, "b"), vote("y", 1, "b"), vote("z", 1, "a"), vote("w", 1, "bad"),
        vote("x", 2, "a"), vote("y", 2, "b"),
    ]  # fmt: skip
    scores = agreement.scores(PAIRS.parts[0], votes)
    assert scores[:3].tolist() == [[0.5, 0.0], [0.25, 0.5], [0.5, 0.5]]
    assert np.isnan(scores[3]).all()
    assert agreement.preferences(scores).tolist() == [[0, 0, 1], [1, 1, 0]]


def test_images_of_several_pairs_have_scores_once_all_their_pairs_are_answered() -> None:
    shown = [("0.png", "1.png"), ("0.png", "2.png"), ("1.png", "2.png")]
    items = [Item(str(n), "cat", names, group="cats") for n, names in enumerate(shown)]
    part = Part(one_question("pairs").question[0], tuple(items))
    votes = [vote("x", 0, "a"), vote("y", 0, "a"), vote("z", 0, "b"), vote("x", 1, "b")]
    (some,) = agreement.scores(part, votes)  # nobody has seen 1 and 2 side by side
    assert some[0] == (2 / 3 + 0) / 2
    assert np.isnan(some[1:]).all()
    # each pair counts once, however many have judged it
    (whole,) = agreement.scores(part, [*votes, vote("x", 2, "a")])
    assert whole.tolist() == [(2 / 3 + 0) / 2, (1 / 3 + 1) / 2, (1 + 0) / 2]


def test_no_scores_give_no_pairs() -> None:
    assert agreement.preferences(np.zeros((0, 7))).shape == (0, 3)
    assert agreement.preferences(np.full((2, 7), np.nan)).shape == (0, 3)


def published(pairs: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Pairs as the published code gives them: h is 1 for the preferred image."""
    return [
        [p["row"], *(p["pair"] if p["h"][0] == [1, -1] else reversed(p["pair"]))] for p in pairs
    ]


def test_pairs_of_one_rater_are_those_of_the_published_code(
    reference_numbers: dict[str, Any],
) -> None:
    numbers = reference_numbers["human_pairs"]
    tags = np.array(numbers["tags"])
    round_ = a_round("tags", *tags.shape)
    votes = [vote("x", p, tuple(np.flatnonzero(row < 0).tolist())) for p, row in enumerate(tags)]
    scores = agreement.scores(round_.parts[0], votes)
    assert (scores == tags).all()
    assert agreement.preferences(scores).tolist() == published(numbers["pairs_bs1"])


def test_label_files_are_cut_and_averaged_as_in_the_published_code(
    reference_numbers: dict[str, Any], tmp_path: Path
) -> None:
    numbers = reference_numbers["human_pairs"]["two_annotators"]
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(numbers[name]))
    scores = agreement.read_label_files(tmp_path)
    assert scores.tolist() == numbers["mean_after_truncation"]
    assert agreement.preferences(scores).tolist() == published(numbers["pairs_bs1"])


def test_label_files_count_whatever_their_capitals_and_copies_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[[0, -1]]")
    (tmp_path / "b.JSON").write_text("[[-1, 0]]")
    assert agreement.read_label_files(tmp_path).tolist() == [[-0.5, -0.5]]
    (tmp_path / "a (1).json").write_text("[[0, -1]]")
    told: list[str] = []
    agreement.read_label_files(tmp_path, told.append)
    (line,) = told
    assert line.endswith(
        "a.json says what a (1).json says. If it is a copy, remove it: it counts twice."
    )
