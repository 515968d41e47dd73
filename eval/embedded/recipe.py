"""How the embedded scorers were made, from nothing but a font.

    python -m eval.embedded.recipe all --work build/scorers

Renders captioned pictures, trains a small CLIP on them, an aesthetic head on that CLIP, a small
BLIP that starts from its image tower, and an ImageReward-shaped model that starts from the BLIP.
Each stage leaves its result in the work folder and is skipped when that is already there.
"""

from __future__ import annotations

import json
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
from d3po_bench.models.embedded.recipe import fit
from eval.embedded import facts
from eval.embedded.facts import Facts
from eval.scorers import _blip, _clip, image_reward
from eval.scorers.aesthetic import Head

HERE = Path(__file__).parent
TOKENIZER = HERE.parent.parent / "d3po_bench" / "models" / "embedded" / "tiny" / "tokenizer"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights, up to the order of floating-point additions."""

    pictures: int = 60_000
    seed: int = 0
    batch: int = 128
    width: int = 128
    layers: int = 3
    patch: int = 4
    embedding: int = 96
    clip_steps: int = 4_000
    clip_lr: float = 1.5e-3
    blip_steps: int = 3_000
    blip_lr: float = 1e-3
    reward_steps: int = 1_500
    reward_lr: float = 5e-4
    reward_widths: tuple[int, ...] = (64, 16)
    ridge: float = 1e-3
    bf16: bool = True


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """N pictures, four of each animal that is in it, each with a caption."""

    images: Tensor
    """[N, 3, 32, 32] uint8."""
    truth: Tensor
    """[N, 3]."""
    full: Tensor
    """[N] bool: whether the caption names all three facts."""


class Batches:
    """Endless batches in which pictures of one animal meet: so colours and patterns are learned."""

    def __init__(self, source: Facts, size: int, seed: int) -> None:
        """`source`: what to draw from."""
        self.source, self.size = source, size
        self.rng = torch.Generator().manual_seed(seed)
        animal = source.truth[:, 0]
        self.of_animal = [(animal == a).nonzero().squeeze(1) for a in animal.unique()]

    def next(self) -> Batch:
        """A batch with a little damage on every picture."""
        drawn = torch.randint(len(self.of_animal), (self.size // 4,), generator=self.rng)
        index = torch.cat([self._four(self.of_animal[a]) for a in drawn.tolist()]).sort().values
        truth = self.source.truth[index]
        full = torch.rand(len(index), generator=self.rng) < 0.65
        strength = 0.35 * torch.rand(len(index), generator=self.rng).square()
        images = facts.damaged(self.source.pictures(index.numpy()), strength, self.rng)
        return Batch(images, truth, full)

    def _four(self, index: Tensor) -> Tensor:
        return index[torch.randint(len(index), (4,), generator=self.rng)]


def match_loss(similarity: Tensor, right: Tensor) -> Tensor:
    """Cross-entropy over rows and columns of [N, N] with every right caption a target."""
    rows = right / right.sum(1, keepdim=True)
    columns = right / right.sum(0, keepdim=True)
    by_image = -(rows * similarity.log_softmax(1)).sum(1).mean()
    by_text = -(columns * similarity.log_softmax(0)).sum(0).mean()
    return (by_image + by_text) / 2


class Hints(nn.Module):
    """Three linear readings of the picture's features, which speed learning up; thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        kinds = (facts.ANIMALS, facts.PATTERNS, facts.COLOURS)
        self.readings = nn.ModuleList(nn.Linear(width, len(names)) for names in kinds)

    def forward(self, features: Tensor, truth: Tensor) -> Tensor:
        """Sum of the cross-entropies of animal, pattern and colour."""
        losses = [
            F.cross_entropy(r(features).float(), truth[:, i]) for i, r in enumerate(self.readings)
        ]
        return torch.stack(losses).sum()


# ---------------------------------------------------------------- CLIP


def new_clip(recipe: Recipe, tokenizer: Any) -> Any:
    """transformers' CLIPModel: 32 px pictures in patches of 4, 16 tokens."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": recipe.width, "intermediate_size": 2 * recipe.width, "image_size": 32,
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

    def forward(self, batch: Batch, tokens: Any) -> Tensor:
        """The contrastive loss and half of the hints'."""
        pixels = _clip.preprocess(batch.images, 32)
        features = self.clip.vision_model(pixel_values=pixels).pooler_output
        read = self.clip.text_model(**tokens).pooler_output
        seen = F.normalize(self.clip.visual_projection(features).float(), dim=1)
        text = F.normalize(self.clip.text_projection(read).float(), dim=1)
        scale = self.clip.logit_scale.exp().clamp(max=100)
        right = facts.agree(batch.truth, batch.truth, batch.full).float()
        hints: Tensor = self.hints(features, batch.truth)
        return match_loss(scale * seen @ text.T, right) + 0.5 * hints


