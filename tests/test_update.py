"""Updates: one gradient whatever the micro-batches, and none from nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d3po_bench.d3po import D3PO, Pairs
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import with_reference
from d3po_bench.diffusion.seeding import stream
from d3po_bench.diffusion.update import Updates, update
from d3po_bench.errors import RunError
from d3po_bench.models.stable_diffusion import StableDiffusion
from d3po_bench.types import Metrics, Reference
from tests.conftest import disturb, loaded
from tests.rounds import KeepGradient, adam, gradient, near, rollout_of, rows_of, weights


def shuffled() -> torch.Generator:
    return stream(0, "shuffle")


def test_the_first_update_costs_log_two_and_has_a_gradient(micro_model: StableDiffusion) -> None:
    policy = Policy(micro_model, steps=5)
    rows = rows_of(policy, untrained=True)
    optimizer = KeepGradient(micro_model)
    metrics = update(policy, D3PO(), rows, optimizer, Updates(units=3), shuffled())
    assert metrics["abs_log_ratio"] < 1e-6
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(("reference", "equal"), [("sampling", True), ("pretrained", False)])
def test_after_training_ratios_are_one_to_the_sampling_policy_alone(
    reference: Reference, equal: bool, micro_model: StableDiffusion
) -> None:
    disturb(micro_model)
    policy, method = Policy(micro_model, steps=5), D3PO(reference=reference)
    rows = rows_of(policy, method)
    optimizer = KeepGradient(micro_model)
    metrics = update(policy, method, rows, optimizer, Updates(units=3), shuffled())
    assert (metrics["abs_log_ratio"] < 1e-6) is equal


def test_merged_steps_give_the_accumulated_gradient(micro_model: StableDiffusion) -> None:
    disturb(micro_model, 0.01)
    policy, method = Policy(micro_model, steps=5), D3PO()
    rows = rows_of(policy, method)
    optimizer = KeepGradient(micro_model)
    update(policy, method, rows, optimizer, Updates(units=3, micro_batch=64), shuffled())
    for weight in micro_model.trainable().values():
        weight.grad = None
    for unit in range(3):  # the published way: one pair, one step, one backward
        for step in range(5):
            loss, _ = method.loss(policy, rows.take(torch.tensor([unit]), torch.tensor([step])))
            (loss / 15).backward()
    slow = gradient(micro_model)
    slow = slow * min(1.0, 1.0 / float(slow.norm()))
    near(optimizer.kept, slow)


def test_ties_leave_the_weights_unchanged(micro_model: StableDiffusion) -> None:
    disturb(micro_model)
    policy, method = Policy(micro_model, steps=4), D3PO()
    drawn = rollout_of(policy)
    tied = replace(drawn, scores=torch.ones_like(drawn.scores))
    tied = with_reference(policy, tied, method, untrained=False, batch=8)
    before = weights(micro_model)
    rows = method.rows(tied, stream(0, "rows"))
    metrics = update(policy, method, rows, adam(micro_model), Updates(), shuffled())
    assert torch.equal(before, weights(micro_model))
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (metrics["ties"], metrics["updates"], metrics["accuracy"]) == (1, 3, 0.5)


def test_micro_batches_do_not_change_the_result(micro: Path) -> None:
    gradients, logs, ends = [], [], []
    for size in (1, 7, 64):
        model = loaded(micro)
        model.add_adapter(0)
        disturb(model, 0.01)
        policy = Policy(model, steps=3)
        optimizer = KeepGradient(model)
        rows = rows_of(policy)
        updates = Updates(units=3, micro_batch=size)
        logs.append(update(policy, D3PO(), rows, optimizer, updates, shuffled()))
        gradients.append(optimizer.kept)
        updates = Updates(units=1, micro_batch=size)
        update(policy, D3PO(), rows, adam(model, 1e-3), updates, shuffled())
        ends.append(weights(model))
    for kept, log, end in zip(gradients[1:], logs[1:], ends[1:], strict=True):
        near(end, ends[0], 1e-5)  # weights after three steps
        # The sums of a gradient cancel between the images of a pair; what rounding is left of
        # them depends on the CPU: 5e-6 to 1.1e-5 seen. A wrong share of a micro-batch gives 1e-2.
        near(kept, gradients[0], 1e-4)
        assert log == pytest.approx(logs[0], rel=1e-3)


def test_an_image_that_is_in_several_pairs_is_computed_once(micro_model: StableDiffusion) -> None:
    disturb(micro_model, 0.01)
    policy, method = Policy(micro_model, steps=3), D3PO()
    drawn = rollout_of(policy, images=4)
    rows = method.rows(replace(drawn, reference=drawn.means + 0.01), stream(0, "rows"))
    gradients, spent = [], []
    for size in (1, 5, 64):  # a pair alone; two prompts and half of a third; all
        before, optimizer = micro_model.backwards, KeepGradient(micro_model)
        update(policy, method, rows, optimizer, Updates(units=18, micro_batch=size), shuffled())
        gradients.append(optimizer.kept)
        spent.append((micro_model.backwards - before) // 2)  # of which guidance takes two
    assert (spent[0], spent[2]) == (18 * 2 * 3, 3 * 4 * 3)
    assert spent[2] <= spent[1] < spent[2] * 1.5
    for kept in gradients[1:]:
        near(kept, gradients[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"units": 1}, 3),
        ({"units": 2}, 2),
        ({"units": 3, "every": "timestep"}, 4),
        ({"units": 1, "passes": 2}, 6),
        ({"count": 2}, 2),  # of two pairs and of one
        ({"count": 99, "units": 3}, 3),  # a unit each: there are no more
        ({"units": 3, "every": "timestep", "passes": 2}, 8),
    ],
)
def test_optimizer_steps_of_a_round(
    options: dict[str, Any], expected: int, micro_model: StableDiffusion
) -> None:
    policy = Policy(micro_model, steps=4)
    rows = rows_of(policy, untrained=True)
    optimizer = KeepGradient(micro_model)
    metrics = update(policy, D3PO(), rows, optimizer, Updates(**options), shuffled())
    assert metrics["updates"] == expected


def test_timestep_fraction_takes_a_subset_of_each_unit(micro_model: StableDiffusion) -> None:
    policy = Policy(micro_model, steps=4)
    rows = rows_of(policy, untrained=True)
    start = micro_model.backwards
    updates = Updates(units=3, timestep_fraction=0.5)
    update(policy, D3PO(), rows, KeepGradient(micro_model), updates, shuffled())
    assert micro_model.backwards - start == 3 * 2 * 2 * 2  # pairs, steps, images, guidance halves


def test_a_loss_that_is_not_finite_stops_before_the_step(micro_model: StableDiffusion) -> None:
    policy = Policy(micro_model, steps=4)
    rows = rows_of(policy, untrained=True)
    broken = replace(rows, reference=rows.reference * float("nan"))
    before = weights(micro_model)
    said = r"The update is not finite: nan for loss, .*nan for abs_log_ratio"
    with pytest.raises(RunError, match=said):
        update(policy, D3PO(), broken, adam(micro_model), Updates(), shuffled())
    assert torch.equal(before, weights(micro_model))


class Detached(D3PO):
    """A loss that nothing can be learned from."""

    def loss(self, policy: Any, items: Pairs) -> tuple[Tensor, Metrics]:
        loss, metrics = super().loss(policy, items)
        return loss.detach(), metrics


class Misnamed(D3PO):
    """A measurement that has the name of the loss."""

    def loss(self, policy: Any, items: Pairs) -> tuple[Tensor, Metrics]:
        loss, metrics = super().loss(policy, items)
        return loss, {**metrics, "loss": torch.tensor(7.0)}


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Detached(), "The loss of Detached has no gradient, so nothing would be trained"),
        (Misnamed(), "The method Misnamed measures loss, as every run does"),
    ],
)
def test_a_loss_that_would_mislead_stops(
    method: D3PO, said: str, micro_model: StableDiffusion
) -> None:
    policy = Policy(micro_model, steps=4)
    rows = rows_of(policy, untrained=True)
    with pytest.raises(RunError, match=said):
        update(policy, method, rows, adam(micro_model), Updates(), shuffled())


def test_nothing_is_trained_without_autograd(micro_model: StableDiffusion) -> None:
    policy = Policy(micro_model, steps=3)
    rows = rows_of(policy)
    with torch.no_grad(), pytest.raises(RunError, match="Autograd is switched off, so nothing"):
        update(policy, D3PO(), rows, adam(micro_model), Updates(), shuffled())
