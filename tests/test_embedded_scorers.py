"""How the embedded scorers are taught: what is true of a picture, what people are said to like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from d3po_bench import registry
from d3po_bench.models.embedded.render import FONT
from eval.embedded import facts, recipe
from eval.embedded.facts import Facts
from eval.embedded.recipe import Recipe

SMALL = Recipe(pictures=2100, batch=16, width=32, layers=1, embedding=16)
needs_font = pytest.mark.skipif(not FONT.exists(), reason=f"needs the emoji font at {FONT}")


def some(count: int) -> Facts:
    """Noise pictures with random facts."""
    rng = np.random.default_rng(1)
    truth = rng.integers(0, (45, 7, 12), (count, 3))
    images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return Facts(images, torch.from_numpy(truth))


def test_a_caption_is_right_where_it_names_nothing_wrong() -> None:
    pictures = torch.tensor([[0, 1, 2], [0, 1, 3], [4, 1, 2]])
    captions = torch.tensor([[0, 1, 2], [0, 5, 5]])
    found = facts.agree(pictures, captions, torch.tensor([True, False]))
    assert found.tolist() == [[True, True], [False, True], [False, False]]


def test_a_wrong_caption_differs_in_one_thing_that_it_names() -> None:
    source = some(500)
    full = torch.arange(500) % 2 == 0
    changed = facts.wrong(source.truth, full, torch.Generator().manual_seed(0))
    different = changed != source.truth
    assert different.sum(1).eq(1).all()
    assert different[~full, 0].all()
    assert different[full].any(0).all(), "each of the three is changed somewhere"
    assert (changed >= 0).all()
    assert (changed < torch.tensor([45, 7, 12])).all()
    apart = facts.agree(source.truth, changed, full).diagonal()
    assert not apart.any()


def test_captions_are_those_of_the_embedded_model() -> None:
    cat = [facts.ANIMALS.index("cat"), facts.PATTERNS.index("striped"), facts.COLOURS.index("blue")]
    assert facts.caption(cat, True) == "a cat on a blue striped background"
    assert facts.caption(cat, False) == "cat"


def test_no_damage_changes_nothing_and_much_changes_much() -> None:
    images = some(4).pictures(slice(None))
    rng = torch.Generator().manual_seed(0)
    assert torch.equal(facts.damaged(images, torch.zeros(4), rng), images)
    heavy = facts.damaged(images, torch.ones(4), rng).float()
    assert (heavy - images.float()).abs().mean() > 30


def test_what_people_like_by_hand() -> None:
    about = torch.tensor([[1, 2, 3]] * 3)
    truth = torch.tensor([[1, 2, 3], [1, 0, 3], [0, 2, 0]])
    damage = torch.tensor([0.0, 0.5, 1.0])
    assert recipe.utility(truth, about, damage).tolist() == [4.0, 2.0, -1.0]


def test_choices_offer_both_sides() -> None:
    pairs = recipe.choices(some(300), 64, torch.Generator().manual_seed(0))
    assert pairs.first.shape == pairs.second.shape == (64, 3, 32, 32)
    assert len(pairs.captions) == 64
    assert (pairs.better > 0.2).sum() > 10
    assert (pairs.better < -0.2).sum() > 10


def disc(centre: int, colour: tuple[int, int, int]) -> torch.Tensor:
    """A disc on grey."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    inside = (x - centre) ** 2 + (y - 16) ** 2 < 40
    paint = torch.tensor(colour)[:, None, None]
    return torch.where(inside, paint, 128).to(torch.uint8)


def test_pretty_is_colourful_contrasty_and_centred() -> None:
    red, grey, aside = (
        recipe.prettiness(disc(c, rgb)[None])[0]
        for c, rgb in ((16, (255, 0, 0)), (16, (140, 140, 140)), (7, (255, 0, 0)))
    )
    assert red > grey
    assert red > aside
    flat = recipe.prettiness(torch.full((1, 3, 32, 32), 99, dtype=torch.uint8))
    assert flat.tolist() == [0.0]


def test_every_right_caption_is_a_target() -> None:
    similarity = torch.tensor([[5.0, 5.0, -9.0], [5.0, 5.0, -9.0], [-9.0, -9.0, 5.0]])
    right = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    # Two rows and columns share their mass equally: log 2 each, two of three.
    expected = torch.tensor(2 / 3 * np.log(2)).float()
    torch.testing.assert_close(recipe.match_loss(similarity, right), expected, atol=1e-4, rtol=0)


def test_blip_starts_from_clips_image_tower(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    clip = recipe.new_clip(SMALL, CLIPTokenizer.from_pretrained(recipe.TOKENIZER))
    recipe.write_vocabulary(tmp_path / "vocab.txt")
    blip = recipe.new_blip(SMALL, tmp_path / "vocab.txt")
    recipe.take_tower(blip, {f"clip.{k}": v for k, v in clip.state_dict().items()})
    # Only the activation differs: with one, the same hidden states come out of each layer.
    clip.vision_model.encoder.layers[0].mlp.activation_fn = torch.nn.GELU()
    x = torch.randn(2, 65, 32)
    with torch.no_grad():
        ours = blip.vision_model.encoder.layers[0](x, attention_mask=None)
        theirs = clip.vision_model.encoder.layers[0](x, attention_mask=None)
    first = [y if isinstance(y, torch.Tensor) else y[0] for y in (ours, theirs)]
    torch.testing.assert_close(first[0], first[1], atol=1e-3, rtol=0)


@pytest.mark.slow
@needs_font
def test_the_whole_recipe_runs_and_its_scorers_load(tmp_path: Path) -> None:
    changes = {"pictures": 2100, "batch": 16, "width": 32, "layers": 1, "embedding": 16,
               "clip_steps": 2, "blip_steps": 2, "reward_steps": 2, "bf16": False}  # fmt: skip
    sets = [part for k, v in changes.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    where = ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    found = CliRunner().invoke(recipe.main, ["all", *where, *sets], catch_exceptions=False)
    assert found.exit_code == 0
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["recipe"]["clip_steps"] == 2
    (tmp_path / "aesthetic" / "clip").symlink_to(tmp_path / "clip")
    images = some(3).pictures(slice(None))
    prompts = ["cat", "a dog on a red striped background", "fox"]
    for name in ("clip", "aesthetic", "blip", "image_reward"):
        scorer: Any = registry.load_scorer(f"{name}:{tmp_path / name}", torch.device("cpu"))
        assert torch.isfinite(scorer(images, prompts)).all()