def train_clip(recipe: Recipe, work: Path, minutes: float | None) -> dict[str, float]:
    """Fit the small CLIP."""
    from transformers import CLIPTokenizer

    torch.manual_seed(recipe.seed)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    student = ClipStudent(recipe, tokenizer)
    batches = Batches(facts.read_facts(work)[0], recipe.batch, recipe.seed + 1)

    def loss() -> Tensor:
        batch = batches.next()
        tokens = tokenizer(
            facts.texts(batch.truth, batch.full), padding="max_length", max_length=16,
            truncation=True, return_tensors="pt",
        )  # fmt: skip
        value: Tensor = student(batch, tokens)
        return value

    return fit(
        student, loss, name="clip", steps=recipe.clip_steps, lr=recipe.clip_lr, ema=0.998,
        bf16=recipe.bf16, out=work / "clip.safetensors", minutes=minutes,
    )  # fmt: skip


def export_clip(recipe: Recipe, work: Path, out: Path) -> None:
    """Write the folder clip/: config.json, model.safetensors in fp16, tokenizer."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    student = ClipStudent(recipe, tokenizer)
    student.load_state_dict(load_file(work / "clip.safetensors"))
    student.clip.half().save_pretrained(out / "clip")
    tokenizer.save_pretrained(out / "clip")


# ---------------------------------------------------------------- aesthetic head


def prettiness(images: Tensor) -> Tensor:
    """The rule that the aesthetic head learns, [N]: what counts as pretty here, by definition.

    Colourfulness (Hasler and Suesstrunk 2003, their M3), plus contrast (standard deviation of
    luminance), plus how centred the subject is (minus the distance, in pixels, of the centroid of
    what differs from the border's mean colour), each in units that make a standard deviation of
    the renders about 1.
    """
    x = images.float()
    red, green, blue = x.unbind(1)
    rg, yb = red - green, (red + green) / 2 - blue
    spread = (rg.var((1, 2)) + yb.var((1, 2))).sqrt()
    mean = (rg.mean((1, 2)).square() + yb.mean((1, 2)).square()).sqrt()
    colourful = spread + 0.3 * mean
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    return colourful / 25 + luminance.std((1, 2)) / 15 - _off_centre(x) / 1.5


def _off_centre(x: Tensor) -> Tensor:
    """Distance of the subject's centroid from the middle, in pixels, [N]."""
    border = torch.cat([x[:, :, :2].flatten(2), x[:, :, -2:].flatten(2)], 2).mean(2)
    subject = (x - border[:, :, None, None]).abs().mean(1)
    weight = subject / subject.sum((1, 2), keepdim=True).clamp(min=1e-6)
    place = torch.arange(x.shape[2]) - (x.shape[2] - 1) / 2
    row, column = (weight.sum(2) * place).sum(1), (weight.sum(1) * place).sum(1)
    return (row.square() + column.square()).sqrt()


@torch.no_grad()
def fit_aesthetic(recipe: Recipe, work: Path, out: Path) -> dict[str, float]:
    """Ridge regression of the rule on CLIP's embedding, scaled to mean 5 and deviation 1."""
    train, test = facts.read_facts(work)
    clip = _clip.opened(out / "clip", torch.device("cpu"))
    x, y = _embedded(clip, train.part(slice(0, 20_000)))
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
    target = out / "aesthetic"
    target.mkdir(exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in head.state_dict().items()}, target / "head.safetensors"
    )
    (target / "config.json").write_text(json.dumps({"widths": [len(slope), 1]}) + "\n")
    x, y = _embedded(clip, test)
    error = (head(x) - ((y - centre) / unit + 5)).square().mean()
    return {"r2_held_out": round(1 - float(error / (y / unit).var()), 4)}


def _embedded(clip: _clip.Clip, part: Facts) -> tuple[Tensor, Tensor]:
    pictures = part.pictures(slice(None))
    return clip.images(pictures), prettiness(pictures)


# ---------------------------------------------------------------- BLIP


def write_vocabulary(path: Path) -> None:
    """A BERT vocabulary of the captions' words and letters."""
    words = {"a", "an", "on", "background", *facts.ANIMALS, *facts.PATTERNS, *facts.COLOURS}
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"##{letter}" for letter in letters), *sorted(words - set(letters))]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path.write_text("\n".join([*special, *pieces]) + "\n", encoding="utf-8")


