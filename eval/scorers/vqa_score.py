"""VQAScore: the probability that a vision-language model says the picture shows the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d3po_bench.models.parts import complete, refused
from d3po_bench.types import Scorer
from eval import downloads
from eval.scorers import _clip

# Nobody has published checksums of the small files: the revision fixes them, and the first fetch
# their sha256.
WEIGHTS = {
    "vqa_score": {
        "summary": "Qwen3-VL-2B-Instruct (scorer vqa_score)",
        "licence": "Apache-2.0",
        "address": "https://huggingface.co/Qwen/Qwen3-VL-2B-Instruct/resolve/89644892e4d85e24eaac8bacfd4f463576704203/",
        "files": {
            "config.json": ("", 0),
            "model.safetensors": (
                "7de1838c87a5349b016c26a1c3f7d2bc400a3d485f95ef39a7059ffd734977a0",
                4_255_140_312,
            ),
            "tokenizer.json": ("", 0),
            "tokenizer_config.json": ("", 0),
        },
    },
}

QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
ANSWER = "Yes"

PICTURE = "<|image_pad|>"
"""Stands in a question once for each group of patches."""

CHAT = f"<|im_start|>user\n<|vision_start|>{{picture}}<|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"  # noqa: E501
"""Qwen3-VL's own template of one question about one picture."""

SIDE = 32
"""Pixels that a group of patches is wide: 2 x 2 patches of 16."""

FEWEST, MOST = 4, 16384
"""Groups that a picture is scaled to have, as Qwen's qwen-vl-utils does."""


class VqaScore:
    """Probability, 0 to 1, of "Yes" as the first word of the answer, among all words.

    The question is 'Does this figure show "PROMPT"? Please answer Yes or No.', as in t2v-metrics
    3.1 (arXiv:2404.01291) with Qwen3-VL, but in float32 where that computes in bfloat16, which
    moves the second digit. The paper's own numbers are CLIP-FlanT5-XXL's, and other models' are
    not comparable with them, nor with each other.
    """

    unit = "probability"
    batch = 16

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load a Qwen3-VL of any size, as transformers saves it.

        Args:
            folder: with config.json, weights as .safetensors and tokenizer.json.
            device: where to score; of 2B, float32 takes 9 GB.

        Raises:
            UserError: it does not load.
        """
        from transformers import AutoTokenizer, Qwen2VLImageProcessorPil
        from transformers import Qwen3VLForConditionalGeneration as Network
        from transformers.utils import logging

        logging.disable_progress_bar()
        with refused(f"The Qwen3-VL in {folder} does not load:", "Fetch or save it again."):
            model = complete(Network, folder, local_files_only=True, dtype="float32")
            self.words: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            (self.yes,) = self.words.encode(ANSWER, add_special_tokens=False)
            self.picture: int = self.words.convert_tokens_to_ids(PICTURE)
        self.model = model.to(device).eval().requires_grad_(False)
        half = [0.5] * 3
        self.see = Qwen2VLImageProcessorPil(
            patch_size=SIDE // 2, merge_size=2, image_mean=half, image_std=half,
            size={"shortest_edge": FEWEST * SIDE**2, "longest_edge": MOST * SIDE**2},
        )  # fmt: skip
        self.device = device
        self.sources = (*sorted(folder.glob("*.safetensors")), folder / "tokenizer.json")

    @_clip.exact()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Probabilities [N] of images [N, 3, h, w] uint8."""
        starts = range(0, len(images), self.batch)
        parts = [
            self._batch(images[i : i + self.batch], prompts[i : i + self.batch]) for i in starts
        ]
        return torch.cat(parts)

    def _batch(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = self.see(list(images.cpu()), return_tensors="pt")
        groups = seen["image_grid_thw"].prod(1) // 4
        asked = [
            CHAT.format(text, picture=PICTURE * n)
            for text, n in zip(prompts, groups.tolist(), strict=True)
        ]
        said = self.words(asked, padding=True, padding_side="right", return_tensors="pt")
        ids, mask = said["input_ids"], said["attention_mask"]
        given = {
            "input_ids": ids, "attention_mask": mask, **seen,
            "mm_token_type_ids": (ids == self.picture).int(),
        }  # fmt: skip
        hidden = self.model.model(**{name: part.to(self.device) for name, part in given.items()})
        last = hidden.last_hidden_state[torch.arange(len(ids)), mask.sum(1) - 1]
        probability: Tensor = self.model.lm_head(last).softmax(1)[:, self.yes]
        return probability.cpu()


def load(device: torch.device, weights: str = "official") -> Scorer:
    """The score on `device`.

    Args:
        device: where to score.
        weights: "official", or a folder with another Qwen3-VL.

    Raises:
        UserError: the weights are absent or broken.
    """
    if weights == "official":
        return VqaScore(downloads.find("vqa_score")[0].parent, device)
    return VqaScore(_clip.folder("vqa_score", weights), device)
