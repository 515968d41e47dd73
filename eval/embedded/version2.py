"""How good the embedded model's version 2 is: GenEval by both judges, sheets to look at, the card.

    python -m eval.embedded.version2 d3po_bench/models/embedded/v2/tiny2

draws the captions of version 2's lists, scores them by kind with each judge that is there,
asks how often the animal of a bare name is the one most likely seen, and writes measured.json,
CARD.md and sheets: one of animals in random order without their names, for people to name, with its
key in naming.json, where answers are written beside it; one with captions; one with the first
judge's verdicts, on which notes are in verdicts.json; one of both versions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws, sample
from d3po_bench.errors import UserError, said_in_one_line
from d3po_bench.models.adapters import Training
from d3po_bench.models.embedded.v2 import judge, lists
from d3po_bench.models.embedded.v2.captions import ANIMALS, read
from d3po_bench.models.embedded.v2.recipe import averaged
from d3po_bench.models.embedded.v2.render import SIZE
from d3po_bench.models.embedded.v2.sheet import save_sheet
from d3po_bench.models.sources import Source, load
from d3po_bench.types import Model
from eval.scorers import _geneval

HERE = judge.HERE
SEED = 7_200_000
LOOKED = 100
"""Pictures to look at beside a judge's verdict."""


def drawn(model: Model, prompts: Sequence[str], steps: int, eta: float = 1.0) -> Tensor:
    """One picture [3, h, w] uint8 of each prompt, guidance 5."""
    policy = Policy(model, steps=steps, eta=eta, guidance=5.0)
    parts = []
    for number in range(0, len(prompts), 60):
        draws = Draws(seed=SEED, round=number, noise="eval-noise", steps="eval-steps")
        part = sample(policy, list(prompts[number : number + 60]), draws)
        parts.append(model.decode(part.latents[:, 0, -1]))
    return torch.cat(parts)


def likeliest(by: judge.Judge, images: Tensor) -> list[str]:
    """The animal that is most probable in each picture."""
    best = by.see(images).animals.flatten(2).amax(2).argmax(1)
    return [ANIMALS[i] for i in best.tolist()]


def measure(
    model: Model, judges: dict[str, judge.Judge], images: int, steps: int
) -> dict[str, Any]:
    """Scores by kind of each list, hard and soft, by each judge; top-1 of bare names.

    Agreement: the share of pictures on which both judges give the same hard verdict.
    """
    facts: dict[str, Any] = {"images": images, "steps": steps}
    for name, captions in lists.lists().items():
        prompts = [c for c in captions for _ in range(images)]
        pictures, asked = drawn(model, prompts, steps), [a for c in prompts if (a := read(c))]
        verdicts: list[Tensor] = []
        for by, one in judges.items():
            seen = one.see(pictures)
            for rule in (_geneval.hard, _geneval.soft):
                scores = torch.tensor(rule(seen, asked))
                told = _geneval.by_kind(scores, prompts)
                facts[f"{name} {by} {rule.__name__}"] = {k: round(v, 4) for k, v in told.items()}
                verdicts += [scores] if rule is _geneval.hard else []
        if len(verdicts) == 2:
            same = (verdicts[0] == verdicts[1]).double().mean()
            facts[f"{name} agreement"] = round(float(same), 4)
    names = [animal for animal in ANIMALS for _ in range(images)]
    pictures = drawn(model, names, steps)
    for by, one in judges.items():
        right = [g == n for g, n in zip(likeliest(one, pictures), names, strict=True)]
        facts[f"names {by} top1"] = round(float(np.mean(right)), 4)
    return facts


def _shown(pictures: Tensor, labels: Sequence[str], path: Path) -> None:
    save_sheet(list(pictures.permute(0, 2, 3, 1).numpy()), labels, path)


def to_name(model: Model, out: Path, steps: int) -> None:
    """naming.png, animals in random order, numbered; naming.json, which they were meant to be."""
    animals = random.Random(SEED).sample(ANIMALS, len(ANIMALS))
    numbers = [str(i + 1) for i in range(len(animals))]
    _shown(drawn(model, animals, steps, eta=0.0), numbers, out / "naming.png")
    answers = {n: {"is": animal, "named": ""} for n, animal in zip(numbers, animals, strict=True)}
    if not (out / "naming.json").exists():
        (out / "naming.json").write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")


def _share(told: dict[str, float], kind: str) -> str:
    """A list's score of a kind; some lists lack one."""
    return f"{told[kind]:.2f}" if kind in told else "-"


def both(model: Model, path: Path, steps: int) -> None:
    """Nine animals by version 1, and by version 2."""
    first = load(Source(str(HERE.parent / "tiny")), torch.device("cpu"), Training())
    old, new = (drawn(m, ANIMALS[:18:2], steps, eta=0.0) for m in (first, model))
    old = old.repeat_interleave(2, 2).repeat_interleave(2, 3)
    names = [f"{name}, version {v}" for v in (1, 2) for name in ANIMALS[:18:2]]
    _shown(torch.cat([old, new]), names, path)