def new_blip(recipe: Recipe, vocabulary: Path) -> Any:
    """transformers' BlipForImageTextRetrieval with the same image tower."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    words = len(vocabulary.read_text(encoding="utf-8").splitlines()) + 2  # [DEC] and [ENC]
    vision = {
        "hidden_size": recipe.width, "intermediate_size": 2 * recipe.width, "image_size": 32,
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
        self.rng = torch.Generator().manual_seed(recipe.seed + 7)

    def forward(self, batch: Batch) -> Tensor:
        """Contrastive loss plus matching loss."""
        x = _blip.pixels(batch.images, lambda picture: picture)
        image = self.blip.vision_model(pixel_values=x).last_hidden_state
        right = _blip.tokenized(self.words, facts.texts(batch.truth, batch.full), x.device)
        seen = F.normalize(self.blip.vision_proj(image[:, 0]).float(), dim=1)
        read = self.blip.text_proj(_blip.understood(self.blip, right)).float()
        similarity = self.scale.exp().clamp(max=100) * seen @ F.normalize(read, dim=1).T
        matches = facts.agree(batch.truth, batch.truth, batch.full).float()
        return match_loss(similarity, matches) + self._matching(batch, image, right)

    def _matching(self, batch: Batch, image: Tensor, right: _blip.Tokens) -> Tensor:
        changed = facts.wrong(batch.truth, batch.full, self.rng)
        wrong = _blip.tokenized(self.words, facts.texts(changed, batch.full), image.device)
        encode = self.words.convert_tokens_to_ids("[ENC]")
        both = _blip.Tokens(
            torch.cat([right.ids, wrong.ids]), torch.cat([right.mask, wrong.mask])
        ).starting(encode)
        first = _blip.understood(self.blip, both, image.repeat(2, 1, 1))
        label = torch.cat([torch.ones(len(image)), torch.zeros(len(image))]).long()
        return F.cross_entropy(self.blip.itm_head(first).float(), label)


def train_blip(recipe: Recipe, work: Path, minutes: float | None) -> dict[str, float]:
    """Fit the small BLIP, from CLIP's image tower."""
    torch.manual_seed(recipe.seed + 2)
    write_vocabulary(work / "vocab.txt")
    student = BlipStudent(recipe, work / "vocab.txt")
    take_tower(student.blip, load_file(work / "clip.safetensors"))
    batches = Batches(facts.read_facts(work)[0], recipe.batch, recipe.seed + 3)
    return fit(
        student, lambda: student(batches.next()), name="blip", steps=recipe.blip_steps,
        lr=recipe.blip_lr, ema=0.998, bf16=recipe.bf16, out=work / "blip.safetensors",
        minutes=minutes,
    )  # fmt: skip


def export_blip(recipe: Recipe, work: Path, out: Path) -> None:
    """Write the folder blip/ in fp16."""
    student = BlipStudent(recipe, work / "vocab.txt")
    student.load_state_dict(load_file(work / "blip.safetensors"))
    _blip.save(out / "blip", student.blip.half(), work / "vocab.txt")


# ---------------------------------------------------------------- ImageReward

SCALED_ON = 1000
"""Held-out pictures whose rewards get mean 0 and deviation 1."""

CLEAR = 0.2
"""Smallest difference in utility that makes one of two pictures the better one."""


def utility(truth: Tensor, about: Tensor, damage: Tensor) -> Tensor:
    """What synthetic people like, [N]: the facts that the caption asked for, and no damage.

    2 for the right animal, 1 each for pattern and colour, minus 2 x damage (0 to 1).
    """
    same = (truth == about).float()
    return same @ torch.tensor([2.0, 1.0, 1.0]) - 2 * damage


@dataclass(frozen=True)
class Choice:
    """N pairs of pictures for a caption each, and how much better the first is."""

    first: Tensor
    second: Tensor
    """[N, 3, 32, 32] uint8."""
    captions: list[str]
    better: Tensor
    """[N]; utility of the first minus that of the second."""


def choices(source: Facts, count: int, rng: torch.Generator) -> Choice:
    """Random pairs: half of the pictures fit their caption, the others are anything."""
    about = source.truth[torch.randint(len(source), (count,), generator=rng)]
    sides, worth = [], []
    for _ in range(2):
        index = _fitting(source, about, rng)
        damage = torch.rand(count, generator=rng) * (torch.rand(count, generator=rng) < 0.6)
        pictures = source.pictures(index.numpy())
        sides.append(facts.damaged(pictures, damage, rng))
        worth.append(utility(source.truth[index], about, damage))
    full = torch.ones(count, dtype=torch.bool)
    return Choice(sides[0], sides[1], facts.texts(about, full), worth[0] - worth[1])


