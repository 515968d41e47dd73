"""How the embedded model was made, from nothing but a font.

    python -m d3po_bench.models.embedded.recipe all --work build/tiny

renders the captioned pictures, trains the autoencoder, the text encoder with the UNet, and the
independent classifier, and writes the pipeline folder beside this file. Each stage leaves its
result in the work folder and is skipped when that is already there. `card.json`, written with
the weights, records the settings, steps and seconds of every stage.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from d3po_bench.errors import said_in_one_line
from d3po_bench.models.embedded import render
from d3po_bench.models.sources import content

HERE = Path(__file__).parent
TEXT_LENGTH = 16


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What the losses of autoencoder and UNet weigh."""

    latent_noise: float = 0.06
    animal_weight: float = 3.0
    edge_weight: float = 0.5
    caption_dropout: float = 0.1
    snr_cap: float = 5.0


@dataclass(frozen=True, kw_only=True)
class Recipe(Losses):
    """Everything that decides the weights, up to the order of floating-point additions."""

    pictures: int = 80_000
    seed: int = 0
    vae_steps: int = 2_800
    vae_batch: int = 32
    vae_lr: float = 2e-3
    unet_steps: int = 7_600
    unet_batch: int = 64
    unet_lr: float = 1.2e-3
    unet_channels: tuple[int, int] = (64, 112)
    ema: float = 0.999
    classifier_steps: int = 1_500
    classifier_batch: int = 64
    classifier_lr: float = 2e-3
    bf16: bool = True
    processes: int = 2


# ---------------------------------------------------------------- pictures


def _render_block(seed: int, start: int, stop: int) -> tuple[Any, list[str], list[int]]:
    drawn = [render.sample(seed, index) for index in range(start, stop)]
    return np.stack([d[0] for d in drawn]), [d[1] for d in drawn], [d[2] for d in drawn]


def render_pictures(recipe: Recipe, work: Path) -> None:
    """Write images.npy [N, 32, 32, 4] uint8 (the last: where the animal is), captions, labels."""
    starts = range(0, recipe.pictures, 1000)
    stops = [min(start + 1000, recipe.pictures) for start in starts]
    with ProcessPoolExecutor(recipe.processes) as pool:
        blocks = list(pool.map(_render_block, [recipe.seed] * len(stops), starts, stops))
    np.save(work / "labels.npy", np.concatenate([np.asarray(b[2]) for b in blocks]))
    (work / "captions.json").write_text(json.dumps([c for b in blocks for c in b[1]]))
    np.save(work / "images.npy", np.concatenate([b[0] for b in blocks]))


def _images(work: Path) -> Any:
    return np.load(work / "images.npy", mmap_mode="r")


def _pixels(images: Any, index: Any) -> Tensor:
    """Pictures `index` as floats in [-1, 1], [N, 3, 32, 32]."""
    return _pixels_and_masks(images, index)[0]


def _pixels_and_masks(images: Any, index: Any) -> tuple[Tensor, Tensor]:
    """Pictures as floats in [-1, 1], [N, 3, 32, 32], and the animals' masks in [0, 1]."""
    batch = torch.from_numpy(np.ascontiguousarray(images[np.sort(index)]))
    batch = batch.permute(0, 3, 1, 2).float()
    return batch[:, :3].div(127.5).sub(1), batch[:, 3:].div(255)


# ---------------------------------------------------------------- training loop


class _Average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            self.shadow[name].lerp_(value, 1 - decay)


def rate(progress: float, step: int, warmup: int = 100) -> float:
    """Cosine from 1 to 0.02 with a linear warm-up."""
    return min(1.0, (step + 1) / warmup) * (0.51 + 0.49 * math.cos(math.pi * min(progress, 1.0)))


