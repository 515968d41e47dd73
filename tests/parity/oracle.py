"""What the official packages score on random weights; runs in their environment, not in ours.

    python -m tests.parity.oracle FOLDER [--full]

For each case it writes the official checkpoint, with every tensor drawn from a seed, and a JSON
file with the tensors' shapes and the scores. `--full` adds the published sizes: 3 GB, ten
minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from tests.parity import inputs, torchvision_operators

Scores = dict[str, list[float]]
VOCABULARY = {"tiny": 400, "full": 30522}
"""Tokens of vocab.txt; BLIP adds two."""

TEXT = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "add_cross_attention": True,
    "model_type": "bert",
}
"""The text encoder as in both official med_config.json, its sizes apart."""

TINY = {"num_hidden_layers": 2, "intermediate_size": 192, "vocab_size": VOCABULARY["tiny"] + 2}
FULL = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "vocab_size": VOCABULARY["full"] + 2,
}


def pictures(height: int, width: int) -> list[Image.Image]:
    """The fixed images of one size, as the official packages take them."""
    arrays = inputs.images(height, width).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(a) for a in arrays]


def scored(sizes: Sequence[tuple[int, int]], score: Callable[..., dict[str, float]]) -> list[Any]:
    """Scores of every image with its prompt, one at a time, for each size of images."""
    found = []
    for size in sizes:
        rows = [score(i, p) for i, p in zip(pictures(*size), inputs.PROMPTS, strict=True)]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        found.append({"size": size, "scores": columns})
    return found


def random_state(network: nn.Module, seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Shapes of the network's float tensors, and its whole state with these drawn anew."""
    state = network.state_dict()
    shapes = {name: list(t.shape) for name, t in state.items() if t.is_floating_point() and t.ndim}
    return shapes, state | inputs.tensors(shapes, seed)


