r"""How version 2 of the embedded model is made, from the drawings that ship.

    python -m d3po_bench.models.embedded.v2.recipe all --work build/tiny-v2

renders captioned pictures, trains the autoencoder, then the text encoder with the UNet, and writes
the pipeline folder. Each stage leaves its result in the work folder, resumes from its checkpoint
when it was killed, and is skipped when it is done. Hours on two cores; on a GPU, in minutes:

    python -m d3po_bench.models.embedded.v2.recipe all --work build/tiny-v2 --device cuda --bf16 \
        --set vae_batch=128 --minutes vae=1.5 \
        --set unet_batch=512 --set unet_lr=0.002 --minutes unet=4
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file
from torch import Tensor

from d3po_bench.errors import UserError, said_in_one_line
from d3po_bench.models.embedded.recipe import (
    Denoiser,
    Losses,
    denoising,
    halve,
    new_scheduler,
    new_text_encoder,
    new_tokenizer,
    reconstruction,
    tokenize,
)  # fmt: skip
from d3po_bench.models.embedded.v2 import render
from d3po_bench.models.embedded.v2.lists import vocabulary
from d3po_bench.models.embedded.v2.pictures import Pictures, render_pictures
from d3po_bench.models.embedded.v2.sheet import draw_sheet
from d3po_bench.models.embedded.v2.training import EVERY, Plan, State, fit
from d3po_bench.models.sources import content

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Recipe(Losses):
    """Everything that decides the weights, up to the order of floating-point additions."""

    pictures: int = 160_000
    seed: int = 0
    vae_images: int = 120_000
    vae_batch: int = 16
    vae_lr: float = 2e-3
    vae_steady: float = 0.0
    vae_width: int = 32
    vae_levels: int = 3
    latent_channels: int = 8
    latent_noise: float = 0.08
    unet_images: int = 800_000
    unet_batch: int = 64
    unet_lr: float = 1.2e-3
    unet_steady: float = 0.6
    unet_channels: tuple[int, ...] = (48, 80, 112)
    text_layers: int = 3

    @property
    def latent_size(self) -> int:
        """Width and height of the latents."""
        return render.SIZE >> (self.vae_levels - 1)


# ---------------------------------------------------------------- autoencoder


def new_vae(recipe: Recipe, scaling_factor: float = 1.0) -> Any:
    """Diffusers' tiny autoencoder; each level but the first halves the picture."""
    from diffusers import AutoencoderTiny

    widths = (recipe.vae_width,) * recipe.vae_levels
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        latent_channels=recipe.latent_channels,
        num_encoder_blocks=(0, *[1] * (recipe.vae_levels - 1)),
        num_decoder_blocks=(3, *[2] * (recipe.vae_levels - 2), 0),
        scaling_factor=scaling_factor,
    )


def train_vae(recipe: Recipe, work: Path, plan: Plan) -> State:
    """Fit the autoencoder."""
    torch.manual_seed(recipe.seed)
    vae = new_vae(recipe).to(plan.device, memory_format=torch.channels_last)
    pictures = Pictures(work / "pictures", plan.device)

    def loss(rng: torch.Generator, count: int) -> Tensor:
        index = torch.randint(len(pictures), (count,), generator=rng, device=plan.device)
        whole = pictures.batch(index).float()
        x, mask = whole[:, :3].div(127.5).sub(1), whole[:, 3:].div(255)
        noise = partial(torch.randn, generator=rng, device=plan.device)
        return reconstruction(vae, x, mask, recipe, lambda z: noise(z.shape))

    return fit(plan, vae, loss)


def _trained_vae(recipe: Recipe, work: Path, device: torch.device, scale: float = 1.0) -> Any:
    vae = new_vae(recipe, scale).to(device, memory_format=torch.channels_last)
    vae.load_state_dict(load_file(work / "vae.safetensors", str(device)))
    return vae.eval()


