"""100 x cosine of any open_clip model, for evaluation with another backbone than one trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from d3po_bench.errors import UserError, install
from d3po_bench.types import Scorer


class OpenClipScore:
    """100 x cosine between picture and prompt; preprocessing and tokens are open_clip's own."""

    unit = "100 x cosine"
    batch = 64

    def __init__(self, device: torch.device, model: str, pretrained: str) -> None:
        """Load `pretrained` weights of the architecture `model`, as open_clip names them.

        Raises:
            UserError: the extra is not installed, or open_clip does not find them.
        """
        try:
            import open_clip
        except (ImportError, RuntimeError) as problem:
            raise UserError(
                f"The scorer open_clip needs an extra that is not installed here ({problem}). "
                f"Install it: {install('open-clip')}."
            ) from problem
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                model, pretrained=pretrained
            )
            self.tokenizer = open_clip.get_tokenizer(model)
        except Exception as problem:  # open_clip and its downloads raise many kinds
            raise UserError(
                f"open_clip does not load {model} with the weights {pretrained}: {problem}. "
                "`python -c 'import open_clip; print(open_clip.list_pretrained())'` lists what "
                "there is; a download needs a network."
            ) from problem
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, h, w] uint8."""
        starts = range(0, len(images), self.batch)
        parts = [
            self._scores(images[i : i + self.batch], list(prompts[i : i + self.batch]))
            for i in starts
        ]
        return torch.cat(parts)

    def _scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        pictures = [Image.fromarray(i.permute(1, 2, 0).contiguous().cpu().numpy()) for i in images]
        pixels = torch.stack([self.preprocess(picture) for picture in pictures])
        seen = self.model.encode_image(pixels.to(self.device))
        read = self.model.encode_text(self.tokenizer(prompts).to(self.device))
        cosine: Tensor = (normalize(seen, dim=1) * normalize(read, dim=1)).sum(1)
        return 100 * cosine.float().cpu()


def load(device: torch.device, weights: str = "") -> Scorer:
    """The scorer open_clip:MODEL/PRETRAINED on `device`; `weights` is what follows the colon."""
    model, _, pretrained = weights.rpartition("/")
    if not model or not pretrained:
        raise UserError(
            f"open_clip:{weights} names no model: write open_clip:MODEL/PRETRAINED, such as "
            "open_clip:ViT-B-32/laion2b_s34b_b79k."
        )
    return OpenClipScore(device, model, pretrained)