def write(path: Path, case: dict[str, Any]) -> None:
    """One case, with the versions that scored it."""
    packages = ("torch", "transformers", "PIL", "torchvision")
    versions = {name: importlib.import_module(name).__version__ for name in packages}
    path.write_text(json.dumps(case | {"versions": versions}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", flush=True)


@contextlib.contextmanager
def vocabulary(folder: Path, size: int) -> Iterator[Path]:
    """A working directory with a `bert-base-uncased`, where the packages look for it."""
    place = folder / f"vocabulary-{size}" / "bert-base-uncased"
    place.mkdir(parents=True, exist_ok=True)
    path = inputs.bert_vocabulary(place / "vocab.txt", size)
    before = Path.cwd()
    os.chdir(place.parent)
    try:
        yield path
    finally:
        os.chdir(before)


# ---- LAVIS


def lavis_network(full: bool) -> Any:
    """LAVIS' BlipITM: ViT-B as published, or two layers 128 wide; 384 px either way."""
    from lavis.models.blip_models.blip_image_text_matching import BlipITM
    from lavis.models.med import BertConfig, XBertEncoder
    from lavis.models.vit import VisionTransformerEncoder

    width, depth = (768, 12) if full else (128, 2)
    vision = VisionTransformerEncoder(
        img_size=384, patch_size=16, embed_dim=width, depth=depth, num_heads=width // 64
    )
    vision.vision_width = width
    sizes = FULL if full else TINY | {"hidden_size": 192, "num_attention_heads": 3}
    config = BertConfig(**TEXT, **sizes, encoder_width=width)
    text = XBertEncoder(config, add_pooling_layer=False)
    return BlipITM(vision, text, embed_dim=256 if full else 64)


def lavis_score(network: Any) -> Callable[[Image.Image, str], dict[str, float]]:
    """Scores as LAVIS' image-text matching example takes them."""
    from lavis.processors.blip_processors import BlipCaptionProcessor, BlipImageEvalProcessor

    see, say = BlipImageEvalProcessor(image_size=384), BlipCaptionProcessor()

    @torch.no_grad()
    def score(image: Image.Image, prompt: str) -> dict[str, float]:
        sample = {"image": see(image).unsqueeze(0), "text_input": [say(prompt)]}
        logits = network(sample, match_head="itm")
        return {
            "blip_itm_logit": logits[0, 1].item(),
            "blip_itm_prob": logits.softmax(1)[0, 1].item(),
            "blip_itc": network(sample, match_head="itc").item(),
        }

    return score


def lavis(folder: Path, full: bool) -> None:
    """Write blip-tiny or blip-full."""
    kind, seed = ("full", 12) if full else ("tiny", 11)
    with vocabulary(folder, VOCABULARY[kind]) as words:
        network = lavis_network(full)
        shapes, state = random_state(network, seed)
        # The published file comes from training: it also holds momentum encoders and queues.
        extra = {"temp": torch.tensor(0.07), "image_queue": torch.ones(4, 8)}
        extra |= {f"{n.partition('.')[0]}_m.x": torch.ones(2) for n in list(state)[:1]}
        checkpoint = folder / f"blip-{kind}.pth"
        torch.save({"model": state | extra, "epoch": 5}, checkpoint)
        network.load_checkpoint(str(checkpoint))
        sizes = inputs.SIZES[:1] if full else inputs.SIZES
        sets = scored(sizes, lavis_score(network.eval()))
    case = {"scorer": "blip", "checkpoint": checkpoint.name, "seed": seed, "sets": sets}
    described = {"vocabulary": str(words.relative_to(folder)), "words": VOCABULARY[kind]}
    drawn = {"digest": inputs.digest({n: state[n] for n in shapes}), "shapes": shapes}
    write(folder / f"blip-{kind}.json", case | described | drawn)


# ---- ImageReward


def reward_network(full: bool, config: Path) -> Any:
    """The authors' ImageReward: ViT-L as published, or two layers 128 wide; 224 px either way."""
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    def small(*_: Any) -> tuple[Any, int]:
        return VisionTransformer(img_size=224, embed_dim=128, depth=2, num_heads=2), 128

    if not full:
        blip_pretrain.create_vit = small
    # The reward head takes 768 features whatever the configuration says.
    sizes = FULL if full else TINY | {"hidden_size": 768, "num_attention_heads": 12}
    config.write_text(json.dumps(TEXT | sizes), encoding="utf-8")
    return ImageReward(med_config=str(config))


def image_reward(folder: Path, full: bool) -> None:
    """Write image_reward-tiny or image_reward-full."""
    import ImageReward

    kind, seed = ("full", 22) if full else ("tiny", 21)
    config, checkpoint = folder / f"med_config-{kind}.json", folder / f"image_reward-{kind}.pt"
    with vocabulary(folder, VOCABULARY[kind]) as words:
        shapes, state = random_state(reward_network(full, config), seed)
        torch.save(state, checkpoint)
        network = ImageReward.load(str(checkpoint), device="cpu", med_config=str(config))

        def score(image: Image.Image, prompt: str) -> dict[str, float]:
            return {"image_reward": network.score(prompt, image)}

        with torch.no_grad():
            sets = scored(inputs.SIZES[:1] if full else inputs.SIZES, score)
    case = {"scorer": "image_reward", "checkpoint": checkpoint.name, "seed": seed, "sets": sets}
    described = {"vocabulary": str(words.relative_to(folder)), "words": VOCABULARY[kind]}
    drawn = {"digest": inputs.digest({n: state[n] for n in shapes}), "shapes": shapes}
    write(folder / f"image_reward-{kind}.json", case | described | drawn)


# ---- torchmetrics and open_clip


def clip_model(
    place: Path, seed: int = 31, activation: str = "quick_gelu"
) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """A small CLIPModel with its tokenizer and processor, saved in `place`.

    Returns:
        It, its shapes and its state, drawn anew.
    """
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    inputs.clip_vocabulary(place)
    words = CLIPTokenizer(
        str(place / "vocab.json"), str(place / "merges.txt"), pad_token="<|endoftext|>"
    )
    sizes: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 512, "projection_dim": 64, "hidden_act": activation}
    # Token 2 as the end of text is how openai's own files say "the largest id".
    text = sizes | {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 2}
    vision = sizes | {"image_size": 224, "patch_size": 32}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).eval()
    shapes, state = random_state(model, seed)
    model.load_state_dict(state)
    model.save_pretrained(place)
    CLIPProcessor(CLIPImageProcessor(), words).save_pretrained(place)
    return model, shapes, state


