"""How well a picture and its prompt match, by BLIP fine-tuned for retrieval on COCO."""

from __future__ import annotations

import torch

from d3po_bench.types import Scorer
from eval import downloads
from eval.scorers import _blip
from eval.scorers._blip_match import Blip

WEIGHTS = {
    "blip": {
        "summary": "BLIP ViT-B, image-text matching on COCO, as LAVIS takes it (scorer blip)",
        "licence": "BSD-3-Clause",
        "address": "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/",
        "files": {"model_base_retrieval_coco.pth": ("", 0)},
    },
}


def load(device: torch.device, weights: str = "official") -> Scorer:
    """The scorer on `device`.

    Args:
        device: where to score.
        weights: "official", "tiny", or a folder that `_blip.save` wrote.

    Raises:
        UserError: the weights are absent or broken.
    """
    if weights == "official":
        return Blip(_blip.official(*downloads.find("blip", "bert-base-uncased")), device)
    return Blip(_blip.opened(weights, "blip"), device)
