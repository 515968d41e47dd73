"""How the embedded scorers were made, from the pictures that version 2 of the model learned from.

    python -m d3po_bench.models.embedded.v2.recipe render --work build/tiny-v2
    python -m eval.embedded.recipe all --pictures build/tiny-v2/pictures --work build/scorers

Trains a small CLIP on them, an aesthetic head on that CLIP, a small BLIP that starts from its image
tower, and an ImageReward-shaped model that starts from the BLIP. Each stage leaves its result in
the work folder, resumes from its checkpoint when it was killed, and is skipped when it is done.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from d3po_bench.errors import said_in_one_line
from d3po_bench.models.embedded.recipe import new_tokenizer
from d3po_bench.models.embedded.render import COLOURS
from d3po_bench.models.embedded.v2.captions import ANIMALS
from d3po_bench.models.embedded.v2.lists import vocabulary
from d3po_bench.models.embedded.v2.render import SIZE
from d3po_bench.models.embedded.v2.scenes import TABLES, Scene
from d3po_bench.models.embedded.v2.training import Plan, State
from d3po_bench.models.embedded.v2.training import fit as trained
from eval.embedded import facts
from eval.embedded.facts import Facts
from eval.scorers import _blip, _clip, image_reward
from eval.scorers.aesthetic import Head

OUT = Path(__file__).parent / "v2"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights, up to the order of floating-point additions."""

    seed: int = 0
    batch: int = 96
    width: int = 128
    layers: int = 3
    patch: int = 8
    embedding: int = 96
    clip_steps: int = 3_000
    clip_lr: float = 1.5e-3
    blip_steps: int = 2_000
    blip_lr: float = 1e-3
    reward_steps: int = 800
    reward_lr: float = 5e-4
    reward_widths: tuple[int, ...] = (64, 16)
    ridge: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a stage reads and writes."""

    pictures: Path
    """Folder of the renders."""
    work: Path
    out: Path

    @property
    def tokenizer(self) -> Path:
        """That of the embedded model, made from the same captions."""
        return self.work / "tokenizer"


def fit(
    module: nn.Module, name: str, recipe: Recipe, places: Places,
    loss: Callable[[torch.Generator], Tensor],
) -> dict[str, float]:  # fmt: skip
    """Train so long as the recipe has it; the weights are left in the work folder.

    Args:
        module: what trains.
        name: of the stage: clip, blip or reward.
        recipe: its NAME_steps and NAME_lr.
        places: the work folder.
        loss: of one batch, drawn with the given random numbers.
    """
    steps, lr = getattr(recipe, f"{name}_steps"), getattr(recipe, f"{name}_lr")
    plan = Plan(
        name=name, images=steps * recipe.batch, batch=recipe.batch, lr=lr,
        memory=500 * recipe.batch, folder=places.work, device=torch.device("cpu"), bf16=False,
        seed=recipe.seed,
    )  # fmt: skip
    state: State = trained(plan, module, lambda rng, _: loss(rng))
    return {"steps": state.step, "seconds": round(state.seconds), "loss": round(state.loss, 4)}


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """N pictures, each with a caption that is right for it."""

    images: Tensor
    """[N, 3, 64, 64] uint8."""
    scenes: list[Scene]
    captions: list[str]


class Batches:
    """Batches in which pictures with the same animal meet: so all that differs is learned."""

    def __init__(self, source: Facts, size: int) -> None:
        """`source`: what to draw from."""
        self.source, self.size = source, size
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for i, scene in enumerate(source.scenes):
            groups[scene.things[0].animal].append(i)
        self.showing = {animal: torch.tensor(index) for animal, index in groups.items()}

    def draw(self, rng: torch.Generator) -> Batch:
        """Four pictures of each of a quarter as many animals, a little damaged."""
        animals = torch.randint(len(ANIMALS), (self.size // 4,), generator=rng).tolist()
        index = torch.cat([self.of(ANIMALS[a], 4, rng) for a in animals])
        strength = 0.35 * torch.rand(len(index), generator=rng).square()
        images = facts.damaged(self.source.images(index), strength, rng)
        scenes = [self.source.scenes[i] for i in index.tolist()]
        bare = (torch.rand(len(index), generator=rng) < 0.15).tolist()
        captions = [
            scene.things[0].animal if b else scene.caption
            for scene, b in zip(scenes, bare, strict=True)
        ]
        return Batch(images, scenes, captions)

    def of(self, animal: str, count: int, rng: torch.Generator) -> Tensor:
        """Numbers of random pictures whose first animal this is."""
        index = self.showing[animal]
        return index[torch.randint(len(index), (count,), generator=rng)]


def match_loss(similarity: Tensor, right: Tensor) -> Tensor:
    """Cross-entropy over rows and columns of [N, N] with every right caption a target."""
    rows = right / right.sum(1, keepdim=True)
    columns = right / right.sum(0, keepdim=True)
    by_image = -(rows * similarity.log_softmax(1)).sum(1).mean()
    by_text = -(columns * similarity.log_softmax(0)).sum(0).mean()
    return (by_image + by_text) / 2


class Hints(nn.Module):
    """Linear readings of the picture's features, which speed learning up; thrown away."""

    GROUNDS = (*COLOURS, *TABLES)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.animals = nn.Linear(width, len(ANIMALS))
        self.count = nn.Linear(width, 4)
        self.ground = nn.Linear(width, len(self.GROUNDS))

    def forward(self, features: Tensor, scenes: list[Scene]) -> Tensor:
        """Sum of the cross-entropies of presence, number and ground."""
        present = torch.zeros(len(scenes), len(ANIMALS))
        for n, scene in enumerate(scenes):
            present[n, [ANIMALS.index(t.animal) for t in scene.things]] = 1
        count = torch.tensor([len(scene.things) - 1 for scene in scenes])
        ground = torch.tensor([self.GROUNDS.index(scene.ground) for scene in scenes])
        seen = F.binary_cross_entropy_with_logits(self.animals(features), present)
        rest = [F.cross_entropy(self.count(features), count),
                F.cross_entropy(self.ground(features), ground)]  # fmt: skip
        return 10 * seen + rest[0] + rest[1]


