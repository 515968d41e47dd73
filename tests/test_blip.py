"""BLIP against the scores that LAVIS gave on the same weights, and what each mistake would do."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from d3po_bench.errors import UserError
from eval.scorers import _blip, blip
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
def loaded(recording: Recording) -> blip.Blip:
    return blip.official(recording.checkpoint, recording.vocabulary, CPU)


@pytest.fixture
def scorer(loaded: blip.Blip) -> Iterator[blip.Blip]:
    before = dict(vars(loaded))
    yield loaded
    vars(loaded).update(before)


def gaps(recording: Recording, scorer: blip.Blip, column: str = "blip_itm_logit") -> Tensor:
    return recording.gaps(column, lambda images, prompts: scorer.columns(images, prompts)[column])


# ---- equal to the official package


@pytest.mark.parametrize("column", COLUMNS)
def test_scores_equal_the_official(recording: Recording, scorer: blip.Blip, column: str) -> None:
    assert gaps(recording, scorer, column).max() <= 1e-5


def test_a_call_gives_the_raw_match_logit(recording: Recording, scorer: blip.Blip) -> None:
    assert recording.gaps("blip_itm_logit", scorer).max() <= 1e-5
    assert scorer.unit == "logit"


def test_columns_agree_with_each_other(scorer: blip.Blip) -> None:
    found = scorer.columns(inputs.images(96, 160), inputs.PROMPTS)
    assert tuple(found) == COLUMNS
    assert all(scores.shape == (len(inputs.PROMPTS),) for scores in found.values())
    # the logit is one of the two whose softmax is the probability, not their difference
    difference = torch.logit(found["blip_itm_prob"])
    assert (difference - found["blip_itm_logit"]).abs().min() > SEEN


@pytest.mark.gpu
def test_a_gpu_scores_as_the_cpu_does(recording: Recording) -> None:
    scorer = blip.official(recording.checkpoint, recording.vocabulary, torch.device("cuda"))
    for column in COLUMNS:
        assert gaps(recording, scorer, column).max() <= 1e-4


# ---- each mistake shows


def test_itm_with_cls_shows(recording: Recording, scorer: blip.Blip) -> None:
    scorer.encode = scorer.words.cls_token_id
    assert gaps(recording, scorer).min() > SEEN
    assert gaps(recording, scorer, "blip_itc").max() <= 1e-5


def test_itc_with_enc_shows(
    recording: Recording, scorer: blip.Blip, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _blip.tokenized
    monkeypatch.setattr(_blip, "tokenized", lambda *a: right(*a).starting(scorer.encode))
    assert gaps(recording, scorer, "blip_itc").max() > SEEN
    assert gaps(recording, scorer).max() <= 1e-5


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.5,) * 3, (0.5,) * 3),
        ((0,) * 3, (1,) * 3),
    ],
)
def test_other_normalisation_shows(
    recording: Recording, scorer: blip.Blip, monkeypatch: pytest.MonkeyPatch, mean: Any, std: Any
) -> None:
    monkeypatch.setattr(_blip, "MEAN", mean)
    monkeypatch.setattr(_blip, "STD", std)
    assert gaps(recording, scorer).max(1).values.min() > SEEN


def test_cropping_instead_of_squeezing_shows(recording: Recording, scorer: blip.Blip) -> None:
    scorer.resize = partial(_blip.cropped, size=384)
    found = gaps(recording, scorer).max(1).values
    for square, gap in zip(SQUARE, found, strict=True):
        assert gap <= 1e-5 if square else gap > SEEN


def test_another_filter_shows(recording: Recording, scorer: blip.Blip) -> None:
    scorer.resize = lambda image: image.resize((384, 384), Image.Resampling.BILINEAR)
    assert gaps(recording, scorer).max(1).values.min() > 1e-4


def test_a_raw_caption_shows(
    recording: Recording, scorer: blip.Blip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blip, "caption", str)
    assert gaps(recording, scorer)[:, 1].min() > SEEN


def test_a_longer_cut_shows(
    recording: Recording, scorer: blip.Blip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_blip, "TOKENS", 77)
    found = gaps(recording, scorer)
    assert found[:, 3].min() > SEEN
    assert found[:, 0].max() <= 1e-5


def test_attention_to_padding_shows(
    recording: Recording, scorer: blip.Blip, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _blip.tokenized

    def unmasked(*arguments: Any) -> _blip.Tokens:
        ids, mask = right(*arguments)
        return _blip.Tokens(ids, torch.ones_like(mask))

    monkeypatch.setattr(_blip, "tokenized", unmasked)
    assert gaps(recording, scorer)[:, 0].min() > SEEN


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A photograph of Two DOGS; (playing) chess...", "a photograph of two dogs playing chess"),
        ('  "Hello",\n\nworld!  ', "hello , world"),
        (" ".join(str(i) for i in range(60)), " ".join(str(i) for i in range(50))),
        ("", ""),
    ],
)
def test_captions(prompt: str, expected: str) -> None:
    assert blip.caption(prompt) == expected


# ---- batches


def test_scores_do_not_depend_on_the_batch(
    scorer: blip.Blip, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = inputs.images(64, 64, 64)
    prompts = [inputs.PROMPTS[i % len(inputs.PROMPTS)] for i in range(64)]
    found = {}
    for batch in (1, 7, 64):
        monkeypatch.setattr(_blip, "BATCH", batch)
        found[batch] = scorer.columns(images, prompts)
    for column in COLUMNS:
        whole = found[64][column]
        for batch in (1, 7):
            gap = (found[batch][column] - whole).abs().max()
            assert gap <= 1e-5 * whole.abs().max()


# ---- weights


def test_a_folder_of_our_own_scores_the_same(
    recording: Recording, scorer: blip.Blip, tmp_path: Path
) -> None:
    _blip.save(tmp_path, scorer.network, recording.vocabulary)
    again = blip.load(CPU, str(tmp_path))
    assert recording.gaps("blip_itm_logit", again).max() <= 1e-5


def test_official_weights_come_from_the_cache(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copy(recording.checkpoint, tmp_path / "model_base_retrieval_coco.pth")
    shutil.copy(recording.vocabulary, tmp_path / "vocab.txt")
    folders = {"blip": tmp_path, "bert-base-uncased": tmp_path}
    monkeypatch.setattr("eval.weights.find_all", lambda *names: [folders[n] for n in names])
    assert recording.gaps("blip_itm_logit", blip.load(CPU)).max() <= 1e-5


def test_tiny_ships_with_the_package() -> None:
    assert _blip.folder("tiny", "blip") == Path(blip.__file__).parents[1] / "embedded" / "blip"
    assert _blip.folder("some/where", "blip") == Path("some/where")


def test_loading_draws_nothing(recording: Recording) -> None:
    before = torch.get_rng_state()
    blip.official(recording.checkpoint, recording.vocabulary, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_ignored_is_named_once(
    recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "eval.scorers._blip"):
        blip.official(recording.checkpoint, recording.vocabulary, CPU)
    (record,) = caplog.records
    assert record.getMessage().endswith("ignored what scoring does not need: temp (1)")


@pytest.mark.parametrize(
    "name",
    ["itm_head.bias", "visual_encoder.pos_embed", "text_encoder.encoder.layer.1.output.dense.bias"],
)
def test_a_missing_tensor_is_refused(recording: Recording, tmp_path: Path, name: str) -> None:
    content = torch.load(recording.checkpoint, weights_only=True)
    del content["model"][name]
    path = tmp_path / "less.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=f"without {_blip.rename(name)}") as error:
        blip.official(path, recording.vocabulary, CPU)
    assert str(path) in str(error.value)


def test_another_shape_is_refused(recording: Recording, tmp_path: Path) -> None:
    content = torch.load(recording.checkpoint, weights_only=True)
    content["model"]["itm_head.weight"] = torch.zeros(3, 192)
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"itm_head.weight of shape \(2, 192\).*got \(3, 192\)"):
        blip.official(path, recording.vocabulary, CPU)


class Harm:
    """Pickles as a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


