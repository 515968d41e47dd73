"""Version 2 of the embedded model: its world, what its captions mean, its judges, its training."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from d3po_bench.errors import UserError
from d3po_bench.models.adapters import Training
from d3po_bench.models.embedded import classifier
from d3po_bench.models.embedded.render import COLOURS
from d3po_bench.models.embedded.v2 import judge, judge_recipe, lists, pictures, recipe, render
from d3po_bench.models.embedded.v2 import scenes as world
from d3po_bench.models.embedded.v2.captions import ANIMALS, read
from d3po_bench.models.embedded.v2.judge import Found, Seen
from d3po_bench.models.embedded.v2.scenes import Scene
from d3po_bench.models.embedded.v2.training import Plan, State, fit
from d3po_bench.models.sources import Source, load
from eval.embedded import version2
from eval.scorers import _geneval

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Scenes of all kinds."""
    rng = np.random.default_rng(0)
    return [world.scene(rng) for _ in range(2000)]


# ---- the world


def test_a_picture_is_a_function_of_seed_and_index() -> None:
    first, same, other = (render.sample(3, i) for i in (7, 7, 8))
    assert first[1] == same[1]
    assert (first[0] == same[0]).all()
    assert (first[0] != other[0]).any()
    assert first[0].shape == (64, 64, 4)


@pytest.mark.parametrize("kind", world.KINDS)
def test_animals_are_drawn_where_the_scene_says(kind: str) -> None:
    for index in range(4):
        picture, scene = render.sample(0, index, kind)
        rows, columns = (picture[..., 3] > 128).nonzero()
        centres = np.array([[t.x, t.y] for t in scene.things]) * render.SIZE
        reach = np.array([t.side for t in scene.things]) * render.SIZE / 2 + 3
        far = np.abs(np.stack([columns, rows], 1)[:, None] - centres).max(2)
        assert (far <= reach).any(1).all()
        assert all((far[:, i] <= reach[i]).sum() > 20 for i in range(len(scene.things)))


def test_no_picture_shows_an_unseen_combination(scenes: list[Scene]) -> None:
    for scene in scenes:
        names = [t.animal for t in scene.things]
        assert world.count_is_drawn(names[0], len(names)) or len(set(names)) > 1
        assert len(set(names)) == 1 or world.pair_is_drawn(names[0], names[1])
        assert all(world.card_is_drawn(t.animal, t.card) for t in scene.things if t.card)


def test_animals_keep_apart_as_the_judges_expect(scenes: list[Scene]) -> None:
    for scene in scenes:
        for i, one in enumerate(scene.things):
            for other in scene.things[:i]:
                assert max(abs(one.x - other.x), abs(one.y - other.y)) > judge.APART + 0.1


def test_lists_share_no_caption_and_hold_every_kind() -> None:
    by_name = lists.lists()
    every = [caption for captions in by_name.values() for caption in captions]
    assert len(every) == len(set(every))
    for name, captions in by_name.items():
        kinds = {asked.kind for c in captions if (asked := read(c))}
        assert kinds >= set(_geneval.KINDS) - {"single_object"}
        assert ("single_object" in kinds) == (name != "geneval-unseen")


# ---- what captions mean


def test_captions_are_read_as_they_were_meant(scenes: list[Scene]) -> None:
    for scene in scenes:
        asked = read(scene.caption)
        assert asked is not None
        assert [w.animal for w in asked.wanted] == list(
            dict.fromkeys(t.animal for t in scene.things)
        )
        assert sum(w.count for w in asked.wanted) == len(scene.things)
        if scene.kind in {"colors", "color_attr"}:
            assert [w.colour for w in asked.wanted] == [t.card for t in scene.things]
        if scene.kind == "background":
            assert asked.wanted[0].colour == scene.ground


@pytest.mark.parametrize(
    "caption", ["a unicorn", "two fox", "a fox on a teal card", "fox frog", ""]
)
def test_other_captions_are_not_read(caption: str) -> None:
    assert read(caption) is None


# ---- right and wrong pictures


def perfect(scene: Scene, grid: int = 16) -> Seen:
    """What a judge would see that makes no mistake."""
    animals = torch.full((1, len(ANIMALS), grid, grid), 1e-4)
    place = torch.zeros(1, 3, grid, grid)
    colours = torch.full((1, len(COLOURS), grid, grid), 1e-4)
    card = torch.full((1, grid, grid), 1e-3)
    for t in scene.things:
        row, column = int(t.y * grid), int(t.x * grid)
        animals[0, ANIMALS.index(t.animal), row, column] = 0.999
        place[0, :, row, column] = torch.tensor([t.x, t.y, t.side])
        colours[0, list(COLOURS).index(t.card or scene.ground), row, column] = 0.999
        card[0, row, column] = 0.999 if t.card else 0.001
    return Seen(animals, place, colours, card)


def test_a_true_caption_is_right_and_probable(scenes: list[Scene]) -> None:
    for scene in scenes[:300]:
        asked, seen = read(scene.caption), perfect(scene)
        assert asked is not None
        assert _geneval.hard(seen, [asked]) == [1.0], scene
        assert _geneval.soft(seen, [asked])[0] > 0.9, scene


