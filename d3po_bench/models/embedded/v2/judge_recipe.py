"""How version 2's judges were made, and how often they are right.

    python -m d3po_bench.models.embedded.v2.judge_recipe first second --work build/tiny-v2

trains each on the renders of the recipe, as far as it is not trained yet, measures it on renders
of another seed, and writes its weights and judge-NAME.json, with the confusion matrix, beside
this file: unless it is right on too few.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from d3po_bench.errors import said_in_one_line
from d3po_bench.models.embedded.render import COLOURS
from d3po_bench.models.embedded.v2 import render
from d3po_bench.models.embedded.v2.captions import ANIMALS
from d3po_bench.models.embedded.v2.judge import (
    NETWORKS,
    Found,
    Judge,
    interpret,
    paths,
    require_good,
)
from d3po_bench.models.embedded.v2.pictures import Pictures
from d3po_bench.models.embedded.v2.scenes import KINDS, Scene, Thing
from d3po_bench.models.embedded.v2.training import Plan, State, fit

HELD_OUT = 1_000_000
"""Seed of the renders to measure on."""

_TOLERANCE = 0.06
"""How far off a place may be, in shares of the width."""


def targets(scenes: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Animals of N pictures, at most four each.

    Returns:
        [N, 4, 3] float: centre across and down, and size. [N, 4, 3] int64: animal, colour under
        it, whether that is a card's; -1 where there are fewer than four.
    """
    places = torch.zeros(len(scenes), 4, 3)
    facts = torch.full((len(scenes), 4, 3), -1)
    colours = {name: i for i, name in enumerate(COLOURS)}
    for n, scene in enumerate(scenes):
        for i, thing in enumerate(scene["things"]):
            places[n, i] = torch.tensor([thing["x"], thing["y"], thing["side"]])
            under = thing["card"] or scene["ground"]
            facts[n, i] = torch.tensor(
                [ANIMALS.index(thing["animal"]), colours[under], int(thing["card"] is not None)]
            )
    return places, facts


def _heat(places: Tensor, facts: Tensor, grid: int) -> Tensor:
    """How near the centre of each animal is to each cell, 0 to 1 (in it), [N, 45, grid, grid]."""
    heat = torch.zeros(len(places), len(ANIMALS), grid, grid, device=places.device)
    steps = (torch.arange(grid, device=places.device) + 0.5) / grid
    for place, animal in zip(places.unbind(1), facts[..., 0].unbind(1), strict=True):
        n = (animal >= 0).nonzero().squeeze(1)
        x, y = place[n, 0, None, None], place[n, 1, None, None]
        near = ((x - steps[None, None, :]) ** 2 + (y - steps[None, :, None]) ** 2).mul(-200).exp()
        inside = ((x * grid).floor() == torch.arange(grid, device=x.device)[None, None, :]) & (
            (y * grid).floor() == torch.arange(grid, device=x.device)[None, :, None]
        )
        near = torch.where(inside, 1.0, near)
        heat[n, animal[n]] = torch.maximum(heat[n, animal[n]], near)
    return heat


def loss_of(raw: Tensor, places: Tensor, facts: Tensor) -> Tensor:
    """Penalty-reduced focal loss on centres (CornerNet's), and the facts at true centres."""
    grid = raw.shape[-1]
    seen = interpret(raw.float())
    heat = _heat(places, facts, grid)
    n, i = (facts[..., 0] >= 0).nonzero(as_tuple=True)
    colour, card = facts[n, i, 1:].unbind(1)
    true = places[n, i]
    column, row = (true[:, :2] * grid).long().clamp(0, grid - 1).unbind(1)
    p = seen.animals.clamp(1e-5, 1 - 1e-5)
    centre = heat == 1
    focal = torch.where(
        centre, -(1 - p).square() * p.log(), -((1 - heat) ** 4) * p.square() * (1 - p).log()
    )
    spots = (n, slice(None), row, column)
    where = (seen.place[spots] - true).abs().mean()
    tone = F.nll_loss(seen.colours[spots].clamp(min=1e-6).log(), colour)
    on_card = F.binary_cross_entropy(seen.card[n, row, column], card.float())
    return focal.sum() / len(n) + 10 * where + 0.5 * tone + 0.5 * on_card


