"""Rollouts: the chain, its noise, and the reference beside it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from d3po_bench.d3po import D3PO
from d3po_bench.diffusion import parallel
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import (
    Draws,
    ahead,
    images_used,
    pretrained_means,
    sample,
    with_reference,
)
from d3po_bench.diffusion.seeding import stream
from d3po_bench.diffusion.transfer import sent
from d3po_bench.models.stable_diffusion import StableDiffusion
from d3po_bench.types import Conditions, Rollout, Step
from tests.conftest import CPU, disturb
from tests.rounds import PROMPTS, rollout_of


def test_every_step_is_its_mean_and_the_noise_of_that_image(micro_model: StableDiffusion) -> None:
    policy = Policy(micro_model, steps=4)
    rollout = rollout_of(policy, images=3, shared=False)
    assert rollout.latents.shape == (3, 3, 5, 4, 4, 4)
    assert rollout.means.shape == (3, 3, 4, 4, 4, 4)
    assert rollout.levels.tolist() == [751, 501, 251, 1, 0]
    assert rollout.training_levels.tolist() == list(range(1000))
    assert rollout.latents.dtype == torch.float32
    noise = torch.randn((4, 4, 4, 4), generator=stream(0, "steps", 0, index=1 * 3 + 2))
    for i in range(4):
        std = float(policy.table.std[i])
        expected = rollout.means[1, 2, i] + std * noise[i]
        torch.testing.assert_close(rollout.latents[1, 2, i + 1], expected)


def test_shared_noise_is_shared_and_own_noise_is_not(micro_model: StableDiffusion) -> None:
    policy = Policy(micro_model, steps=2)
    shared = rollout_of(policy, shared=True)
    own = rollout_of(policy, shared=False)
    assert torch.equal(shared.latents[:, 0, 0], shared.latents[:, 1, 0])
    assert torch.equal(shared.means[:, 0, 0], shared.means[:, 1, 0])
    assert not torch.equal(shared.latents[:, 0, 1], shared.latents[:, 1, 1])
    assert not torch.equal(own.latents[:, 0, 0], own.latents[:, 1, 0])


def test_shared_first_step_is_computed_once(micro_model: StableDiffusion) -> None:
    rollout_of(Policy(micro_model, steps=4), images=7, shared=True)
    # 3 prompts, guidance doubles: 2 * 3 at the first step, 2 * 21 at the other three.
    assert micro_model.forwards == 6 + 3 * 42
    assert micro_model.backwards == 0


@pytest.mark.parametrize("shared", [False, True])
def test_batch_size_bounds_a_pass_and_does_not_change_what_is_drawn(
    shared: bool, micro_model: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(micro_model)
    policy, rows = Policy(micro_model, steps=3), list[int]()

    def step(self: Policy, x_t: Tensor, *given: Any) -> Step:
        rows.append(len(x_t))
        return taken(self, x_t, *given)

    def drawn(batch: int) -> Rollout:
        rows.clear()
        return sample(policy, PROMPTS, Draws(seed=3, round=1), images_per_prompt=3,
                      shared_noise=shared, batch=batch)  # fmt: skip

    taken = Policy.step
    monkeypatch.setattr(Policy, "step", step)
    whole = drawn(64)
    for batch, most in ((7, 6), (2, 2), (1, 1)):
        part = drawn(batch)
        assert max(rows) == most
        torch.testing.assert_close(part.latents, whole.latents, rtol=1e-5, atol=1e-5)
        assert torch.equal(part.latents[:, :, 0], whole.latents[:, :, 0])


def test_same_seed_same_bytes_other_seed_not(micro_model: StableDiffusion) -> None:
    policy = Policy(micro_model, steps=2)
    assert torch.equal(rollout_of(policy).latents, rollout_of(policy).latents)
    assert not torch.equal(rollout_of(policy).latents, rollout_of(policy, seed=1).latents)


def test_evaluation_draws_from_streams_of_its_own(micro_model: StableDiffusion) -> None:
    policy = Policy(micro_model, steps=2)
    before = rollout_of(policy)
    draws = Draws(seed=0, round=0, noise="eval-noise", steps="eval-steps")
    evaluated = sample(policy, PROMPTS, draws, images_per_prompt=2, shared_noise=True)
    assert torch.equal(before.latents, rollout_of(policy).latents)
    assert not (evaluated.latents == before.latents).any()


# ---- the reference


def test_the_reference_does_not_depend_on_its_batches(micro_model: StableDiffusion) -> None:
    disturb(micro_model)
    policy = Policy(micro_model, steps=4)
    rollout = rollout_of(policy)
    small, large = (pretrained_means(policy, rollout, batch=b) for b in (3, 100))
    torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-5)
    x, conditions = rollout.latents[1, 1, 2:3], rollout.conditions.take(slice(1, 2))
    with torch.no_grad():
        one = policy.step(x, torch.tensor([2]), conditions, weights="base").mean[0]
    torch.testing.assert_close(small[1, 1, 2], one, rtol=1e-5, atol=1e-5)


def test_only_images_that_are_used_get_a_reference(micro_model: StableDiffusion) -> None:
    disturb(micro_model)
    policy, method = Policy(micro_model, steps=4), D3PO(pairs="extremes")
    rollout = rollout_of(policy, images=4)
    before = micro_model.forwards
    found = with_reference(policy, rollout, method, untrained=False, batch=7, skip=1)
    assert micro_model.forwards - before == 3 * 2 * 3 * 2  # prompts, images, steps, guidance
    whole = pretrained_means(policy, rollout, batch=7, skip=1)
    assert found.reference is not None
    chosen = images_used(method, rollout)
    assert chosen.sum(1).tolist() == [2, 2, 2]
    torch.testing.assert_close(found.reference[chosen][:, :3], whole[chosen], rtol=1e-4, atol=1e-4)
    assert torch.equal(found.reference[~chosen], rollout.means[~chosen])
    with_all = replace(rollout, reference=torch.cat([whole, rollout.means[:, :, 3:]], 2))
    ours, theirs = (method.rows(r, stream(0, "rows")) for r in (found, with_all))
    torch.testing.assert_close(ours.reference, theirs.reference, rtol=1e-4, atol=1e-4)


# ---- what is made ready for a device, and sent to it


@pytest.mark.parametrize(("rank", "world", "own"), [(0, 1, [0, 1, 2, 3]), (1, 2, [1, 3])])
def test_what_the_next_piece_needs_is_made_while_one_is_worked_on(
    rank: int, world: int, own: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    monkeypatch.setattr(parallel, "world", lambda: world)
    begun = {n: threading.Event() for n in range(4)}

    def make(number: int) -> int:
        begun[number].set()
        return number * number

    with ahead(4, make) as made:
        for number, later in zip(own, [*own[1:], None], strict=True):
            assert made(number) == number * number
            assert later is None or begun[later].wait(60)
    assert [n for n, event in begun.items() if event.is_set()] == own


def test_what_fails_in_the_other_thread_fails_here() -> None:
    with pytest.raises(ZeroDivisionError), ahead(1, lambda number: 1 / number) as made:
        made(0)


def test_a_card_copies_from_pinned_memory_while_python_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = list[Any]()
    x, card = torch.ones(2), torch.device("cuda")

    def noted(tensor: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        calls.append((args, given))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", noted)
    monkeypatch.setattr(torch.Tensor, "to", noted)
    sent(Conditions({"text": x}), card)
    assert calls == [((), {}), ((card,), {"non_blocking": True})]
    calls.clear()
    sent(x, CPU)
    assert calls == [((CPU,), {})]
