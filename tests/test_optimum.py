"""A policy gradient with a KL penalty ends at the known optimum: exp(R / beta) times the base.

The base model is linear with Gaussian data, so its chain is, too. With slopes A_i, so that
x_(i+1) = A_i x_i + const + std_i z_i, and with P_i = A_i A_(i+1) ... A_(T-1):

- The final latent has the variance V = P_0^2 + V_steps, V_steps = sum std_i^2 P_(i+1)^2: P_0^2 is
  that of the initial noise, which no policy can change.
- For a linear reward R = g x_T, the chain that maximises E[R] - beta KL is the base chain tilted
  by exp(R / beta). Its value function is linear, so it adds std_i^2 P_(i+1) g / beta to the mean
  of step i and leaves the variances. The final mean moves by sum P_(i+1) std_i^2 P_(i+1) g / beta
  = V_steps g / beta.
- That costs KL = sum (std_i^2 P_(i+1) g / beta)^2 / (2 std_i^2) = V_steps |g|^2 / (2 beta^2), in
  nats over all steps and elements; any other chain with that final mean costs more.

What trains here is one number for each step and element, added to the network's output, so the
optimum lies in the class. DPOK divides rewards by their standard deviation sqrt(V) |g|: with the
weight w its beta is w sqrt(V) |g|. The mean moves by V_steps / (w sqrt(V)) along g / |g|, and the
KL is V_steps / (2 w^2 V).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from baselines.dpok import DPOK
from d3po_bench.diffusion.gaussian import Gaussian
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.process import RectifiedFlow, VariancePreserving
from d3po_bench.diffusion.sampling import Draws, pretrained_means, sample, with_reference
from d3po_bench.diffusion.seeding import stream
from d3po_bench.diffusion.update import Updates, update
from d3po_bench.types import Conditions, Prediction, Process, Weights
from tests.points import VARIANCE, Points

STEPS, IMAGES, ROUNDS, BURN_IN = 5, 256, 150, 50
ALPHAS_CUMPROD = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
UP = torch.tensor([1.0, 2.0])
"""g: the reward rises along it."""


class Steered(Points):
    """Points, exactly; what trains is a number for each step and element."""

    def __init__(self, process: Process, prediction: Prediction) -> None:
        super().__init__(torch.device("cpu"))
        self.process, self.prediction = process, prediction
        self.starts = process.levels(STEPS)[:-1]
        self.scale = torch.ones(STEPS, 1)
        """Of each step's number in the output."""
        self.bias = torch.zeros(STEPS, 2, requires_grad=True)

    def output(
        self, x: Tensor, s: Tensor, conditions: Conditions, *, weights: Weights = "current"
    ) -> Tensor:
        found = super().output(x, s, conditions, weights="base")  # the noise
        if self.prediction == "flow":
            slope = VARIANCE * (self.process.alpha(s) / self.process.sigma(s)).float()
            found = found - (conditions["centre"] + slope.unsqueeze(1) * found)
        if weights == "base":
            return found
        step = (s.unsqueeze(1) == self.starts).int().argmax(1)
        return found + (self.scale * self.bias)[step]

    def trainable(self) -> dict[str, Tensor]:
        return {"bias": self.bias}


@torch.no_grad()
def variances(policy: Policy) -> tuple[float, float]:
    """V and V_steps of an element of the final latent."""
    prompt = policy.model.encode(["one"])
    total, of_steps = 1.0, 0.0
    for i, level in enumerate(policy.levels[:-1]):
        at_0, at_1 = (
            policy.model.output(torch.full((1, 2), x), level.view(1), prompt)[0, 0]
            for x in (0.0, 1.0)
        )
        slope = float(policy.table.x[i] + policy.table.output[i] * (at_1 - at_0))
        total, of_steps = (
            slope**2 * v + float(policy.table.std[i]) ** 2 for v in (total, of_steps)
        )
    return total, of_steps


def trained(policy: Policy, method: DPOK) -> Tensor:
    """The mean of the weights [T, 2] over the rounds after the first."""
    (bias,) = policy.model.trainable().values()
    # A step's gradient is the weight times its distance to the optimum, divided by T and by the
    # elements, over which the loss is a mean: this rate goes a tenth of the way.
    optimizer = torch.optim.SGD([bias], lr=0.1 * STEPS * 2 / method.kl_weight)
    updates = Updates(units=IMAGES, micro_batch=IMAGES * STEPS, max_grad_norm=1e6)
    kept = []
    for number in range(ROUNDS):
        drawn = sample(
            policy, ["one"], Draws(seed=0, round=number), images_per_prompt=IMAGES, batch=IMAGES
        )
        rollout = replace(drawn, scores=drawn.latents[:, :, -1] @ UP)
        rollout = with_reference(policy, rollout, method, untrained=False, batch=IMAGES * STEPS)
        rows = method.rows(rollout, stream(0, "rows", number))
        update(policy, method, rows, optimizer, updates, stream(0, "shuffle", number))
        kept.append(bias.detach().clone())
    return torch.stack(kept[BURN_IN:]).mean(0)


def moved(policy: Policy, base: Policy) -> tuple[Tensor, float]:
    """How far the final mean is from the base model's, [2], and the KL of the chains."""
    draws = Draws(seed=1, round=0)
    ours, theirs = (sample(p, ["one"], draws, images_per_prompt=8) for p in (policy, base))
    # From the same noise every image of a linear chain moves alike.
    way = (ours.latents - theirs.latents)[0, :, -1]
    torch.testing.assert_close(way, way[:1].expand_as(way), rtol=1e-3, atol=1e-5)
    means, pretrained = (m[0].flatten(0, 1) for m in (ours.means, pretrained_means(base, ours)))
    kl = Gaussian(means, policy.table.std.float().repeat(8)).kl(pretrained)
    return way.mean(0), float(kl.sum() * 2 / 8)  # elements, images


@pytest.mark.parametrize(
    ("process", "prediction", "eta", "weight"),
    [
        (VariancePreserving(ALPHAS_CUMPROD), "epsilon", 1.0, 0.7),
        pytest.param(RectifiedFlow(), "flow", 0.7, 2.0, marks=pytest.mark.slow),
    ],
    ids=["noise that preserves variance", "rectified flow"],
)
def test_the_optimum_of_reward_and_kl(
    process: Process, prediction: Prediction, eta: float, weight: float
) -> None:
    model = Steered(process, prediction)
    base, policy = (
        Policy(m, steps=STEPS, eta=eta, guidance=1.0) for m in (Steered(process, prediction), model)
    )
    # In units in which all steps need about as long.
    model.scale = (policy.table.std / policy.table.output).float().unsqueeze(1)
    method = DPOK(kl_weight=weight, buffer=0, clip_range=0.9, advantage_clip=100)
    model.bias.data.copy_(trained(policy, method))
    total, of_steps = variances(base)
    expected = of_steps / (weight * math.sqrt(total)) * UP / UP.norm()
    # Each round's gradient is off by the noise of its images, and the mean over n images by
    # sqrt(V_steps) / (w sqrt(n)); a little more along g, where reward and noise go together.
    error = math.sqrt(of_steps) / (weight * math.sqrt((ROUNDS - BURN_IN) * IMAGES))
    way, kl = moved(policy, base)
    assert ((way - expected).abs() < 5 * error).all()
    assert kl == pytest.approx(of_steps / (2 * weight**2 * total), rel=0.05)