@torch.no_grad()
def encode_latents(recipe: Recipe, work: Path, device: torch.device) -> None:
    """Write latents.npy [N, c, s, s] float16, divided by their standard deviation; the facts."""
    pictures, path = Pictures(work / "pictures", device), work / "latents.npy"
    if path.exists() and len(np.load(path, mmap_mode="r")) == len(pictures):
        return
    vae = _trained_vae(recipe, work, device)
    shape = (len(pictures), recipe.latent_channels, recipe.latent_size, recipe.latent_size)
    latents = np.lib.format.open_memmap(
        work / "latents.part.npy", "w+", dtype=np.float16, shape=shape
    )
    errors: list[Tensor] = []
    for index in torch.arange(len(pictures), device=device).split(500):
        x = pictures.batch(index)[:, :3].float().div(127.5).sub(1)
        z = vae.encoder(x.contiguous(memory_format=torch.channels_last))
        latents[index[0].item() : index[-1].item() + 1] = z.half().cpu().numpy()
        if len(errors) < 4:
            errors.append((vae.decoder(z).clamp(-1, 1) - x).square().mean() / 4)
    std = float(latents[:20_000].astype(np.float32).std())
    for block in range(0, len(pictures), 10_000):
        latents[block : block + 10_000] /= np.float16(std)
    latents.flush()
    psnr = -10 * math.log10(torch.stack(errors).mean().item())
    (work / "latents.json").write_text(json.dumps({"std": std, "psnr_db": psnr}))
    captions = [scene["caption"] for scene in pictures.scenes()]
    (work / "captions.json").write_text(json.dumps(captions))
    (work / "latents.part.npy").replace(path)
    click.echo(f"latents: std {std:.4f}, {psnr:.2f} dB on 2,000 pictures")


# ---------------------------------------------------------------- text and UNet