def share_gradients(module: nn.Module) -> None:
    """Average gradients over the processes, in one message."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def fit(
    module: nn.Module,
    loss: Callable[[], Tensor],
    *,
    name: str,
    steps: int,
    lr: float,
    ema: float,
    bf16: bool,
    out: Path,
    minutes: float | None,
) -> dict[str, float]:
    """Train with AdamW, clipping at 1, cosine schedule; save the averaged weights as it goes."""
    optimizer = torch.optim.AdamW(
        module.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average, start, recent = _Average(module, ema), time.monotonic(), 0.0
    lead = not dist.is_initialized() or dist.get_rank() == 0
    step, progress = 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(progress, step)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            value = loss()
        optimizer.zero_grad()
        value.backward()
        share_gradients(module)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.update(module, step)
        recent += (value.item() - recent) * (0.01 if step > 100 else 0.1)
        step += 1
        progress = _progress(step, steps, time.monotonic() - start, minutes)
        if lead and (step % 200 == 0 or progress >= 1):
            shadow = {name: value.contiguous() for name, value in average.shadow.items()}
            save_file(shadow, out.with_suffix(".part"))
            out.with_suffix(".part").replace(out)
            seconds = time.monotonic() - start
            print(f"{name} step {step} loss {recent:.4f} {seconds:.0f} s", flush=True)
    return {"steps": step, "seconds": round(time.monotonic() - start), "loss": recent}


def _progress(step: int, steps: int, seconds: float, minutes: float | None) -> float:
    """Share of the run that is over, by steps or by time, equal on all processes."""
    share = torch.tensor(max(step / steps, seconds / 60 / minutes if minutes else 0.0))
    if dist.is_initialized():
        dist.broadcast(share, 0)
    return float(share)


# ---------------------------------------------------------------- autoencoder


def new_vae(scaling_factor: float = 1.0) -> Any:
    """An f=4 AutoencoderTiny of 0.9M parameters: 32 px pictures, 12 x 8 x 8 latents."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(64, 64, 64),
        decoder_block_out_channels=(64, 64, 64),
        latent_channels=12,
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(2, 2, 1),
        scaling_factor=scaling_factor,
    )


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of pixels one below, and beside, the other."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def _inner(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` cut to the shapes that `_edges` returns."""
    return x[..., 1:, :], x[..., :, 1:]


def reconstruction(
    vae: Any, x: Tensor, mask: Tensor, losses: Losses, noise: Callable[[Tensor], Tensor]
) -> Tensor:
    """The autoencoder's loss: L1 on pixels and their differences, the animals' weighing more.

    Noise on the latents keeps neighbouring latents decodable, which the UNet's samples need.

    Args:
        vae: an AutoencoderTiny.
        x: pictures [N, 3, h, w] in [-1, 1].
        mask: [N, 1, h, w], 1 on animals.
        losses: what its parts weigh.
        noise: standard normal, of the shape and device of its argument.
    """
    weight = 1 + losses.animal_weight * mask
    z = vae.encoder(x.contiguous(memory_format=torch.channels_last))
    error = x - vae.decoder(z + losses.latent_noise * noise(z)).float()
    steps = zip(_edges(error), _inner(weight), strict=True)
    sharp = sum((edge * w).abs().mean() for edge, w in steps)
    far = (z.float().abs() - 3).clamp(min=0).square().mean()
    total: Tensor = (error * weight).abs().mean() + losses.edge_weight * sharp + 0.1 * far
    return total / (1 + losses.animal_weight / 3)


def train_vae(recipe: Recipe, work: Path, rank: int, minutes: float | None) -> dict[str, float]:
    """Fit the autoencoder."""
    vae = new_vae().to(memory_format=torch.channels_last)
    images, rng = _images(work), np.random.default_rng([recipe.seed, 1, rank])
    batch = recipe.vae_batch // recipe.processes

    def loss() -> Tensor:
        x, mask = _pixels_and_masks(images, rng.integers(0, len(images), batch))
        return reconstruction(vae, x, mask, recipe, torch.randn_like)

    return fit(
        vae, loss, name="vae", steps=recipe.vae_steps, lr=recipe.vae_lr, ema=recipe.ema,
        bf16=recipe.bf16, out=work / "vae.safetensors", minutes=minutes,
    )  # fmt: skip


