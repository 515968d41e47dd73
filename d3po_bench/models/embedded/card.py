"""Measure the embedded model and write its card, CARD.md, and the sheet of samples.

    python -m d3po_bench.models.embedded.card

Every figure on the card comes from here or from card.json, which the recipe wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from d3po_bench import registry
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws, sample
from d3po_bench.errors import said_in_one_line
from d3po_bench.models.adapters import Training
from d3po_bench.models.sources import load
from d3po_bench.models.tiny import SOURCE
from d3po_bench.prompts import read_prompts
from d3po_bench.types import Model

HERE = Path(__file__).parent
SEED = 7_000_000


def draw(model: Model, prompts: list[str], eta: float, steps: int) -> Tensor:
    """One image [3, 32, 32] uint8 for each prompt, guidance 5."""
    policy = Policy(model, steps=steps, eta=eta, guidance=5.0)
    draws = Draws(seed=SEED, round=0, noise="eval-noise", steps="eval-steps")
    return model.decode(sample(policy, prompts, draws).latents[:, 0, -1])


def measure(model: Model, images: int, steps: int) -> dict[str, Any]:
    """Top-1 of the classifier on bare animal names, and JPEG sizes, with both samplers."""
    animals = read_prompts("animals")
    prompts = [a for a in animals for _ in range(images)]
    judge: Any = registry.load_scorer("animal", torch.device("cpu")).scorer
    size = registry.load_scorer("jpeg_size", torch.device("cpu"))
    facts: dict[str, Any] = {"images": images, "steps": steps}
    for name, eta in (("eta1", 1.0), ("eta0", 0.0)):
        drawn = draw(model, prompts, eta, steps)
        guess = judge.logits(drawn).argmax(1)
        right = torch.tensor([judge.names[g] == p for g, p in zip(guess, prompts, strict=True)])
        by_animal = right.view(len(animals), images).float().mean(1)
        sizes = size(drawn, prompts)
        facts[name] = {
            "top1": round(float(right.float().mean()), 4),
            "weakest": {animals[i]: round(float(by_animal[i]), 2) for i in by_animal.argsort()[:5]},
            "jpeg_kb_mean": round(float(sizes.mean()), 3),
            "jpeg_kb_std": round(float(sizes.std()), 3),
        }
    flat = size(torch.full((1, 3, 32, 32), 128, dtype=torch.uint8), [""])
    return facts | {"flat_jpeg_kb": round(float(flat[0]), 3)}


def sheet(model: Model, path: Path) -> None:
    """A picture of every animal and of some captions, deployment sampler, 20 steps."""
    from PIL import Image

    captions = [
        "a cat on a red striped background", "a frog on a yellow checked background",
        "a fox on a teal dotted background", "a whale on a pink background",
        "a bee on a black grainy background", "a pig on a blue cloudy background",
        "a zebra on a green gradient background", "an ant on a white background",
        "a duck on a purple striped background",
    ]  # fmt: skip
    images = draw(model, read_prompts("animals") + captions, eta=0.0, steps=20)
    grid = images.view(6, 9, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(6 * 32, 9 * 32, 3)
    picture = Image.fromarray(np.ascontiguousarray(grid.numpy()))
    picture.resize((9 * 96, 6 * 96), Image.Resampling.BICUBIC).save(path)


def write_card(facts: dict[str, Any]) -> str:
    """CARD.md from the figures of card.json."""
    recipe, stages, found = facts["recipe"], facts["stages"], facts["facts"]
    rows = "\n".join(
        f"| {name} | {s['steps']:,} | {s['seconds']:,} |" for name, s in sorted(stages.items())
    )
    shown = facts["measured"]
    tops = "\n".join(
        f"| {steps} | {m['eta1']['top1']:.3f} | {m['eta0']['top1']:.3f} | "
        f"{m['eta1']['jpeg_kb_mean']:.2f} +- {m['eta1']['jpeg_kb_std']:.2f} |"
        for steps, m in shown.items()
    )
    weakest = ", ".join(f"{n} {v:.2f}" for n, v in shown["20"]["eta1"]["weakest"].items())
    text = (HERE / "CARD.template.md").read_text(encoding="utf-8")
    megabytes = sum(p.stat().st_size for p in HERE.rglob("*") if p.is_file()) / 1e6
    return text.format(
        stages=rows, tops=tops, weakest=weakest, psnr=found["psnr_db"], scale=1 / found["std"],
        judge=found["classifier_held_out_top1"], pictures=recipe["pictures"],
        processes=recipe["processes"], megabytes=megabytes, images=shown["20"]["images"],
        flat=shown["20"]["flat_jpeg_kb"],
    )  # fmt: skip


@click.command()
@click.option("--images", default=10, show_default=True, help="Samples of each animal.")
def main(images: int) -> None:
    """Measure, then write card.json, CARD.md and samples.png beside the weights.

    Example: python -m d3po_bench.models.embedded.card --images 10
    """
    torch.set_num_threads(1)
    model = load(SOURCE, torch.device("cpu"), Training())
    path = HERE / "card.json"
    facts = json.loads(path.read_text())
    facts["measured"] = {str(steps): measure(model, images, steps) for steps in (20, 10)}
    path.write_text(json.dumps(facts, indent=1) + "\n")
    (HERE / "CARD.md").write_text(write_card(facts), encoding="utf-8")
    sheet(model, HERE / "samples.png")
    click.echo(json.dumps(facts["measured"], indent=1))


if __name__ == "__main__":
    with said_in_one_line():
        main()
