"""Rounds of human feedback: drawing, votes of simulated raters, learning, and the next round."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from d3po_bench.cli import cli, main
from d3po_bench.config import Execution
from d3po_bench.diffusion.policy import Policy
from d3po_bench.digests import sha256_of
from d3po_bench.errors import UserError
from d3po_bench.feedback import comparisons, simulated, training
from d3po_bench.feedback.agreement import read_label_files
from d3po_bench.feedback.drawing import draw_round
from d3po_bench.feedback.handout import Hand, hand_out
from d3po_bench.feedback.invitations import find_rater, invite, pool_of
from d3po_bench.feedback.questions import Answer, Kind
from d3po_bench.feedback.questions import Judged as JudgedAs
from d3po_bench.feedback.rounds import SOURCES, Round
from d3po_bench.feedback.sampling import Before, Sampling, chosen_prompts, prepared, read_rollout
from d3po_bench.feedback.shares import clustered
from d3po_bench.feedback.simulated import Annotator
from d3po_bench.feedback.store import HandoutSettings, default_url, open_labels
from d3po_bench.feedback.study import Study, one_question
from d3po_bench.feedback.votes import cast_vote, effective_votes, scores_of
from d3po_bench.runs.store import RunStore
from d3po_bench.runs.tensors import digest_of, read_tensors
from d3po_bench.training.progress import Progress
from d3po_bench.training.trainer import Trainer
from eval.tools import TOOLS
from tests.feedback_round import claiming, new_round, picture

SMALL = {"sampling_steps": "3", "sample_batch": "14", "dtype": "fp32"}
LEARN = {"prompts_per_round": "2", "learning_rate": "1e-2"}
TAGS, PAIRS = one_question("tags"), one_question("pairs")


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for those that keep times."""
    return {
        p.relative_to(folder).as_posix(): without_times(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("provenance.json", "timing.jsonl")
    }


def without_times(path: Path) -> bytes:
    """A file's bytes; of a checkpoint, what it holds but for the digest of timing.jsonl."""
    if path.parent.name != "checkpoints":
        return path.read_bytes()
    tensors, facts = read_tensors(path)
    del facts["rows"]["timing.jsonl"]
    return digest_of(tensors, json.dumps(facts)).encode()


def draw(folder: Path, model: Path, study: Study = TAGS, count: int = 4, **more: Any) -> Round:
    """A small round of the micro model."""
    settings = {"sample_batch": "14"} if "before" in more else SMALL
    return draw_round(
        folder, study, "animals", count=count, model=str(model), preset="official_code",
        settings=settings, device="cpu", **more,
    )  # fmt: skip


def say(folder: Path, answers: Sequence[Answer | None], rater: str = "Ann") -> None:
    """Votes of one rater on the first items of a round; None is no vote."""
    settings = HandoutSettings(votes_per_item=9, gold_every=0, repeat_every=0)
    with open_labels(folder, None, settings, new=True) as store:
        place = {item.id: n for n, item in enumerate(store.round.items)}
        who = find_rater(store, token=invite(store, rater))
        assert who is not None
        while hand := hand_out(store, who.id):
            number = place[hand.item.id]
            answer = answers[number] if number < len(answers) else None
            cast_vote(store, who.id, hand.id, answer, 5, hand.step)


def learnable(folder: Path) -> training.Data:
    """A round and its votes."""
    return training.data_of(folder, scores_of(folder))


def request(method: str = "d3po", passes: int = 1, **settings: str) -> training.TrainRequest:
    """A small training."""
    return training.TrainRequest(
        method=method, passes=passes, settings={**LEARN, **settings}, preset="official_code",
        device="cpu", tools=TOOLS,
    )  # fmt: skip


def pixels(path: Path) -> Tensor:
    """A picture, [3, h, w] uint8."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


@pytest.fixture(scope="module")
def drawn(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round of four prompts with seven images each, of which three are judged."""
    folder = tmp_path_factory.mktemp("loop") / "round-1"
    draw(folder, micro)
    say(folder, [(0, 1), (6,), ()])
    return folder


@pytest.fixture(scope="module")
def trained(drawn: Path) -> Path:
    """What D3PO learnt of it."""
    out = drawn / "trained" / "d3po"
    training.train(learnable(drawn), request(), out)
    return out


# ---- drawing


def test_the_images_of_a_prompt_start_from_one_noise(drawn: Path) -> None:
    latents = read_rollout(drawn, 0)["latents"]
    assert latents.shape[:3] == (2, 7, 4)
    assert torch.equal(latents[:, :1, 0].expand_as(latents[:, :, 0]), latents[:, :, 0])
    assert not torch.equal(latents[:, 0, 1], latents[:, 1, 1])
    assert not torch.equal(latents[0, 0, 0], latents[1, 0, 0])


def test_a_round_holds_what_its_policy_did(drawn: Path) -> None:
    """The stored means are those of the stored latents, and pictures are the last latents."""
    sampling = Sampling.read(drawn)
    model, policy = prepared(sampling, None, Execution(device="cpu").usual())
    kept = read_rollout(drawn, 1)
    conditions = model.encode(sampling.prompts[2:4])
    for step in range(3):
        x = kept["latents"][:, 4, step]
        found = policy.step(x, torch.full((2,), step), conditions).mean
        torch.testing.assert_close(found, kept["means"][:, 4, step], atol=1e-5, rtol=1e-5)
    image = model.decode(kept["latents"][1, 4, -1:])[0]
    assert torch.equal(pixels(drawn / "images" / "00003-4.png"), image)


def test_a_second_call_changes_nothing_and_a_cut_one_goes_on_to_the_same_bytes(
    micro: Path, tmp_path: Path
) -> None:
    draw(tmp_path / "round", micro)
    whole = files(tmp_path / "round")
    draw(tmp_path / "round", micro)
    assert files(tmp_path / "round") == whole
    for lost in ("round.json", "files.json", "rollout/00001.safetensors", "images/00003-1.png"):
        (tmp_path / "round" / lost).unlink()
    draw(tmp_path / "round", micro)
    assert files(tmp_path / "round") == whole


def test_a_round_keeps_its_sampler_and_an_older_one_has_the_default(
    micro: Path, tmp_path: Path
) -> None:
    small = {**SMALL, "sampler": "cps"}
    draw_round(
        tmp_path, TAGS, "animals", count=1, model=str(micro), preset="official_code",
        settings=small, device="cpu",
    )  # fmt: skip
    assert Sampling.read(tmp_path).config("d3po").sampler == "cps"
    data = json.loads((tmp_path / "sampling.json").read_text())
    del data["settings"]["sampler"]
    (tmp_path / "sampling.json").write_text(json.dumps(data))
    assert Sampling.read(tmp_path).settings["sampler"] == "auto"


def test_prompts_come_equally_often_and_in_another_order_in_another_round(micro: Path) -> None:
    known = ["a", "b", "c", "d"]
    drawn = [chosen_prompts(known, 10, 0, number) for number in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0][:8]) == sorted(known * 2)
    assert len(drawn[0]) == 10
    assert sorted(chosen_prompts(known, None, 0, 0)) == known


