"""Layouts of preference data that exist already, each recognised by the columns of its table.

A row becomes marks: what it says of one picture. Marks with the same key are of one comparison, and
what several rows say of a picture is averaged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

from d3po_bench.errors import UserError

Judged = Literal["pairs", "tags", "scale"]
"""Pictures compared with each other, or each judged by itself, as good or bad or by a number."""


class Mark(NamedTuple):
    """What a row says of one picture."""

    key: str
    """Of the pictures that were compared with it; "" for those of the row alone."""
    prompt: str
    picture: Any
    """A path, or the name of the column that holds its bytes."""
    score: float
    """Larger is better; of tags 1 for liked and -1 for disliked, of a scale 0 for its middle."""
    rater: str = ""
    """Who says it, where several judged the same pictures."""


Row = Mapping[str, Any]
Marks = Iterator[Mark]


@dataclass(frozen=True)
class Layout:
    """A kind of table."""

    name: str
    columns: frozenset[str]
    """All of which it has; other columns do not matter."""
    judged: Callable[[Row], Judged]
    """What its first row says that it is."""
    marks: Callable[[Row], Marks]
    """Of a row; raises ValueError, KeyError or TypeError where it is malformed."""


def _text(row: Row, *names: str) -> str:
    name = next((n for n in names if n in row), names[0])
    if not isinstance(row.get(name), str) or not row[name].strip():
        raise ValueError(f"{name} is {ascii(row.get(name))[:40]}, not a text")
    return str(row[name])


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{name} is {ascii(value)[:40]}, not a number")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not abs(number) <= 1e6:  # nan is not
        raise ValueError(f"{name} is {ascii(value)[:40]}, not a number")
    return number


def _list(row: Row, name: str, length: int | None = None) -> list[Any]:
    found = list(row[name]) if isinstance(row[name], list | tuple) else []
    if len(found) < 2 or (length is not None and len(found) != length):
        raise ValueError(f"{name} is {ascii(row[name])[:60]}, not a list of {length or 'pictures'}")
    return found


# ---- Pick-a-Pic


def _pick_a_pic(row: Row) -> Marks:
    # As booleans, numbers and what spreadsheets make of them.
    if str(row.get("has_label")).strip().lower() in ("false", "no", "0", "0.0"):
        return
    for n in ("0", "1"):
        label = _number(row[f"label_{n}"], f"label_{n}")
        if not 0 <= label <= 1:
            raise ValueError(f"label_{n} is {label:g}, not from 0 to 1")
        yield Mark("", _text(row, "caption", "prompt"), row[f"jpg_{n}"], label)


# ---- HPD, ImageReward


def _hpd(row: Row) -> Marks:
    pictures = _list(row, "image_path")
    name = "human_preference" if "human_preference" in row else "rank"
    sign = 1 if name == "human_preference" else -1  # a rank of 1 is the best
    for picture, value in zip(pictures, _list(row, name, len(pictures)), strict=True):
        yield Mark("", _text(row, "prompt"), picture, sign * _number(value, name))


def _generations(row: Row) -> Marks:
    pictures = _list(row, "generations")
    for picture, rank in zip(pictures, _list(row, "ranking", len(pictures)), strict=True):
        yield Mark("", _text(row, "prompt"), picture, -_number(rank, "ranking"))


def _image_reward_db(row: Row) -> Marks:
    key = str(row["prompt_id"])
    yield Mark(key, _text(row, "prompt"), row["image_path"], -_number(row["rank"], "rank"))


# ---- Label Studio

WORDS: Mapping[str, tuple[float, float]] = {
    "left": (1, 0), "a": (1, 0), "1": (1, 0), "right": (0, 1), "b": (0, 1), "2": (0, 1),
    "tie": (0, 0), "equal": (0, 0), "both": (0, 0), "neither": (0, 0), "bad": (0, 0),
}  # fmt: skip
"""What is chosen of two pictures -> their scores."""

TAGS: Mapping[str, float] = {
    "good": 1, "like": 1, "liked": 1, "yes": 1, "1": 1, "true": 1,
    "bad": -1, "dislike": -1, "disliked": -1, "no": -1, "0": -1, "-1": -1, "false": -1,
}  # fmt: skip
"""What is said of one picture -> its score."""

PICTURE = re.compile(r"\.(png|jpe?g|webp)$", re.IGNORECASE)

SERVED = r"(?:https?://[^?#]+)?/data/(?:upload/\d+/|local-files/\?d=)(.+)"
"""Where Label Studio's own server shows a file."""


def _studio_pictures(row: Row) -> list[str]:
    found = [v for v in row["data"].values() if isinstance(v, str) and PICTURE.search(v)]
    if len(found) not in (1, 2):
        raise ValueError(f"its data name {len(found)} pictures, not one or two")
    return found


def _label_studio(row: Row) -> Marks:
    prompt = _text(row["data"], "prompt", "text", "caption")
    pictures = _studio_pictures(row)
    for number, annotation in enumerate(row["annotations"]):
        if annotation.get("was_cancelled"):
            continue
        chosen = _chosen(annotation["result"])
        scores = _scores(chosen, WORDS) if len(pictures) == 2 else [_scores(chosen, TAGS)]
        for picture, score in zip(pictures, scores, strict=True):
            yield Mark("", prompt, _local(picture), score, str(number))