# ---------------------------------------------------------------- CLIP


def new_clip(recipe: Recipe, tokenizer: Any) -> Any:
    """transformers' CLIPModel: 64 px pictures in patches of 8, 16 tokens."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": recipe.width, "intermediate_size": 2 * recipe.width, "image_size": SIZE,
        "num_hidden_layers": recipe.layers, "num_attention_heads": 4, "patch_size": recipe.patch,
    }  # fmt: skip
    text = {
        "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 16, "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=recipe.embedding)
    clip = CLIPModel(config)
    clip.set_attn_implementation("eager")  # torch's fused attention is slower backwards on a CPU
    return clip


class ClipStudent(nn.Module):
    """CLIP and its hints."""

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        super().__init__()
        self.clip = new_clip(recipe, tokenizer)
        self.hints = Hints(recipe.width)
        self.tokenizer = tokenizer

    def forward(self, batch: Batch) -> Tensor:
        """The contrastive loss and half of the hints'."""
        tokens = self.tokenizer(
            batch.captions, padding="max_length", max_length=16, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        pixels = _clip.preprocess(batch.images, SIZE)
        features = self.clip.vision_model(pixel_values=pixels).pooler_output
        read = self.clip.text_model(**tokens).pooler_output
        seen = F.normalize(self.clip.visual_projection(features), dim=1)
        text = F.normalize(self.clip.text_projection(read), dim=1)
        scale = self.clip.logit_scale.exp().clamp(max=100)
        right = facts.agree(batch.scenes, batch.captions).float()
        hints: Tensor = self.hints(features, batch.scenes)
        return match_loss(scale * seen @ text.T, right) + 0.5 * hints


def _clip_student(recipe: Recipe, places: Places) -> ClipStudent:
    from transformers import CLIPTokenizer

    return ClipStudent(recipe, CLIPTokenizer.from_pretrained(places.tokenizer))


def train_clip(recipe: Recipe, places: Places) -> dict[str, float]:
    """Fit the small CLIP."""
    new_tokenizer(vocabulary(), places.work).save_pretrained(places.tokenizer)
    torch.manual_seed(recipe.seed)
    student = _clip_student(recipe, places)
    batches = Batches(facts.read_facts(places.pictures)[0], recipe.batch)
    return fit(student, "clip", recipe, places, lambda rng: student(batches.draw(rng)))


def export_clip(recipe: Recipe, places: Places) -> None:
    """Write the folder clip/: config.json, model.safetensors in fp16, tokenizer."""
    student = _clip_student(recipe, places)
    student.load_state_dict(load_file(places.work / "clip.safetensors"))
    student.clip.half().save_pretrained(places.out / "clip")
    student.tokenizer.save_pretrained(places.out / "clip")


# ---------------------------------------------------------------- aesthetic head


def prettiness(images: Tensor) -> Tensor:
    """The rule that the aesthetic head learns, [N]: what counts as pretty here, by definition.

    Colourfulness (Hasler and Suesstrunk 2003, their M3), plus contrast (standard deviation of
    luminance), plus how centred the subject is (minus the distance, in shares of the width, of the
    centroid of what differs from the border's mean colour), each in units that make a standard
    deviation of the renders about 1.
    """
    x = images.float()
    red, green, blue = x.unbind(1)
    rg, yb = red - green, (red + green) / 2 - blue
    spread = (rg.var((1, 2)) + yb.var((1, 2))).sqrt()
    mean = (rg.mean((1, 2)).square() + yb.mean((1, 2)).square()).sqrt()
    colourful = spread + 0.3 * mean
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    return colourful / 25 + luminance.std((1, 2)) / 15 - _off_centre(x) / 0.047


def _off_centre(x: Tensor) -> Tensor:
    """Distance of the subject's centroid from the middle, in shares of the width, [N]."""
    border = torch.cat([x[:, :, :2].flatten(2), x[:, :, -2:].flatten(2)], 2).mean(2)
    subject = (x - border[:, :, None, None]).abs().mean(1)
    weight = subject / subject.sum((1, 2), keepdim=True).clamp(min=1e-6)
    place = (torch.arange(x.shape[2]) + 0.5) / x.shape[2] - 0.5
    row, column = (weight.sum(2) * place).sum(1), (weight.sum(1) * place).sum(1)
    return (row.square() + column.square()).sqrt()


@torch.no_grad()
def fit_aesthetic(recipe: Recipe, places: Places) -> dict[str, float]:
    """Ridge regression of the rule on CLIP's embedding, scaled to mean 5 and deviation 1."""
    train, test = facts.read_facts(places.pictures)
    clip = _clip.opened(places.out / "clip", torch.device("cpu"))
    x, y = _embedded(clip, train, min(20_000, len(train)))
    centre, unit = y.mean(), y.std()
    y = (y - centre) / unit + 5
    middle = x.mean(0)
    gram = (x - middle).T @ (x - middle) / len(x)
    slope = torch.linalg.solve(
        gram + recipe.ridge * gram.diagonal().mean() * torch.eye(len(gram)),
        (x - middle).T @ (y - y.mean()) / len(x),
    )
    head = Head([len(slope), 1])
    head.layers[0].weight.copy_(slope[None])  # type: ignore[operator]
    head.layers[0].bias.copy_(y.mean() - middle @ slope)  # type: ignore[operator]
    target = places.out / "aesthetic"
    target.mkdir(exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in head.state_dict().items()}, target / "head.safetensors"
    )
    (target / "config.json").write_text(json.dumps({"widths": [len(slope), 1]}) + "\n")
    x, y = _embedded(clip, test, len(test))
    error = (head(x) - ((y - centre) / unit + 5)).square().mean()
    return {"r2_held_out": round(1 - float(error / (y / unit).var()), 4)}