def test_a_safety_round_is_blurred(micro: Path, tmp_path: Path) -> None:
    assert draw(tmp_path / "round", micro, one_question("tags", "unsafe"), count=1).study.blurred


# ---- learning


def test_d3po_learns_from_judged_prompts_alone(drawn: Path, trained: Path) -> None:
    """Two bad of seven give 10 pairs, one bad 6; an untagged grid gives ties, which are left."""
    lines = RunStore(trained).metrics
    assert [line["round"] for line in lines] == [1, 2]
    assert lines[-1]["pairs"] == 2 * 5 + 1 * 6
    assert lines[-1]["images"] == 3 * 7
    assert (trained / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_prompts_that_were_judged_in_part_are_left_out_and_counted(drawn: Path) -> None:
    scores, told = np.zeros((4, 7)), list[str]()
    training.data_of(drawn, scores, say=told.append)
    assert told == []
    scores[1, 2] = scores[3] = np.nan
    scores[3, 0] = 1
    training.data_of(drawn, scores, say=told.append)
    assert told == ["2 prompts are left out: not all images have been judged."]
    scores[:, 0] = np.nan
    with pytest.raises(UserError, match="Nobody has judged all images of a prompt of the"):
        training.data_of(drawn, scores)


def test_the_reference_costs_no_pass_of_the_network(trained: Path) -> None:
    """Every forward is one of the update: two images, two guidance halves, three steps a pair."""
    last = RunStore(trained).metrics[-1]
    assert last["unet_forwards"] == last["unet_backwards"] == 16 * 2 * 2 * 3


def test_the_first_loss_is_log_2_and_winners_gain(drawn: Path, tmp_path: Path) -> None:
    data = learnable(drawn)
    training.train(data, request(passes=6, units_per_update="16"), tmp_path / "run")
    lines = [line for line in RunStore(tmp_path / "run").metrics if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["loss"] < math.log(2)


def test_the_next_round_goes_on_from_what_was_learnt(
    micro: Path, drawn: Path, trained: Path, tmp_path: Path
) -> None:
    before = Before.read(trained)
    draw(tmp_path / "round-2", micro, before=trained)
    second = Sampling.read(tmp_path / "round-2")
    assert (second.number, second.seed) == (1, 0)
    assert second.settings == json.loads(json.dumps(Sampling.read(drawn).settings))
    changed = [w for n, w in before.weights.items() if "lora_B" in n and w.abs().max() > 0]
    assert changed
    say(tmp_path / "round-2", [(0,), (1,), (2,), (3,)])
    data = learnable(tmp_path / "round-2")
    config, execution = training.planned(data, request())
    trainer = Trainer(config, execution, data.experience(config), torch.device("cpu"))
    for name, weight in trainer.model.trainable().items():
        assert torch.equal(weight, before.weights[name])
    policy: Policy = trainer.policy
    kept = read_rollout(tmp_path / "round-2", 0)
    conditions = trainer.model.encode(second.prompts[:2])
    x, number = kept["latents"][:, 0, 1], torch.ones(2, dtype=torch.int64)
    torch.testing.assert_close(
        policy.step(x, number, conditions).mean, kept["means"][:, 0, 1], atol=1e-5, rtol=1e-5
    )
    base = policy.step(x, number, conditions, weights="base").mean
    assert not torch.allclose(base, kept["means"][:, 0, 1], atol=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        "preferred_images",
        "ddpo",
        "diffusion_dpo",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("reward_weighted", "dpok", "kto")),
    ],
)
def test_other_methods_learn_from_the_same_votes(method: str, drawn: Path, tmp_path: Path) -> None:
    training.train(learnable(drawn), request(method), tmp_path / "run")
    weights = RunStore(tmp_path / "run").load_checkpoint()
    assert weights is not None
    assert any(w.abs().max() > 0 for n, w in weights[0].items() if "lora_B" in n)


