"""How fast a round is, as ratios of CPU seconds in one process on one thread: `nox -s bench`.

For two methods and two presets on the embedded model, a round of ours, in turn with

- the published code's loop over the same work (yk7333/d3po, kvablack/ddpo-pytorch): images drawn a
  few at a time, one small call for each timestep of what is trained on, LoRA layers of peft, and
  for D3PO a second network as reference, which has no adapter;
- the floor: as many latents as that round passed, through the network alone, at whichever batch is
  fastest, those without a gradient through a network without an adapter.

Then a round of eight images with `pairs=all` against the same round with every pair by itself and
peft's layers, as commit 58e92b5 computed it, and the share of evaluation in a run of the preset
quick with five seeds. Medians, with the least and the most; each ratio beside its bar.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import median

import torch
from peft.tuners.lora import Linear
from torch import Generator, Tensor

from d3po_bench.config import make
from d3po_bench.d3po import D3PO, Pairs, d3po_loss
from d3po_bench.diffusion.advantages import ppo_loss
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws
from d3po_bench.models.adapters import DiffusersModel, Training
from d3po_bench.models.low_rank import OneProduct
from d3po_bench.models.sources import load, model_source
from d3po_bench.training.evaluation import Evaluation
from d3po_bench.training.trainer import Trainer
from d3po_bench.types import Conditions, Rollout
from eval.tools import TOOLS
from tests.conftest import CPU
from tests.rounds import trainer_of

FORWARD, BACKWARD = (32, 64, 128, 256), (32, 64, 128)
"""Batches of the network alone, in latents."""

DRAWN_AT_ONCE, LEARNED_AT_ONCE = 1, 1
"""Images, by default in ddpo-pytorch: `sample.batch_size` and `train.batch_size` of its
config/base.py."""

SEEDS = 5
"""Of a quick run, which share the evaluation of the base model."""


def trainer(method: str, preset: str, prompts: int, **settings: str) -> Trainer:
    """A trainer on the embedded model."""
    changes = {"prompts_per_round": str(prompts), "dtype": "fp32", "learning_rate": "1e-4"}
    config, execution = make(method, "incompress", preset, changes | settings, model="tiny")
    return trainer_of(config, replace(execution, device="cpu"))


def model_of(of: Trainer) -> DiffusersModel:
    """Its model, which is one that diffusers loads."""
    assert isinstance(of.model, DiffusersModel)
    return of.model


def bare() -> DiffusersModel:
    """The embedded model without an adapter."""
    found = load(model_source("tiny"), CPU, Training())
    assert isinstance(found, DiffusersModel)
    return found


def as_peft_computes(of: Trainer) -> Trainer:
    """With peft's own layers."""
    for layer in model_of(of).network.modules():
        if type(layer) is OneProduct:
            layer.__class__ = Linear
    return of


# ---- the published loops


@torch.no_grad()
def _rollout(policy: Policy, x: Tensor, noise: Tensor, conditions: Conditions) -> list[Tensor]:
    chain = [x]
    for i in range(policy.steps):
        step = policy.step(chain[-1], torch.full((len(x),), i, device=x.device), conditions)
        chain.append(step.sample(noise[:, i]))
    return chain


def _trained(of: Trainer, policy: Policy) -> range:
    """As many steps of the policy as the trainer learns from."""
    left = policy.steps - of.config.skip_steps
    return range(max(1, round(left * of.config.timestep_fraction)))


def published_round(policy: Policy, reference: Policy, ours: Trainer) -> None:
    """D3PO's round, one call at a time, on any device: the best image of a prompt and the worst."""
    config, device = ours.config, policy.model.device
    count, images = config.prompts_per_round, config.images_per_prompt or 2
    prompts = list(ours.experience.prompts[:count])
    conditions = policy.model.encode(prompts)
    draws, shape = Draws(seed=0, round=0), policy.model.latent_shape
    noise = draws.start(range(count), images, True, shape).to(device)
    along = draws.along(range(count), images, policy.steps, shape).to(device)
    chains = [_rollout(policy, noise[:, k], along[:, k], conditions) for k in range(images)]
    scores = torch.stack(
        [ours.experience.scorer(policy.model.decode(chain[-1]), prompts) for chain in chains]
    )
    steps = _trained(ours, policy)
    for pair in range(count):
        own = conditions.take(slice(pair, pair + 1))
        for i in steps:
            ratios, number = [], torch.tensor([i], device=device)
            for k in (int(scores[:, pair].argmax()), int(scores[:, pair].argmin())):
                x, x_next = chains[k][i][pair : pair + 1], chains[k][i + 1][pair : pair + 1]
                step = policy.step(x, number, own)
                with torch.no_grad():
                    old = reference.step(x, number, own)
                ratios.append(step.log_prob(x_next) - old.log_prob(x_next))
            won = torch.ones(1, device=device)
            loss = d3po_loss(torch.stack(ratios, 1), won).mean()
            (loss / len(steps)).backward()
        if (pair + 1) % config.units_per_update == 0 or pair + 1 == count:
            ours.optimizer.step()
            ours.optimizer.zero_grad()


