"""How well a picture and its prompt match, by BLIP as it was pretrained, which the paper names."""

from __future__ import annotations

import torch

from d3po_bench.types import Scorer
from eval import downloads
from eval.scorers import _blip
from eval.scorers._blip_match import Blip

WEIGHTS = {
    "blip_base": {
        "summary": "BLIP ViT-B, pretrained on 129M pictures, model_base.pth (scorer blip_base)",
        "licence": "BSD-3-Clause",
        "address": "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/",
        "files": {"model_base.pth": ("", 0)},
    },
}


def load(device: torch.device, weights: str = "official") -> Scorer:
    """The scorer of model_base.pth, 224 pixels, which arXiv:2311.13231 names for its BLIP column.

    Its columns are blip_base_itm_logit, blip_base_itm_prob and blip_base_itc; those of `blip`, the
    checkpoint that was fine-tuned for retrieval, have no `base`.

    Args:
        device: where to score.
        weights: "official", or a folder that `_blip.save` wrote.

    Raises:
        UserError: the weights are absent or broken.
    """
    if weights == "official":
        parts = _blip.official(*downloads.find("blip_base", "bert-base-uncased"))
    else:
        parts = _blip.opened(weights, "blip_base")
    return Blip(parts, device, "blip_base")
