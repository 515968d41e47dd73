"""The page's own words in several languages, and which of them a browser gets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

from fastapi import Request

from d3po_bench.feedback.questions import Answer, Language, Question, Tags, Words

LANGUAGES: tuple[Language, ...] = get_args(Language)
COOKIE = "d3po_feedback_language"


def _read() -> dict[Language, SimpleNamespace]:
    path = Path(__file__).parent / "words.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    return {language: SimpleNamespace(**found[language]) for language in LANGUAGES}


ALL = _read()
"""Each language's words, by name."""


def choose(request: Request) -> Language:
    """The language asked for: with ?lang=de, earlier so, or by the browser; else English."""
    wanted = [request.query_params.get("lang", ""), request.cookies.get(COOKIE, "")]
    accepted = re.findall(
        r"([A-Za-z]{1,8})(?:-[\w-]*)?\s*(?:;\s*q=([0-9.]{1,5}))?\s*(?:,|$)",
        request.headers.get("accept-language", "")[:200],
    )
    weights = {name.lower(): _weight(weight) for name, weight in reversed(accepted)}
    wanted += sorted((n for n in weights if weights[n] > 0), key=lambda name: -weights[name])
    return next((name for name in wanted if name in LANGUAGES), "en")


def _weight(text: str) -> float:
    try:
        return float(text or "1")
    except ValueError:
        return 0.0


def said(text: Words | None, language: Language) -> str:
    """A study's own words in a language; in English or the first there is if they lack it."""
    if text is None or isinstance(text, str):
        return text or ""
    return text.get(language) or text.get("en") or next(iter(text.values()))


def asked(question: Question, language: Language) -> str:
    """What raters are asked."""
    known: str = ALL[language].asked.get(f"{question.kind}.{question.name}", "")
    return said(question.text, language) or known


def word_on_tag(question: Question, language: Language) -> str:
    """What stands on a tagged picture; "" where nothing is tagged."""
    if not isinstance(question, Tags):
        return ""
    known = ALL[language].tags
    return said(question.word, language) or str(known.get(question.name, known[""]))


def in_words(question: Question, answer: Answer, order: Sequence[int], language: Language) -> str:
    """An answer as people say it, with pictures by their place from 1.

    Args:
        question: what was asked.
        answer: in the item's own indices.
        order: index of the picture at each place.
        language: to say it in.
    """
    w = ALL[language]
    if question.kind == "pairs":
        known = {"tie": w.tie, "bad": w.both_bad}
        place = order.index("ab".index(str(answer))) + 1 if answer in ("a", "b") else 0
        return str(known.get(str(answer)) or w.first.format(place))
    if question.kind == "scale":
        ratings = answer if isinstance(answer, tuple) else (answer,)
        ends = {question.steps[0]: question.low, question.steps[-1]: question.high}
        meant = [said(ends.get(int(rating)), language) for rating in ratings]
        both = zip(ratings, meant, strict=True)
        return " / ".join(f"{rating} ({word})" if word else str(rating) for rating, word in both)
    assert isinstance(answer, tuple)
    places = [str(order.index(index) + 1) for index in answer]
    if question.kind == "ranking":
        return " > ".join(places)
    return ", ".join(sorted(places)) or str(w.none)


def marks(question: Question, answer: Answer, order: Sequence[int]) -> list[str]:
    """What stands on the picture at each place: good, bad, a number, or nothing."""
    if question.kind == "pairs":
        return ["good" if "ab"[index] == answer else "" for index in order]
    if question.kind == "scale":
        ratings = answer if isinstance(answer, tuple) else (answer,)
        return [" / ".join(map(str, ratings))]
    assert isinstance(answer, tuple)
    if question.kind == "tags":
        return ["bad" if index in answer else "" for index in order]
    return [str(answer.index(index) + 1) for index in order]
