"""How the embedded scorers are taught: what is true of a picture, what people are said to like."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from d3po_bench import api, registry
from d3po_bench.models.embedded.recipe import new_tokenizer
from d3po_bench.models.embedded.v2 import judge_recipe
from d3po_bench.models.embedded.v2.captions import ANIMALS
from d3po_bench.models.embedded.v2.pictures import SHARD
from d3po_bench.models.embedded.v2.scenes import KINDS, Scene, Thing
from d3po_bench.models.embedded.v2.scenes import scene as drawn
from d3po_bench.runs.run import find_runs
from eval.embedded import check, facts, recipe
from eval.embedded.facts import Facts
from eval.embedded.recipe import Batches, Recipe

SMALL = Recipe(batch=16, width=32, layers=1, embedding=16)


def some(count: int) -> Facts:
    """Noise pictures with random scenes of every kind."""
    rng, kinds = np.random.default_rng(1), list(KINDS)
    scenes = [drawn(rng, kinds[i % len(kinds)]) for i in range(count)]
    images = torch.randint(256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    return Facts(lambda index: images[index].to(torch.uint8), scenes)


def thing(animal: str, x: float = 0.5, card: str | None = None) -> Thing:
    """An animal at half height."""
    return Thing(animal=animal, x=x, y=0.5, side=0.4, card=card)


FOX_ON_RED_LEFT_OF_FROG = Scene(
    kind="position", caption="a fox left of a frog", ground="mist",
    things=(thing("fox", 0.25, "red"), thing("frog", 0.75, "blue")),
)  # fmt: skip


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        ("fox", True), ("a frog", True), ("a cat", False), ("one fox", True), ("two foxes", False),
        ("a fox and a frog", True), ("a frog and a cat", False), ("a frog right of a fox", True),
        ("a frog left of a fox", False), ("a fox above a frog", False),
        ("a fox on a red card", True), ("a fox on a blue card", False),
        ("a frog on a blue card and a fox on a red card", True),
        ("a fox on a red background", False),
    ],
)  # fmt: skip
def test_a_caption_is_right_where_it_asks_for_nothing_wrong(caption: str, right: bool) -> None:
    assert facts.holds(FOX_ON_RED_LEFT_OF_FROG, caption) is right


def test_a_background_is_right_in_colour_and_pattern() -> None:
    striped = Scene(kind="background", caption="", ground="red", pattern="striped",
                    things=(thing("fox"),))  # fmt: skip
    plain = replace(striped, pattern="plain")
    captions = ["a fox on a red striped background", "a fox on a red background"]
    assert facts.agree([striped, plain], captions).tolist() == [[True, False], [False, True]]


def test_a_scenes_own_caption_is_right_and_a_changed_one_wrong() -> None:
    source, rng = some(400), random.Random(0)
    assert facts.agree(source.scenes[:48], source.captions()[:48]).diagonal().all()
    for scene in source.scenes:
        changed = facts.wrong(scene, rng)
        assert facts.holds(scene, scene.caption)
        assert not facts.holds(scene, changed)
        assert len(changed.split()) == len(scene.caption.split())


def test_no_damage_changes_nothing_and_much_changes_much() -> None:
    images = some(4).pictures()
    rng = torch.Generator().manual_seed(0)
    assert torch.equal(facts.damaged(images, torch.zeros(4), rng), images)
    heavy = facts.damaged(images, torch.ones(4), rng).float()
    assert (heavy - images.float()).abs().mean() > 30


def test_what_people_like_by_hand() -> None:
    def worth(caption: str, damage: float = 0.0) -> float:
        return recipe.utility(FOX_ON_RED_LEFT_OF_FROG, caption, damage)

    assert worth("a fox left of a frog") == 4.0
    assert worth("a fox left of a frog", 0.5) == 3.0
    assert worth("a fox right of a frog") == pytest.approx(4 * 2 / 3)
    assert worth("a fox on a blue card and a frog on a blue card") == 3.0
    assert worth("two foxes") == 2.0
    assert worth("two cats", 1.0) == -2.0


def test_choices_offer_both_sides() -> None:
    pairs = recipe.choices(Batches(some(450), 16), 64, torch.Generator().manual_seed(0))
    assert pairs.first.shape == pairs.second.shape == (64, 3, 64, 64)
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
    torch.manual_seed(0)
    words = new_tokenizer(["a fox"], tmp_path)
    clip = recipe.new_clip(SMALL, words)
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
def test_the_whole_recipe_runs_and_its_scorers_load(tmp_path: Path) -> None:
    source = some(facts.HELD_OUT + SHARD)
    shards(source, tmp_path / "pictures")
    changes = {"batch": 16, "width": 32, "layers": 1, "embedding": 16, "clip_steps": 2,
               "blip_steps": 2, "reward_steps": 2}  # fmt: skip
    sets = [part for k, v in changes.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    where = ["--pictures", str(tmp_path / "pictures"), "--work", str(tmp_path / "work"),
             "--out", str(tmp_path)]  # fmt: skip
    found = CliRunner().invoke(recipe.main, ["all", *where, *sets], catch_exceptions=False)
    assert found.exit_code == 0
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["recipe"]["clip_steps"] == 2
    (tmp_path / "aesthetic" / "clip").symlink_to(tmp_path / "clip")
    images = source.images(torch.arange(3))
    prompts = ["cat", "a dog on a red striped background", "fox"]
    for name in ("clip", "aesthetic", "blip", "image_reward"):
        scorer: Any = registry.load_scorer(f"{name}:{tmp_path / name}", torch.device("cpu"))
        assert torch.isfinite(scorer(images, prompts)).all()


def shards(source: Facts, folder: Path) -> None:
    """Write the pictures as the embedded model's recipe does."""
    folder.mkdir()
    for number in range(len(source) // SHARD):
        index = torch.arange(number * SHARD, (number + 1) * SHARD)
        pixels = source.images(index).permute(0, 2, 3, 1)
        masks = torch.full((*pixels.shape[:3], 1), 255, dtype=torch.uint8)
        np.save(folder / f"images-{number:04}.npy", torch.cat([pixels, masks], 3).numpy())
        lines = (json.dumps(asdict(source.scenes[i])) for i in index.tolist())
        (folder / f"scenes-{number:04}.jsonl").write_text("\n".join(lines) + "\n")


def test_the_animals_of_version_2_are_what_its_second_judge_sees() -> None:
    images, scenes = judge_recipe.held_out(24)
    shown = registry.load_scorer("animal:tiny2", torch.device("cpu"))
    absent = [
        next(animal for animal in ANIMALS if animal not in {t.animal for t in scene.things})
        for scene in scenes
    ]
    assert shown(images, [scene.caption for scene in scenes]).min() > 0.5
    assert shown(images, absent).max() < 0.5
    assert shown(images[:1], ["a house"]).isnan().all()


def test_the_card_has_a_number_for_each_check() -> None:
    found = dict(check.measured(count=24))
    assert found.keys() == check.WORDS.keys()
    assert all(0 < value <= 1 for value in found.values())


def test_version_2_learns_from_its_judge(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "prompts_per_round": 2, "images_per_prompt": 2, "sampling_steps": 2, "skip_steps": 0,
        "eval_every": 0,
    }  # fmt: skip
    api.run(
        method="ddpo", objective="geneval_soft", model="tiny2", out=tmp_path, settings=settings,
        rounds=1, quiet=True,
    )  # fmt: skip
    (run,) = find_runs([tmp_path])
    assert 0 <= run.metrics[-1]["score_mean"] <= 1
