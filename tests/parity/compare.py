"""Our scorers on what `oracle` and `newer` wrote: the largest difference of each column.

    python -m tests.parity.compare FOLDER

Exits 1 if one is above its limit. Our `open_clip` is only compared where the extra open-clip is
there.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d3po_bench.types import Scorer
from eval.scorers import (
    _blip,
    _blip_match,
    _clip,
    clip,
    hps_v2_1,
    image_reward,
    open_clip,
    pick_score,
    vqa_score,
)
from tests.parity import inputs, torchvision_operators

LIMIT = {"pick_score": 1e-4}
"""Of a difference, in a scorer's own unit; of the others it is 1e-5."""

SCORERS = ("blip", "clip", "image_reward", "pick_score", "hps_v2_1", "vqa_score")
CPU = torch.device("cpu")

Columns = Callable[[Tensor, tuple[str, ...]], dict[str, Tensor]]


def ours(scorer: str, checkpoint: Path, vocabulary: Path) -> Columns:
    """Our scorer with an official checkpoint, as columns [N] of images and prompts."""
    if scorer == "blip":
        return _blip_match.Blip(_blip.official(checkpoint, vocabulary), CPU).columns
    reward = image_reward.ImageReward(_blip.official(checkpoint, vocabulary), CPU)
    return lambda images, prompts: {"image_reward": reward(images, prompts)}


NEWER: dict[str, Callable[[Path], Scorer]] = {
    "pick_score": lambda place: pick_score.load(CPU, str(place)),
    "hps_v2_1": lambda path: hps_v2_1.HpsV21(
        _clip.Clip(hps_v2_1.official(path), words(path.parent), CPU, hps_v2_1.letterboxed), (path,)
    ),
    "vqa_score": lambda place: vqa_score.load(CPU, str(place)),
}
"""Name -> our scorer with what `newer` wrote."""


def words(place: Path) -> Path:
    """`place`, with the tokenizer of its vocabulary as transformers saves it."""
    from transformers import CLIPTokenizer

    files = (str(place / "vocab.json"), str(place / "merges.txt"))
    CLIPTokenizer(*files, model_max_length=77).save_pretrained(place)
    return place


def judges(case: dict[str, Any], folder: Path) -> Iterator[tuple[str, Columns]]:
    """Our scorers that a case is for, by name."""
    scorer, checkpoint = case["scorer"], folder / case["checkpoint"]
    if scorer in NEWER:
        newer = NEWER[scorer](checkpoint)
        yield scorer, lambda images, prompts: {scorer: newer(images, prompts)}
        return
    if scorer != "clip":
        yield scorer, ours(scorer, checkpoint, folder / case["vocabulary"])
        return
    yield "clip", torchmetrics_cosines(clip.ClipScore(CPU, str(checkpoint)))
    if importlib.util.find_spec("open_clip"):
        own = own_open_clip(checkpoint, case["config"])
        yield "open_clip", lambda images, prompts: {"open_clip": own(images, prompts) / 100}


# ---- CLIP


def torchmetrics_cosines(score: Scorer) -> Columns:
    """A score of 100 x cosine as the columns [N] of cosines that the packages have.

    `clip_score` is raised to 0, as torchmetrics does with a mean, here of one picture.
    `clip_without_end`, where torchmetrics loses the end of a long prompt, is not ours to equal.
    """

    def columns(images: Tensor, prompts: tuple[str, ...]) -> dict[str, Tensor]:
        found = score(images, prompts) / 100
        return {"clip": found, "clip_score": found.clamp(min=0), "open_clip": found}

    return columns


def official(case: dict[str, Any], scores: dict[str, list[float]], column: str) -> Tensor:
    """Official scores [N] of a column; cosines for CLIP, whose scores are 100 times these."""
    values = torch.tensor(scores[column], dtype=torch.float64)
    return values / 100 if case["scorer"] == "clip" else values


def own_open_clip(place: Path, config: dict[str, Any]) -> Scorer:
    """Our scorer `open_clip` with the tensors and words in `place`, of a size of its own.

    Args:
        place: with open_clip.pt and bpe.txt.gz.
        config: transformers' of the same model.
    """
    import open_clip as library

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"parity-{place.name}.json")
        path.write_text(json.dumps(architecture(place, config)), encoding="utf-8")
        library.add_model_config(path)
        return open_clip.OpenClipScore(CPU, path.stem, str(place / "open_clip.pt"))


def architecture(place: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A CLIPConfig in open_clip's words."""
    seen, said = config["vision_config"], config["text_config"]
    sizes = [
        {"layers": part["num_hidden_layers"], "width": part["hidden_size"]} for part in (seen, said)
    ]
    words = {"bpe_path": str(place / "bpe.txt.gz")}
    return {
        "embed_dim": config["projection_dim"],
        "quick_gelu": True,
        "vision_cfg": {
            **sizes[0], "image_size": seen["image_size"], "patch_size": seen["patch_size"],
        },
        "text_cfg": {
            **sizes[1], "heads": said["num_attention_heads"], "vocab_size": said["vocab_size"],
            "tokenizer_kwargs": words,
        },
    }  # fmt: skip


# ---- differences


def differences(case: dict[str, Any], columns: Columns) -> dict[str, float]:
    """Column -> largest absolute difference to the official scores, over all sizes of images."""
    worst: dict[str, float] = {}
    for item in case["sets"]:
        found = columns(inputs.images(*item["size"]), inputs.PROMPTS)
        for name, values in found.items():
            gap = (values.double() - official(case, item["scores"], name)).abs().max()
            worst[name] = max(worst.get(name, 0.0), gap.item())
    return worst


def spread(case: dict[str, Any], column: str) -> float:
    """Standard deviation of the official scores, to hold the differences against."""
    return torch.cat([official(case, i["scores"], column) for i in case["sets"]]).std().item()


def main(folder: Path) -> int:
    """Print a line for each case, column and scorer of ours; 1 if a difference is too large."""
    failed = 0
    for path in sorted(folder.glob("*.json")):
        case = json.loads(path.read_text(encoding="utf-8"))
        if case.get("scorer") not in SCORERS:
            continue
        unit = "cosine" if case["scorer"] == "clip" else "score"
        for scorer, columns in judges(case, folder):
            for column, gap in differences(case, columns).items():
                limit = LIMIT.get(scorer, 1e-5)
                failed |= not gap <= limit
                verdict = "equal" if gap <= limit else f"ABOVE {limit}"
                print(
                    f"{path.stem:18} {column:15} by our {scorer:13} {gap:.1e} of the {unit}, whose "
                    f"spread is {spread(case, column):.3f}  {verdict}"
                )
    del torchvision_operators.LIBRARY
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
