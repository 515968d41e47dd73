"""How much of a gradient is signal: without guidance and with it, by denoising step.

    python -m results.gradients

takes ten minutes of one core and writes gradients.csv. It draws eight images of each of 48 prompts
of training, from one noise a prompt, and takes DDPO's gradient (advantages against the images of a
prompt) of each eight prompts by themselves. Of such parts, which share no prompt, `agreement` is
the mean of <g_i, g_j> over the mean of <g_i, g_i>: the share of the squared length of a part's
gradient that other prompts confirm. 0 is noise alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d3po_bench import registry
from d3po_bench.diffusion.advantages import advantages
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws, sample
from d3po_bench.models import start
from d3po_bench.models.adapters import Training
from d3po_bench.models.sources import load, model_source
from d3po_bench.prompts import read_prompts
from d3po_bench.runs.files import csv_bytes, read_csv, write_atomically
from d3po_bench.training.tools import spread
from d3po_bench.types import Rollout
from eval.analysis.tables import Record, Table, number, text

FILE = Path(__file__).resolve().parent / "gradients.csv"
SCORERS = ("geneval_soft", "jpeg_size")
GUIDANCES, STEPS, SEED = (1.0, 5.0), 10, 900
PARTS, PROMPTS, IMAGES = 6, 8, 8
"""Parts, prompts of a part, images of a prompt: 64 images a part."""


def measure() -> None:
    """Write gradients.csv."""
    torch.set_num_threads(1)
    rows = [row for guidance in GUIDANCES for row in _measured(guidance)]
    write_atomically(FILE, csv_bytes(rows))


def agreement(parts: Tensor) -> float:
    """Mean product of two parts' gradients over their mean squared length.

    Args:
        parts: [n, D], a gradient each.
    """
    products = parts @ parts.T
    own = products.diag().sum()
    return float((products.sum() - own) / (len(parts) - 1) / own)


def _measured(guidance: float) -> Iterator[dict[str, Any]]:
    device = torch.device("cpu")
    model = load(model_source("tiny2"), device, Training())
    start.begin(model, SEED, "")
    policy = Policy(model, steps=STEPS, eta=1.0, guidance=guidance)
    prompts = spread(read_prompts("geneval"), PARTS * PROMPTS)
    drawn = sample(
        policy, prompts, Draws(seed=SEED, round=0), images_per_prompt=IMAGES, shared_noise=True
    )
    with torch.no_grad():
        pictures = model.decode(drawn.latents[:, :, -1].flatten(0, 1))
    of_each = [prompt for prompt in prompts for _ in range(IMAGES)]
    scores = {n: registry.load_scorer(n, device)(pictures, of_each) for n in SCORERS}
    for scorer, gradients in _gradients(policy, drawn, scores).items():
        own = gradients / gradients.norm(dim=2, keepdim=True).mean(0)
        kinds = {str(step + 1): gradients[:, step] for step in range(STEPS)}
        kinds |= {
            f"1 to {STEPS // 2}": gradients[:, : STEPS // 2].sum(1), "all": gradients.sum(1),
            "all, of equal length": own.sum(1),
        }  # fmt: skip
        for steps, parts in kinds.items():
            yield {"guidance": guidance, "scorer": scorer, "steps": steps,
                   "agreement": f"{agreement(parts):.3f}"}  # fmt: skip


def _gradients(policy: Policy, drawn: Rollout, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[parts, T, D] of each scorer: DDPO's gradient for LoRA's B, as A has none at the start."""
    weights = [w for name, w in policy.model.trainable().items() if "lora_B" in name]
    found: dict[str, list[Tensor]] = {name: [] for name in scores}
    advantage = {
        name: advantages(replace(drawn, scores=score.view(-1, IMAGES)), against="group")
        for name, score in scores.items()
    }
    for part in torch.arange(PARTS * PROMPTS).split(PROMPTS):
        conditions = drawn.conditions.take(part.repeat_interleave(IMAGES))
        for place in range(STEPS):
            x, x_next = (drawn.latents[part, :, n].flatten(0, 1) for n in (place, place + 1))
            step = policy.step(x, torch.full((len(x),), place), conditions)
            log_prob = step.log_prob(x_next)
            for name, gradients in found.items():
                loss = (advantage[name][part].flatten() * log_prob).mean()
                parts = torch.autograd.grad(loss, weights, retain_graph=True)
                gradients.append(torch.cat([g.flatten() for g in parts]))
    return {name: torch.stack(g).view(PARTS, STEPS, -1) for name, g in found.items()}


def table() -> Table:
    """What `measure` found of several steps together; single ones cannot be told from noise."""
    found: dict[str, Record] = {}
    for row in (row for row in read_csv(FILE) if not row["steps"].isdigit()):
        name = f"{row['scorer']}, guidance {float(row['guidance']):g}"
        found.setdefault(row["steps"], {"steps": row["steps"]})[name] = float(row["agreement"])
    records = [*found.values()]
    names = [name for name in records[0] if name != "steps"]
    columns = {"steps": text("steps"), **{name: number(name, ".3f") for name in names}}
    return Table(records, columns, left=("steps",))


if __name__ == "__main__":
    measure()