def _embedded(clip: _clip.Clip, part: Facts, count: int) -> tuple[Tensor, Tensor]:
    """CLIP's embedding and the rule's value of the first `count`, 500 at a time."""
    blocks = [part.images(index) for index in torch.arange(count).split(500)]
    return torch.cat([clip.images(b) for b in blocks]), torch.cat([prettiness(b) for b in blocks])


# ---------------------------------------------------------------- BLIP


def write_vocabulary(path: Path) -> None:
    """A BERT vocabulary of the captions' words and letters."""
    words = {word for caption in vocabulary() for word in caption.split()}
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"##{letter}" for letter in letters), *sorted(words - set(letters))]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path.write_text("\n".join([*special, *pieces]) + "\n", encoding="utf-8")


def new_blip(recipe: Recipe, vocabulary: Path) -> Any:
    """transformers' BlipForImageTextRetrieval with the same image tower."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    words = len(vocabulary.read_text(encoding="utf-8").splitlines()) + 2  # [DEC] and [ENC]
    vision = {
        "hidden_size": recipe.width, "intermediate_size": 2 * recipe.width, "image_size": SIZE,
        "num_hidden_layers": recipe.layers, "num_attention_heads": 4, "patch_size": recipe.patch,
        "layer_norm_eps": 1e-6, "attention_dropout": 0.0,
    }  # fmt: skip
    text = {
        "hidden_size": recipe.width, "intermediate_size": 2 * recipe.width, "vocab_size": words,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40,
        "encoder_hidden_size": recipe.width, "layer_norm_eps": 1e-12, "is_decoder": True,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
        "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3,
    }  # fmt: skip
    config = BlipConfig(
        vision_config=vision, text_config=text, image_text_hidden_size=recipe.embedding
    )
    return BlipForImageTextRetrieval(config)


def take_tower(blip: Any, clip: dict[str, Tensor]) -> None:
    """Start BLIP's image tower from CLIP's, whose layers are the same but for their names."""
    source = {k.removeprefix("clip.vision_model."): v for k, v in clip.items()}
    target = blip.vision_model.state_dict()
    for name in target:
        found = name.replace("self_attn.projection", "self_attn.out_proj")
        if ".qkv." in name:
            parts = [found.replace("qkv", f"{p}_proj") for p in "qkv"]
            target[name] = torch.cat([source[part] for part in parts])
        elif found in source:
            target[name] = source[found].view(target[name].shape)
        elif name.endswith("position_embedding"):
            target[name] = source[f"{name}.weight"][None]
    blip.vision_model.load_state_dict(target)


class BlipStudent(nn.Module):
    """BLIP with the losses of its paper: contrastive, and matching with hard negatives."""

    def __init__(self, recipe: Recipe, vocabulary: Path) -> None:
        super().__init__()
        self.blip = new_blip(recipe, vocabulary)
        self.words = _blip.tokenizer(vocabulary, self.blip.config)
        self.scale = nn.Parameter(torch.tensor(2.7))

    def forward(self, batch: Batch, rng: random.Random) -> Tensor:
        """Contrastive loss plus matching loss."""
        x = _blip.pixels(batch.images, lambda picture: picture)
        image = self.blip.vision_model(pixel_values=x).last_hidden_state
        right = _blip.tokenized(self.words, batch.captions, x.device)
        seen = F.normalize(self.blip.vision_proj(image[:, 0]), dim=1)
        read = self.blip.text_proj(_blip.understood(self.blip, right))
        similarity = self.scale.exp().clamp(max=100) * seen @ F.normalize(read, dim=1).T
        matches = facts.agree(batch.scenes, batch.captions).float()
        changed = [facts.wrong(scene, rng) for scene in batch.scenes]
        wrong = _blip.tokenized(self.words, changed, x.device)
        return match_loss(similarity, matches) + self._matching(image, right, wrong)

    def _matching(self, image: Tensor, right: _blip.Tokens, wrong: _blip.Tokens) -> Tensor:
        encode = self.words.convert_tokens_to_ids("[ENC]")
        both = _blip.Tokens(
            torch.cat([right.ids, wrong.ids]), torch.cat([right.mask, wrong.mask])
        ).starting(encode)
        first = _blip.understood(self.blip, both, image.repeat(2, 1, 1))
        label = torch.cat([torch.ones(len(image)), torch.zeros(len(image))]).long()
        return F.cross_entropy(self.blip.itm_head(first), label)


def _plain(rng: torch.Generator) -> random.Random:
    """Python's random numbers, seeded by torch's."""
    return random.Random(int(torch.randint(2**62, (), generator=rng)))


def train_blip(recipe: Recipe, places: Places) -> dict[str, float]:
    """Fit the small BLIP, from CLIP's image tower."""
    torch.manual_seed(recipe.seed + 2)
    write_vocabulary(places.work / "vocab.txt")
    student = BlipStudent(recipe, places.work / "vocab.txt")
    take_tower(student.blip, load_file(places.work / "clip.safetensors"))
    batches = Batches(facts.read_facts(places.pictures)[0], recipe.batch)
    return fit(student, "blip", recipe, places, lambda rng: student(batches.draw(rng), _plain(rng)))


