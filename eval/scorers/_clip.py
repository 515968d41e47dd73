"""CLIP for the scorers that stand on it: loading, preprocessing, embeddings of unit length."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from d3po_bench.errors import UserError
from d3po_bench.models.parts import complete, refused
from eval import downloads

if TYPE_CHECKING:
    from transformers import CLIPModel

WEIGHTS = {
    "clip": {
        "summary": "CLIP ViT-L/14 of OpenAI (scorers clip, aesthetic and diversity)",
        "licence": "MIT",
        "address": "https://huggingface.co/openai/clip-vit-large-patch14/resolve/32bd64288804d66eefd0ccbe215aa642df71cc41/",
        "files": {
            "config.json": (
                "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a",
                4519,
            ),
            "model.safetensors": (
                "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
                1_710_540_580,
            ),
            "tokenizer.json": (
                "a83e0809aa4c3af7208b2df632a7a69668c6d48775b3c3fe4e1b1199d1f8b8f4",
                0,
            ),
            "tokenizer_config.json": (
                "deef455e52fa5e8151e339add0582e4235f066009601360999d3a9cda83b1129",
                0,
            ),
            "vocab.json": (
                "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69",
                0,
            ),
            "merges.txt": (
                "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
                0,
            ),
        },
    },
    "clip-words": {
        "summary": "vocabulary of CLIP (scorers pick_score and hps_v2_1)",
        "licence": "MIT",
        "address": "https://huggingface.co/openai/clip-vit-large-patch14/resolve/32bd64288804d66eefd0ccbe215aa642df71cc41/",
        "files": {
            "tokenizer.json": (
                "a83e0809aa4c3af7208b2df632a7a69668c6d48775b3c3fe4e1b1199d1f8b8f4",
                0,
            ),
            "tokenizer_config.json": (
                "deef455e52fa5e8151e339add0582e4235f066009601360999d3a9cda83b1129",
                0,
            ),
            "vocab.json": (
                "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69",
                0,
            ),
            "merges.txt": (
                "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
                0,
            ),
        },
    },
}

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images, in RGB."""

EMBEDDED = Path(__file__).parent.parent / "embedded"
"""The small scorers that ship with the project."""

SHIPPED = {"tiny": "", "tiny2": "v2"}
"""Embedded model -> folder of its scorers, below EMBEDDED."""


def shipped(name: str, which: str) -> Path:
    """Folder of the weights `name`: the stand-in for an embedded model, or `which` itself.

    Raises:
        UserError: that model has none.
    """
    path = EMBEDDED / SHIPPED[which] / name if which in SHIPPED else Path(which)
    if which in SHIPPED and not path.is_dir():
        raise UserError(
            f"{name} has no small stand-in for the embedded model. Write {name}:official, or "
            f"{name}:FOLDER."
        )
    return path


def folder(name: str, which: str) -> Path:
    """Where the weights `name` lie: "official", of "tiny" or "tiny2", or a folder.

    Raises:
        UserError: they are not there.
    """
    if which == "official":
        return downloads.find(name)[0].parent
    path = shipped(name, which)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{name}:{which} names no weights: after the colon stands official, "
            f"{', '.join(SHIPPED)} or a folder with a config.json."
        )
    return path


@contextmanager
def exact() -> Iterator[None]:
    """No gradients, and no TF32 in the patch embedding, which cuDNN would use on a GPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def preprocess(images: Tensor, size: int) -> Tensor:
    """Pictures as CLIP sees them: shorter side to `size`, bicubic, the middle, standardised.

    Args:
        images: [N, 3, h, w] uint8.
        size: pixels a side.

    Returns:
        [N, 3, size, size] float32.
    """
    pixels = np.stack([_square(image, size) for image in images.cpu()]).astype(np.float32) / 255
    standard = (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(standard).permute(0, 3, 1, 2).contiguous()


def _square(image: Tensor, size: int) -> Any:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    width, height = picture.size
    short = min(width, height)
    if short != size:
        shape = (size * width // short, size * height // short)
        picture = picture.resize(shape, Image.Resampling.BICUBIC)
    left, top = (picture.size[0] - size) // 2, (picture.size[1] - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def opened(
    path: Path, device: torch.device, activation: str = "quick_gelu", words: Path | None = None
) -> Clip:
    """The CLIP in a folder of transformers' layout.

    Args:
        path: with config.json and model.safetensors.
        device: where to run.
        activation: that its weights were trained with.
        words: folder of the tokenizer; None for `path`.

    Raises:
        UserError: it does not load, or its config.json names another activation.
    """
    from transformers import CLIPModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    _require_activation(path, activation)
    with refused(f"The CLIP model in {path} does not load:", "Fetch or save it again."):
        model = complete(CLIPModel, path, local_files_only=True, dtype="float32")
    return Clip(model, words or path, device)


class Clip:
    """A CLIP model in float32, without gradients."""

    batch = 64

    def __init__(
        self,
        model: CLIPModel,
        words: Path,
        device: torch.device,
        prepare: Callable[[Tensor, int], Tensor] = preprocess,
    ) -> None:
        """Put a model to use.

        Args:
            model: in float32.
            words: folder of its tokenizer.
            device: where to run.
            prepare: what makes [N, 3, size, size] of pictures and that size.

        Raises:
            UserError: there is no tokenizer in `words`.
        """
        from transformers import CLIPTokenizer

        with refused(f"The CLIP tokenizer in {words} does not load:", "Fetch or save it again."):
            self.tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True)
        self.model = model.to(device).eval().requires_grad_(False)
        self.device, self.prepare = device, prepare
        self.size = int(self.model.config.vision_config.image_size)
        self.tokens = int(self.model.config.text_config.max_position_embeddings)

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine [N] between each of the images [N, 3, h, w] uint8 and its prompt."""
        return (self.images(images) * self.texts(prompts)).sum(1)

    @exact()
    def images(self, images: Tensor) -> Tensor:
        """Embeddings [N, D], of length 1, of images [N, 3, h, w] uint8."""
        parts = [self._images(part) for part in images.split(self.batch)]
        return normalize(torch.cat(parts), dim=1)

    def _images(self, images: Tensor) -> Tensor:
        pixels = self.prepare(images, self.size).to(self.device)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        projected: Tensor = self.model.visual_projection(pooled)
        return projected.cpu()

    @exact()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [N, D], of length 1; prompts are cut to the length that CLIP knows."""
        distinct = list(dict.fromkeys(prompts))
        starts = range(0, len(distinct), self.batch)
        parts = [self._texts(distinct[i : i + self.batch]) for i in starts]
        place = torch.tensor([distinct.index(p) for p in prompts])
        return normalize(torch.cat(parts), dim=1)[place]

    def _texts(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.tokens,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        pooled = self.model.text_model(**tokens).pooler_output
        projected: Tensor = self.model.text_projection(pooled)
        return projected.cpu()


def _require_activation(path: Path, wanted: str) -> None:
    """Refuse another activation: every score would be shifted.

    OpenAI's weights were trained with x * sigmoid(1.702 x), LAION's with GELU.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        found = {
            config[part].get("hidden_act", "quick_gelu")
            for part in ("text_config", "vision_config")
        }
    except (OSError, ValueError, KeyError, AttributeError) as problem:
        raise UserError(
            f"{path}/config.json is not CLIP's ({problem!r}). Fetch or save it again."
        ) from problem
    if found != {wanted}:
        raise UserError(
            f"The activation in {path}/config.json is {' and '.join(sorted(found))}, not {wanted}, "
            "as this scorer's is. Use its own checkpoint, or open_clip:MODEL/PRETRAINED for others."
        )
