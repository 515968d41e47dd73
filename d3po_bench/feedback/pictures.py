"""Rounds of pictures from elsewhere: folders with a metadata.csv, judged and compared."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

from d3po_bench.errors import UserError
from d3po_bench.feedback import rounds
from d3po_bench.feedback.rounds import Item, Kind, Question, Round, Vote
from d3po_bench.feedback.sampling import write_files
from d3po_bench.prompts import read_pictures
from d3po_bench.runs.files import taken, write_atomically

SOURCES = "sources.json"
"""Where the folders that were compared are named, in their order."""

Listed = list[tuple[Path, str]]
"""Pictures with their prompts."""


def take(folder: Path, sources: Sequence[Path], judged: tuple[Kind, Question]) -> Round:
    """Copy pictures into a round.

    Args:
        folder: of the round; it must hold none.
        sources: folders with metadata.csv (file_name, text). With pairs, every two of them are
            compared, line by line. With tags, a line of each makes a grid; of a single folder,
            the lines that follow each other with the same text do.
        judged: how people will look at them.

    Raises:
        UserError: a source is none, their texts differ, or a round is there.
    """
    listed = [_listed(source) for source in sources]
    kind, question = judged
    with taken(folder):
        if (folder / rounds.FILE).exists():
            raise UserError(
                f"Expected an empty folder for a round, got one in {folder}. Give another."
            )
        groups = list(_groups(sources, listed, kind))
        items = tuple(_copied(folder, name, prompt, paths) for name, prompt, paths in groups)
        write_files(folder)
        names = json.dumps([str(source) for source in sources])
        write_atomically(folder / SOURCES, names.encode() + b"\n")
        round_ = Round(kind, question, question == "unsafe", items)
        round_.write(folder)
        return round_


def _listed(source: Path) -> Listed:
    return [(source / name, text) for name, text in read_pictures(source)]


def _groups(
    sources: Sequence[Path], listed: Sequence[Listed], kind: Kind
) -> Iterator[tuple[str, str, list[Path]]]:
    """Name, prompt and pictures of each item."""
    if len(sources) == 1:
        yield from _of_one(listed[0])
        return
    for n, lines in enumerate(zip(*_same_texts(sources, listed), strict=True)):
        pictures, prompt = [path for path, _ in lines], lines[0][1]
        if kind == "tags":
            yield f"{n:05d}", prompt, pictures
        else:
            for i, j in combinations(range(len(pictures)), 2):
                yield _pair(n, i, j), prompt, [pictures[i], pictures[j]]


def _same_texts(sources: Sequence[Path], listed: Sequence[Listed]) -> Sequence[Listed]:
    texts = [[text for _, text in lines] for lines in listed]
    for source, mine in zip(sources, texts, strict=True):
        if mine != texts[0]:
            raise UserError(
                f"Expected the same texts in the same order in {sources[0]} and {source}, got "
                "others. Compare pictures of the same prompts."
            )
    return listed


def _of_one(lines: Listed) -> Iterator[tuple[str, str, list[Path]]]:
    groups: list[tuple[str, list[Path]]] = []
    for path, text in lines:
        if not groups or groups[-1][0] != text:
            groups.append((text, []))
        groups[-1][1].append(path)
    for n, (text, paths) in enumerate(groups):
        yield f"{n:05d}", text, paths


def _copied(folder: Path, name: str, prompt: str, paths: Sequence[Path]) -> Item:
    """The item, with its pictures saved again as PNG: nothing else in the files comes along."""
    from PIL import Image

    names = []
    for k, path in enumerate(paths):
        try:
            with Image.open(path) as picture:
                buffer = io.BytesIO()
                picture.convert("RGB").save(buffer, "PNG")
        except (OSError, ValueError, Image.DecompressionBombError) as problem:
            raise UserError(
                f"Expected a picture in {path}, got {problem}. Save it again, or take its line "
                "out of metadata.csv."
            ) from problem
        names.append(f"images/{name}-{k}.png")
        write_atomically(folder / names[-1], buffer.getvalue())
    return Item(name, prompt, tuple(names))


# ---- who is chosen


def first_choices(round_: Round, votes: Sequence[Vote], sources: int) -> dict[str, list[float]]:
    """How often each source is a rater's first choice, by prompt; the shares of a prompt add to 1.

    A rater's first choice for a prompt is the picture that wins most of its comparisons; equals
    share it. Ties and "both bad" are won by neither. Only raters who compared all pictures of a
    prompt count, once each.

    Args:
        round_: made by `take` from several sources, in pairs.
        votes: what was said.
        sources: number of them.

    Returns:
        Line number of the prompt, as in item names, -> [sources] shares.
    """
    wins: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * sources)
    seen: dict[tuple[str, str], int] = defaultdict(int)
    for vote in votes:
        if vote.repeat:
            continue
        prompt, i, j = vote.item.split("-")
        seen[vote.rater, prompt] += 1
        if vote.answer in ("a", "b"):
            wins[vote.rater, prompt][int(i if vote.answer == "a" else j)] += 1
    all_of_them = sources * (sources - 1) // 2
    chosen: dict[str, list[list[float]]] = defaultdict(list)
    for key, count in seen.items():
        if count == all_of_them:
            chosen[key[1]].append(_first(wins[key]))
    return {
        prompt: [sum(share) / len(said) for share in zip(*said, strict=True)]
        for prompt, said in sorted(chosen.items())
    }


def _first(wins: Sequence[int]) -> list[float]:
    best = [n == max(wins) for n in wins]
    return [float(b) / sum(best) for b in best]


def sources_of(folder: Path) -> list[str]:
    """The folders that a round compares, in pairs.

    Raises:
        UserError: it compares none.
    """
    found = _sources(folder)
    pairs = list(combinations(range(len(found)), 2))
    ids = [item.id for item in Round.read(folder).items]
    prompts = range(len(ids) // len(pairs))
    if ids != [_pair(n, i, j) for n in prompts for i, j in pairs]:
        raise UserError(
            f"Expected every two of {len(found)} folders of pictures, as {folder / SOURCES} says, "
            f"got a round of other items in {folder}. Make one with `feedback new --kind pairs "
            "--pictures A --pictures B`."
        )
    return found


def _pair(line: int, i: int, j: int) -> str:
    """Name of the item that shows sources i and j of a line."""
    return f"{line:05d}-{i}-{j}"


def _sources(folder: Path) -> list[str]:
    path = folder / SOURCES
    try:
        found = [str(name) for name in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RecursionError) as problem:
        raise UserError(
            f"Expected a round of several folders of pictures in {folder}, got {problem}. Make one "
            "with `feedback new --kind pairs --pictures A --pictures B`."
        ) from problem
    if len(found) < 2:
        raise UserError(
            f"Expected a round of several folders of pictures in {folder}, got one of "
            f"{len(found)}. Compare at least two."
        )
    return found