@pytest.mark.parametrize("content", [Harm(), {"model": {"x": Harm()}}, [1], {"model": {"x": 1}}])
def test_other_files_are_refused_and_not_executed(
    recording: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object
) -> None:
    path = tmp_path / "harm.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"Expected named tensors in .*harm\.pth, got"):
        blip.official(path, recording.vocabulary, CPU)
    assert "executed" not in capsys.readouterr().out


def test_a_truncated_file_is_refused(recording: Recording, tmp_path: Path) -> None:
    path = tmp_path / "half.pth"
    path.write_bytes(recording.checkpoint.read_bytes()[:10000])
    with pytest.raises(UserError, match="Expected named tensors"):
        blip.official(path, recording.vocabulary, CPU)


def test_another_vocabulary_is_refused(recording: Recording, tmp_path: Path) -> None:
    vocabulary = inputs.bert_vocabulary(tmp_path / "vocab.txt", 399)
    with pytest.raises(UserError, match=r"Expected 400 tokens in .*vocab\.txt, got 399"):
        blip.official(recording.checkpoint, vocabulary, CPU)


def test_an_incomplete_folder_is_refused(
    recording: Recording, scorer: blip.Blip, tmp_path: Path
) -> None:
    _blip.save(tmp_path, scorer.network, recording.vocabulary)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"got no vocab\.txt"):
        blip.load(CPU, str(tmp_path))


# ---- callers


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), inputs.images(8, 8)[:, :2]],
)
def test_other_images_are_refused(scorer: blip.Blip, images: Tensor) -> None:
    with pytest.raises(TypeError, match="blip scores uint8 images"):
        scorer(images, ["a cat"] * len(images))


def test_a_prompt_for_each_image(scorer: blip.Blip) -> None:
    with pytest.raises(TypeError, match="got 6 images and 1 prompts"):
        scorer(inputs.images(8, 8), ["a cat"])