def ddpo_round(policy: Policy, ours: Trainer) -> None:
    """DDPO's round in the way of ddpo-pytorch."""
    config = ours.config
    images = config.images_per_prompt or 1
    count = config.prompts_per_round * images
    prompts = [
        p for p in ours.experience.prompts[: config.prompts_per_round] for _ in range(images)
    ]
    conditions = policy.model.encode(prompts)
    draws, shape = Draws(seed=0, round=0), policy.model.latent_shape
    noise = draws.start(range(count), 1, False, shape)[:, 0]
    along = draws.along(range(count), 1, policy.steps, shape)[:, 0]
    batches = [slice(n, n + DRAWN_AT_ONCE) for n in range(0, count, DRAWN_AT_ONCE)]
    chains = [_rollout(policy, noise[b], along[b], conditions.take(b)) for b in batches]
    chain = [torch.cat(latents) for latents in zip(*chains, strict=True)]
    found = torch.cat(
        [ours.experience.scorer(policy.model.decode(chain[-1][b]), prompts[b]) for b in batches]
    )
    advantage = ((found - found.mean()) / (found.std() + 1e-8)).clamp(-5, 5)
    steps, learned = _trained(ours, policy), 0
    for n in range(0, count, LEARNED_AT_ONCE):
        part = slice(n, n + LEARNED_AT_ONCE)
        for i in steps:
            x, number = chain[i][part], torch.full((len(chain[i][part]),), i)
            step = policy.step(x, number, conditions.take(part))
            log_prob = step.log_prob(chain[i + 1][part])
            loss = ppo_loss(log_prob - log_prob.detach(), advantage[part], 1e-4).mean()
            (loss / len(steps)).backward()
        learned += LEARNED_AT_ONCE
        if learned >= config.units_per_update or n + LEARNED_AT_ONCE >= count:
            ours.optimizer.step()
            ours.optimizer.zero_grad()
            learned = 0


# ---- measuring


@dataclass
class Seconds:
    """CPU seconds of calls that are made in turn."""

    of: dict[str, list[float]]

    @property
    def median(self) -> dict[str, float]:
        """Name -> the median."""
        return {name: median(found) for name, found in self.of.items()}

    def said(self, name: str) -> str:
        """The median, the least and the most."""
        found = self.of[name]
        return f"{median(found):.2f} s ({min(found):.2f} to {max(found):.2f})"


def in_turn(calls: Mapping[str, Callable[[], object]], repeats: int) -> Seconds:
    """CPU seconds of every call, `repeats` times one after the other, after one that warms up."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number:
                found[name].append(time.process_time() - start)
    return Seconds(found)


def a_round(of: Trainer) -> None:
    """A round of ours."""
    of.train_round(lambda share: None)


def passes(model: DiffusersModel, count: int, gradient: bool) -> None:
    """So many latents through the network."""
    x, s = torch.zeros(count, *model.latent_shape), torch.full((count,), 500)
    conditions = model.encode(["cat"]).expand(count)
    with torch.set_grad_enabled(gradient):
        output = model.output(x, s, conditions)
        if gradient:
            output.square().mean().backward()


class NetworkAlone:
    """The network at the batches that are fastest here, without and with a gradient."""

    def __init__(self, repeats: int) -> None:
        """Try every batch."""
        self.models = {False: bare(), True: model_of(trainer("d3po", "quick", 1))}
        self.batch = {}
        for gradient, batches in ((False, FORWARD), (True, BACKWARD)):
            calls = {str(n): partial(passes, self.models[gradient], n, gradient) for n in batches}
            found = in_turn(calls, repeats).median
            self.batch[gradient] = min(batches, key=lambda n: found[str(n)] / n)

    def compute(self, without: int, gradient: int) -> None:
        """So many latents without and with a gradient; a last batch is smaller."""
        for kind, count in ((False, without), (True, gradient)):
            for n in range(0, count, self.batch[kind]):
                passes(self.models[kind], min(self.batch[kind], count - n), kind)


def told(name: str, value: float, bar: float, most: bool) -> None:
    """Print a ratio beside its bar."""
    met = value <= bar if most else value >= bar
    sign = "<=" if most else ">="
    print(f"  {name}: {value:.2f} (bar {sign} {bar:g}: {'met' if met else 'missed'})", flush=True)


def against_the_published(
    method: str, preset: str, prompts: int, repeats: int, alone: NetworkAlone
) -> None:
    """A method's round against its published loop and its floor."""
    ours = trainer(method, preset, prompts)
    theirs = as_peft_computes(trainer(method, preset, prompts))
    config = ours.config
    frozen = Policy(bare(), steps=config.sampling_steps, eta=config.eta, guidance=config.guidance)
    plain = partial(ddpo_round, theirs.policy, theirs)
    if method == "d3po":
        plain = partial(published_round, theirs.policy, frozen, theirs)
    spent = [0, 0]

    def floor() -> None:
        """As many passes as in our round before."""
        forwards, backwards = ours.model.forwards, ours.model.backwards
        alone.compute(forwards - backwards - spent[0], backwards - spent[1])
        spent[:] = forwards - backwards, backwards

    found = in_turn({"ours": partial(a_round, ours), "published": plain, "floor": floor}, repeats)
    print(f"{method}, {preset}, {prompts} prompts, T = {config.sampling_steps}")
    for name in ("ours", "published", "floor"):
        print(f"  {name} {found.said(name)}")
    told("published / ours", found.median["published"] / found.median["ours"],
         3.4 if method == "d3po" else 2.8, False)  # fmt: skip
    told("ours / floor", found.median["ours"] / found.median["floor"], 1.05, True)