@torch.no_grad()
def encode_latents(recipe: Recipe, work: Path) -> None:
    """Write latents.npy [N, 12, 8, 8] float16, divided by their standard deviation."""
    vae = new_vae().to(memory_format=torch.channels_last)
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    images, parts, errors = _images(work), [], []
    for start in range(0, len(images), 500):
        x = _pixels(images, np.arange(start, min(start + 500, len(images))))
        z = vae.encoder(x.contiguous(memory_format=torch.channels_last))
        parts.append(z.half())
        if start < 2000:
            errors.append((vae.decoder(z).clamp(-1, 1) - x).square().mean() / 4)
    latents = torch.cat(parts)
    std = latents[:20_000].float().std().item()
    psnr = -10 * math.log10(torch.stack(errors).mean().item())
    print(f"latents std {std:.4f} psnr {psnr:.2f} dB", flush=True)
    (work / "latents.json").write_text(json.dumps({"std": std, "psnr_db": psnr}))
    np.save(work / "latents.npy", (latents / std).numpy())


# ---------------------------------------------------------------- text and UNet


def new_tokenizer(captions: list[str], work: Path) -> Any:
    """A byte-pair tokenizer with CLIP's conventions, trained on the captions."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    # More than the merges there are to find: every word of the captions becomes one token.
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=TEXT_LENGTH)


def new_text_encoder(tokenizer: Any, layers: int = 2) -> Any:
    """A small CLIP text encoder, 96 wide, 16 positions."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192,
            num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, projection_dim=96,
        )
    )  # fmt: skip


def new_unet(recipe: Recipe) -> Any:
    """Stable Diffusion's UNet class, two levels, 8 x 8 latents of 12 channels."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=12,
        out_channels=12,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=recipe.unet_channels,
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> Any:
    """Stable Diffusion 1.5's noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip


class Denoiser(nn.Module):
    """UNet and text encoder, trained together."""

    def __init__(self, unet: Any, text: Any) -> None:
        """Of a UNet2DConditionModel and a CLIPTextModel."""
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Noise predicted in `x_t` [N, c, s, s] at `t` [N] under captions `tokens` [N, 16]."""
        text = self.text(tokens).last_hidden_state
        noise: Tensor = self.unet(x_t, t, text, return_dict=False)[0]
        return noise


def denoising(
    model: Denoiser, x: Tensor, noise: Tensor, alphas: Tensor, t: Tensor, tokens: Tensor, cap: float
) -> Tensor:
    """Error of the predicted noise with min-SNR weights (arXiv:2303.09556).

    Args:
        model: what predicts.
        x: latents [N, c, s, s].
        noise: likewise, standard normal.
        alphas: cumulative products at `t`, [N].
        t: timesteps [N].
        tokens: of the captions, [N, 16].
        cap: of the signal-to-noise ratio.
    """
    a = alphas.view(-1, 1, 1, 1)
    predicted = model(a.sqrt() * x + (1 - a).sqrt() * noise, t, tokens).float()
    error: Tensor = (predicted - noise).square().flatten(1).mean(1)
    weighted: Tensor = error * (cap / (alphas / (1 - alphas))).clamp(max=1)
    return weighted.mean()


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token numbers [N, 16], padded and cut."""
    tokens: Tensor = tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return tokens


