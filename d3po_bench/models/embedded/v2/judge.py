"""Two judges that find the animals in a picture of version 2: what, where, and on which colour.

Both were trained on renders alone, apart from each other: `first`, a convolutional network, may be
a reward; `second`, a transformer, never is, so that the gap between them shows what was learned
about the first alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d3po_bench.errors import UserError
from d3po_bench.models.embedded.classifier import Residual, pictures
from d3po_bench.models.embedded.render import COLOURS
from d3po_bench.models.embedded.v2.captions import ANIMALS
from d3po_bench.models.embedded.v2.render import SIZE

HERE = Path(__file__).parent
BAR = 0.98
"""A judge that is right on a smaller share of held-out renders, in any respect, is refused."""

CHANNELS = len(ANIMALS) + 3 + len(COLOURS) + 1
"""Of what a judge says of each cell: animals, place and size, colours, card."""


@dataclass(frozen=True)
class Seen:
    """What a judge sees in N pictures, cell by cell of a grid g x g."""

    animals: Tensor
    """[N, 45, g, g] probability that the centre of such an animal is in the cell."""
    place: Tensor
    """[N, 3, g, g] that animal's centre, across and down, and size, in shares of the width."""
    colours: Tensor
    """[N, 12, g, g] probability of each colour under it."""
    card: Tensor
    """[N, g, g] probability that the colour is a card's, not the background's."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One animal that a judge sees. Lengths are shares of the picture's width."""

    animal: str
    probability: float
    x: float
    y: float
    side: float
    colour: str
    card: bool


def interpret(raw: Tensor) -> Seen:
    """What a network's output [N, CHANNELS, g, g] says."""
    animals, place, colours, card = raw.split([len(ANIMALS), 3, len(COLOURS), 1], 1)
    steps = torch.arange(raw.shape[-1], device=raw.device) + 0.5
    down, across = torch.meshgrid(steps, steps, indexing="ij")
    corner = torch.stack([across, down]) / raw.shape[-1]
    centre = corner + place[:, :2].tanh() / raw.shape[-1]
    whole = torch.cat([centre, place[:, 2:].sigmoid()], 1)
    return Seen(animals.sigmoid(), whole, colours.softmax(1), card[:, 0].sigmoid())


APART = 0.25
"""Animals' centres are further apart than this, in shares of the width."""


def objects(seen: Seen, threshold: float = 0.3) -> list[list[Found]]:
    """The animals of each picture: the surest first, and none beside a surer one."""
    best, which = seen.animals.flatten(2).max(1)
    found: list[list[Found]] = []
    for n in range(len(best)):
        cells = (best[n] > threshold).nonzero().flatten()
        cells = cells[best[n][cells].argsort(descending=True)]
        taken: list[Found] = []
        for cell in cells.tolist():
            x, y, side = seen.place[n].flatten(1)[:, cell].tolist()
            if all(max(abs(x - t.x), abs(y - t.y)) > APART for t in taken):
                colour = int(seen.colours[n].flatten(1)[:, cell].argmax())
                taken.append(
                    Found(
                        animal=ANIMALS[int(which[n, cell])], probability=float(best[n, cell]),
                        x=x, y=y, side=side, colour=list(COLOURS)[colour],
                        card=bool(seen.card[n].flatten()[cell] > 0.5),
                    )
                )  # fmt: skip
        found.append(taken)
    return found


def _rare(head: nn.Module) -> nn.Module:
    """The last layer, at first sure of no animal anywhere, as nearly everywhere is right."""
    with torch.no_grad():
        head.get_parameter("bias")[: len(ANIMALS)] = -5.0
    return head