@pytest.mark.parametrize(
    ("judged", "scores"),
    [
        # tagged by one of three or by none, and by all; then steps above the middle
        ("tags", [[-1 / 3, 0, -1 / 3, -1, -1, -1, -1], [-1, -1, -1, -1, -1, -1, -2 / 3]]),
        ("scale", [[1, 2, 1, 0, 0, 0, 0], [-2, -2, -2, -2, -2, -2, -1]]),
    ],
)
def test_no_image_is_preferred_for_being_the_least_bad(
    judged: JudgedAs, scores: list[list[float]], own: Path, tmp_path: Path
) -> None:
    data = replace(training.data_of(own, np.array(scores)), judged=judged)
    training.train(data, request("preferred_images"), tmp_path / "run")
    assert RunStore(tmp_path / "run").metrics[-1]["pairs"] == 3


@pytest.mark.slow
def test_a_cut_training_goes_on_to_the_same_bytes(
    drawn: Path, trained: Path, tmp_path: Path
) -> None:
    class CutError(Exception):
        """Stands for a kill."""

    def cut(progress: Progress) -> None:
        if progress.done.get("round", 0) > 1.2:
            raise CutError

    data = learnable(drawn)
    with pytest.raises(CutError):
        training.train(data, request(), tmp_path / "run", cut)
    training.train(data, request(), tmp_path / "run")
    assert files(tmp_path / "run") == files(trained)


@pytest.mark.slow
def test_a_training_on_votes_can_be_watched(drawn: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    asked = replace(request(), track=("tensorboard",))
    training.train(learnable(drawn), asked, tmp_path / "run")
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rounds = RunStore(tmp_path / "run").metrics
    assert [event.step for event in found.Scalars("loss")] == [row["round"] for row in rounds]
    (text,) = found.Tensors("command/text_summary")
    said = text.tensor_proto.string_val[0].decode()
    assert f"d3po-bench feedback train {drawn} --method d3po --passes 1" in said


@pytest.mark.slow
def test_more_passes_go_on_to_the_bytes_of_a_longer_training(drawn: Path, tmp_path: Path) -> None:
    data = learnable(drawn)
    for passes in (1, 2):
        training.train(data, request(passes=passes), tmp_path / "run")
    training.train(data, request(passes=2), tmp_path / "whole")
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_other_votes_are_another_training(drawn: Path, trained: Path) -> None:
    data = learnable(drawn)
    other = replace(data, scores=-data.scores)
    before = files(trained)
    with pytest.raises(UserError, match="began with other votes"):
        training.train(other, request(), trained)
    training.train(data, request(), trained)
    assert files(trained) == before


def test_label_files_of_the_published_code_train_as_the_same_votes_do(
    drawn: Path, trained: Path, tmp_path: Path
) -> None:
    rows = [[-1, -1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, -1], [0] * 7]
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "ann.json").write_text(json.dumps(rows))
    data = training.data_of(drawn, read_label_files(tmp_path / "labels"))
    training.train(data, request(), tmp_path / "run")
    name = "metrics.jsonl"
    assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()


# ---- simulated raters


def votes(
    folder: Path, kind: Kind, pool: Sequence[Annotator], number: int = 8
) -> tuple[dict[str, Tensor], list[tuple[str, str, Answer]]]:
    """How good the images of a new round are, by item, and what a pool says of them."""
    round_ = new_round(folder, kind, number, size=4)
    worth = {
        item.id: torch.randn(round_.parts[0].images_per_item, generator=torch.manual_seed(n))
        for n, item in enumerate(round_.items)
    }
    settings = HandoutSettings(votes_per_item=len(pool), gold_every=0, repeat_every=0)
    with open_labels(folder, None, settings, new=True) as store:
        expected = number * len(pool)
        assert simulated.let_vote(store, worth, pool, seed=0) == expected
        found = effective_votes(store)
        assert simulated.let_vote(store, worth, pool, seed=0) == 0
    assert len({(vote.rater, vote.item) for vote in found}) == len(found) == expected
    return worth, sorted((vote.rater, vote.item, vote.answer) for vote in found)


def tagged(answer: Answer) -> set[int]:
    assert isinstance(answer, tuple)
    return set(answer)


def right(worth: Tensor) -> Answer:
    """What a rater without errors says."""
    if len(worth) == 2:
        return "a" if worth[0] > worth[1] else "b"
    return tuple((worth <= 0).nonzero().squeeze(1).tolist())


@pytest.mark.parametrize("kind", ["tags", "pairs"])
def test_without_errors_raters_say_what_the_rule_says_and_with_error_1_the_opposite(
    kind: Kind, tmp_path: Path
) -> None:
    worth, found = votes(tmp_path / "right", kind, [Annotator()])
    assert [said for _, _, said in found] == [right(worth[item]) for _, item, _ in found]
    worth, found = votes(tmp_path / "wrong", kind, [Annotator(error=1.0)])
    assert [said for _, _, said in found] == [right(-worth[item]) for _, item, _ in found]


@pytest.mark.slow
def test_errors_come_as_often_as_stated_and_differ_between_raters(tmp_path: Path) -> None:
    worth, found = votes(tmp_path, "tags", [Annotator(error=0.2)] * 2, number=60)
    wrong = [len(tagged(right(worth[item])) ^ tagged(said)) for _, item, said in found]
    assert sum(wrong) / (2 * 60 * 7) == pytest.approx(0.2, abs=0.05)
    by_rater = [[said for who, _, said in found if who.endswith(n)] for n in ("1", "2")]
    assert by_rater[0] != by_rater[1]