@dataclass(frozen=True)
class EachByItself(D3PO):
    """Every pair computes both its images, as if no other pair had them."""

    def rows(self, rollout: Rollout, rng: Generator) -> Pairs:
        """The same pairs, with nothing to share."""
        rows = super().rows(rollout, rng)
        return replace(rows, same=torch.arange(rows.same.numel()).view(rows.same.shape))


def all_pairs_of_eight(prompts: int, repeats: int) -> None:
    """Eight images of a prompt, all pairs, one update a round."""
    settings = {"images_per_prompt": "8", "pairs": "all", "units_per_update": str(28 * prompts)}
    ours, before = (trainer("d3po", "official_code", prompts, **settings) for _ in range(2))
    before.method = EachByItself()
    as_peft_computes(before)
    calls = {"ours": partial(a_round, ours), "before": partial(a_round, before)}
    found = in_turn(calls, repeats)
    print(f"d3po, official_code, {prompts} prompts of eight images, all pairs in one update")
    print(f"  ours {found.said('ours')}, as before {found.said('before')}")
    told("before / ours", found.median["before"] / found.median["ours"], 4, False)


def share_of_evaluation(method: str, repeats: int) -> None:
    """How much of a run of the preset quick is evaluation."""
    of = trainer(method, "quick", 16)
    evaluation = Evaluation(of.config, of.execution, of.experience, TOOLS, CPU)
    found = in_turn({
        "round": partial(a_round, of),
        "evaluation": lambda: evaluation(of.model, of.round),
        "base": lambda: evaluation(of.model, 0),
    }, repeats)  # fmt: skip
    rounds = of.config.rounds
    later = sum(evaluation.due(number) for number in range(1, rounds + 1))
    spent = later * found.median["evaluation"] + found.median["base"] / SEEDS
    share = spent / (spent + rounds * found.median["round"])
    print(f"{method}, quick, evaluation in {SEEDS} runs of {rounds} rounds")
    print(f"  round {found.said('round')}, evaluation {found.said('evaluation')}")
    told("share", share, 0.1, True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print all figures, or those that are named."""
    parts = ["d3po", "ddpo", "all-pairs", "evaluation"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; all")
    parser.add_argument("--prompts", type=int, default=10, help="of a round (10)")
    parser.add_argument("--repeats", type=int, default=5, help="counted, after one (5)")
    asked = parser.parse_args(arguments)
    chosen = asked.parts or parts
    torch.set_num_threads(1)
    if learned := [method for method in ("d3po", "ddpo") if method in chosen]:
        alone = NetworkAlone(asked.repeats)
        for method, preset in product(learned, ("official_code", "quick")):
            against_the_published(method, preset, asked.prompts, asked.repeats, alone)
    if "all-pairs" in chosen:
        all_pairs_of_eight(max(1, asked.prompts // 5), asked.repeats)
    if "evaluation" in chosen:
        for method in ("d3po", "ddpo"):
            share_of_evaluation(method, max(1, asked.repeats // 2))


if __name__ == "__main__":
    main()