class First(nn.Module):
    """A convolutional network with a coarse look at the whole; a grid of 16 x 16."""

    GRID = 16

    def __init__(self) -> None:
        """Fresh weights; 0.5M parameters."""
        super().__init__()
        self.fine = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1), Residual(32),
            nn.Conv2d(32, 64, 4, stride=2, padding=1), Residual(64),
        )  # fmt: skip
        self.coarse = nn.Sequential(
            nn.Conv2d(64, 96, 4, stride=2, padding=1), Residual(96),
            nn.Upsample(scale_factor=2), nn.Conv2d(96, 64, 3, padding=1),
        )  # fmt: skip
        self.head = nn.Sequential(nn.GroupNorm(8, 64), nn.SiLU(), _rare(nn.Conv2d(64, CHANNELS, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """What `interpret` reads, of pictures [N, 3, 64, 64] in [-1, 1]."""
        fine = self.fine(x)
        raw: Tensor = self.head(fine + self.coarse(fine))
        return raw


class Second(nn.Module):
    """A transformer on 8 x 8 patches that a few convolutions read; a grid of 16 x 16."""

    GRID = 16

    def __init__(self) -> None:
        """Fresh weights; 0.6M parameters."""
        super().__init__()
        self.patches = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1), nn.GroupNorm(8, 32), nn.SiLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.GroupNorm(8, 64), nn.SiLU(),
            nn.Conv2d(64, 112, 4, stride=2, padding=1),
        )  # fmt: skip
        self.places = nn.Parameter(0.02 * torch.randn(1, 64, 112))
        layer = nn.TransformerEncoderLayer(
            112, 4, 224, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.finer = nn.Sequential(nn.LayerNorm(112), nn.Linear(112, 4 * 64), nn.SiLU())
        self.head = _rare(nn.Conv2d(64, CHANNELS, 1))

    def forward(self, x: Tensor) -> Tensor:
        """What `interpret` reads, of pictures [N, 3, 64, 64] in [-1, 1]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        seen = self.finer(self.body(tokens)).transpose(1, 2).reshape(len(x), 256, 8, 8)
        raw: Tensor = self.head(F.pixel_shuffle(seen, 2))
        return raw


NETWORKS: dict[str, type[First] | type[Second]] = {"first": First, "second": Second}


class Judge:
    """A trained judge."""

    def __init__(self, network: nn.Module) -> None:
        """`network`: one of NETWORKS, on the device to judge on."""
        self.network = network.eval()
        self.device = next(network.parameters()).device

    @torch.no_grad()
    def see(self, images: Tensor) -> Seen:
        """What is in images [N, 3, h, w] uint8, on the CPU."""
        batches = (pictures(x, self.device, SIZE) for x in images.split(64))
        parts = [self.network(x).float().cpu() for x in batches]
        return interpret(torch.cat(parts))

    def find(self, images: Tensor) -> list[list[Found]]:
        """The animals in each of images [N, 3, h, w] uint8."""
        return objects(self.see(images))


def require_good(name: str, shares: dict[str, float]) -> None:
    """Refuse a judge by its shares right on held-out renders.

    Raises:
        UserError: one of them is below BAR.
    """
    weak = {what: share for what, share in shares.items() if share < BAR}
    if weak:
        said = ", ".join(f"{what} {share:.1%}" for what, share in weak.items())
        raise UserError(
            f"The {name} judge is right on too few held-out renders ({said}; {BAR:.0%} are "
            "needed). Train it longer."
        )


def paths(name: str, folder: Path) -> tuple[Path, Path]:
    """The files of a judge: its weights, and how it did on held-out renders."""
    return folder / f"judge-{name}.fp16.safetensors", folder / f"judge-{name}.json"


def load(name: str, device: torch.device, folder: Path = HERE) -> Judge:
    """The judge `first` or `second` that ships with version 2, or another of a folder.

    Raises:
        UserError: it is not there, or was right on too few held-out renders.
    """
    from safetensors.torch import load_file

    weights, facts = paths(name, folder)
    if not weights.exists():
        raise UserError(
            f"There is no judge at {weights}. Train it: "
            f"python -m d3po_bench.models.embedded.v2.judge_recipe {name}"
        )
    require_good(name, json.loads(facts.read_text(encoding="utf-8"))["right"])
    network = NETWORKS[name]()
    network.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    return Judge(network.to(device))
