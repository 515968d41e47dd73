"""Images, prompts, vocabularies and random tensors: equal wherever they are made.

Only uniform draws of NumPy's PCG64 are used, whose stream does not change between releases.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIZES = ((512, 512), (96, 160), (224, 224), (300, 201))
"""Height and width of the images: upwards, downwards, unchanged, and odd margins to crop."""

PROMPTS = (
    "a cat",
    "A photograph of Two DOGS; (playing) chess... on the moon!",
    'café über "naïve" 一只猫 🐈 x²',
    "a red cube on top of a blue sphere, next to a very small green pyramid, in the style of an "
    "oil painting by an old master, with soft light from the left and a long dark shadow that "
    "falls over the table, the wall and the floor of the otherwise empty room",
    "",
    "word " * 60 + "and the rest is cut",
)
"""Short; punctuation and capitals; accents, Chinese and emoji; cut at 35; empty; cut at 50 words
by LAVIS and at 77 tokens by CLIP."""

_WORDS = (
    "a an the of and on in to cat dog dogs two red blue green cube sphere small very photograph "
    "playing chess moon style oil painting old light left long dark cafe uber naive word rest cut "
    "next top by with soft shadow that falls over table wall floor is room master empty"
)


def images(height: int, width: int, count: int = len(PROMPTS)) -> Tensor:
    """[count, 3, height, width] uint8: blocks of colour under noise, all different."""
    rng = np.random.default_rng([height, width])
    rough = rng.integers(0, 192, (count, 3, height // 16 + 1, width // 16 + 1), dtype=np.uint8)
    blocks = rough.repeat(16, axis=2).repeat(16, axis=3)[:, :, :height, :width]
    noise = rng.integers(0, 64, (count, 3, height, width), dtype=np.uint8)
    return torch.from_numpy(blocks + noise)


def bert_vocabulary(path: Path, size: int) -> Path:
    """Write vocab.txt of `size` tokens, laid out as that of bert-base-uncased.

    Padding comes first, [UNK], [CLS], [SEP] and [MASK] have 100 to 103, then follow characters,
    alone and within a word, and words; unused tokens fill up.
    """
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    inside = [f"##{c}" for c in letters if c.isalnum()]
    known = [*letters, *inside, *_WORDS.split(), "##s", "##ing", "一", "猫"]
    unused = (f"[unused{i}]" for i in range(size))
    tokens = ["[PAD]", *(next(unused) for _ in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens += dict.fromkeys(known)
    tokens += [next(unused) for _ in range(size - len(tokens))]
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


def clip_vocabulary(folder: Path) -> Path:
    """Write a small byte-pair vocabulary of CLIP's layout, for transformers and for open_clip.

    The 256 bytes come first, then these as the ends of words, merges, and the two special tokens.

    Returns:
        `folder`, with vocab.json, merges.txt and bpe.txt.gz.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    pairs = list(dict.fromkeys(pair for word in _WORDS.split() for pair in _merges(word)))
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in pairs)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    lines = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs)])
    folder.mkdir(parents=True, exist_ok=True)
    index = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "merges.txt").write_text(lines + "\n", encoding="utf-8")
    (folder / "bpe.txt.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    return folder


QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizer splits a text into words."""


def qwen_vocabulary(folder: Path) -> Path:
    """Write a tokenizer of Qwen's layout that knows bytes, "Yes", "No" and the special tokens."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    merges = [("Y", "e"), ("Ye", "s"), ("N", "o")]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    found = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    found.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    found.add_special_tokens(list(QWEN_SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    found.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    facts = json.dumps(named | {"pad_token": "<|endoftext|>"})
    (folder / "tokenizer_config.json").write_text(facts, encoding="utf-8")
    return folder


def saying_yes(state: Mapping[str, Tensor], token: int) -> dict[str, Tensor]:
    """The weights with a louder "Yes", whose probability is then between 0 and 1, not about 0."""
    head = state["lm_head.weight"].clone()
    head[token] *= -3
    return {**state, "lm_head.weight": head}


def _merges(word: str) -> list[tuple[str, str]]:
    """Letter by letter from the left, so that no two pairs make the same token."""
    parts = [*word[:-1], word[-1] + "</w>"]
    return [("".join(parts[:i]), parts[i]) for i in range(1, len(parts))]


def tensors(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Random float32 tensors in which everything matters: biases and norms too.

    Matrices keep the variance of what goes through them, scales of norms lie around 1, embeddings
    and position codes within 1.
    """
    return {name: torch.from_numpy(_tensor(name, shape, seed)) for name, shape in shapes.items()}


def _tensor(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    u = 2 * rng.random(tuple(shape), dtype=np.float32) - 1
    if len(shape) <= 1:
        return 1 + 0.3 * u if name.endswith("weight") else 0.3 * u
    if "embeddings." in name or "pos_embed" in name or "cls_token" in name:
        return u
    return u * np.float32((3 / np.prod(shape[1:])) ** 0.5)


def digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names and bytes, so that a changed generator shows as that."""
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode())
        total.update(state[name].contiguous().numpy().tobytes())
    return total.hexdigest()