def new_unet(recipe: Recipe) -> Any:
    """Stable Diffusion's UNet class; of three levels the first and finest only convolves."""
    from diffusers import UNet2DConditionModel

    plain = len(recipe.unet_channels) - 2
    return UNet2DConditionModel(
        sample_size=recipe.latent_size,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",) * plain,
        block_out_channels=recipe.unet_channels,
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_denoiser(recipe: Recipe, tokenizer: Any) -> Denoiser:
    """UNet and text encoder with fresh weights."""
    return Denoiser(new_unet(recipe), new_text_encoder(tokenizer, recipe.text_layers))


def _tokenizer(work: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(work / "tokenizer")


def train_unet(recipe: Recipe, work: Path, plan: Plan) -> State:
    """Fit UNet and text encoder: noise prediction as `denoising` measures it."""
    tokenizer, device = _tokenizer(work), plan.device
    torch.manual_seed(recipe.seed)
    model: Any = new_denoiser(recipe, tokenizer)  # torch's types know no layout of a module
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    model = model.to(device, memory_format=layout)
    captions = json.loads((work / "captions.json").read_text())
    unique = ["", *sorted(set(captions))]
    table, number = tokenize(tokenizer, unique).to(device), {c: i for i, c in enumerate(unique)}
    rows = torch.tensor([number[c] for c in captions], device=device)
    latents = torch.from_numpy(np.load(work / "latents.npy", mmap_mode="c")).to(device)
    alphas = new_scheduler().alphas_cumprod.to(device)

    def loss(rng: torch.Generator, count: int) -> Tensor:
        rand = partial(torch.rand, generator=rng, device=device)
        index = torch.randint(len(rows), (count,), generator=rng, device=device)
        x = latents[index].float()
        chosen = torch.where(rand(count) < recipe.caption_dropout, 0, rows[index])
        # One timestep from each of `count` equal slices of 0..999: less noise in the mean.
        t = ((torch.arange(count, device=device) + rand(count)) * 1000 / count).long()
        t.clamp_(max=999)
        noise = torch.randn(x.shape, generator=rng, device=device)
        return denoising(model, x, noise, alphas[t], t, table[chosen], recipe.snr_cap)

    def look(weights: dict[str, Tensor], state: State) -> None:
        if state.progress < 1 and state.seconds // 1200 == (state.seconds - EVERY) // 1200:
            return
        model_now = new_denoiser(recipe, tokenizer).to(device)
        model_now.load_state_dict(weights)
        path = work / "sheets" / f"{state.images:09}.png"
        draw_sheet(pipeline(recipe, work, model_now), path)

    return fit(plan, model, loss, look)


# ---------------------------------------------------------------- export and command line


def pipeline(recipe: Recipe, work: Path, denoiser: Denoiser) -> Any:
    """A stock StableDiffusionPipeline of the trained autoencoder and this UNet."""
    from diffusers import StableDiffusionPipeline

    scale = 1 / json.loads((work / "latents.json").read_text())["std"]
    device = next(denoiser.parameters()).device
    return StableDiffusionPipeline(
        vae=_trained_vae(recipe, work, device, scale), text_encoder=denoiser.text,
        tokenizer=_tokenizer(work), unet=denoiser.unet, scheduler=new_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def export(recipe: Recipe, work: Path, out: Path) -> None:
    """Write the pipeline folder in fp16, its pin and card.json."""
    denoiser = new_denoiser(recipe, _tokenizer(work))
    denoiser.load_state_dict(load_file(work / "unet.safetensors"))
    pipe = pipeline(recipe, work, denoiser)
    # The text encoder is stored in fp32: transformers loads what is stored, diffusers fp32.
    halve(pipe.text_encoder).float()
    halve(pipe.unet), halve(pipe.vae)
    pipe.save_pretrained(out / "tiny2", safe_serialization=True)
    (out / "tiny2.sha256").write_text(content(out / "tiny2") + "\n")
    paths = (work / f"{name}.jsonl" for name in ("vae", "unet"))
    logs = {path.stem: path.read_text().splitlines() for path in paths if path.exists()}
    card = {
        "recipe": asdict(recipe), "facts": json.loads((work / "latents.json").read_text()),
        "stages": {name: json.loads(lines[-1]) for name, lines in logs.items()},
    }  # fmt: skip
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def averaged(batch: int) -> int:
    """Pictures over which the weights are averaged, about."""
    return max(64_000, 500 * batch)


def _worker(rank: int, stage: str, recipe: Recipe, work: Path, options: dict[str, Any]) -> None:
    """One training process, on one thread of the CPU."""
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    processes, device = options["processes"], torch.device(options["device"])
    if processes > 1:
        store = dist.FileStore(  # type: ignore[attr-defined]
            str(work / f".rendezvous-{stage}"), processes
        )
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    images, batch, lr, steady = (
        getattr(recipe, f"{stage}_{k}") for k in ("images", "batch", "lr", "steady")
    )
    plan = Plan(
        name=stage, images=images, batch=batch, lr=lr, steady=steady,
        memory=averaged(batch), folder=work, device=device, bf16=options["bf16"],
        seed=recipe.seed, lead=rank == 0, minutes=options["minutes"].get(stage),
    )  # fmt: skip
    {"vae": train_vae, "unet": train_unet}[stage](recipe, work, plan)


def run_stage(stage: str, recipe: Recipe, work: Path, out: Path, options: dict[str, Any]) -> None:
    """Run one stage, or what is left of it."""
    if stage == "render":
        render_pictures(work / "pictures", recipe.seed, recipe.pictures, os.cpu_count() or 1)
    if stage in {"vae", "unet"}:
        (work / f".rendezvous-{stage}").unlink(missing_ok=True)
        torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
            _worker, (stage, recipe, work, options), nprocs=options["processes"]
        )
    if stage == "latents":
        new_tokenizer(vocabulary(), work).save_pretrained(work / "tokenizer")
        encode_latents(recipe, work, torch.device(options["device"]))
    if stage == "export":
        export(recipe, work, out)


STAGES = ("render", "vae", "latents", "unet", "export")


@click.command()
@click.argument("stages", nargs=-1, type=click.Choice((*STAGES, "all")), required=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/tiny-v2"))
@click.option("--out", type=click.Path(path_type=Path), default=HERE)
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="One recipe field.")
@click.option(
    "--minutes",
    "times",
    multiple=True,
    metavar="STAGE=MINUTES",
    help="Let the rate of vae or unet end after so long, not after so many images.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--processes", type=int, help="To train; usually 2 on a CPU, 1 on a GPU.")
@click.option("--bf16/--fp32", default=False, help="Train in mixed precision.")
def main(
    stages: tuple[str, ...], work: Path, out: Path, changes: tuple[str, ...],
    times: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """Make version 2 of the embedded model, or some STAGES of it.

    Example: python -m d3po_bench.models.embedded.v2.recipe all --work build/tiny-v2
    """
    work.mkdir(parents=True, exist_ok=True)
    fields = {key: json.loads(value) for key, value in (c.split("=", 1) for c in changes)}
    minutes = {stage: float(value) for stage, value in (t.split("=", 1) for t in times)}
    if other := minutes.keys() - {"vae", "unet"}:
        raise UserError(f"--minutes is of vae and unet, not of {', '.join(sorted(other))}.")
    options["minutes"] = minutes
    options["processes"] = options["processes"] or (2 if options["device"] == "cpu" else 1)
    for stage in STAGES if "all" in stages else stages:
        run_stage(stage, Recipe(**fields), work, out, options)


if __name__ == "__main__":
    with said_in_one_line():
        main()
