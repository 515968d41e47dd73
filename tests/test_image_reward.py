"""ImageReward against the scores of the authors' package on the same weights, and each mistake."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from d3po_bench.errors import UserError
from eval.scorers import _blip, _blip_match, image_reward
from tests.parity import inputs
from tests.parity.recording import Recording, regenerated

CPU = torch.device("cpu")
SEEN = 1e-3
"""What a mistake must change at least; the scores spread over 0.2."""


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return regenerated("image_reward-tiny", tmp_path_factory.mktemp("image_reward"))


def loaded_from(
    checkpoint: Path, recording: Recording, device: torch.device = CPU
) -> image_reward.ImageReward:
    return image_reward.ImageReward(_blip.official(checkpoint, recording.vocabulary), device)


@pytest.fixture(scope="module")
def loaded(recording: Recording) -> image_reward.ImageReward:
    return loaded_from(recording.checkpoint, recording)


@pytest.fixture
def scorer(loaded: image_reward.ImageReward) -> Iterator[image_reward.ImageReward]:
    before = dict(vars(loaded))
    yield loaded
    vars(loaded).update(before)


def gaps(recording: Recording, scorer: image_reward.ImageReward) -> Tensor:
    return recording.gaps("image_reward", scorer)


# ---- equal to the official package


def test_scores_equal_the_official(recording: Recording, scorer: image_reward.ImageReward) -> None:
    assert gaps(recording, scorer).max() <= 1e-5


@pytest.mark.gpu
def test_a_gpu_scores_as_the_cpu_does(recording: Recording) -> None:
    scorer = loaded_from(recording.checkpoint, recording, torch.device("cuda"))
    assert gaps(recording, scorer).max() <= 1e-4


def test_the_head_by_hand() -> None:
    # (2 * 3 + 1 * 4 + 1) = 11, then 2 * 11 - 5 = 17: no activation clips or bends either
    head = image_reward.Head([2, 1]).eval()
    first, last = (layer for layer in head.layers if isinstance(layer, nn.Linear))
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[2.0, 1.0]]))
        first.bias.fill_(1)
        last.weight.fill_(2)
        last.bias.fill_(-5)
    assert head(torch.tensor([[3.0, 4.0], [-3.0, -4.0]])).tolist() == [[17.0], [-23.0]]


# ---- each mistake shows


def test_enc_instead_of_cls_shows(
    recording: Recording, scorer: image_reward.ImageReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, enc = _blip.tokenized, scorer.words.convert_tokens_to_ids("[ENC]")
    monkeypatch.setattr(_blip, "tokenized", lambda *a: right(*a).starting(enc))
    assert gaps(recording, scorer).min() > SEEN


@pytest.mark.slow
def test_other_normalisation_of_images_or_rewards_shows(
    recording: Recording, scorer: image_reward.ImageReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for mean, std in (imagenet, ((0.5,) * 3, (0.5,) * 3), ((0,) * 3, (1,) * 3)):
        with monkeypatch.context() as patch:
            patch.setattr(_blip, "MEAN", mean)
            patch.setattr(_blip, "STD", std)
            assert gaps(recording, scorer).max(1).values.min() > SEEN, mean
    for scorer.mean, scorer.std in ((0.0, 1.0), (image_reward.MEAN, 1.0)):
        assert gaps(recording, scorer).min() > SEEN


@pytest.mark.slow
def test_squeezing_instead_of_cropping_shows(
    recording: Recording, scorer: image_reward.ImageReward
) -> None:
    scorer.resize = partial(_blip_match.square, size=224)
    found = gaps(recording, scorer).max(1).values
    for (height, width), gap in zip(inputs.SIZES, found, strict=True):
        assert gap <= 1e-5 if height == width else gap > SEEN


@pytest.mark.slow
def test_another_filter_shows(recording: Recording, scorer: image_reward.ImageReward) -> None:
    def bilinear(image: Image.Image) -> Image.Image:
        return image.resize((224, 224), Image.Resampling.BILINEAR)

    scorer.resize = bilinear
    found = gaps(recording, scorer).max(1).values
    for size, gap in zip(inputs.SIZES, found, strict=True):
        assert gap <= 1e-5 if size == (224, 224) else gap > 1e-4  # nothing to resize there


@pytest.mark.slow
def test_another_cut_shows(
    recording: Recording, scorer: image_reward.ImageReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tokens in (34, 77):
        monkeypatch.setattr(_blip, "TOKENS", tokens)
        found = gaps(recording, scorer)
        assert found[:, 3].min() > SEEN
        assert found[:, 0].max() <= 1e-5


def test_attention_to_padding_shows(
    recording: Recording, scorer: image_reward.ImageReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _blip.tokenized

    def unmasked(*arguments: Any) -> _blip.Tokens:
        ids, mask = right(*arguments)
        return _blip.Tokens(ids, torch.ones_like(mask))

    monkeypatch.setattr(_blip, "tokenized", unmasked)
    assert gaps(recording, scorer)[:, 0].min() > SEEN


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        # 300 high, 201 wide: to 334 high (224 * 300 / 201 = 334.3), 55 off the top
        ((300, 201), (0, 55, 224, 279)),
        # 96 high, 160 wide: to 373 wide (373.3), 149 / 2 = 74.5 rounds to the even 74
        ((96, 160), (74, 0, 298, 224)),
    ],
)
def test_cropping_by_hand(shape: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    array = inputs.images(*shape)[0].permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(array)
    whole = (224, 334) if shape == (300, 201) else (373, 224)
    expected = image.resize(whole, Image.Resampling.BICUBIC).crop(box)
    assert image_reward.cropped(image, 224).tobytes() == expected.tobytes()


# ---- batches and weights


def test_scores_do_not_depend_on_the_batch(
    scorer: image_reward.ImageReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, prompts = inputs.images(64, 64, 12), inputs.PROMPTS * 2
    found = {}
    for batch in (1, 5, 12):
        monkeypatch.setattr(_blip, "BATCH", batch)
        found[batch] = scorer(images, prompts)
    for batch in (1, 5):
        torch.testing.assert_close(found[batch], found[12], rtol=1e-5, atol=1e-6)


def test_a_folder_of_our_own_scores_the_same(
    recording: Recording, scorer: image_reward.ImageReward, tmp_path: Path
) -> None:
    _blip.save(tmp_path, scorer.network, recording.vocabulary)
    assert recording.gaps("image_reward", image_reward.load(CPU, str(tmp_path))).max() <= 1e-5
    # its own scale: z * 2 + 1 of the official mean and standard deviation undone
    _blip.save(tmp_path, scorer.network, recording.vocabulary, reward_mean=1.0, reward_std=2.0)
    images = inputs.images(96, 160)
    raw = scorer(images, inputs.PROMPTS) * image_reward.STD + image_reward.MEAN
    scaled = image_reward.load(CPU, str(tmp_path))(images, inputs.PROMPTS)
    torch.testing.assert_close(scaled, (raw - 1) / 2, rtol=1e-5, atol=1e-5)


def test_official_weights_come_from_the_cache(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"image_reward": recording.checkpoint, "bert-base-uncased": recording.vocabulary}
    monkeypatch.setattr("eval.downloads.find", lambda *names: [files[n] for n in names])
    assert recording.gaps("image_reward", image_reward.load(CPU)).max() <= 1e-5


@pytest.mark.parametrize("name", ["mlp.layers.7.bias", "blip.visual_encoder.norm.weight"])
def test_a_missing_tensor_is_refused(recording: Recording, tmp_path: Path, name: str) -> None:
    content = torch.load(recording.checkpoint, weights_only=True)
    del content["model"][name]
    path = tmp_path / "less.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=f"lacks {_blip.rename(name)}"):
        loaded_from(path, recording)


def test_a_flat_checkpoint_loads_too(recording: Recording, tmp_path: Path) -> None:
    path = tmp_path / "flat.pt"  # as ImageReward.pt is published
    torch.save(torch.load(recording.checkpoint, weights_only=True)["model"], path)
    assert gaps(recording, loaded_from(path, recording)).max() <= 1e-5


def test_other_images_are_refused(scorer: image_reward.ImageReward) -> None:
    with pytest.raises(TypeError, match="image_reward scores uint8 images"):
        scorer(torch.zeros(1, 3, 8, 8), ["a cat"])