def test_a_biased_rater_takes_the_left_one(tmp_path: Path) -> None:
    votes(tmp_path, "pairs", [Annotator(first=1.0)], number=20)
    with open_labels(tmp_path, None) as store:
        for vote in effective_votes(store):
            assert vote.answer == "ab"[vote.shown[0]]


def test_at_a_temperature_raters_choose_as_bradley_and_terry_do() -> None:
    """A picture that is better by the temperature wins 1 / (1 + 1 / e) = 73.1 % of 4,000 pairs."""
    hand, rater = cast(Hand, None), Annotator(temperature=2.0)
    rng = torch.Generator().manual_seed(0)
    wins = [rater.answer("pairs", hand, torch.tensor([3.0, 1.0]), rng) == "a" for _ in range(4000)]
    assert sum(wins) / 4000 == pytest.approx(0.731, abs=0.02)
    bad = [len(tagged(rater.answer("tags", hand, torch.full((7,), 2.0), rng))) for _ in range(600)]
    assert sum(bad) / 4200 == pytest.approx(0.269, abs=0.02)
    with pytest.raises(UserError, match="temperature is 0 or above"):
        Annotator(temperature=math.nan)


def test_pictures_are_judged_by_a_scorer_if_one_is_given(tmp_path: Path) -> None:
    """A picture of noise is a larger file than a white one."""
    round_ = new_round(tmp_path, "tags", 1, question="unsafe")
    for n, name in enumerate(round_.items[0].images):
        grey = (
            np.random.default_rng(n).integers(0, 256, (32, 32))
            if n == 2
            else np.full((32, 32), 255)
        )
        Image.fromarray(grey.astype(np.uint8)).convert("RGB").save(tmp_path / name)
    asked = ["feedback", "simulate", str(tmp_path), "--bad-below", "1.2"]
    refused = CliRunner().invoke(cli, asked)
    assert "Add --by SCORER, or leave" in str(refused.exception)
    assert CliRunner().invoke(cli, [*asked, "--by", "jpeg_size"]).exit_code == 0
    with open_labels(tmp_path, None) as store:
        (vote,) = effective_votes(store)
    assert vote.answer == (0, 1, 3, 4, 5, 6)


def test_pictures_are_judged_by_the_rule_of_the_question(tmp_path: Path) -> None:
    """Red is unsafe, here on the second picture of each pair."""
    round_ = new_round(tmp_path, "pairs", 2, question="unsafe")
    for item in round_.items:
        for name, colour in zip(item.images, ("white", "red"), strict=True):
            Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    assert simulated.simulate(tmp_path, None, [Annotator()], 0, TOOLS) == 2
    with open_labels(tmp_path, None) as store:
        assert [vote.answer for vote in effective_votes(store)] == ["a", "a"]


def cast_so_far(folder: Path) -> list[tuple[str, str, Answer]]:
    with open_labels(folder, None) as store:
        return sorted((vote.rater, vote.item, vote.answer) for vote in effective_votes(store))


def test_raters_who_have_voted_do_not_go_on_by_another_rule(tmp_path: Path) -> None:
    new_round(tmp_path, "pairs", 4, question="unsafe", size=8)
    rule = simulated.by_scorer("jpeg_size")
    assert simulated.simulate(tmp_path, None, [Annotator(0.2)] * 2, 0, TOOLS) == 8
    before = cast_so_far(tmp_path)
    for pool, seed, other, said in (
        (
            [Annotator(0.9)] * 2,
            0,
            None,
            "simulated 1, simulated 2 voted .*error 0.2, not error 0.9",
        ),
        (
            [Annotator(0.2), Annotator(), Annotator()],
            0,
            None,
            r"simulated 2 voted .*not error 0\.0",
        ),
        ([Annotator(0.2)] * 2, 1, None, "seed 0, not seed 1"),
        ([Annotator(0.2)] * 2, 0, rule, "by the question's rule, not by jpeg_size"),
    ):
        with pytest.raises(UserError, match=f"{said}.*votes stay.* --labels"):
            simulated.simulate(tmp_path, None, pool, seed, TOOLS, rule=other)
    assert cast_so_far(tmp_path) == before
    assert simulated.simulate(tmp_path, None, [Annotator(0.2)] * 3, 0, TOOLS) == 4


def test_simulated_votes_resume_and_those_of_earlier_versions_stay_readable(tmp_path: Path) -> None:
    def ask(name: str, heard: list[str], *, stop: int = 99) -> int:
        def told(done: int, total: int) -> None:
            if done == stop:
                raise KeyboardInterrupt

        pool = [Annotator(0.5)] * 2
        return simulated.simulate(tmp_path / name, None, pool, 0, TOOLS, told, say=heard.append)

    heard = list[str]()
    for name in ("whole", "cut"):
        new_round(tmp_path / name, "pairs", 4, question="unsafe", size=8)
    assert ask("whole", heard) == 8
    with pytest.raises(KeyboardInterrupt):
        ask("cut", heard, stop=3)
    assert ask("cut", heard) == 5
    assert cast_so_far(tmp_path / "cut") == cast_so_far(tmp_path / "whole")
    assert ask("cut", heard) == 0
    assert heard == []
    with contextlib.closing(sqlite3.connect(tmp_path / "cut/labels.sqlite")) as labels, labels:
        labels.execute("delete from facts where name like 'simulated %'")
    assert ask("cut", heard) == 0
    assert heard == ["simulated 1, simulated 2 had voted before; by which rule is not on record."]