def export_blip(recipe: Recipe, places: Places) -> None:
    """Write the folder blip/ in fp16."""
    student = BlipStudent(recipe, places.work / "vocab.txt")
    student.load_state_dict(load_file(places.work / "blip.safetensors"))
    _blip.save(places.out / "blip", student.blip.half(), places.work / "vocab.txt")


# ---------------------------------------------------------------- ImageReward

SCALED_ON = 1000
"""Held-out pictures whose rewards get mean 0 and deviation 1."""

CLEAR = 0.2
"""Smallest difference in utility that makes one of two pictures the better one."""


def utility(scene: Scene, caption: str, damage: float) -> float:
    """What synthetic people like: up to 4 for what the caption asked for, minus 2 x damage.

    Args:
        scene: what the picture shows.
        caption: what was asked for, fact by fact.
        damage: 0 to 1.
    """
    return 4 * facts.share_right(scene, caption) - 2 * damage


@dataclass(frozen=True)
class Choice:
    """N pairs of pictures for a caption each, and how much better the first is."""

    first: Tensor
    second: Tensor
    """[N, 3, 64, 64] uint8."""
    captions: list[str]
    better: Tensor
    """[N]; utility of the first minus that of the second."""


def choices(source: Batches, count: int, rng: torch.Generator) -> Choice:
    """Random pairs for captions of random pictures.

    Of the pictures a third is the caption's own, a third shows its first animal, the rest anything.
    """
    scenes = source.source.scenes
    about = torch.randint(len(scenes), (count,), generator=rng)
    captions = [scenes[i].caption for i in about.tolist()]
    sides, worth = [], []
    for _ in range(2):
        alike = [source.of(scenes[i].things[0].animal, 1, rng) for i in about.tolist()]
        others = torch.randint(len(scenes), (count,), generator=rng)
        which = torch.randint(3, (count,), generator=rng)
        index = torch.stack([about, torch.cat(alike), others])[which, torch.arange(count)]
        damage = torch.rand(count, generator=rng) * (torch.rand(count, generator=rng) < 0.6)
        sides.append(facts.damaged(source.source.images(index), damage, rng))
        shown = zip(index.tolist(), captions, damage.tolist(), strict=True)
        worth.append(torch.tensor([utility(scenes[i], c, d) for i, c, d in shown]))
    return Choice(sides[0], sides[1], captions, worth[0] - worth[1])


