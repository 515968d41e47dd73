"""The scorers that stand on CLIP, with small random models of the same classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from d3po_bench.errors import UserError
from eval import downloads
from eval.golden import checked_scorer
from eval.scorers import _clip, aesthetic, clip
from tests.parity import inputs, recording

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "d3po_bench" / "models" / "embedded" / "tiny" / "tokenizer"
REAL_HEAD = ROOT.parent / "shared" / "data" / "laion" / "sac+logos+ava1-l14-linearMSE.pth"
CPU = torch.device("cpu")
PROMPTS = ["a cat on a red background", "a dog", "a fish on a blue striped background"]


def small_clip(folder: Path, act: str = "quick_gelu") -> Path:
    """A random CLIP of 48 px pictures and 77 tokens, in `folder`."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    common = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": act,
    }
    text = common | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = common | {"image_size": 48, "patch_size": 12}
    torch.manual_seed(7)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_clip(tmp_path_factory.mktemp("clip"))


def pictures(count: int, height: int = 48, width: int = 48) -> Tensor:
    """Smooth random pictures [N, 3, h, w] uint8."""
    rng = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 6, 6, generator=rng) * 255
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return fine.round().to(torch.uint8)


# ---- preprocessing


def test_a_picture_of_the_right_size_is_only_standardised() -> None:
    image = pictures(1)
    by_hand = (image[0].double() / 255 - torch.tensor(_clip.MEAN).double()[:, None, None]) / (
        torch.tensor(_clip.STD).double()[:, None, None]
    )
    torch.testing.assert_close(_clip.preprocess(image, 48)[0].double(), by_hand, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (90, 60), (60, 91), (32, 32)])
def test_preprocessing_is_that_of_transformers(height: int, width: int) -> None:
    from transformers import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    )
    images = pictures(2, height, width)
    as_pil = [Image.fromarray(i.permute(1, 2, 0).contiguous().numpy()) for i in images]
    expected = torch.tensor(np.array(theirs(as_pil)["pixel_values"]))
    torch.testing.assert_close(_clip.preprocess(images, 48), expected, atol=1e-6, rtol=0)


# ---- CLIP score


def by_hand(folder: Path, images: Tensor, prompts: list[str]) -> Tensor:
    """100 x cosine straight from transformers, one pair at a time."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        tokens = tokenizer([prompt], return_tensors="pt", truncation=True, max_length=77)
        with torch.no_grad():
            out = model(pixel_values=_clip.preprocess(image[None], 48), **tokens)
        found.append(100 * (out.image_embeds * out.text_embeds).sum())
    return torch.stack(found)


def test_the_score_is_100_cosine(folder: Path) -> None:
    images = pictures(3)
    ours = clip.load(CPU, str(folder))(images, PROMPTS)
    torch.testing.assert_close(ours, by_hand(folder, images, PROMPTS), atol=1e-4, rtol=0)
    assert ours.std() > 0.1


def test_a_long_prompt_is_cut_at_77_tokens(folder: Path) -> None:
    long = "a cat on " * 60
    scorer = clip.ClipScore(CPU, str(folder))
    tokens = scorer.clip.tokenizer(long).input_ids
    assert len(tokens) > 150
    assert scorer.clip.tokens == 77
    images = pictures(2)
    ours = scorer(images, [long, long])
    torch.testing.assert_close(ours, by_hand(folder, images, [long, long]), atol=1e-4, rtol=0)
    # The cut keeps the end-of-text token, whose state is the embedding: 75 words, not 77.
    words = long.split()
    same = scorer(images, [" ".join(words[:75])] * 2)
    other = scorer(images, [" ".join(words[:74])] * 2)
    torch.testing.assert_close(ours, same, atol=1e-4, rtol=0)
    assert not torch.allclose(ours, other, atol=1e-2)


def test_scores_do_not_depend_on_the_batch(folder: Path) -> None:
    images, prompts = pictures(64), (PROMPTS * 22)[:64]
    scorer = clip.ClipScore(CPU, str(folder))
    whole = scorer(images, prompts)
    for size in (1, 7):
        parts = [scorer(images[i : i + size], prompts[i : i + size]) for i in range(0, 64, size)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


def test_another_activation_is_refused_and_would_matter(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "gelu")
    path = tmp_path / "gelu" / "config.json"
    config = json.loads(path.read_text())
    for part in ("text_config", "vision_config"):
        config[part]["hidden_act"] = "gelu"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="is gelu, not quick_gelu"):
        clip.load(CPU, str(tmp_path / "gelu"))
    images = pictures(3)
    right = by_hand(folder, images, PROMPTS)
    wrong = by_hand(tmp_path / "gelu", images, PROMPTS)
    assert (right - wrong).abs().max() > 0.01


def test_a_model_that_lacks_a_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "part")
    path = tmp_path / "part" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("visual_projection.weight")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"does not load: its files lack visual_projection.weight"):
        clip.load(CPU, str(tmp_path / "part"))


def test_a_damaged_folder_is_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"CLIP model in .* does not load"):
        clip.load(CPU, str(tmp_path / "cut"))
    (tmp_path / "cut" / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not CLIP's"):
        clip.load(CPU, str(tmp_path / "cut"))
    with pytest.raises(UserError, match="official, tiny, tiny2 or a folder"):
        clip.load(CPU, str(tmp_path / "nowhere"))


# ---- aesthetic


def aesthetic_folder(clip_folder: Path, target: Path) -> Path:
    """A random head of the official depth on that CLIP."""
    from safetensors.torch import save_file

    shutil.copytree(clip_folder, target / "clip")
    torch.manual_seed(11)
    head = aesthetic.Head([24, 16, 8, 1])
    state = {k: v.contiguous() for k, v in head.state_dict().items()}
    save_file(state, target / "head.safetensors")
    (target / "config.json").write_text("{}")
    return target


def test_the_head_sees_embeddings_of_length_1(folder: Path, tmp_path: Path) -> None:
    scorer = aesthetic.Aesthetic(CPU, str(aesthetic_folder(folder, tmp_path)))
    images = pictures(4)
    raw = torch.cat([scorer.clip._images(images)])
    right = scorer.head(normalize(raw, dim=1))
    wrong = scorer.head(raw)
    torch.testing.assert_close(scorer(images, [""] * 4), right)
    assert (right - wrong).abs().min() > 0.01, "without normalising the score is another"


def chain(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The head's formula: W5 (W4 (... (W1 x + b1) ...)) + b5."""
    for number in (0, 2, 4, 6, 7):
        weight, bias = (state[f"layers.{number}.{kind}"].double() for kind in ("weight", "bias"))
        x = x @ weight.T + bias
    return x.squeeze(1)