FOX = Found(animal="fox", probability=1.0, x=0.25, y=0.5, side=0.4, colour="red", card=True)
FROG = replace(FOX, animal="frog", x=0.75, colour="blue")
SECOND_FOX = replace(FOX, x=0.75)


@pytest.mark.parametrize(
    ("caption", "found", "verdict"),
    [
        ("a fox", [FOX], True),
        ("a fox", [FOX, FROG], True),
        ("a frog", [FOX], False),
        ("one fox", [FOX, SECOND_FOX], False),
        ("two foxes", [FOX, SECOND_FOX], True),
        ("two foxes", [FOX, FROG], False),
        ("three foxes", [FOX, SECOND_FOX], False),
        ("a fox and a frog", [FOX, FROG], True),
        ("a fox and a frog", [FOX, SECOND_FOX], False),
        ("a fox left of a frog", [FOX, FROG], True),
        ("a frog right of a fox", [FOX, FROG], True),
        ("a fox right of a frog", [FOX, FROG], False),
        ("a fox above a frog", [FOX, FROG], False),
        ("a fox above a frog", [replace(FOX, x=0.5, y=0.2), replace(FROG, x=0.5, y=0.8)], True),
        ("a fox left of a frog", [FOX, replace(FROG, x=0.30)], False),
        ("a fox on a red card", [FOX], True),
        ("a fox on a blue card", [FOX], False),
        ("a fox on a red background", [FOX], False),
        ("a fox on a red background", [replace(FOX, card=False)], True),
        ("a fox on a red card and a frog on a blue card", [FOX, FROG], True),
        ("a fox on a blue card and a frog on a red card", [FOX, FROG], False),
    ],
)
def test_verdicts_are_those_of_geneval(caption: str, found: list[Found], verdict: bool) -> None:
    asked = read(caption)
    assert asked is not None
    assert _geneval.right(found, asked) is verdict
    things = tuple(
        world.Thing(animal=f.animal, x=f.x, y=f.y, side=f.side, card=f.colour if f.card else None)
        for f in found
    )
    scene = Scene(kind=asked.kind, caption=caption, things=things, ground="red")
    assert (_geneval.soft(perfect(scene), [asked])[0] > 0.5) is verdict


def test_probabilities_of_counts() -> None:
    assert _geneval.at_least([0.5, 0.5], 0) == 1
    assert _geneval.at_least([0.5, 0.5], 1) == pytest.approx(0.75)
    assert _geneval.at_least([0.5, 0.2], 2) == pytest.approx(0.1)
    assert _geneval.at_least([0.5], 2) == 0


class AllSeeing(judge.Judge):
    """Sees a fox on a red background in every picture."""

    def __init__(self) -> None:
        pass

    def see(self, images: Tensor) -> Seen:
        thing = world.Thing(animal="fox", x=0.4, y=0.6, side=0.8)
        scene = Scene(kind="name", caption="fox", things=(thing,), ground="red")
        one = perfect(scene)
        return Seen(*(t.repeat(len(images), *[1] * (t.ndim - 1)) for t in vars(one).values()))


def test_scores_by_kind() -> None:
    scorer = _geneval.GenEval("geneval", AllSeeing(), _geneval.hard, ())
    prompts = ["fox", "a frog", "a fox on a red background", "a sunset"]
    columns = scorer.columns(torch.zeros(4, 3, 64, 64, dtype=torch.uint8), prompts)
    assert columns["geneval"].tolist()[:3] == [1, 0, 1]
    assert columns["geneval"].isnan().tolist() == [False, False, False, True]
    assert columns["geneval_colors"].isnan().tolist() == [True, True, False, True]
    told = _geneval.by_kind(columns["geneval"], prompts)
    assert told == {"single_object": 0.5, "colors": 1.0, "mean": 0.75}
    with pytest.raises(UserError, match="64 pixels wide and high, and these have 32 x 32"):
        scorer(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), prompts)


# ---- judges


