"""BLIP against the scores that LAVIS gave on the same weights, and what each mistake would do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from d3po_bench.errors import UserError
from eval.scorers import _blip, _blip_match, blip, blip_base, image_reward
from eval.scorers._blip_match import Blip
from tests.parity import inputs
from tests.parity.recording import Recording, regenerated

CPU = torch.device("cpu")
COLUMNS = ("blip_itm_logit", "blip_itm_prob", "blip_itc")
SQUARE = [height == width for height, width in inputs.SIZES]
SEEN = 1e-3
"""What a mistake must change at least; the scores spread over 0.05 to 0.3."""


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return regenerated("blip-tiny", tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def loaded(recording: Recording) -> Blip:
    return Blip(_blip.official(recording.checkpoint, recording.vocabulary), CPU)


@pytest.fixture
def scorer(loaded: Blip) -> Iterator[Blip]:
    before = dict(vars(loaded))
    yield loaded
    vars(loaded).update(before)


def gaps(recording: Recording, scorer: Blip, column: str = "blip_itm_logit") -> Tensor:
    return recording.gaps(column, lambda images, prompts: scorer.columns(images, prompts)[column])


# ---- equal to the official package


def test_scores_equal_the_official(recording: Recording, scorer: Blip) -> None:
    for column in COLUMNS:
        assert gaps(recording, scorer, column).max() <= 1e-5, column
    assert recording.gaps("blip_itm_logit", scorer).max() <= 1e-5, "a call gives the raw logit"
    assert scorer.unit == "logit"


def test_columns_agree_with_each_other(scorer: Blip) -> None:
    found = scorer.columns(inputs.images(96, 160), inputs.PROMPTS)
    assert tuple(found) == COLUMNS
    assert all(scores.shape == (len(inputs.PROMPTS),) for scores in found.values())
    # the logit is one of the two whose softmax is the probability, not their difference
    difference = torch.logit(found["blip_itm_prob"])
    assert (difference - found["blip_itm_logit"]).abs().min() > SEEN


@pytest.mark.gpu
def test_a_gpu_scores_as_the_cpu_does(recording: Recording) -> None:
    parts = _blip.official(recording.checkpoint, recording.vocabulary)
    scorer = Blip(parts, torch.device("cuda"))
    for column in COLUMNS:
        assert gaps(recording, scorer, column).max() <= 1e-4


# ---- each mistake shows


@pytest.mark.slow
def test_itm_with_cls_shows(recording: Recording, scorer: Blip) -> None:
    scorer.encode = scorer.words.cls_token_id
    assert gaps(recording, scorer).min() > SEEN
    assert gaps(recording, scorer, "blip_itc").max() <= 1e-5


@pytest.mark.slow
def test_itc_with_enc_shows(
    recording: Recording, scorer: Blip, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _blip.tokenized
    monkeypatch.setattr(_blip, "tokenized", lambda *a: right(*a).starting(scorer.encode))
    assert gaps(recording, scorer, "blip_itc").max() > SEEN
    assert gaps(recording, scorer).max() <= 1e-5


@pytest.mark.slow
def test_other_normalisation_shows(
    recording: Recording, scorer: Blip, monkeypatch: pytest.MonkeyPatch
) -> None:
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for mean, std in (imagenet, ((0.5,) * 3, (0.5,) * 3), ((0,) * 3, (1,) * 3)):
        monkeypatch.setattr(_blip, "MEAN", mean)
        monkeypatch.setattr(_blip, "STD", std)
        assert gaps(recording, scorer).max(1).values.min() > SEEN, mean


@pytest.mark.slow
def test_cropping_instead_of_squeezing_shows(recording: Recording, scorer: Blip) -> None:
    scorer.resize = partial(image_reward.cropped, size=384)
    found = gaps(recording, scorer).max(1).values
    for square, gap in zip(SQUARE, found, strict=True):
        assert gap <= 1e-5 if square else gap > SEEN


@pytest.mark.slow
def test_another_filter_shows(recording: Recording, scorer: Blip) -> None:
    scorer.resize = lambda image: image.resize((384, 384), Image.Resampling.BILINEAR)
    assert gaps(recording, scorer).max(1).values.min() > 1e-4


@pytest.mark.slow
def test_a_raw_caption_shows(
    recording: Recording, scorer: Blip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_blip_match, "caption", str)
    assert gaps(recording, scorer)[:, 1].min() > SEEN


@pytest.mark.slow
def test_a_longer_cut_shows(
    recording: Recording, scorer: Blip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_blip, "TOKENS", 77)
    found = gaps(recording, scorer)
    assert found[:, 3].min() > SEEN
    assert found[:, 0].max() <= 1e-5


def test_attention_to_padding_shows(
    recording: Recording, scorer: Blip, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _blip.tokenized

    def unmasked(*arguments: Any) -> _blip.Tokens:
        ids, mask = right(*arguments)
        return _blip.Tokens(ids, torch.ones_like(mask))

    monkeypatch.setattr(_blip, "tokenized", unmasked)
    assert gaps(recording, scorer)[:, 0].min() > SEEN


def test_captions() -> None:
    for prompt, expected in {
        "A photograph of Two DOGS; (playing) chess...": "a photograph of two dogs playing chess",
        '  "Hello",\n\nworld!  ': "hello , world",
        " ".join(str(i) for i in range(60)): " ".join(str(i) for i in range(50)),
        "": "",
    }.items():
        assert _blip_match.caption(prompt) == expected


def test_scores_do_not_depend_on_the_batch(scorer: Blip, monkeypatch: pytest.MonkeyPatch) -> None:
    images, prompts = inputs.images(64, 64, 12), inputs.PROMPTS * 2
    found = {}
    for batch in (1, 5, 12):
        monkeypatch.setattr(_blip, "BATCH", batch)
        found[batch] = scorer.columns(images, prompts)
    for column in COLUMNS:
        whole = found[12][column]
        for batch in (1, 5):
            assert (found[batch][column] - whole).abs().max() <= 1e-5 * whole.abs().max()


# ---- weights


def test_a_folder_of_our_own_scores_the_same(
    recording: Recording, scorer: Blip, tmp_path: Path
) -> None:
    _blip.save(tmp_path, scorer.network, recording.vocabulary)
    again = blip.load(CPU, str(tmp_path))
    assert recording.gaps("blip_itm_logit", again).max() <= 1e-5
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"has no vocab\.txt\. Give a folder with config\.json"):
        blip.load(CPU, str(tmp_path))


def test_official_weights_come_from_the_cache(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"blip": recording.checkpoint, "bert-base-uncased": recording.vocabulary}
    monkeypatch.setattr("eval.downloads.find", lambda *names: [files[n] for n in names])
    assert recording.gaps("blip_itm_logit", blip.load(CPU)).max() <= 1e-5


def test_the_checkpoint_that_the_paper_names_is_smaller_and_has_columns_of_its_own(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = torch.load(recording.checkpoint, weights_only=True)["model"]
    places = content["visual_encoder.pos_embed"][:, : 1 + (224 // 16) ** 2]
    path = altered(recording, tmp_path / "model_base.pth", {"visual_encoder.pos_embed": places})
    monkeypatch.setattr("eval.downloads.find", lambda *names: [path, recording.vocabulary])
    base: Any = blip_base.load(CPU)
    images = inputs.images(64, 64)
    found = base.columns(images, inputs.PROMPTS)
    assert list(found) == ["blip_base_itm_logit", "blip_base_itm_prob", "blip_base_itc"]
    assert torch.equal(found["blip_base_itm_logit"], base(images, inputs.PROMPTS))
    assert base.network.config.vision_config.image_size == 224


def test_loading_draws_nothing_and_names_what_it_ignores(
    recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "eval.scorers._blip"):
        Blip(_blip.official(recording.checkpoint, recording.vocabulary), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    (record,) = caplog.records
    assert record.getMessage().endswith("ignored what scoring does not need: temp (1)")


def altered(recording: Recording, path: Path, changes: dict[str, Tensor | None]) -> Path:
    """The checkpoint with some tensors replaced, or left out."""
    content = torch.load(recording.checkpoint, weights_only=True)
    content["model"] |= changes
    content["model"] = {name: t for name, t in content["model"].items() if t is not None}
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("itm_head.bias", None, "lacks itm_head.bias"),
        ("visual_encoder.pos_embed", None, "lacks vision_model.embeddings.position_embedding"),
        ("text_encoder.encoder.layer.1.output.dense.bias", None, "lacks text_encoder.encoder"),
        ("itm_head.weight", torch.zeros(3, 192), r"has the shape \(3, 192\) and .* \(2, 192\)"),
    ],
)
def test_a_missing_tensor_or_another_shape_is_refused(
    recording: Recording, tmp_path: Path, name: str, tensor: Tensor | None, said: str
) -> None:
    path = altered(recording, tmp_path / "other.pth", {name: tensor})
    with pytest.raises(UserError, match=rf"{path}.*{said}|itm_head.weight in {path} {said}"):
        Blip(_blip.official(path, recording.vocabulary), CPU)


class Harm:
    """Pickles as a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


