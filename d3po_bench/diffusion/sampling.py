"""sample(): rollouts of a policy, with the reference that a method asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from d3po_bench.diffusion import parallel
from d3po_bench.diffusion.finite import require_finite
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.seeding import Purpose, normal, stream
from d3po_bench.diffusion.transfer import HOST, pinned, sent
from d3po_bench.types import Conditions, Method, Model, Rollout, UsesSomeImages

T = TypeVar("T")

ALL = slice(None)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Names the random streams of one rollout: noise and steps of image k of prompt p."""

    seed: int
    round: int
    noise: Purpose = "noise"
    steps: Purpose = "steps"
    first: int = 0
    """Number of the first prompt: a part of a list draws what it would in the whole."""

    def start(
        self, rows: range, images: int, shared: bool, shape: Sequence[int], part: slice = ALL
    ) -> Tensor:
        """Initial noise [P, K, C, H, W] of the prompts `rows`, equal where shared.

        Args:
            rows: numbers of the prompts.
            images: of each prompt.
            shared: one noise for all images of a prompt.
            shape: of a latent.
            part: which of the images, K of them.
        """
        prompts = range(self.first + rows.start, self.first + rows.stop)
        own = range(images)[part]
        index = [p * images + (0 if shared else k) for p in prompts for k in own]
        unique = sorted(set(index))
        drawn = normal(shape, (stream(self.seed, self.noise, self.round, i) for i in unique))
        place = torch.tensor([unique.index(i) for i in index])
        return drawn[place].view(len(rows), len(own), *shape)

    def along(
        self, rows: range, images: int, steps: int, shape: Sequence[int], part: slice = ALL
    ) -> Tensor:
        """Step noise [P, K, T, C, H, W] of the prompts `rows`; see `start`."""
        prompts = range(self.first + rows.start, self.first + rows.stop)
        index = [p * images + k for p in prompts for k in range(images)[part]]
        streams = (stream(self.seed, self.steps, self.round, i) for i in index)
        return normal((steps, *shape), streams).view(len(rows), -1, steps, *shape)


@torch.no_grad()
def sample(
    policy: Policy, prompts: Sequence[str], draws: Draws, *,
    images_per_prompt: int = 1, shared_noise: bool = False, batch: int = 64,
    progress: Callable[[float], None] = lambda share: None,
) -> Rollout:  # fmt: skip
    """Draw images and keep every latent on the way; scores are left at zero.

    Args:
        policy: whose steps to take.
        prompts: P prompts.
        draws: the random streams to use.
        images_per_prompt: K.
        shared_noise: start the K images of a prompt from one noise; the first step of those in
            flight is then computed once.
        batch: most images in flight at a time; it does not change what is drawn.
        progress: called with the share done.

    Raises:
        RunError: a mean is not finite.
    """
    k, total = images_per_prompt, len(prompts)
    model, steps, shape = policy.model, policy.steps, policy.model.latent_shape
    conditions = model.encode(prompts)
    latents, means = (torch.empty(total, k, n, *shape) for n in (steps + 1, steps))
    parts = side_by_side(total, k, batch)

    def noise(number: int) -> list[Tensor]:
        rows, images = range(total)[parts[number][0]], parts[number][1]
        start = draws.start(rows, k, shared_noise, shape, images)
        along = draws.along(rows, k, steps, shape, images)
        return [pinned(tensor, model.device) for tensor in (start, along)]

    def walk(number: int) -> None:
        part, (start, along) = parts[number], (sent(t, model.device) for t in drawn(number))
        walked = _walk(policy, start, along, conditions.take(part[0]), shared_noise)
        latents[part], means[part] = walked
        progress((number + 1) / len(parts))

    with ahead(len(parts), noise) as drawn:
        parallel.share(len(parts), walk)
    for number, part in enumerate(parts):
        parallel.send(latents[part], number)
        parallel.send(means[part], number)
    require_finite("means of the denoising steps", means)  # of which latents are made
    return Rollout(
        prompts=tuple(prompts), conditions=conditions.to(HOST), latents=latents, means=means,
        levels=policy.levels, training_levels=model.process.training_levels,
        scores=torch.zeros(total, k),
    )  # fmt: skip


