"""Pictures from elsewhere: folders with a table of texts, judged line by line and compared."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, combinations, groupby
from pathlib import Path

import numpy as np

from d3po_bench.errors import UserError
from d3po_bench.feedback import rounds, schema
from d3po_bench.feedback.invitations import pool_of
from d3po_bench.feedback.rounds import SOURCES, Item, Pool, Round, Vote
from d3po_bench.feedback.shares import clustered
from d3po_bench.feedback.store import LabelStore
from d3po_bench.feedback.study import Study
from d3po_bench.feedback.votes import effective_votes
from d3po_bench.pictures import read_pictures
from d3po_bench.runs.files import csv_bytes, taken, write_output

REMEDY = "Make a round with `feedback new --kind pairs --pictures A --pictures B`."


@dataclass(frozen=True, kw_only=True)
class Share:
    """How often a source of a comparison is the first choice."""

    source: str
    """Folder of pictures, as `feedback new` was given it."""
    share: float
    """0 to 1; those of all sources add to 1."""
    low: float | None
    high: float | None
    """Ends of its 95 % interval over prompts; None with a single prompt."""
    raters: Pool

    @property
    def said(self) -> str:
        """For people."""
        if self.low is None or self.high is None:
            return f"{self.source}  {self.share:.1%}  (one prompt: no interval)"
        return f"{self.source}  {self.share:.1%}  (95 % {self.low:.1%} to {self.high:.1%})"


# ---- the round


def take(folder: Path, sources: Sequence[Path], study: Study, beside: Path = Path()) -> Round:
    """Copy pictures into a round.

    Args:
        folder: of the round; it must hold none.
        sources: folders with metadata.csv or metadata.jsonl (file_name, text). With pairs, every
            two of them are compared, line by line. Otherwise a line of each makes a group; of a
            single folder, the lines that follow each other with the same text do.
        study: what people will be asked.
        beside: where the paths of the study's own pictures begin.

    Raises:
        UserError: a source is malformed, their texts differ, or a round is there.
    """
    listed = [[(source / name, text) for name, text in read_pictures(source)] for source in sources]
    texts = [[text for _, text in lines] for lines in listed]
    for source, found in zip(sources, texts, strict=True):
        if found != texts[0]:
            raise UserError(
                f"{source} does not have the texts of {sources[0]}, in the same order. Compare "
                "pictures of the same prompts."
            )
    study, known = rounds.placed(study, beside)
    rounds.check_sizes(path for path, _ in chain(*listed))
    with taken(folder):
        if (folder / rounds.FILE).exists():
            raise UserError(f"There is a round in {folder} already. Give another folder.")
        compared = all(question.kind == "pairs" for question in study.question)
        groups = []
        for name, prompt, paths in _groups(listed, compared):
            copies = {f"images/{name}-{k}.png": path for k, path in enumerate(paths)}
            rounds.save_pictures(folder, copies)
            groups.append(Item(name, prompt, tuple(copies)))
        rounds.save_pictures(folder, known)
        rounds.write_json(folder / SOURCES, [str(source) for source in sources])
        return Round(study, tuple(groups)).finish(folder)


def _groups(
    listed: Sequence[Sequence[tuple[Path, str]]], compared: bool
) -> Iterator[tuple[str, str, list[Path]]]:
    """Name, prompt and pictures of each item."""
    if len(listed) == 1:
        for n, (text, lines) in enumerate(groupby(listed[0], key=lambda line: line[1])):
            yield f"{n:05d}", text, [path for path, _ in lines]
        return
    for n, same in enumerate(zip(*listed, strict=True)):
        pictures, prompt = [path for path, _ in same], same[0][1]
        if compared:
            for i, j in combinations(range(len(pictures)), 2):
                yield _pair(n, i, j), prompt, [pictures[i], pictures[j]]
        else:
            yield f"{n:05d}", prompt, pictures


def _pair(line: int, i: int, j: int) -> str:
    """Name of the item that shows sources i and j of a line."""
    return f"{line:05d}-{i}-{j}"


# ---- who is chosen


def choices(store: LabelStore, folder: Path) -> list[Share]:
    """How often each source of the round in `folder` is the first choice.

    Raises:
        UserError: the round compares nothing, or nobody has compared all pictures of a prompt.
    """
    sources = sources_of(store.round, folder)
    votes = [v for v in effective_votes(store) if store.items[v.item].use == "main"]
    found = first_choices(votes, len(sources))
    if not found:
        raise UserError(
            f"Nobody has compared all pictures of a prompt in {folder} yet. Let raters finish: "
            "d3po-bench feedback serve."
        )
    pool = pool_of(vote.rater for vote in votes)
    shares = []
    means, count = [np.mean(said, 0) for said in found.values()], sum(map(len, found.values()))
    for source, column in zip(sources, np.array(means).T, strict=True):
        low, high = clustered(column.tolist(), range(len(column)), count)
        ends = (low, high) if len(column) > 1 else (None, None)
        mean = float(column.mean())
        shares.append(Share(source=source, share=mean, low=ends[0], high=ends[1], raters=pool))
    return shares


def sources_of(round_: Round, folder: Path) -> list[str]:
    """The folders that the round in `folder` compares, in pairs.

    Raises:
        UserError: it compares none.
    """
    if not (folder / SOURCES).exists():
        raise UserError(f"{folder} does not compare folders of pictures. {REMEDY}")
    found = schema.read(schema.SOURCES, folder / SOURCES, REMEDY)
    pairs = list(combinations(range(len(found)), 2))
    ids = [item.id.partition(".")[0] for item in round_.items if item.use == "main"]
    if ids != [_pair(n, i, j) for n in range(len(ids) // len(pairs)) for i, j in pairs]:
        raise UserError(
            f"{folder} does not compare every two of the {len(found)} folders that "
            f"{SOURCES} names. {REMEDY}"
        )
    return found


def first_choices(votes: Sequence[Vote], sources: int) -> dict[str, list[list[float]]]:
    """Raters' first choices, by prompt; the shares of a choice add to 1.

    A rater's first choice for a prompt is the picture that wins most of its comparisons; equals
    share it. Ties and "both bad" are won by neither. Only raters who compared all pictures of a
    prompt count, once each.

    Args:
        votes: on a round that `take` made from several sources, in pairs.
        sources: number of them.

    Returns:
        Line number of the prompt, as in item names, -> [raters, sources] shares.
    """
    wins: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * sources)
    seen = Counter[tuple[str, str]]()
    for vote in votes:
        if vote.repeat:
            continue
        prompt, i, j = vote.item.partition(".")[0].split("-")
        seen[vote.rater, prompt] += 1
        if vote.answer in ("a", "b"):
            wins[vote.rater, prompt][int(i if vote.answer == "a" else j)] += 1
    chosen: dict[str, list[list[float]]] = defaultdict(list)
    for (rater, prompt), count in seen.items():
        if count == sources * (sources - 1) // 2:
            best = [n == max(wins[rater, prompt]) for n in wins[rater, prompt]]
            chosen[prompt].append([b / sum(best) for b in best])
    return dict(sorted(chosen.items()))


def write_choices(path: Path, found: Sequence[Share]) -> None:
    """Write shares as CSV, one a row, rounded to 6 digits; `d3po-bench table1` reads them.

    Sources are said from the file's folder, so that it may be published or moved with them.
    """
    rows = [
        {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(share).items()}
        | {"source": os.path.relpath(share.source, path.parent)}
        for share in found
    ]
    write_output(path, csv_bytes(rows))