def test_other_files_are_refused_and_not_executed(
    recording: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "harm.pth"
    for content in (Harm(), {"model": {"x": Harm()}}, [1], {"model": {"x": 1}}):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"harm\.pth does not hold named tensors \("):
            _blip.official(path, recording.vocabulary)
    path.write_bytes(recording.checkpoint.read_bytes()[:10000])
    with pytest.raises(UserError, match=r"harm\.pth does not hold named tensors \("):
        _blip.official(path, recording.vocabulary)
    assert "executed" not in capsys.readouterr().out


def test_another_vocabulary_is_refused(recording: Recording, tmp_path: Path) -> None:
    vocabulary = inputs.bert_vocabulary(tmp_path / "vocab.txt", 399)
    with pytest.raises(UserError, match=r"vocab\.txt has 399 tokens, but .* with 400"):
        Blip(_blip.official(recording.checkpoint, vocabulary), CPU)


# ---- callers


def test_other_images_and_too_few_prompts_are_refused(scorer: Blip) -> None:
    right = inputs.images(8, 8)
    for images in (right.float(), right[0], right[:, :2]):
        with pytest.raises(TypeError, match="blip scores uint8 images"):
            scorer(images, ["a cat"] * len(images))
    with pytest.raises(TypeError, match="got 6 images and 1 prompts"):
        scorer(inputs.images(8, 8), ["a cat"])
