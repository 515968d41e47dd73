"""Which denoising steps decide a picture's JPEG size? Prints a Markdown table.

    python results/search/step_shares.py

Pictures of the 45 animals are drawn by the embedded model, then again with the noise of one step
alone drawn afresh: the mean squared change of the size, as a share of the change when the noise of
all steps is (first noise kept, as in a pair of D3PO). Shares need not add up to 1. "Sensitivity"
is E^2 / 2 s^2 of the schedule: nats of KL per unit of squared change of the predicted noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d3po_bench import registry
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.seeding import normal, stream
from d3po_bench.models.adapters import Training
from d3po_bench.models.sources import load
from d3po_bench.prompts import read_prompts

CPU = torch.device("cpu")
REPEATS = 4


class Sizes:
    """JPEG sizes of pictures whose every noise is given."""

    def __init__(self, steps: int) -> None:
        model = load(registry.model_source("tiny"), CPU, Training())
        self.policy = Policy(model, steps=steps)
        self.prompts = read_prompts("animals")
        self.text = model.encode(self.prompts)
        self.scorer = registry.scorer("jpeg_size", CPU)

    def noise(self, index: int) -> Tensor:
        """First noise and that of all steps, [T + 1, P, C, H, W]."""
        p, shape = len(self.prompts), self.policy.model.latent_shape
        steps = len(self.policy.timesteps) + 1
        return normal((p, *shape), (stream(0, "steps", index, i) for i in range(steps)))

    @torch.no_grad()
    def __call__(self, noise: Tensor) -> Tensor:
        """kB, [P]."""
        x, policy = noise[0], self.policy
        for t, step_noise in zip(policy.timesteps, noise[1:], strict=True):
            x = policy.step(x, t.expand(len(x)), self.text).sample(step_noise)
        return self.scorer(policy.model.decode(x), self.prompts)


def changes(sizes: Sizes, steps: list[int]) -> float:
    """Mean squared change, kB^2, when the noise of `steps` is drawn afresh."""
    total = 0.0
    for repeat in range(REPEATS):
        noise, other = sizes.noise(2 * repeat), sizes.noise(2 * repeat + 1)
        mixed = noise.clone()
        mixed[1:][steps] = other[1:][steps]
        total += float((sizes(mixed) - sizes(noise)).square().mean()) / REPEATS
    return total


def table(steps: int) -> str:
    """A row for each step of a sampler of that many."""
    sizes = Sizes(steps)
    s = sizes.policy.schedule
    whole = changes(sizes, list(range(steps)))
    sensitivity = s.e_coef.square() / (2 * s.std.square())
    return "\n".join(
        f"| {steps} | {i + 1} | {int(s.timesteps[i])} | {changes(sizes, [i]) / whole:.3f} | "
        f"{float(sensitivity[i]):.2f} |"
        for i in range(steps)
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| T | step | timestep | share of the change | sensitivity |\n|--:|--:|--:|--:|--:|")
    for count in (10, 6):
        print(table(count))
