"""Whether methods rank alike on UNets half and twice as large as version 2's.

    python -m results.sizes build/sizes --device cuda --bf16 --minutes 4.5

trains the two other models, with version 2's recipe and its own autoencoder, and writes them to
build/sizes/half/tiny2 and build/sizes/double/tiny2. The runs are those of `tiny2/grid.toml` on
them, as PROTOCOL.md says.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from d3po_bench.errors import said_in_one_line
from d3po_bench.models.embedded.v2 import recipe
from d3po_bench.runs.packed import PACKED
from eval.analysis.gains import Groups, both_ends
from eval.analysis.ranks import rank_agreement
from eval.analysis.tables import Record, Table, change, number, over_seeds, spread, text
from results.claims import bullets
from results.steps import worst
from results.version2 import Seeds, main_rows, published, rewards

HOME = Path(__file__).resolve().parent
FOLDERS = {"half": HOME / "sizes" / "half", "version 2": HOME / "tiny2",
           "double": HOME / "sizes" / "double"}  # fmt: skip
"""Size of the UNet -> where its runs are published."""

CHANNELS = {"half": (32, 64, 80), "double": (64, 112, 160)}
"""Size -> channels of the UNet's levels; version 2 has 48, 80 and 112."""

ANIMAL = {"half": "animal:tiny2", "version 2": "animal", "double": "animal:tiny2"}
"""Size -> the second judge's column of its runs."""

SHIPPED = json.loads((recipe.HERE / "card.json").read_text())
"""The card of version 2."""


# ---- models


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--size", "sizes", multiple=True, type=click.Choice(list(CHANNELS)),
              default=list(CHANNELS), help="Default: both.")  # fmt: skip
@click.option("--minutes", type=float, help="Of training a UNet; default: the recipe's pictures.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--bf16/--fp32", default=False)
def models(
    work: Path, sizes: tuple[str, ...], minutes: float | None, device: str, bf16: bool
) -> None:
    """Train the UNets of the two other sizes below WORK; the same command resumes."""
    options = {
        "device": device, "bf16": bf16, "processes": 2 if device == "cpu" else 1,
        "minutes": {"unet": minutes} if minutes else {},
    }  # fmt: skip
    prepare(work, options)
    for size in sizes:
        (work / size).mkdir(exist_ok=True)
        for shared in ("tokenizer", "captions.json", "latents.json", "latents.npy", VAE):
            if not (link := work / size / shared).exists():
                link.symlink_to(Path("..", shared))
        own = recipe.Recipe(**SHIPPED["recipe"] | {"unet_channels": CHANNELS[size]})
        for stage in ("unet", "export"):
            recipe.run_stage(stage, own, work / size, work / size, options)


VAE = "vae.safetensors"


def prepare(work: Path, options: dict[str, Any]) -> None:
    """What both learn from: the recipe's pictures, and their latents by version 2's autoencoder."""
    from safetensors.torch import load_file, save_file

    work.mkdir(parents=True, exist_ok=True)
    shipped = recipe.HERE / "tiny2" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: weights.float() for name, weights in load_file(shipped).items()}, work / VAE)
    for stage in ("render", "latents"):
        recipe.run_stage(stage, recipe.Recipe(), work, work, options)


# ---- tables


def tables(folders: Mapping[str, Path] = FOLDERS) -> dict[str, Callable[[], Table]]:
    """Name -> what makes it, once all runs are there."""
    if not all((folder / PACKED).is_file() for folder in folders.values()):
        return {}
    made = {"v2-sizes": sizes, "v2-ranks": ranks, "v2-sizes-models": trained}
    return {name: partial(table, folders) for name, table in made.items()}


def sentences(folders: Mapping[str, Path] = FOLDERS) -> dict[str, Callable[[], str]]:
    """Likewise."""
    return {"claims-ranks": partial(said, folders)} if tables(folders) else {}


def _groups(folders: Mapping[str, Path]) -> dict[str, Groups]:
    return {size: main_rows(published(place)) for size, place in folders.items()}


def trained(folders: Mapping[str, Path]) -> Table:
    """A row for each model: how long it was trained, and what it draws before any fine-tuning."""
    records = []
    for size, folder in folders.items():
        card = folder / "card.json"
        known = json.loads(card.read_text()) if card.is_file() else SHIPPED
        runs = [run for own in main_rows(published(folder)).values() for run in own]
        spent = known["stages"]["unet"]
        records.append({
            "size": size, "channels": ", ".join(map(str, known["recipe"]["unet_channels"])),
            "pictures": spent["images"], "loss": spent["loss"],
            "recognised": both_ends(runs[0], ANIMAL[size])[0],
        })  # fmt: skip
    columns = {
        "UNet": text("size"), "channels": text("channels"),
        "pictures seen": number("pictures", ",.0f"), "loss": number("loss", ".3f"),
        "recognised": number("recognised", ".2f"),
    }  # fmt: skip
    return Table(records, columns, left=("UNet", "channels"))


def sizes(folders: Mapping[str, Path]) -> Table:
    """A row for each size and method: S and its rank there, and what the worse runs kept."""
    records: list[Record] = []
    for size, groups in _groups(folders).items():
        found, seen = rewards(groups), worst(groups, ANIMAL[size])
        before = both_ends(next(iter(groups.values()))[0], ANIMAL[size])[0]
        means = {method: fmean(seeds.values()) for method, seeds in found.items()}
        records += [
            {
                "size": size, "method": method, "seeds": len(seeds),
                **over_seeds("s", [*seeds.values()]),
                "rank": 1 + sum(mean > means[method] for mean in means.values()),
                "recognised_before": before,
                "recognised": fmean(one.recognised for one in seen[method].values()),
                "drift": fmean(one.drift for one in seen[method].values()),
            } for method, seeds in found.items()
        ]  # fmt: skip
    columns = {
        "UNet": text("size"), "method": text("method"), "seeds": text("seeds"),
        "S (95 % interval)": spread("s"), "rank": text("rank"),
        "recognised": change("recognised", ".2f"), "drift": number("drift", ".4f"),
    }  # fmt: skip
    return Table(records, columns, left=("UNet", "method"))


def ranks(folders: Mapping[str, Path]) -> Table:
    """A row for each two sizes: how far they put the methods in the same order."""
    found = {size: rewards(groups) for size, groups in _groups(folders).items()}
    records = []
    for one, other in combinations(found, 2):
        tau, low, high = rank_agreement(*(_seeds(found[size], found[one]) for size in (one, other)))
        records.append({"sizes": f"{one}, {other}", "tau": tau, "tau_low": low, "tau_high": high})
    columns = {"sizes": text("sizes"), "Kendall's tau (95 % interval)": spread("tau")}
    return Table(records, columns, left=("sizes",))


def said(folders: Mapping[str, Path]) -> str:
    """Which two sizes are shown to agree."""
    shown = [record["sizes"] for record in ranks(folders).records if record["tau_low"] > 0]
    return bullets([
        f"Shown to put the rows in a like order, tau above 0: {'; '.join(shown) or 'no two UNets'}."
    ])  # fmt: skip


def _seeds(found: Mapping[str, Seeds], order: Mapping[str, Seeds]) -> Any:
    """S [seeds, methods] of the seeds that all methods have."""
    shared = set.intersection(*(set(seeds) for seeds in found.values()))
    return [[found[method][seed] for method in order] for seed in sorted(shared)]


if __name__ == "__main__":
    with said_in_one_line():
        models(sys.argv[1:])