def test_a_scorer_answers_tags_and_pairs_of_a_study(tmp_path: Path) -> None:
    """Items of its questions show seven and two pictures."""
    folder = tmp_path / "both"
    plain = new_round(folder, "tags", 1, size=8)
    both = [*one_question("tags", "Odd?").question, *one_question("pairs", "Redder?").question]
    Round(Study(question=both), plain.groups).write(folder)
    asked = ("feedback", "simulate", folder)
    refused(*asked, match="Give a scorer with --by")
    assert CliRunner().invoke(cli, [*map(str, asked), "--by", "jpeg_size"]).exit_code == 0
    assert len(cast_so_far(folder)) == 1 + 21
    new_round(tmp_path / "scale", "scale", 1, question="How real?", size=8)
    refused("feedback", "simulate", tmp_path / "scale", "--by", "jpeg_size",
            match="asks for a scale, and simulated raters answer tags and pairs alone")  # fmt: skip


def test_what_the_rule_does_not_know_is_not_called_good(tmp_path: Path) -> None:
    new_round(tmp_path / "a", "tags", 2, prompt="house {}")
    with pytest.raises(UserError, match="cannot say how good a picture of 'house 0' is"):
        simulated.simulate(tmp_path / "a", None, [Annotator()], 0, TOOLS)
    round_ = new_round(tmp_path / "b", "pairs", 1, question="unsafe")
    (tmp_path / "b" / round_.items[0].images[0]).write_bytes(picture(0, 8))
    with pytest.raises(UserError, match="have several sizes"):
        simulated.simulate(tmp_path / "b", None, [Annotator()], 0, TOOLS)


def test_errors_are_probabilities() -> None:
    for error in (-0.1, 1.5, math.nan):
        with pytest.raises(UserError, match="error is a probability"):
            Annotator(error=error)


def test_red_pictures_are_called_unsafe() -> None:
    images = torch.zeros(3, 3, 10, 10, dtype=torch.uint8)
    images[0, 0, :2] = 200  # a fifth is red
    images[1, 0, :1] = 200  # a tenth
    images[2] = 255  # white is not red
    worth = simulated.harmless(images, [""] * 3, TOOLS)
    assert (worth > 0).tolist() == [False, True, True]


# ---- pictures from elsewhere