def to_check(model: Model, by: judge.Judge, path: Path, steps: int) -> None:
    """100 held-out captions, with whether the judge takes the picture to be right."""
    captions = random.Random(5).sample(lists.lists()["geneval-held-out"], LOOKED)
    pictures, asked = drawn(model, captions, steps), [a for c in captions if (a := read(c))]
    verdicts = ["right" if right else "wrong" for right in _geneval.hard(by.see(pictures), asked)]
    labels = [
        f"{n}. {verdict}: {caption}"
        for n, (verdict, caption) in enumerate(zip(verdicts, captions, strict=True), 1)
    ]
    _shown(pictures, labels, path)


def _judges(folder: Path | None) -> dict[str, judge.Judge]:
    """Those in a folder, or those that ship."""
    home = folder or judge.HERE
    there = [name for name in judge.NETWORKS if (home / f"judge-{name}.json").exists()]
    return {name: judge.load(name, torch.device("cpu"), home) for name in there}


def card(home: Path, judges: Path) -> str:
    """CARD.md from what the recipes and `main` wrote into a folder, and people's answers."""
    read = {
        p.stem: json.loads(p.read_text(encoding="utf-8"))
        for p in (*home.glob("*.json"), *judges.glob("judge-*.json"))
    }
    made, found = read["card"], read["measured"]
    stages = "\n".join(
        f"| {name} | {stage['images']:,} | {stage['seconds']:,.0f} |"
        for name, stage in made["stages"].items()
    )
    shares = {name: read[f"judge-{name}"]["right"] for name in judge.NETWORKS}
    parts = ("presence", "count", "colour", "place")
    kinds = (*_geneval.KINDS, "mean")
    scores = [
        f"| {name} | {by} | {' | '.join(_share(found[key], k) for k in kinds)} |"
        for name, by, key in (
            (name, by, f"{name} {by} hard") for name in lists.lists() for by in judge.NETWORKS
        )
    ]
    if "verdicts" not in read:
        raise UserError(
            f"Nobody looked at {home / 'verdicts.png'} yet. Write the numbers of pictures whose "
            'verdict is not right as {"wrong": [], "arguable": []} to verdicts.json beside it, '
            "and give the command again."
        )
    answers, notes = read["naming"].values(), read["verdicts"]
    agreement = [found[f"{name} agreement"] for name in lists.lists()]
    template = (HERE / "CARD.template.md").read_text(encoding="utf-8")
    megabytes = sum(p.stat().st_size for p in home.rglob("*.safetensors")) / 1e6
    return template.format(
        stages=stages, scores="\n".join(scores), kinds=" | ".join(_geneval.KINDS),
        bars="--:|" * len(_geneval.KINDS), megabytes=megabytes,
        judges="\n".join(
            f"| {name} | {' | '.join(f'{share[p]:.1%}' for p in parts)} |"
            for name, share in shares.items()
        ),
        named=sum(a["is"] == a["named"] for a in answers),
        agreement=f"{min(agreement):.1%} to {max(agreement):.1%}",
        top1=", ".join(f"{found[f'names {by} top1']:.1%}" for by in judge.NETWORKS),
        channels=made["recipe"]["latent_channels"],
        latent=SIZE >> (made["recipe"]["vae_levels"] - 1), pictures=made["recipe"]["pictures"],
        psnr=made["facts"]["psnr_db"], scale=1 / made["facts"]["std"], steps=found["steps"],
        images=found["images"], looked=LOOKED, wrong=len(notes["wrong"]),
        arguable=len(notes["arguable"]), averaged=averaged(made["recipe"]["unet_batch"]),
    )  # fmt: skip


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--judges", type=click.Path(exists=True, path_type=Path), help="Their folder.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the result; FOLDER's.")
@click.option("--images", default=2, show_default=True, help="Pictures of each caption.")
@click.option("--steps", default=20, show_default=True)
def main(folder: Path, judges: Path | None, out: Path | None, images: int, steps: int) -> None:
    """Measure the pipeline in FOLDER.

    Example: python -m eval.embedded.version2 d3po_bench/models/embedded/v2/tiny2
    """
    torch.set_num_threads(1)
    out = out or folder.parent
    model = load(Source(str(folder)), torch.device("cpu"), Training())
    to_name(model, out, steps)
    captions = lists.lists()["geneval-held-out"][::6]
    _shown(drawn(model, captions, steps, eta=0.0), captions, out / "captions.png")
    both(model, out / "versions.png", steps)
    asked = _judges(judges)
    to_check(model, asked["first"], out / "verdicts.png", steps)
    facts = measure(model, asked, images, steps)
    (out / "measured.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (out / "CARD.md").write_text(card(out, judges or judge.HERE), encoding="utf-8")
    click.echo(json.dumps(facts, indent=1))


if __name__ == "__main__":
    with said_in_one_line():
        main()