def torchmetrics_scores(model: Any, place: Path) -> Callable[[Image.Image, str], dict[str, float]]:
    """`clip_score`, and 100 x cosine as it has it before the mean is raised to 0.

    torchmetrics cuts long prompts behind the 77th token and so loses the end of text, where CLIP
    reads a prompt: `clip_without_end`. For the others the tokenizer cuts, and keeps it.
    """
    import numpy as np
    from torchmetrics.functional.multimodal import clip_score
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update
    from transformers import CLIPImageProcessor, CLIPTokenizer

    see, say = CLIPImageProcessor.from_pretrained(place), CLIPTokenizer.from_pretrained(place)

    def process(text: Any = None, images: Any = None, **options: Any) -> Any:
        return see(images, return_tensors="pt") if text is None else say(text, **options)

    def cut(**options: Any) -> Any:
        return process(**options, truncation=True, max_length=77)

    @torch.no_grad()
    def score(image: Image.Image, prompt: str) -> dict[str, float]:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return {
            "clip": _clip_score_update(pixels, prompt, model, cut)[0].item(),
            "clip_score": clip_score(pixels, prompt, lambda: (model, cut)).item(),
            "clip_without_end": _clip_score_update(pixels, prompt, model, process)[0].item(),
        }

    return score


def open_clip_score(state: dict[str, Tensor], place: Path) -> Callable[[Image.Image, str], float]:
    """100 x cosine by open_clip, with QuickGELU, from transformers' tensors."""
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    say = SimpleTokenizer(str(place / "bpe.txt.gz"))
    sizes = {"layers": 2, "width": 128}
    network = open_clip.CLIP(
        embed_dim=64,
        vision_cfg=open_clip.CLIPVisionCfg(**sizes, image_size=224, patch_size=32),
        text_cfg=open_clip.CLIPTextCfg(**sizes, heads=2, vocab_size=say.vocab_size),
        quick_gelu=True,
    ).eval()
    converted = open_clip_state(state)
    network.load_state_dict(converted)
    torch.save(converted, place / "open_clip.pt")
    see = open_clip.image_transform(224, is_train=False)

    @torch.no_grad()
    def score(image: Image.Image, prompt: str) -> float:
        seen = network.encode_image(see(image).unsqueeze(0), normalize=True)
        said = network.encode_text(say([prompt]), normalize=True)
        return float(100 * (seen * said).sum())

    return score


OPEN_CLIP = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
"""transformers' part of a name -> open_clip's."""


def open_clip_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a CLIPModel under open_clip's names, the projections turned over."""
    found = {}
    for name, tensor in state.items():
        if name.endswith("position_ids") or re.search(r"\.[kv]_proj\.", name):
            continue
        if ".q_proj." in name:  # open_clip has one matrix for the three
            three = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            name = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
            tensor = torch.cat(three)
        for ours, theirs in OPEN_CLIP:
            name = name.replace(ours, theirs)
        found[name] = tensor
    found["visual.proj"] = found.pop("visual_projection.weight").T
    found["text_projection"] = found.pop("text_projection.weight").T
    return found


def clip(folder: Path) -> None:
    """Write clip-tiny: a folder for transformers and the scores of both packages."""
    place = folder / "clip-tiny"
    model, shapes, state = clip_model(place)
    metrics, other = torchmetrics_scores(model, place), open_clip_score(state, place)
    sets = scored(inputs.SIZES, lambda i, p: {**metrics(i, p), "open_clip": other(i, p)})
    case = {"scorer": "clip", "checkpoint": place.name, "seed": 31, "sets": sets}
    drawn = {"digest": inputs.digest({n: state[n] for n in shapes}), "shapes": shapes}
    write(folder / "clip-tiny.json", case | drawn | {"config": model.config.to_dict()})


def put_back() -> None:
    """Names where LAVIS and ImageReward look for them; transformers 4.56 moved these."""
    from transformers import modeling_utils, pytorch_utils

    for name in (
        "apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer",
    ):  # fmt: skip
        setattr(modeling_utils, name, getattr(pytorch_utils, name))


def main() -> None:
    """Write every case into the folder on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true", help="also the published sizes")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # LAVIS and ImageReward import openai's clip, which they declare nowhere, for other models.
    sys.modules.setdefault("clip", types.ModuleType("clip"))
    put_back()
    warnings.simplefilter("ignore")
    for full in [True, False] if options.full else [False]:
        lavis(folder, full)
        image_reward(folder, full)
    clip(folder)
    del torchvision_operators.LIBRARY


if __name__ == "__main__":
    main()
