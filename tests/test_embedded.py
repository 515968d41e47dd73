"""The embedded model: what ships, what it draws, and that its recipe runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMScheduler, StableDiffusionPipeline

from d3po_bench.models.embedded import captions, card, recipe, render
from d3po_bench.models.sources import content
from d3po_bench.models.stable_diffusion import StableDiffusion
from d3po_bench.models.tiny import SOURCE
from d3po_bench.prompts import read_prompts
from eval.golden import checked_scorer
from tests.conftest import CPU, loaded

HOME = Path(recipe.__file__).parent
needs_font = pytest.mark.skipif(
    not render.FONT.exists(), reason="needs the font: apt-get install fonts-noto-color-emoji"
)


@pytest.fixture(scope="module")
def tiny() -> StableDiffusion:
    return loaded(SOURCE.path)


@pytest.mark.parametrize(("version", "most"), [(HOME, 12e6), (HOME / "v2", 14e6)])
def test_a_version_is_small(version: Path, most: float) -> None:
    files = [p for p in version.rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"}]
    own = [p for p in files if version.name == "v2" or "v2" not in p.relative_to(HOME).parts]
    assert any(p.suffix == ".safetensors" for p in own)
    assert not [p for p in own if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]
    assert sum(p.stat().st_size for p in own) <= most


def test_plain_diffusers_loads_the_folder_and_draws_from_it() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(SOURCE.path)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    images = pipe(
        ["fox", "frog"], num_inference_steps=20, guidance_scale=5.0, generator=rng,
        output_type="pt",
    ).images  # fmt: skip
    judge: Any = checked_scorer("animal", CPU)
    scores = judge(images.mul(255).round().to(torch.uint8), ["fox", "frog"])
    assert scores.min() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("images", "steps"), [(1, 10), (2, 20)])
def test_samples_are_recognised(images: int, steps: int, tiny: StableDiffusion) -> None:
    # a smaller draw of what card.json records, which has ten of each animal
    facts = card.measure(tiny, images, steps)
    assert facts["eta1"]["top1"] >= 0.92
    assert facts["eta0"]["top1"] >= 0.92
    recorded = json.loads((HOME / "card.json").read_text())["measured"][str(steps)]
    assert recorded["images"] >= 10
    assert recorded["eta1"]["top1"] >= 0.95
    assert recorded["flat_jpeg_kb"] == facts["flat_jpeg_kb"]


def test_the_card_is_what_its_figures_say() -> None:
    facts = json.loads((HOME / "card.json").read_text())
    written = (HOME / "CARD.md").read_text()
    for line in card.write_card(facts).splitlines():
        if "MB with the classifier" not in line:  # the card's own size counts in it
            assert line in written


def test_every_animal_is_one_token_and_captions_fit(tiny: StableDiffusion) -> None:
    animals = read_prompts("animals")
    assert len(animals) == len(set(animals)) == 45
    assert animals == list(render.GLYPHS)
    tokenizer = tiny.parts["tokenizer"]
    for animal in animals:
        assert len(tokenizer(animal).input_ids) == 3
    longest = [
        render.caption(a, p, c) for a in animals for p in render.PATTERNS for c in render.COLOURS
    ]
    assert max(len(tokenizer(text).input_ids) for text in longest) <= recipe.TEXT_LENGTH


def test_judge_wants_the_right_animal(tiny: StableDiffusion) -> None:
    image = card.draw(tiny, ["frog"], eta=0.0, steps=20)
    judge = checked_scorer("animal", CPU)
    right, wrong, none = (float(judge(image, [p])[0]) for p in ("a frog", "whale", "1 hand"))
    assert right > 0.5 > wrong
    assert none != none  # NaN: the prompt names no animal


def test_captions() -> None:
    assert render.caption("cat", "striped", "red") == "a cat on a red striped background"
    assert render.caption("ant", "plain", "orange") == "an ant on an orange background"


@needs_font
def test_pictures_are_a_function_of_seed_and_index() -> None:
    one, text, label = render.sample(0, 7)
    same, again, _ = render.sample(0, 7)
    other, _, _ = render.sample(1, 7)
    assert one.shape == (32, 32, 4)
    assert np.array_equal(one, same)
    assert text == again
    assert list(render.GLYPHS)[label] in text
    assert not np.array_equal(one, other)


@needs_font
def test_every_glyph_is_in_the_font() -> None:
    def inked(animal: str) -> bool:
        picture = render.draw(animal, "plain", "white", np.random.default_rng(0))
        return bool((picture[..., 3] > 128).mean() > 0.1)

    assert [animal for animal in render.GLYPHS if not inked(animal)] == []


@pytest.mark.slow
@needs_font
def test_the_recipe_runs_from_font_to_pipeline(tmp_path: Path) -> None:
    settings = ["pictures=2600", "processes=1", "bf16=false"]
    settings += [f"{stage}_steps=2" for stage in ("vae", "unet", "classifier")]
    settings += [f"{stage}_batch=4" for stage in ("vae", "unet", "classifier")]
    out = tmp_path / "out"
    arguments = ["all", "--work", str(tmp_path / "work"), "--out", str(out)]
    arguments += [part for s in settings for part in ("--set", s)]
    result = CliRunner().invoke(recipe.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    pipe = StableDiffusionPipeline.from_pretrained(out / "tiny")
    assert pipe.unet.config.sample_size == 8
    assert (out / "tiny.sha256").read_text().strip() == content(out / "tiny")
    made = json.loads((out / "card.json").read_text())
    assert made["stages"]["unet"]["steps"] == 2


def test_captions_for_training_and_for_evaluation_are_apart() -> None:
    training, held_out = captions.lists()
    assert read_prompts("captions") == training
    assert read_prompts("captions-held-out") == held_out
    assert (len(training), len(held_out)) == (135, 300)
    assert not set(training) & set(held_out)
    for names in (training, held_out):
        assert {text.split()[1] for text in names} == set(render.GLYPHS)