@pytest.mark.parametrize("name", judge.NETWORKS)
def test_a_judge_learns_what_it_is_shown(name: str) -> None:
    torch.manual_seed(0)
    images, shown = judge_recipe.held_out(8)
    places, facts = judge_recipe.targets([asdict(s) for s in shown])
    network = judge.NETWORKS[name]()
    x = classifier.pictures(images, CPU, render.SIZE)
    first = judge_recipe.loss_of(network(x), places, facts).item()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(8):
        loss = judge_recipe.loss_of(network(x), places, facts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert judge_recipe.loss_of(network(x), places, facts) < first / 2
    assert len(judge.Judge(network).find(images)) == 8


def test_loss_is_least_at_the_truth(scenes: list[Scene]) -> None:
    places, facts = judge_recipe.targets([asdict(s) for s in scenes[:50]])
    seen = [perfect(s) for s in scenes[:50]]
    grid = (torch.arange(16) + 0.5) / 16
    corner = torch.stack(torch.meshgrid(grid, grid, indexing="xy"))
    raw = torch.cat(
        [
            torch.cat([s.animals.logit() for s in seen]),
            torch.cat([((s.place[:, :2] - corner) * 16).clamp(-0.99, 0.99).atanh() for s in seen]),
            torch.cat([s.place[:, 2:].clamp(0.01, 0.99).logit() for s in seen]),
            torch.cat([s.colours.log() for s in seen]),
            torch.cat([s.card[:, None].logit() for s in seen]),
        ],
        1,
    )
    wrong = raw.roll(1, 1)
    assert judge_recipe.loss_of(raw, places, facts) < 0.1
    assert judge_recipe.loss_of(wrong, places, facts) > 1
    found = judge.objects(judge.interpret(raw))
    for scene, animals in zip(scenes, found, strict=False):
        assert sorted(f.animal for f in animals) == sorted(t.animal for t in scene.things)


def test_a_judge_that_errs_too_often_is_refused() -> None:
    judge.require_good("first", {"presence": 0.98, "count": 1.0})
    with pytest.raises(UserError, match=r"first judge .*count 97\.9%; 98% are needed"):
        judge.require_good("first", {"presence": 0.99, "count": 0.979})


def test_a_trained_judge_is_measured_and_kept_only_if_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(judge.Second().state_dict(), tmp_path / "judge-second.safetensors")
    with pytest.raises(UserError, match="presence 0"):
        judge_recipe.export("second", tmp_path, tmp_path, 8)
    monkeypatch.setattr(judge, "BAR", 0.0)
    judge_recipe.export("second", tmp_path, tmp_path, 8)
    kept = judge.load("second", CPU, tmp_path)
    assert len(kept.find(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))) == 2
    facts = json.loads((tmp_path / "judge-second.json").read_text())
    assert set(facts["right"]) == {"presence", "count", "colour", "place"}


def test_an_absent_judge_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no judge at .*judge-second\..*\. Train it"):
        judge.load("second", CPU, tmp_path)


# ---- training


def plan(folder: Path, images: int) -> Plan:
    """Of a stage that steps through so many pictures, four at a time."""
    return Plan(
        name="toy", images=images, batch=4, lr=0.1, memory=40, folder=folder, device=CPU,
        bf16=False, seed=0,
    )  # fmt: skip


def trained(folder: Path, *, stop: int | None = None) -> Tensor:
    """Averaged weights after 40 pictures; a run that stops leaves its checkpoint of that step."""
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    steps = 0

    def loss(rng: torch.Generator, count: int) -> Tensor:
        nonlocal steps
        steps += 1
        if stop is not None and steps > stop:
            raise KeyboardInterrupt
        error: Tensor = module(torch.randn(count, 3, generator=rng)) - 1
        return error.square().mean()

    weights: dict[str, Tensor] = {}

    def look(average: dict[str, Tensor], state: State) -> None:
        weights.update(average)

    fit(plan(folder, 40), module, loss, look)
    return torch.cat([w.flatten() for w in weights.values()])


def test_a_killed_run_goes_on_as_if_it_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3po_bench.models.embedded.v2.training.EVERY", 0.0)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", stop=6)
    assert torch.equal(trained(tmp_path / "killed"), whole)


def test_pictures_are_read_as_they_were_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "SHARD", 3)
    for number in (0, 1):
        pictures._render_shard(number, seed=5, folder=tmp_path)
    stored = pictures.Pictures(tmp_path)
    picture, scene = render.sample(5, 4)
    assert len(stored) == 6
    assert (stored.batch(torch.tensor([4]))[0].permute(1, 2, 0).numpy() == picture).all()
    assert stored.scenes()[4]["caption"] == scene.caption


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe's work folder and result, from six pictures and hardly any training."""
    monkeypatch.setattr(pictures, "SHARD", 3)
    monkeypatch.setattr(recipe, "draw_sheet", lambda *_: None)
    small = recipe.Recipe(
        pictures=6, vae_width=8, latent_channels=4, unet_channels=(16, 16, 32), text_layers=1
    )
    for number in (0, 1):
        pictures._render_shard(number, seed=0, folder=_made(tmp_path / "pictures"))
    recipe.train_vae(small, tmp_path, replace(plan(tmp_path, 4), name="vae"))
    recipe.run_stage("latents", small, tmp_path, tmp_path, {"device": "cpu"})
    recipe.train_unet(small, tmp_path, replace(plan(tmp_path, 4), name="unet"))
    recipe.export(small, tmp_path, tmp_path)
    return tmp_path


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_the_recipe_makes_a_pipeline_that_diffusers_loads_and_draws(made: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(made / "tiny2")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("three foxes", num_inference_steps=1).images[0].size == (64, 64)
    model = load(Source(str(made / "tiny2")), CPU, Training())
    assert version2.drawn(model, ["fox", "two pigs"], steps=1).shape == (2, 3, 64, 64)
    latents = np.load(made / "latents.npy")
    assert latents.shape == (6, 4, 16, 16)
    assert latents.astype(np.float32).std() == pytest.approx(1, abs=0.02)
    words = pipe.tokenizer("two wolves on a card").input_ids
    assert len(words) == 7  # each word one token, a start and an end
