"""What the official code of PickScore, HPS v2.1 and VQAScore scores on random weights.

    python -m tests.parity.newer FOLDER

Like `tests.parity.oracle`, in the same environment. PickScore's code is that of its README, HPS'
the package hpsv2 1.2.0. The package t2v-metrics is on PyPI without Qwen3-VL, so the code of its
repository (version 3.1, qwen3vl_model.py) is followed here step by step, with the packages that it
calls: transformers' processor and `generate`, and qwen-vl-utils.
"""

from __future__ import annotations

import json
import shutil
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.parity import inputs, torchvision_operators
from tests.parity.oracle import clip_model, random_state, scored, write

Score = Callable[[Image.Image, str], dict[str, float]]


def drawn(state: dict[str, Any], shapes: dict[str, Any], seed: int) -> dict[str, Any]:
    """What is needed to draw the weights again."""
    return {"digest": inputs.digest({n: state[n] for n in shapes}), "shapes": shapes, "seed": seed}


# ---- PickScore


def pick_score(folder: Path) -> None:
    """Write pick_score-tiny: a folder for transformers, and its scores."""
    from transformers import AutoModel, AutoProcessor

    place, seed = folder / "pick_score-tiny", 51
    clip, shapes, state = clip_model(place, seed, "gelu")
    processor = AutoProcessor.from_pretrained(place, use_fast=False)
    model = AutoModel.from_pretrained(place).eval()
    asked = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}

    @torch.no_grad()
    def score(image: Image.Image, prompt: str) -> dict[str, float]:
        seen = model.get_image_features(**processor(images=[image], **asked))
        seen = seen / torch.norm(seen, dim=-1, keepdim=True)
        said = model.get_text_features(**processor(text=prompt, **asked))
        said = said / torch.norm(said, dim=-1, keepdim=True)
        return {"pick_score": (model.logit_scale.exp() * (said @ seen.T)[0]).item()}

    case = {"scorer": "pick_score", "checkpoint": place.name, "config": clip.config.to_dict()}
    found = {"sets": scored(inputs.SIZES, score)}
    write(folder / "pick_score-tiny.json", case | drawn(state, shapes, seed) | found)


# ---- HPS v2.1


def lend_vocabulary() -> None:
    """Give hpsv2 the vocabulary that its wheel forgot: its open_clip does not load without one."""
    import hpsv2
    import open_clip

    name = "bpe_simple_vocab_16e6.txt.gz"
    target = Path(hpsv2.__path__[0], "src", "open_clip", name)
    if not target.exists():
        shutil.copyfile(Path(open_clip.__path__[0], name), target)


def hps(folder: Path) -> None:
    """Write hps_v2_1-tiny: a checkpoint as hpsv2 reads it, and its scores."""
    lend_vocabulary()
    from hpsv2 import img_score
    from hpsv2.src import open_clip
    from hpsv2.src.open_clip import tokenizer

    place, seed = inputs.clip_vocabulary(folder / "hps_v2_1-tiny"), 52
    tokenizer._tokenizer = tokenizer.SimpleTokenizer(str(place / "bpe.txt.gz"))
    towers = {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": 224, "patch_size": 32, "layers": 2, "width": 160, "head_width": 80,
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": len(tokenizer._tokenizer.encoder), "width": 128,
            "heads": 2, "layers": 2,
        },
    }  # fmt: skip
    (place / "tiny.json").write_text(json.dumps(towers), encoding="utf-8")
    open_clip.add_model_config(place / "tiny.json")
    model, _, see = open_clip.create_model_and_transforms(
        "tiny", precision="amp", device="cpu", light_augmentation=True, output_dict=True
    )
    img_score.model_dict.update(model=model, preprocess_val=see)
    shapes, state = random_state(model, seed)
    torch.save({"state_dict": state}, place / "HPS_v2.1_compressed.pt")

    def score(image: Image.Image, prompt: str) -> dict[str, float]:
        checkpoint = str(place / "HPS_v2.1_compressed.pt")
        found = img_score.score(image, prompt, cp=checkpoint, hps_version="v2.1")
        return {"hps_v2_1": float(found[0])}

    case = {"scorer": "hps_v2_1", "checkpoint": f"{place.name}/HPS_v2.1_compressed.pt"}
    found = {"sets": scored(inputs.SIZES, score)}
    write(folder / "hps_v2_1-tiny.json", case | drawn(state, shapes, seed) | found)


# ---- VQAScore

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
"""What Qwen3-VL's chat template comes to for a question with a picture.

The end is an expression, as Jinja drops a template's last line break.
"""


def qwen(place: Path, seed: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A small Qwen3-VL with its processor, saved in `place`: config, shapes and state."""
    from transformers import (
        AutoTokenizer,
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    words = AutoTokenizer.from_pretrained(inputs.qwen_vocabulary(place))
    ids = {token: words.convert_tokens_to_ids(token) for token in inputs.QWEN_SPECIAL}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(words), "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "rope_theta": 5000000,
            "rope_scaling": {
                "rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
            "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config)
    shapes, state = random_state(model, seed)
    model.load_state_dict(inputs.saying_yes(state, words.convert_tokens_to_ids("Yes")))
    model.save_pretrained(place)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16}
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(**half), words, Qwen3VLVideoProcessor(**half), TEMPLATE
    ).save_pretrained(place)
    return config, shapes, state


def t2v_metrics(place: Path) -> Score:
    """The score of t2v-metrics' Qwen3VLModel.forward, in float32."""
    from qwen_vl_utils import process_vision_info
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(
        place, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    processor = AutoProcessor.from_pretrained(place, use_fast=False)
    (yes,) = processor.tokenizer.encode("Yes", add_special_tokens=False)

    @torch.inference_mode()
    def score(image: Image.Image, prompt: str) -> dict[str, float]:
        question = f'Does this figure show "{prompt}"? Please answer Yes or No.'
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images, _ = process_vision_info(
            messages, image_patch_size=processor.image_processor.patch_size
        )
        given = processor(
            text=[text], images=images, padding=True, return_tensors="pt", do_resize=False
        )
        outputs = model.generate(
            **given, max_new_tokens=1, do_sample=False, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return {"vqa_score": outputs.scores[-1][0].softmax(-1)[yes].item()}

    return score


def vqa_score(folder: Path) -> None:
    """Write vqa_score-tiny: a folder for transformers, and its scores."""
    place, seed = folder / "vqa_score-tiny", 53
    config, shapes, state = qwen(place, seed)
    case = {"scorer": "vqa_score", "checkpoint": place.name, "config": config.to_dict()}
    found = {"sets": scored(inputs.SIZES, t2v_metrics(place))}
    write(folder / "vqa_score-tiny.json", case | drawn(state, shapes, seed) | found)


def main() -> None:
    """Write every case into the folder on the command line."""
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # hpsv2 imports a name from Python's turtle graphics, which it never uses.
    sys.modules.setdefault("turtle", types.SimpleNamespace(forward=None))  # type: ignore[arg-type]
    warnings.simplefilter("ignore")
    for case in (pick_score, hps, vqa_score):
        case(folder)
    del torchvision_operators.LIBRARY


if __name__ == "__main__":
    main()
