"""PickScore, HPS v2.1 and VQAScore against their official code, on the same random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d3po_bench.errors import UserError
from d3po_bench.types import Scorer
from eval import downloads, golden
from eval.golden import checked_scorer
from eval.scorers import _clip, hps_v2_1, pick_score, vqa_score
from tests.parity import inputs
from tests.parity.recording import RECORDED

CPU = torch.device("cpu")
NAMES = ("pick_score", "hps_v2_1", "vqa_score")
SQUARE = [height == width for height, width in inputs.SIZES]
Places = dict[str, Path]


def case_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDED / f"{name}-tiny.json").read_text())
    return found


def weights_of(name: str) -> dict[str, Tensor]:
    """As the official code scored them."""
    case = case_of(name)
    state = inputs.tensors(case["shapes"], case["seed"])
    assert inputs.digest(state) == case["digest"]
    return state


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A folder for each scorer, in the layout of what its authors publish."""
    from transformers import (
        AutoTokenizer,
        CLIPConfig,
        CLIPModel,
        CLIPTokenizer,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )

    found = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name in ("pick_score", "hps_v2_1"):
        words = inputs.clip_vocabulary(found[name])
        files = (str(words / "vocab.json"), str(words / "merges.txt"))
        CLIPTokenizer(*files, model_max_length=77).save_pretrained(words)
    clip = CLIPModel(CLIPConfig.from_dict(case_of("pick_score")["config"]))
    clip.load_state_dict(weights_of("pick_score"), strict=False)  # logit_scale is not drawn
    clip.save_pretrained(found["pick_score"])
    state = {**weights_of("hps_v2_1"), "logit_scale": torch.tensor(2.6592)}
    torch.save({"state_dict": state}, found["hps_v2_1"] / "HPS_v2.1_compressed.pt")
    inputs.qwen_vocabulary(found["vqa_score"])
    yes = AutoTokenizer.from_pretrained(found["vqa_score"]).convert_tokens_to_ids("Yes")
    qwen = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(case_of("vqa_score")["config"]))
    qwen.load_state_dict(inputs.saying_yes(weights_of("vqa_score"), yes))
    qwen.save_pretrained(found["vqa_score"])
    return found


@pytest.fixture(scope="module")
def scorers(places: Places) -> dict[str, Any]:
    """Each as `NAME:official` loads it, from files where the downloads lie."""
    patch = pytest.MonkeyPatch()
    files = {
        "pick_score": places["pick_score"] / "model.safetensors",
        "hps_v2_1": places["hps_v2_1"] / "HPS_v2.1_compressed.pt",
        "clip-words": places["hps_v2_1"] / "vocab.json",
        "vqa_score": places["vqa_score"] / "config.json",
    }
    patch.setattr(downloads, "find", lambda *names: [files[name] for name in names])
    load: dict[str, Callable[..., Scorer]] = {
        "pick_score": pick_score.load, "hps_v2_1": hps_v2_1.load, "vqa_score": vqa_score.load,
    }  # fmt: skip
    found = {name: load[name](CPU) for name in NAMES}
    patch.undo()
    return found


def gaps(name: str, scorer: Scorer) -> Tensor:
    """Largest difference to the official scores for each size of pictures."""
    return torch.stack([
        (scorer(inputs.images(*item["size"]), inputs.PROMPTS)
         - torch.tensor(item["scores"][name])).abs().max()
        for item in case_of(name)["sets"]
    ])  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_official_code(name: str, scorers: dict[str, Any]) -> None:
    official = torch.tensor([item["scores"][name] for item in case_of(name)["sets"]])
    assert official.std() > 0.02
    assert gaps(name, scorers[name]).max() <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_one_picture_at_a_time_scores_as_sixteen(name: str, scorers: dict[str, Any]) -> None:
    images, prompts = inputs.images(32, 48, 16), (inputs.PROMPTS * 3)[:16]
    whole = scorers[name](images, prompts)
    alone = [scorers[name](images[i : i + 1], prompts[i : i + 1]) for i in range(16)]
    assert (torch.cat(alone) - whole).abs().max() <= 1e-5


