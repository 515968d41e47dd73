"""What known models take of a card, counted without weights, and the batches that are chosen by it.

    python -m results.memory

counts, which takes a minute or two, and writes memory.csv, of which make.py makes tables. Nothing
here was measured on a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from d3po_bench.config import BATCHES, Execution, of_preset
from d3po_bench.models.adapters import DiffusersModel, Training
from d3po_bench.models.memory import Needs
from d3po_bench.models.parts import quieten
from d3po_bench.models.sd3 import StableDiffusion3
from d3po_bench.models.sdxl import StableDiffusionXL
from d3po_bench.models.stable_diffusion import StableDiffusion
from d3po_bench.runs.files import csv_bytes, read_csv, write_atomically
from d3po_bench.training import sizes
from d3po_bench.types import Conditions
from eval.analysis.tables import Table, text

META = torch.device("meta")
HERE = Path(__file__).resolve().parent

MODELS = {
    "sd15": "Stable Diffusion 1.5",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
}
CARDS = (24, 40, 80)
"""GB."""

COUNTED = ("weights", "update", "checkpointed", "sampling", "decoding", "optimizer", "latent")

VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip

SD15: dict[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip

SDXL: dict[str, Any] = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048, "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip

SD3: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip


def rows(name: str) -> Iterator[dict[str, Any]]:
    """A line for each card: what is counted of a model in half precision, and what is chosen."""
    config = of_preset("d3po", "aesthetic", "paper")
    needs = Needs(*model(name, Training(dtype="fp16")))
    for card in CARDS:
        free = sizes.free(card, needs, META)
        found = sizes.chosen(Execution(), config, needs, free)
        yield {
            "model": name, "card": card, **{n: getattr(found, n) for n in sizes.KEPT},
            "peak": needs.weights + sizes.peak(found, config, needs),
            **{n: getattr(needs, n) for n in COUNTED},
        }  # fmt: skip


def table() -> Table:
    """The batches chosen for each card."""

    def gb(name: str) -> Any:
        return lambda row: f"{int(row[name]) / 1e9:.1f}"

    columns = {
        "model": lambda row: MODELS[row["model"]],
        "card, GB": text("card"),
        **{f"`{n}`": text(n) for n in BATCHES},
        "checkpointing": lambda row: "on" if row["gradient_checkpointing"] == "True" else "off",
        "weights, GB": gb("weights"),
        "peak with weights, GB": gb("peak"),
        "fits": lambda row: "yes" if int(row["peak"]) < int(row["card"]) * 1e9 else "no",
    }
    return Table(read_csv(HERE / "memory.csv"), columns, left=("model",))


def each() -> Table:
    """What one of each takes, by model."""
    found = {row["model"]: row for row in read_csv(HERE / "memory.csv")}

    def megabytes(name: str) -> Any:
        return lambda row: f"{int(row[name]) / 1e6:,.0f}"

    columns = {
        "model": lambda row: MODELS[row["model"]],
        "update, MB a latent": megabytes("update"),
        "with checkpointing": megabytes("checkpointed"),
        "sampling, MB a latent": megabytes("sampling"),
        "decoding, MB a picture": megabytes("decoding"),
    }
    return Table([*found.values()], columns, left=("model",))


def model(name: str, training: Training) -> tuple[DiffusersModel, Conditions]:
    """A model of that name on the meta device, and the shapes of a prompt's conditions."""
    import diffusers
    import transformers

    quieten()
    with META:
        encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig())
        text = {"text": torch.empty(1, 77, 768)}
        kind: Any = StableDiffusion
        vae = diffusers.AutoencoderKL(**VAE)
        if name == "sd3":
            kind, network = StableDiffusion3, diffusers.SD3Transformer2DModel(**SD3)
            text = {"text": torch.empty(1, 333, 4096), "pooled": torch.empty(1, 2048)}
            vae = diffusers.AutoencoderKL(
                **VAE
                | {
                    "latent_channels": 16,
                    "shift_factor": 0.0609,
                    "use_quant_conv": False,
                    "use_post_quant_conv": False,
                }
            )
        elif name == "sdxl":
            kind, network = StableDiffusionXL, diffusers.UNet2DConditionModel(**SDXL)
            text = {"text": torch.empty(1, 77, 2048), "pooled": torch.empty(1, 1280)}
        else:
            network = diffusers.UNet2DConditionModel(**SD15)
    scheduler = (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        if name == "sd3"
        else diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    )
    parts = {kind.NETWORK: network.to(training.stored_dtype), "vae": vae, "scheduler": scheduler,
             "text_encoder": encoder}  # fmt: skip
    return kind(parts, {}, META, training), Conditions(text)


if __name__ == "__main__":
    write_atomically(HERE / "memory.csv", csv_bytes([row for name in MODELS for row in rows(name)]))