def _fitting(source: Facts, about: Tensor, rng: torch.Generator) -> Tensor:
    """Of 64 random pictures for each caption one that agrees most, or, half of the time, any."""
    drawn = torch.randint(len(source), (len(about), 64), generator=rng)
    same = (source.truth[drawn] == about[:, None]).float() @ torch.tensor([2.0, 1.0, 1.0])
    best = drawn[torch.arange(len(about)), same.argmax(1)]
    return torch.where(torch.rand(len(about), generator=rng) < 0.6, best, drawn[:, 0])


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
        return reward.float()


def train_reward(recipe: Recipe, work: Path, minutes: float | None) -> dict[str, float]:
    """Fit the ImageReward-shaped model, from BLIP."""
    torch.manual_seed(recipe.seed + 4)
    student = RewardStudent(recipe, work / "vocab.txt")
    source = {k.removeprefix("blip."): v for k, v in load_file(work / "blip.safetensors").items()}
    kept = {k: v for k, v in source.items() if k in student.blip.state_dict()}
    student.blip.load_state_dict(kept, strict=False)
    train, rng = facts.read_facts(work)[0], torch.Generator().manual_seed(recipe.seed + 5)

    def loss() -> Tensor:
        pairs = choices(train, recipe.batch // 2, rng)
        both = student(torch.cat([pairs.first, pairs.second]), pairs.captions * 2)
        first, second = both.chunk(2)
        clear = (pairs.better.abs() > CLEAR).float()
        each = F.softplus(-(first - second) * pairs.better.sign()) * clear
        return each.sum() / clear.sum()

    return fit(
        student, loss, name="reward", steps=recipe.reward_steps, lr=recipe.reward_lr, ema=0.998,
        bf16=recipe.bf16, out=work / "reward.safetensors", minutes=minutes,
    )  # fmt: skip


@torch.no_grad()
def export_reward(recipe: Recipe, work: Path, out: Path) -> None:
    """Write the folder image_reward/ in fp16, with its rewards' mean and deviation."""
    student = RewardStudent(recipe, work / "vocab.txt").eval()
    student.load_state_dict(load_file(work / "reward.safetensors"))
    pairs = choices(facts.read_facts(work)[1], SCALED_ON, torch.Generator().manual_seed(9))
    raw = student(pairs.first, pairs.captions)
    _blip.save(
        out / "image_reward", student.blip.half(), work / "vocab.txt",
        head_widths=list(recipe.reward_widths), reward_mean=float(raw.mean()),
        reward_std=float(raw.std()),
    )  # fmt: skip


# ---------------------------------------------------------------- command line

Train = Callable[[Recipe, Path, float | None], dict[str, float]]
TRAINED: dict[str, tuple[Train, Callable[[Recipe, Path, Path], None]]] = {
    "clip": (train_clip, export_clip),
    "blip": (train_blip, export_blip),
    "reward": (train_reward, export_reward),
}
STAGES = ("render", "clip", "aesthetic", "blip", "reward")


def run_stage(stage: str, recipe: Recipe, work: Path, out: Path, minutes: float | None) -> None:
    """Run one stage unless its result is there already."""
    done = work / f"stage-{stage}.json"
    if done.exists():
        return
    found: dict[str, float] = {}
    if stage == "render":
        facts.render_facts(recipe.pictures, work, processes=2)
    elif stage == "aesthetic":
        found = fit_aesthetic(recipe, work, out)
    else:
        train, export = TRAINED[stage]
        found = train(recipe, work, minutes)
        export(recipe, work, out)
    done.write_text(json.dumps(found) + "\n")


@click.command()
@click.argument("stage", type=click.Choice((*STAGES, "all")))
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/scorers"))
@click.option("--out", type=click.Path(path_type=Path), default=HERE)
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="One recipe field.")
@click.option("--minutes", type=float, help="Anneal a training stage early to end by then.")
def main(
    stage: str, work: Path, out: Path, changes: tuple[str, ...], minutes: float | None
) -> None:
    """Make the embedded scorers, or one STAGE of them.

    Example: python -m eval.embedded.recipe all --work build/scorers
    """
    work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(**{k: json.loads(v) for k, v in (c.split("=", 1) for c in changes)})
    for name in STAGES if stage == "all" else (stage,):
        run_stage(name, recipe, work, out, minutes)
    if stage == "all":
        stages = {n: json.loads((work / f"stage-{n}.json").read_text()) for n in STAGES}
        card = {"recipe": asdict(recipe), "stages": stages}
        (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    with said_in_one_line():
        main()