def test_golden_scores_are_given_again(
    scorers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "GOLDEN", tmp_path / "golden.json")
    golden.GOLDEN.write_text("{}")
    golden.recorded.cache_clear()
    for name in NAMES:
        assert not golden.check(name, scorers[name])
        golden.record(name, scorers[name])
        assert golden.check(name, scorers[name])
    golden.recorded.cache_clear()


# ---- each mistake shows


def test_the_scale_is_pick_scores_own(scorers: dict[str, Any]) -> None:
    scorer = scorers["pick_score"]
    images = inputs.images(64, 64)
    cosines = scorer.clip.cosines(images, inputs.PROMPTS)
    torch.testing.assert_close(scorer(images, inputs.PROMPTS), cosines * 14.2849, rtol=1e-4, atol=0)


def test_cropping_a_picture_for_hps_shows(
    scorers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorers["hps_v2_1"].clip, "prepare", _clip.preprocess)
    wrong = gaps("hps_v2_1", scorers["hps_v2_1"])
    assert all(gap > 1e-3 for gap, square in zip(wrong, SQUARE, strict=True) if not square)


def test_a_letterbox_by_hand() -> None:
    # twice as wide as high, and of the right width: nothing is resized, a quarter is black above
    image = torch.full((1, 3, 4, 8), 255, dtype=torch.uint8)
    found = hps_v2_1.letterboxed(image, 8)
    black, white = ((torch.tensor([v, v, v]) - torch.tensor(_clip.MEAN)) for v in (0.0, 1.0))
    std = torch.tensor(_clip.STD)
    torch.testing.assert_close(found[0, :, 1, 0], black / std)
    torch.testing.assert_close(found[0, :, 2, 0], white / std)
    torch.testing.assert_close(found[0, :, 5, 7], white / std)
    torch.testing.assert_close(found[0, :, 6, 7], black / std)


def test_another_question_shows(scorers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    images, scorer = inputs.images(32, 32), scorers["vqa_score"]
    right = scorer(images, inputs.PROMPTS)
    monkeypatch.setattr(vqa_score, "CHAT", vqa_score.CHAT.replace("Please a", "A"))
    assert (scorer(images, inputs.PROMPTS) - right).abs().min() > 1e-4


# ---- weights


def test_a_folder_of_ones_own_scores_the_same(places: Places, scorers: dict[str, Any]) -> None:
    images = inputs.images(64, 64)
    own = pick_score.load(CPU, str(places["pick_score"]))
    assert torch.equal(own(images, inputs.PROMPTS), scorers["pick_score"](images, inputs.PROMPTS))
    # the same model in HPS' place: without the scale, and with bars where pictures are not square
    other: Any = hps_v2_1.load(CPU, str(places["pick_score"]))
    torch.testing.assert_close(
        other(images, inputs.PROMPTS) * 14.2849, own(images, inputs.PROMPTS), rtol=0, atol=0.2
    )


def test_a_checkpoint_that_is_not_hps_is_refused(places: Places, tmp_path: Path) -> None:
    whole = torch.load(places["hps_v2_1"] / "HPS_v2.1_compressed.pt")
    part = {name: t for name, t in whole["state_dict"].items() if name != "ln_final.bias"}
    for content, said in (
        ({"state_dict": part}, "lacks text_model.final_layer_norm.bias. Fetch it again"),
        ({"state_dict": {}}, "is no checkpoint of HPS v2.1"),
        ({}, "is no checkpoint of HPS v2.1"),
    ):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(UserError, match=said):
            hps_v2_1.official(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pick_score", "weights fetch pick_score clip-words"),
        ("hps_v2_1", "weights fetch hps_v2_1 clip-words"),
        ("vqa_score", r"4\.3 GB.*weights fetch vqa_score"),
        ("blip_base", "weights fetch blip_base bert-base-uncased"),
        ("pick_score:tiny", "no small stand-in for the embedded model. Write pick_score:official"),
        ("blip_base:tiny", "no small stand-in for the embedded model. Write blip_base:official"),
        ("vqa_score:/nowhere", "names no weights"),
    ],
)
def test_absent_weights_are_named_with_the_command_that_fetches_them(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PO_BENCH_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=said) as error:
        checked_scorer(name, CPU)
    assert "\n" not in str(error.value)