def side_by_side(prompts: int, images: int, most: int) -> list[tuple[slice, slice]]:
    """Prompts and which of their images are drawn at a time: whole prompts, where one fits.

    Args:
        prompts: number of them.
        images: of each.
        most: images at a time.
    """
    block, side = max(1, most // images), min(most, images)
    return [
        (slice(p, min(p + block, prompts)), slice(i, min(i + side, images)))
        for p in range(0, prompts, block)
        for i in range(0, images, side)
    ]


@contextmanager
def ahead(count: int, make: Callable[[int], T]) -> Iterator[Callable[[int], T]]:
    """While a device works on a piece, have what the next one needs made in another thread.

    Args:
        count: of pieces; this process does its share of them, in order.
        make: what piece n needs. It must not depend on what else is going on.

    Yields:
        What gives it, for the pieces of this process in their order.
    """
    with ThreadPoolExecutor(1) as aside:
        first = parallel.rank()
        waiting = {first: aside.submit(make, first)} if first < count else {}

        def made(number: int) -> T:
            found = waiting.pop(number).result()
            if (later := number + parallel.world()) < count:
                waiting[later] = aside.submit(make, later)
            return found

        yield made


def _walk(
    policy: Policy, start: Tensor, noise: Tensor, conditions: Conditions, shared: bool
) -> tuple[Tensor, Tensor]:
    """The latents of a block of prompts, of which the first are given, and the means."""
    p, k = start.shape[:2]
    latents = start.new_empty(p, k, policy.steps + 1, *start.shape[2:])
    means, latents[:, :, 0] = torch.empty_like(noise), start
    every = conditions.repeat(k)
    for i in range(policy.steps):
        x = latents[:, :, i]
        if shared and i == 0:  # one noise for the K images: one step for all of them
            number = torch.zeros(p, dtype=torch.int64, device=x.device)
            mean = policy.step(x[:, 0], number, conditions).mean.unsqueeze(1).expand_as(x)
        else:
            number = torch.full((p * k,), i, device=x.device)
            mean = policy.step(x.flatten(0, 1), number, every).mean.view_as(x)
        means[:, :, i] = mean
        latents[:, :, i + 1] = means[:, :, i] + float(policy.table.std[i]) * noise[:, :, i]
    return latents, means


@torch.no_grad()
def pretrained_means(
    policy: Policy,
    rollout: Rollout,
    *,
    batch: int = 256,
    skip: int = 0,
    images: Tensor | None = None,
) -> Tensor:
    """Step means [P, K, T - skip, C, H, W] of the pretrained model on a rollout's own latents.

    Depends on nothing trainable, so once per round is enough, in large batches.

    Args:
        policy: whose model and schedule.
        rollout: the latents.
        batch: most steps in one call.
        skip: last steps to leave out.
        images: [P, K] bool, which images; the others keep the rollout's own means. All if None.
    """
    out = rollout.means[:, :, : rollout.means.shape[2] - skip].clone()
    steps, device = out.shape[2], policy.model.device
    chosen = torch.ones(out.shape[:2], dtype=torch.bool) if images is None else images
    prompt, image = chosen.nonzero(as_tuple=True)
    flat = torch.empty(len(prompt) * steps, *out.shape[3:])
    pieces = torch.arange(len(flat)).split(batch)

    def compute(number: int) -> None:
        items = pieces[number]
        i, j, s = prompt[items // steps], image[items // steps], items % steps
        x, conditions = rollout.latents[i, j, s], rollout.conditions.take(i)
        there = (sent(x, device), sent(s, device), sent(conditions, device))
        flat[items] = policy.step(*there, weights="base").mean.to(HOST)

    parallel.share(len(pieces), compute)
    for number, items in enumerate(pieces):
        parallel.send(flat[int(items[0]) : int(items[-1]) + 1], number)
    out[prompt, image] = flat.view(len(prompt), *out.shape[2:])
    return out


def pictures(model: Model, latents: Tensor, batch: int) -> Tensor:
    """Pictures [N, 3, h, w] uint8 of final latents [N, C, H, W], as `Model.decode` gives them.

    Args:
        model: whose decoder.
        latents: of all pictures.
        batch: pictures in a piece of the work, which decides bits where decoders' do.
    """
    return parallel.joined(
        latents.split(batch), lambda part: model.decode(sent(part, model.device))
    )


def images_used(method: Method[Any], rollout: Rollout) -> Tensor:
    """Which images of a scored rollout the method learns from, [P, K] bool."""
    if isinstance(method, UsesSomeImages):
        return method.images_used(rollout)
    return torch.ones(rollout.means.shape[:2], dtype=torch.bool)


def needs_chain(method: Any) -> bool:
    """Whether it learns from every denoising step of an image, not from the finished one alone."""
    return bool(getattr(method, "needs_chain", True))


def with_reference(
    policy: Policy,
    rollout: Rollout,
    method: Method[Any],
    *,
    untrained: bool,
    batch: int,
    skip: int = 0,
) -> Rollout:
    """Add the reference means that the method asks for.

    They are the rollout's own where the reference is the sampling policy; while the policy is
    `untrained` and so equals the pretrained model; and wherever nothing is trained on: in the last
    `skip` steps, and for images that the method does not use.
    """
    if method.reference is None:
        return rollout
    if method.reference == "sampling" or untrained:
        return replace(rollout, reference=rollout.means)
    images = images_used(method, rollout)
    reference = pretrained_means(policy, rollout, batch=batch, skip=skip, images=images)
    require_finite("means of the reference", reference)
    rest = rollout.means[:, :, reference.shape[2] :]
    return replace(rollout, reference=torch.cat([reference, rest], 2))