def _chosen(result: Any) -> str:
    """The one word that an annotation is."""
    for part in result:
        value = part["value"]
        if part["type"] == "pairwise":
            return str(value.get("selected") or "tie").lower()
        if part["type"] == "choices":
            return str(value["choices"][0]).lower()
    raise ValueError("an annotation has neither pairwise nor choices as its result")


def _scores(chosen: str, known: Mapping[str, Any]) -> Any:
    if chosen not in known:
        raise ValueError(f"{chosen!a} is none of {', '.join(known)}")
    return known[chosen]


def _local(picture: str) -> str:
    """The file behind an address of Label Studio's own server."""
    file = re.fullmatch(SERVED, picture)
    return unquote(file[1]) if file else picture


# ---- our page, the paper authors' label files, and a plain list of tags


def _our_page(row: Row) -> Marks:
    pictures, answer = row["images"], row["answer"]
    csv = isinstance(pictures, str)  # JSON has lists
    pictures = pictures.split() if csv else pictures
    # Asked again, to measure the rater; or of pictures with a known answer.
    if str(row["repeat"]) != "0" or row.get("use") in ("gold", "practice"):
        return
    if row.get("kind") in ("scale", "ranking"):
        said = row["scores"].split() if isinstance(row["scores"], str) else row["scores"]
        scores = [_number(value, "scores") for value in said]
        if len(scores) != len(pictures):
            raise ValueError(f"scores is {ascii(said)[:40]}, of {len(pictures)} images")
    elif answer in ("a", "b", "tie", "bad"):
        scores = list(WORDS[answer])
    else:
        tagged = {int(n) for n in (answer.split() if isinstance(answer, str) else answer)}
        if not tagged <= set(range(len(pictures))):
            raise ValueError(f"answer is {ascii(answer)[:40]}, of {len(pictures)} images")
        scores = [-1.0 if n in tagged else 1.0 for n in range(len(pictures))]
    prompt = _text(row, "prompt")
    if csv and re.match(r"'+\s*[=+@-]", prompt):
        prompt = prompt[1:]  # which keeps spreadsheets from computing it
    # Two pairs of a prompt do not say which picture of one is better than one of the other.
    alone = answer in ("a", "b", "tie", "bad")
    group = str(row["item"] if alone else row.get("group") or row["item"])
    for picture, score in zip(pictures, scores, strict=True):
        yield Mark(group, prompt, picture, score, str(row.get("rater", "")))


def of_question(path: Path, rows: Iterator[Any], question: str | None) -> Iterator[Any]:
    """The rows of one question of this page's export; a file that names none has one.

    Raises:
        UserError: it has several and none is chosen, or not the chosen one.
    """
    seen: dict[str, None] = {}
    for row in rows:
        if isinstance(row, dict) and "question" in row and "repeat" in row:
            seen[str(row["question"])] = None
            if question not in (None, row["question"]):
                continue
        yield row
        if question is None and len(seen) > 1:
            raise UserError(
                f"{path} has answers to several questions, such as {' and '.join(seen)}. Choose "
                "one with --question."
            )
    if question is not None and question not in seen:
        known = ", ".join(seen) or "no questions"
        raise UserError(f"{path} has no question {question!a}, but {known}. Correct --question.")


def _our_kind(row: Row) -> Judged:
    kind = row.get("kind")
    if kind == "scale":
        return "scale"
    return "pairs" if kind == "ranking" or row["answer"] in ("a", "b", "tie", "bad") else "tags"


def _label_file(row: Row) -> Marks:
    for number, value in enumerate(row["labels"]):
        if value not in (0, -1) or isinstance(value, bool):
            raise ValueError(f"{ascii(value)[:40]} is neither 0 nor -1")
        picture = f"images/{row['first'] + number:05d}.png"
        yield Mark(str(row["first"]), _text(row, "prompt"), picture, 1.0 if value == 0 else -1.0)


def _liked(row: Row) -> Marks:
    score = _scores(json.dumps(row["liked"]).strip('"').lower(), TAGS)
    yield Mark("", _text(row, "text", "prompt", "caption"), row["file_name"], score)


def _pairs(row: Row) -> Judged:
    return "pairs"


def _tags(row: Row) -> Judged:
    return "tags"


LAYOUTS = (
    Layout("Pick-a-Pic", frozenset({"jpg_0", "jpg_1", "label_0", "label_1"}), _pairs, _pick_a_pic),
    Layout("HPD", frozenset({"prompt", "image_path", "human_preference"}), _pairs, _hpd),
    Layout("ImageReward", frozenset({"prompt", "generations", "ranking"}), _pairs, _generations),
    Layout(
        "ImageRewardDB", frozenset({"prompt_id", "prompt", "image_path", "rank"}), _pairs,
        _image_reward_db,
    ),
    Layout("HPD", frozenset({"prompt", "image_path", "rank"}), _pairs, _hpd),
    Layout(
        "Label Studio", frozenset({"data", "annotations"}),
        lambda row: "pairs" if len(_studio_pictures(row)) == 2 else "tags", _label_studio,
    ),
    Layout(
        "our page", frozenset({"prompt", "item", "repeat", "answer", "images"}),
        _our_kind, _our_page,
    ),
    Layout("the D3PO authors' labels", frozenset({"first", "labels"}), _tags, _label_file),
    Layout("tags", frozenset({"file_name", "liked"}), _tags, _liked),
)  # fmt: skip
"""The first that fits is taken."""