@pytest.mark.skipif(not REAL_HEAD.exists(), reason=f"needs LAION's head at {REAL_HEAD}")
def test_the_real_head_scores_as_its_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PO_BENCH_CACHE", str(tmp_path))
    place = tmp_path / "laion_aesthetic"
    place.mkdir()
    path = place / REAL_HEAD.name
    shutil.copyfile(REAL_HEAD, path)
    head = aesthetic.load_head(downloads.find("laion_aesthetic")[0])
    assert [tuple(weight.shape) for weight in head.state_dict().values() if weight.ndim == 2] == [
        (1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)
    ]  # fmt: skip
    x = normalize(torch.randn(5, 768, generator=torch.Generator().manual_seed(1)), dim=1)
    state = torch.load(REAL_HEAD, map_location="cpu", weights_only=True)
    torch.testing.assert_close(head(x).double(), chain(state, x.double()), rtol=1e-5, atol=1e-5)

    data = REAL_HEAD.read_bytes()
    for damaged in (data[:-1], data[:5000] + b"\0" + data[5001:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or another"):
            downloads.find("laion_aesthetic")


class Trap:
    """What runs when it is unpickled carelessly."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("fallen"),)


def test_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"layers.0.weight": Trap()}, "head.pth")
    with pytest.raises(UserError, match="no aesthetic head"):
        aesthetic.load_head(tmp_path / "head.pth")
    assert not Path("fallen").exists()


def test_another_state_dict_is_no_head(tmp_path: Path) -> None:
    for state in ({}, {"layers.0.weight": torch.zeros(2)}, {"a": torch.zeros(2)}):
        torch.save(state, tmp_path / "head.pth")
        with pytest.raises(UserError, match="no aesthetic head"):
            aesthetic.load_head(tmp_path / "head.pth")


# ---- names and absence


@pytest.mark.parametrize("name", ["clip", "aesthetic"])
def test_official_weights_are_asked_for_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PO_BENCH_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"Missing: config\.json.*d3po-bench weights fetch clip"):
        checked_scorer(name, CPU)


def test_what_follows_the_colon_chooses_weights(folder: Path) -> None:
    found = checked_scorer(f"clip:{folder}", CPU, "tiny")
    assert found.unit == "100 x cosine"
    with pytest.raises(UserError, match="jpeg_size has no weights to choose"):
        checked_scorer("jpeg_size:tiny", CPU)


def test_open_clip_needs_model_and_weights() -> None:
    for name in ("open_clip", "open_clip:", "open_clip:ViT-B-32", "open_clip:/x"):
        with pytest.raises(UserError, match="write open_clip:MODEL/PRETRAINED"):
            checked_scorer(name, CPU)


# ---- against torchmetrics and open_clip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[clip.ClipScore, dict[str, Any]]:
    """Ours on the model that `tests.parity.oracle` scored, and what the packages said of it."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    case = json.loads((recording.RECORDED / "clip-tiny.json").read_text())
    state = inputs.tensors(case["shapes"], case["seed"])
    assert inputs.digest(state) == case["digest"]
    place = inputs.clip_vocabulary(tmp_path_factory.mktemp("clip-tiny"))
    model = CLIPModel(CLIPConfig.from_dict(case["config"]))
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not [name for name in missing if name != "logit_scale"]
    model.save_pretrained(place)
    CLIPTokenizer(
        str(place / "vocab.json"), str(place / "merges.txt"), model_max_length=77
    ).save_pretrained(place)
    return clip.ClipScore(CPU, str(place)), case


@pytest.mark.parametrize("package", ["clip", "open_clip"])
def test_the_score_is_that_of_the_official_packages(
    package: str, recorded: tuple[clip.ClipScore, dict[str, Any]]
) -> None:
    scorer, case = recorded
    for item in case["sets"]:
        ours = scorer(inputs.images(*item["size"]), inputs.PROMPTS)
        # On the cosine itself; these scores are 100 times it.
        gap = (ours - torch.tensor(item["scores"][package])).abs() / 100
        assert gap.max() <= 1e-5, item["size"]


def test_losing_the_end_of_a_long_prompt_would_show(
    recorded: tuple[clip.ClipScore, dict[str, Any]],
) -> None:
    scorer, case = recorded
    item = case["sets"][0]
    ours = scorer(inputs.images(*item["size"]), inputs.PROMPTS)
    wrong = torch.tensor(item["scores"]["clip_without_end"])
    assert (ours - wrong).abs().max() > 1  # of the prompts, one is too long