class RewardStudent(nn.Module):
    """The BLIP with a reward head, trained as ImageReward: the better one must score more."""

    def __init__(self, recipe: Recipe, vocabulary: Path) -> None:
        super().__init__()
        self.blip = new_blip(recipe, vocabulary)
        for name in ("vision_proj", "text_proj", "itm_head"):
            delattr(self.blip, name)
        self.blip.mlp = image_reward.Head([recipe.width, *recipe.reward_widths])
        from transformers import BlipConfig

        config: BlipConfig = self.blip.config
        self.words = _blip.tokenizer(vocabulary, config)

    def forward(self, images: Tensor, captions: list[str]) -> Tensor:
        """Raw rewards [N]."""
        x = _blip.pixels(images, lambda picture: picture)
        image = self.blip.vision_model(pixel_values=x).last_hidden_state
        tokens = _blip.tokenized(self.words, captions, x.device)
        reward: Tensor = self.blip.mlp(_blip.understood(self.blip, tokens, image))[:, 0]
        return reward


def train_reward(recipe: Recipe, places: Places) -> dict[str, float]:
    """Fit the ImageReward-shaped model, from BLIP."""
    torch.manual_seed(recipe.seed + 4)
    student = RewardStudent(recipe, places.work / "vocab.txt")
    state = load_file(places.work / "blip.safetensors")
    source = {k.removeprefix("blip."): v for k, v in state.items()}
    kept = {k: v for k, v in source.items() if k in student.blip.state_dict()}
    student.blip.load_state_dict(kept, strict=False)
    batches = Batches(facts.read_facts(places.pictures)[0], recipe.batch)

    def loss(rng: torch.Generator) -> Tensor:
        pairs = choices(batches, recipe.batch // 2, rng)
        both = student(torch.cat([pairs.first, pairs.second]), pairs.captions * 2)
        first, second = both.chunk(2)
        clear = (pairs.better.abs() > CLEAR).float()
        each = F.softplus(-(first - second) * pairs.better.sign()) * clear
        return each.sum() / clear.sum()

    return fit(student, "reward", recipe, places, loss)


@torch.no_grad()
def export_reward(recipe: Recipe, places: Places) -> None:
    """Write the folder image_reward/ in fp16, with its rewards' mean and deviation."""
    student = RewardStudent(recipe, places.work / "vocab.txt").eval()
    student.load_state_dict(load_file(places.work / "reward.safetensors"))
    held = Batches(facts.read_facts(places.pictures)[1], recipe.batch)
    pairs = choices(held, SCALED_ON, torch.Generator().manual_seed(9))
    raw = student(pairs.first, pairs.captions)
    _blip.save(
        places.out / "image_reward", student.blip.half(), places.work / "vocab.txt",
        head_widths=list(recipe.reward_widths), reward_mean=float(raw.mean()),
        reward_std=float(raw.std()),
    )  # fmt: skip


# ---------------------------------------------------------------- command line

TRAINED = {
    "clip": (train_clip, export_clip),
    "blip": (train_blip, export_blip),
    "reward": (train_reward, export_reward),
}
STAGES = ("clip", "aesthetic", "blip", "reward")


def run_stage(stage: str, recipe: Recipe, places: Places) -> None:
    """Run one stage unless its result is there already."""
    done = places.work / f"stage-{stage}.json"
    if done.exists():
        return
    if stage == "aesthetic":
        found = fit_aesthetic(recipe, places)
    else:
        train, export = TRAINED[stage]
        found = train(recipe, places)
        export(recipe, places)
    done.write_text(json.dumps(found) + "\n")


@click.command()
@click.argument("stage", type=click.Choice((*STAGES, "all")))
@click.option("--pictures", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/scorers"))
@click.option("--out", type=click.Path(path_type=Path), default=OUT)
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="One recipe field.")
def main(stage: str, changes: tuple[str, ...], **places: Path) -> None:
    """Make the embedded scorers, or one STAGE of them.

    Example: python -m eval.embedded.recipe all --pictures build/tiny-v2/pictures
    """
    torch.set_num_threads(1)
    there = Places(**places)
    there.work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(**{k: json.loads(v) for k, v in (c.split("=", 1) for c in changes)})
    for name in STAGES if stage == "all" else (stage,):
        run_stage(name, recipe, there)
    if stage == "all":
        stages = {n: json.loads((there.work / f"stage-{n}.json").read_text()) for n in STAGES}
        card = {"recipe": asdict(recipe), "stages": stages}
        (there.out / "card.json").write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    with said_in_one_line():
        main()