def worn(images: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures [N, 3, 64, 64] in [-1, 1] with contrast, blur and noise, unlike crisp renders."""
    count, device = len(images), images.device
    rand = torch.rand(3, count, 1, 1, 1, generator=rng, device=device)
    x = images * (0.85 + 0.3 * rand[0])
    blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = x + (1.2 * rand[1] - 0.2).clamp(min=0) * (blurred - x)
    return x + 0.12 * rand[2] * torch.randn(x.shape, generator=rng, device=device)


def train(name: str, work: Path, plan: Plan) -> State:
    """Fit one judge on all the renders that are there."""
    torch.manual_seed(plan.seed)
    network = NETWORKS[name]().to(plan.device)
    pictures = Pictures(work / "pictures", plan.device)
    places, facts = (t.to(plan.device) for t in targets(pictures.scenes()))

    def loss(rng: torch.Generator, count: int) -> Tensor:
        index = torch.randint(len(pictures), (count,), generator=rng, device=plan.device)
        x = pictures.batch(index)[:, :3].float().div(127.5).sub(1)
        return loss_of(network(worn(x, rng)), places[index], facts[index])

    return fit(plan, network, loss)


# ---------------------------------------------------------------- how often they are right


def held_out(count: int) -> tuple[Tensor, list[Scene]]:
    """Renders that no judge was trained on, as many of each kind of caption."""
    kinds = list(KINDS)
    drawn = [render.sample(HELD_OUT, i, kinds[i % len(kinds)]) for i in range(count)]
    pixels = torch.from_numpy(np.stack([p[..., :3] for p, _ in drawn])).permute(0, 3, 1, 2)
    return pixels, [scene for _, scene in drawn]


def _nearest(found: list[Found], thing: Thing) -> Found | None:
    """What was found at an animal's place, if anything was."""
    close = [f for f in found if max(abs(f.x - thing.x), abs(f.y - thing.y)) < _TOLERANCE]
    return close[0] if close else None


def measure(judge: Judge, count: int) -> dict[str, Any]:
    """Shares right on held-out renders, and what was taken for what.

    Presence and count: of pictures, in which exactly the true animals are seen, and as many of
    each. Place and colour: of animals, at whose place one is seen, and on the right card or ground.
    """
    images, scenes = held_out(count)
    right: dict[str, list[bool]] = {k: [] for k in ("presence", "count", "place", "colour")}
    animals: Counter[str] = Counter()
    colours: Counter[str] = Counter()
    for found, scene in zip(judge.find(images), scenes, strict=True):
        true, seen = Counter(t.animal for t in scene.things), Counter(f.animal for f in found)
        right["presence"].append(set(true) == set(seen))
        right["count"].append(true == seen)
        animals["nothing as something"] += max(0, len(found) - len(scene.things))
        for thing in scene.things:
            near = _nearest(found, thing)
            under = _ground(thing.card or scene.ground, thing.card is not None)
            seen_under = _ground(near.colour, near.card) if near else "nothing"
            right["place"].append(near is not None)
            right["colour"].append(under == seen_under)
            animals[f"{thing.animal} as {near.animal if near else 'nothing'}"] += 1
            colours[f"{under} as {seen_under}"] += 1
    shares = {what: round(float(np.mean(values)), 4) for what, values in right.items()}
    confusion = {"animals": dict(animals.most_common()), "colours": dict(colours.most_common())}
    return {"renders": count, "right": shares} | confusion


def _ground(colour: str, card: bool) -> str:
    return f"{colour} {'card' if card else 'background'}"


def export(name: str, work: Path, out: Path, count: int) -> None:
    """Measure, and write the weights in fp16 and the facts.

    Raises:
        UserError: the judge is right on too few.
    """
    network = NETWORKS[name]()
    network.load_state_dict(
        {k: v.half().float() for k, v in load_file(work / f"judge-{name}.safetensors").items()}
    )
    facts = measure(Judge(network), count)
    click.echo(json.dumps({name: facts["right"]}))
    require_good(name, facts["right"])
    weights, record = paths(name, out)
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, weights)
    record.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(tuple(NETWORKS)), required=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/tiny-v2"))
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent)
@click.option("--images", default=200_000, show_default=True, help="To see in training.")
@click.option("--batch", default=32, show_default=True)
@click.option("--minutes", type=float, help="Let the rate end after so long.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--renders", default=4000, show_default=True, help="To measure on.")
def main(
    names: tuple[str, ...], work: Path, out: Path, images: int, batch: int,
    minutes: float | None, device: str, renders: int,
) -> None:  # fmt: skip
    """Train the judges NAMES, measure them, and write those that are good enough.

    Example: python -m d3po_bench.models.embedded.v2.judge_recipe first second
    """
    torch.set_num_threads(1)
    for name in names:
        plan = Plan(
            name=f"judge-{name}", images=images, batch=batch, lr=2e-3, memory=64_000,
            folder=work, device=torch.device(device), bf16=False, minutes=minutes,
            seed=10 + list(NETWORKS).index(name),
        )  # fmt: skip
        train(name, work, plan)
        export(name, work, out, renders)


if __name__ == "__main__":
    with said_in_one_line():
        main()