def source(folder: Path, texts: Sequence[str], first: int = 0) -> Path:
    """A folder of pictures with their metadata."""
    folder.mkdir()
    lines = ["file_name,text"]
    for n, text in enumerate(texts):
        (folder / f"{n}.png").write_bytes(picture(first + n))
        lines.append(f"{n}.png,{text}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def test_four_folders_give_every_pair_of_them(tmp_path: Path) -> None:
    sources = [source(tmp_path / name, ["cat", "dog"], 10 * n) for n, name in enumerate("abcd")]
    round_ = comparisons.take(tmp_path / "round", sources, PAIRS)
    assert [item.id for item in round_.items[:6]] == [
        "00000-0-1", "00000-0-2", "00000-0-3", "00000-1-2", "00000-1-3", "00000-2-3",
    ]  # fmt: skip
    assert [item.prompt for item in round_.items] == ["cat"] * 6 + ["dog"] * 6
    shown = pixels(tmp_path / "round" / round_.items[-1].images[1])
    assert torch.equal(shown, pixels(sources[3] / "1.png"))
    assert Round.read(tmp_path / "round") == round_


def test_first_choices_by_hand(tmp_path: Path) -> None:
    """Of three: Ann prefers the last in both its duels; Bob's wins go round, so all share."""
    sources = [source(tmp_path / name, ["cat", "dog"], 10 * n) for n, name in enumerate("abc")]
    folder = tmp_path / "round"
    comparisons.take(folder, sources, PAIRS)
    refused("feedback", "choices", folder, match="compared all pictures of a prompt")
    say(folder, ["a", "b", "b", "tie", "bad"], rater="Ann")  # the last pair of the dogs is skipped
    say(folder, ["a", "b", "a", "b", "b", "tie"], rater="Bob")
    with open_labels(folder, None) as store:
        found = comparisons.first_choices(effective_votes(store), 3)
    third = 1 / 3
    expected = {
        "00000": [[0, 0, 1], [third, third, third]],
        "00001": [[0.0, 0.5, 0.5]],  # Bob alone: b over a, c over a, a tie
    }
    assert found == expected
    target = tmp_path / "choices" / "seed-0.csv"
    arguments = ["feedback", "choices", str(folder), "--out", str(target)]
    told = CliRunner().invoke(cli, arguments).output.splitlines()
    assert [line.split()[0] for line in told] == [str(path) for path in sources]
    assert "58.3%" in told[2]
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["source", "share", "low", "high", "raters"]
    assert [(target.parent / row["source"]).resolve() for row in rows] == sources
    # the two prompts above, one after the other: 1/12, 1/3 and 7/12
    assert [row["share"] for row in rows] == ["0.083333", "0.333333", "0.583333"]
    assert [float(row["low"]) <= float(row["share"]) <= float(row["high"]) for row in rows] == (
        [True] * 3
    )
    assert {row["raters"] for row in rows} == {"people"}
    say(folder, [None] * 5 + ["a"], rater="simulated 2")
    with open_labels(folder, None) as store:
        assert {s.raters for s in comparisons.choices(store, folder)} == {"simulated"}


def test_unanimous_choices_have_an_interval(tmp_path: Path) -> None:
    sources = [source(tmp_path / name, ["cat", "dog"], 10 * n) for n, name in enumerate("ab")]
    comparisons.take(tmp_path / "round", sources, PAIRS)
    say(tmp_path / "round", ["a", "a"])
    with open_labels(tmp_path / "round", None) as store:
        first, second = comparisons.choices(store, tmp_path / "round")
    far = 2 / (2 + 12.7062**2)  # Wilson with t(1) and two prompts
    assert (first.share, first.low, first.high) == pytest.approx((1, far, 1), abs=1e-4)
    assert (second.share, second.low, second.high) == pytest.approx((0, 0, 1 - far), abs=1e-4)


@pytest.mark.parametrize(("prompts", "raters_", "share"), [(5, 1, 0.9), (10, 3, 0.9), (20, 3, 0.5)])
def test_intervals_of_choices_hold_the_truth(prompts: int, raters_: int, share: float) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        means = rng.binomial(raters_, share, prompts) / raters_
        low, high = clustered(means.tolist(), range(prompts), prompts * raters_)
        held += low <= share <= high
    assert held / 400 >= 0.95


def test_one_simulated_rater_makes_a_pool_simulated() -> None:
    assert pool_of(["Ann"]) == pool_of(["simulated Ann"]) == "people"
    assert pool_of(["Ann", "simulated 12"]) == "simulated"


def test_only_rounds_of_folders_in_pairs_have_first_choices(tmp_path: Path) -> None:
    sources = [source(tmp_path / name, ["cat", "dog"]) for name in "abc"]
    comparisons.take(tmp_path / "tags", sources, TAGS)
    say(tmp_path / "tags", [(0,), ()])
    refused("feedback", "choices", tmp_path / "tags", match="does not compare every two of the 3")
    comparisons.take(tmp_path / "pairs", sources, PAIRS)
    (tmp_path / "pairs" / SOURCES).write_text('["a", "b"]')
    known = json.loads((tmp_path / "pairs" / "files.json").read_text())
    known[SOURCES] = sha256_of(tmp_path / "pairs" / SOURCES)
    (tmp_path / "pairs" / "files.json").write_text(json.dumps(known))
    refused("feedback", "choices", tmp_path / "pairs", match="does not compare every two of the 2")
    new_round(tmp_path / "plain", "pairs", 1)
    refused("feedback", "choices", tmp_path / "plain", match="does not compare folders")


def test_a_folder_alone_is_tagged_by_its_texts(tmp_path: Path) -> None:
    one = source(tmp_path / "a", ["cat", "cat", "dog", "dog"])
    round_ = comparisons.take(tmp_path / "round", [one], TAGS)
    assert [(item.prompt, len(item.images)) for item in round_.items] == [("cat", 2), ("dog", 2)]


# ---- bad input, on the command line


def refused(*arguments: object, match: str) -> None:
    """The command ends in one line that says `match`."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    assert errors.getvalue().count("\n") == 1, errors.getvalue()
    assert match in errors.getvalue()


@pytest.fixture
def own(drawn: Path, tmp_path: Path) -> Path:
    """A copy of the round, to damage."""
    shutil.copytree(drawn, tmp_path / "own", ignore=shutil.ignore_patterns("trained"))
    return tmp_path / "own"


def test_altered_or_missing_files_are_named(own: Path) -> None:
    image, stored = own / "images" / "00001-2.png", own / "rollout" / "00000.safetensors"
    before, kept = image.read_bytes(), stored.read_bytes()
    image.write_bytes((own / "images" / "00001-3.png").read_bytes())
    commands = ("train", "export", "serve", "status", "simulate")
    for command in commands:
        refused("feedback", command, own, match="00001-2.png was changed")
    image.unlink()
    for command in commands:
        refused("feedback", command, own, match="00001-2.png")
    image.write_bytes(before)
    stored.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    refused("feedback", "train", own, match="00000.safetensors was changed")


def test_labels_that_do_not_belong_to_the_round_are_refused(own: Path, tmp_path: Path) -> None:
    new_round(tmp_path / "other", "tags", 3)
    say(tmp_path / "other", [()])
    url = default_url(tmp_path / "other")
    refused("feedback", "train", own, "--labels", url, match="are not of this round")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "ann.json").write_text("[[0, -1]]")
    refused(
        "feedback", "train", own, "--label-files", tmp_path / "files", match="are of 1 x 2 images"
    )
    (tmp_path / "files" / "ann.json").write_text(json.dumps([[0] * 7] * 9))
    refused(
        "feedback", "train", own, "--label-files", tmp_path / "files", match="are of 9 x 7 images"
    )


def test_votes_on_something_else_are_refused(own: Path) -> None:
    faults = [
        ("item", "99999"), ("answer", "garbage"), ("answer", "null"), ("answer", "[9]"),
        ("answer", "[1, 1]"), ("answer", "[" * 100_000), ("shown", "[0]"), ("shown", "0"),
        ("repeat", "x"), ("milliseconds", "x"), ("time", "x"),
    ]  # fmt: skip
    whole = (own / "labels.sqlite").read_bytes()
    for column, value in faults:
        (own / "labels.sqlite").write_bytes(whole)
        with contextlib.closing(sqlite3.connect(own / "labels.sqlite")) as connection:
            connection.execute(f"update votes set {column} = ?", (value,))
            connection.commit()
        damaged = (own / "labels.sqlite").read_bytes()
        for command in ("train", "export", "status"):
            refused("feedback", command, own, match="does not fit this round")
        assert (own / "labels.sqlite").read_bytes() == damaged


def test_a_damaged_database_is_said_in_one_line(own: Path) -> None:
    labels = own / "labels.sqlite"
    whole = labels.read_bytes()
    for start in range(4096, len(whole), 4096):  # all pages but the first, one at a time
        labels.write_bytes(whole[:start] + b"\xff" * 4096 + whole[start + 4096 :])
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()) as said:
            main(["feedback", "status", str(own)])
        assert said.getvalue().count("\n") <= 1, said.getvalue()
    labels.write_bytes(whole[: len(whole) // 2])
    refused("feedback", "status", own, match="as a database: ")


def test_a_database_of_a_newer_version_is_refused(own: Path) -> None:
    with sqlite3.connect(own / "labels.sqlite") as connection:
        connection.execute("update facts set value = '99' where name = 'version'")
    for command in ("train", "export", "status"):
        refused("feedback", command, own, match="have version 99")


def test_a_round_without_votes_cannot_be_learnt_from(own: Path) -> None:
    (own / "labels.sqlite").unlink()
    refused("feedback", "train", own, match="Nobody has voted on the round")


@pytest.mark.parametrize(
    "method",
    ["d3po", "preferred_images", "reward_weighted", pytest.param("ddpo", marks=pytest.mark.slow)],
)
def test_ties_alone_teach_only_who_compares_with_the_round(
    method: str, own: Path, tmp_path: Path
) -> None:
    (own / "labels.sqlite").unlink()
    (tmp_path / "ann.json").write_text(json.dumps([[0] * 7, [-1] * 7]))
    train = ("feedback", "train", own, "--method", method, "--label-files", tmp_path)
    if method == "d3po":
        refused(*train, match=f"are ties, from which {method} learns nothing")
    else:
        data = training.data_of(own, read_label_files(tmp_path))
        training.train(data, request(method=method), tmp_path / "run")
        assert RunStore(tmp_path / "run").metrics[-1]["pairs"] > 0
    (tmp_path / "ann.json").write_text(json.dumps([[-1] * 7] * 2))
    refused(*train, "--out", tmp_path / "other", match="are ties, from which")


@pytest.mark.parametrize("command", ["status", "export", "train"])
def test_labels_that_are_not_there_are_refused_and_not_made(
    command: str, own: Path, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'typo.sqlite'}"
    refused("feedback", command, own, "--labels", url, match="There are no labels at")
    assert not (tmp_path / "typo.sqlite").exists()


def test_rows_that_not_all_label_files_have_are_left_out_and_said_so(
    own: Path, tmp_path: Path
) -> None:
    rows = [[-1, -1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, -1], [0] * 7]
    (tmp_path / "ann.json").write_text(json.dumps(rows))
    (tmp_path / "bob.json").write_text(json.dumps(rows[:2]))
    said: list[str] = []
    data = training.data_of(own, read_label_files(tmp_path, said.append))
    assert len(data.experience(data.sampling.config("d3po")).prompts) == 2
    left = f"Only the first 2 of up to 3 rows are in all files of {tmp_path}: the rest is left out."
    assert said == [left]


def test_how_far_a_round_is_needs_pictures_alone_and_makes_nothing(own: Path) -> None:
    (own / "labels.sqlite").unlink()
    for path in (own / "rollout").iterdir():
        path.unlink()
    result = CliRunner().invoke(cli, ["feedback", "status", str(own)])
    assert (result.exit_code, result.output.splitlines()[0]) == (0, "0 of 4 items complete")
    assert not (own / "labels.sqlite").exists()


def test_without_its_extra_feedback_is_one_line() -> None:
    code = (
        "import sys; sys.modules['sqlalchemy'] = None; from d3po_bench.cli import main; "
        "main(['feedback', 'status', 'round'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: The extra `feedback` is not installed: there is no")
    assert done.stderr.count("\n") == 1


def test_an_empty_round_and_no_round_are_refused(own: Path, tmp_path: Path) -> None:
    whole = json.loads((own / "round.json").read_text())
    (own / "round.json").write_text(json.dumps({**whole, "items": []}))
    refused("feedback", "status", own, match="at least 1 item")
    refused("feedback", "status", tmp_path / "nothing", match="no round.json")


def test_what_is_not_there_and_cannot_be_written_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "pairs.csv"
    refused("feedback", "train", gone, match="pairs.csv is not there. Give the folder of a round")
    refused("feedback", "agreement", gone, "--scorers", "clip:tiny", match="is not there")
    gone.write_text("")
    pictures = ("--pictures", source(tmp_path / "a", ["cat", "cat"]))
    refused("feedback", "new", gone / "round", *pictures, match="in its place. Give another FOLDER")


def test_a_folder_with_another_round_is_left_alone(own: Path, micro: Path) -> None:
    before = files(own)
    with pytest.raises(UserError, match="its prompts differ"):
        draw(own, micro, count=3)
    with pytest.raises(UserError, match="kind, question or study"):
        draw(own, micro, one_question("tags", "better"))
    assert files(own) == before


def test_settings_of_the_round_are_not_changed_afterwards(own: Path, trained: Path) -> None:
    refused(
        "feedback", "train", own, "--set", "sampling_steps=9", match="Give it to `feedback new`"
    )
    more = ("--prompts", "animals", "--from", trained)
    refused("feedback", "new", own / "next", *more, "--set", "guidance=2", match="rounds before")


def test_only_a_finished_training_can_draw_the_next_round(own: Path, trained: Path) -> None:
    more = ("--prompts", "animals")
    refused(
        "feedback", "new", own / "next", *more, "--from", own, match="finished `feedback train`"
    )
    refused("feedback", "new", own / "next", match="Give --prompts")
    refused(
        "feedback",
        "new",
        own / "next",
        *more,
        "--kind",
        "pairs",
        "--images",
        "3",
        match="A pair has 2",
    )


def test_pictures_from_elsewhere_have_no_denoising_steps_to_learn_from(tmp_path: Path) -> None:
    new_round(tmp_path, "tags", 2)
    say(tmp_path, [(0,), ()])
    refused("feedback", "train", tmp_path, match="came finished. Use --method diffusion_dpo, kto")
    (tmp_path / "round.json").unlink()
    refused("feedback", "train", tmp_path, "--method", "kto", match="There is no round.json")


def test_pictures_with_bad_metadata_are_refused(tmp_path: Path) -> None:
    one, two = source(tmp_path / "a", ["cat"]), source(tmp_path / "b", ["dog"])
    command = ("feedback", "new", tmp_path / "round", "--kind", "pairs", "--pictures")
    refused(*command, one, "--pictures", two, match="in the same order")
    refused(*command, tmp_path, match="metadata.csv")
    (one / "metadata.csv").write_text("file_name,text\n../b/0.png,cat\n")
    refused(*command, one, match="which is not a picture inside")
    (one / "metadata.csv").write_text("file_name,text\n0.png\n")
    refused(*command, one, match="row 1 has more or fewer values")
    (one / "metadata.csv").write_text("file_name,text\n0.png,cat\x1b[31m\n")
    refused(*command, one, match="holds the control character")
    (one / "metadata.csv").write_text("file_name,text\n0.png,cat\n")
    (one / "0.png").write_bytes(b"no picture")
    refused(*command, one, "--pictures", one, match="is not a picture that can be read")
    (one / "0.png").write_bytes(claiming(picture(0), 5_000, 5_000))
    refused(*command, one, "--pictures", one, match="that can be read: it is 5000 x 5000")
    assert not (tmp_path / "round" / "round.json").exists()


def test_votes_cannot_be_an_objective_of_a_run(tmp_path: Path) -> None:
    more = ("--method", "d3po", "--objective", "feedback", "--out", tmp_path)
    refused("run", *more, match="No objective is called")


def test_export_writes_every_vote(own: Path, tmp_path: Path) -> None:
    say(own, [(1,), (1,), (1,), (1,)], rater="Bob")
    runner = CliRunner()
    assert runner.invoke(cli, ["feedback", "export", str(own)]).exit_code == 0
    with (own / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    assert {row["rater"] for row in rows} == {"Ann", "Bob"}
    assert [r["answer"] for r in rows if (r["rater"], r["item"]) == ("Ann", "00000")] == ["0 1"]
    out = tmp_path / "votes.json"
    assert runner.invoke(cli, ["feedback", "export", str(own), "--out", str(out)]).exit_code == 0
    assert [row["answer"] for row in json.loads(out.read_text())][-1] == [1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("labels.sqlite", "not 'labels.sqlite'"),
        ("votes.xlsx", "Votes are written as .csv or .json, not 'votes.xlsx'"),
        ("round.json", "round.json is there already and holds something else"),
        ("files.json", "files.json is there already and holds something else"),
    ],
)
def test_an_export_takes_the_place_of_no_other_file(own: Path, name: str, said: str) -> None:
    before = files(own)
    done = CliRunner().invoke(cli, ["feedback", "export", str(own), "--out", str(own / name)])
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)
    assert files(own) == before


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", " ="])
def test_no_spreadsheet_computes_an_exported_text(start: str, tmp_path: Path) -> None:
    """`=HYPERLINK(...)` as a prompt; in JSON it stays what it is."""
    text = f"{start}1+1"
    new_round(tmp_path, "pairs", 1, size=4, prompt=text)
    name = text.strip()
    say(tmp_path, ["tie"], rater=name)
    for out in (tmp_path / "labels.csv", tmp_path / "labels.json"):
        done = CliRunner().invoke(cli, ["feedback", "export", str(tmp_path), "--out", str(out)])
        assert done.exit_code == 0
    with (tmp_path / "labels.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["prompt"], row["rater"]) == (f"'{text}", f"'{name}")
    (row,) = json.loads((tmp_path / "labels.json").read_text())
    assert (row["prompt"], row["rater"]) == (text, name)


def test_the_whole_loop_on_the_command_line(micro: Path, tmp_path: Path) -> None:
    runner = CliRunner()

    def command(*words: object) -> str:
        result = runner.invoke(cli, ["feedback", *map(str, words)])
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result.output

    small = [f for key, value in SMALL.items() for f in ("--set", f"{key}={value}")]
    first = tmp_path / "round-1"
    which = ("--kind", "pairs", "--question", "deformed", "--prompts", "animals", "--count", 3)
    command("new", first, *which, "--model", micro, "--preset", "official_code", *small)
    assert "6 simulated votes" in command("simulate", first, "--raters", 2)
    told = command("status", first, "--votes", 2)
    assert "3 of 3 items complete" in told
    assert "simulated 2: 3 votes" in told
    command("train", first, "--preset", "official_code")
    command("new", tmp_path / "round-2", *which, "--from", first / "trained" / "d3po")
    assert Sampling.read(tmp_path / "round-2").number == 1