def _batches(recipe: Recipe, work: Path, tokenizer: Any, rank: int) -> Iterator[tuple[Tensor, ...]]:
    """Endless (latents, tokens) batches; one caption in ten is dropped."""
    captions = json.loads((work / "captions.json").read_text())
    unique = sorted(set(captions) | {""})
    table = tokenize(tokenizer, unique)
    number = {text: i for i, text in enumerate(unique)}
    rows = torch.tensor([number[c] for c in captions])
    latents = torch.from_numpy(np.load(work / "latents.npy"))
    rng = torch.Generator().manual_seed(recipe.seed * 1000 + 2 * 100 + rank)
    while True:
        index = torch.randint(len(rows), (recipe.unet_batch // recipe.processes,), generator=rng)
        drop = torch.rand(len(index), generator=rng) < recipe.caption_dropout
        chosen = torch.where(drop, torch.tensor(number[""]), rows[index])
        yield latents[index].float(), table[chosen]


def train_unet(recipe: Recipe, work: Path, rank: int, minutes: float | None) -> dict[str, float]:
    """Fit UNet and text encoder: noise prediction as `denoising` measures it."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    torch.manual_seed(recipe.seed)
    model = Denoiser(new_unet(recipe), new_text_encoder(tokenizer))
    batches = _batches(recipe, work, tokenizer, rank)
    alphas = new_scheduler().alphas_cumprod
    rng = torch.Generator().manual_seed(recipe.seed * 1000 + 3 * 100 + rank)

    def loss() -> Tensor:
        x, tokens = next(batches)
        n = len(x)
        # One timestep from each of n equal slices of 0..999: less noise in the mean.
        t = ((torch.arange(n) + torch.rand(n, generator=rng)) * 1000 / n).long().clamp(max=999)
        noise = torch.randn(x.shape, generator=rng)
        return denoising(model, x, noise, alphas[t], t, tokens, recipe.snr_cap)

    return fit(
        model, loss, name="unet", steps=recipe.unet_steps, lr=recipe.unet_lr, ema=recipe.ema,
        bf16=False, out=work / "unet.safetensors", minutes=minutes,
    )  # fmt: skip


# ---------------------------------------------------------------- classifier


def _noisy(x: Tensor) -> Tensor:
    """Pictures with random contrast, blur and noise, so that the judge looks at shapes."""
    x = x * (0.8 + 0.4 * torch.rand(len(x), 1, 1, 1))
    if torch.rand(()) < 0.5:
        x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    return x + 0.15 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)


def train_classifier(
    recipe: Recipe, work: Path, rank: int, minutes: float | None
) -> dict[str, float]:
    """Fit the independent judge on renders; the last 2,000 pictures are held out."""
    from d3po_bench.models.embedded.classifier import Classifier

    torch.manual_seed(recipe.seed + 4)
    model = Classifier(len(render.GLYPHS)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = _images(work), np.load(work / "labels.npy")
    rng = np.random.default_rng([recipe.seed, 4, rank])
    batch = recipe.classifier_batch // recipe.processes

    def loss() -> Tensor:
        index = np.sort(rng.integers(0, len(images) - 2000, batch))
        x = _noisy(_pixels(images, index)).contiguous(memory_format=torch.channels_last)
        logits = model(x).float()
        return F.cross_entropy(logits, torch.from_numpy(labels[index]), label_smoothing=0.05)

    return fit(
        model, loss, name="classifier", steps=recipe.classifier_steps, lr=recipe.classifier_lr,
        ema=0.99, bf16=recipe.bf16, out=work / "classifier.safetensors", minutes=minutes,
    )  # fmt: skip


@torch.no_grad()
def held_out_accuracy(work: Path) -> float:
    """Top-1 of the classifier on the 2,000 renders it has not seen."""
    from d3po_bench.models.embedded.classifier import Classifier

    model = Classifier(len(render.GLYPHS))
    model.load_state_dict(load_file(work / "classifier.safetensors"))
    images, labels = _images(work), np.load(work / "labels.npy")
    index = np.arange(len(images) - 2000, len(images))
    guess = torch.cat([model(_pixels(images, part)).argmax(1) for part in index.reshape(20, -1)])
    return float((guess == torch.from_numpy(labels[index])).float().mean())


# ---------------------------------------------------------------- export and command line


def halve(module: Any) -> Any:
    """The module in half precision, its weights laid out as files have them."""
    return module.half().to(memory_format=torch.contiguous_format)


def export(recipe: Recipe, work: Path, out: Path) -> None:
    """Write a stock StableDiffusionPipeline folder in fp16, its pin, the classifier, card.json."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    denoiser = Denoiser(new_unet(recipe), new_text_encoder(tokenizer))
    denoiser.load_state_dict(load_file(work / "unet.safetensors"))
    facts = json.loads((work / "latents.json").read_text())
    vae = new_vae(scaling_factor=1 / facts["std"])
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    # The text encoder is stored in fp32: transformers loads what is stored, diffusers fp32.
    pipe = StableDiffusionPipeline(
        vae=halve(vae), text_encoder=halve(denoiser.text).float(), tokenizer=tokenizer,
        unet=halve(denoiser.unet), scheduler=new_scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(out / "tiny", safe_serialization=True)
    (out / "tiny.sha256").write_text(content(out / "tiny") + "\n")
    judge = {
        k: v.half().contiguous() for k, v in load_file(work / "classifier.safetensors").items()
    }
    save_file(judge, out / "classifier.safetensors")
    stages = {p.stem[6:]: json.loads(p.read_text()) for p in sorted(work.glob("stage-*.json"))}
    facts["classifier_held_out_top1"] = held_out_accuracy(work)
    card = {"recipe": asdict(recipe), "stages": stages, "facts": facts}
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def _worker(rank: int, stage: str, recipe: Recipe, work: Path, minutes: float | None) -> None:
    """One training process of `recipe.processes`, on one thread."""
    torch.set_num_threads(1)
    train = {"vae": train_vae, "unet": train_unet, "classifier": train_classifier}[stage]
    torch.manual_seed(recipe.seed)
    if recipe.processes > 1:
        store = dist.FileStore(  # type: ignore[attr-defined]
            str(work / f".rendezvous-{stage}"), recipe.processes
        )
        dist.init_process_group("gloo", store=store, rank=rank, world_size=recipe.processes)
    facts = train(recipe, work, rank, minutes)
    if rank == 0:
        (work / f"stage-{stage}.json").write_text(json.dumps(facts))


def _train(stage: str, recipe: Recipe, work: Path, minutes: float | None) -> None:
    (work / f".rendezvous-{stage}").unlink(missing_ok=True)
    torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
        _worker, (stage, recipe, work, minutes), nprocs=recipe.processes
    )


def run_stage(stage: str, recipe: Recipe, work: Path, out: Path, minutes: float | None) -> None:
    """Run one stage unless its result is there already."""
    if stage == "render" and not (work / "images.npy").exists():
        render_pictures(recipe, work)
    if stage in {"vae", "unet", "classifier"} and not (work / f"stage-{stage}.json").exists():
        _train(stage, recipe, work, minutes)
    if stage == "latents" and not (work / "latents.npy").exists():
        captions = json.loads((work / "captions.json").read_text())
        new_tokenizer(captions, work).save_pretrained(work / "tokenizer")
        encode_latents(recipe, work)
    if stage == "export":
        export(recipe, work, out)


STAGES = ("render", "vae", "latents", "unet", "classifier", "export")


@click.command()
@click.argument("stage", type=click.Choice((*STAGES, "all")))
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/tiny"))
@click.option("--out", type=click.Path(path_type=Path), default=HERE)
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="One recipe field.")
@click.option("--minutes", type=float, help="Anneal a training stage early to end by then.")
def main(
    stage: str, work: Path, out: Path, changes: tuple[str, ...], minutes: float | None
) -> None:
    """Make the embedded model, or one STAGE of it.

    Example: python -m d3po_bench.models.embedded.recipe all --work build/tiny
    """
    work.mkdir(parents=True, exist_ok=True)
    fields = {key: json.loads(value) for key, value in (c.split("=", 1) for c in changes)}
    recipe = Recipe(**fields)
    for name in STAGES if stage == "all" else (stage,):
        run_stage(name, recipe, work, out, minutes)


if __name__ == "__main__":
    with said_in_one_line():
        main()
