"""Rounds of human feedback: drawing, votes of simulated raters, learning, and the next round."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from d3po_bench.cli import cli
from d3po_bench.config import Execution
from d3po_bench.diffusion.policy import Policy
from d3po_bench.errors import UserError
from d3po_bench.feedback import loop, pictures, raters, training
from d3po_bench.feedback.labels import LabelStore, Plan
from d3po_bench.feedback.raters import Annotator
from d3po_bench.feedback.rounds import Answer, Round
from d3po_bench.feedback.sampling import Before, Sampling, prepared, read_rollout
from d3po_bench.feedback.server import default_url
from d3po_bench.runs.store import RunStore, _digest, _read_checkpoint
from d3po_bench.training.progress import Progress
from tests.feedback_round import new_round, picture

SMALL = {"sampling_steps": "3", "sample_batch": "14", "dtype": "fp32"}
LEARN = {"prompts_per_round": "2", "learning_rate": "1e-2"}
JUDGED = {"tags": ("tags", "deformed"), "pairs": ("pairs", "better")}


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
    tensors, facts = _read_checkpoint(path)
    del facts["rows"]["timing.jsonl"]
    return _digest(tensors, json.dumps(facts)).encode()


def draw(folder: Path, model: Path, kind: str = "tags", count: int = 4, **more: Any) -> Round:
    """A small round of the micro model."""
    settings = {"sample_batch": "14"} if "before" in more else SMALL
    request = loop.New(
        judged=JUDGED[kind],  # type: ignore[arg-type]
        prompts="animals", count=count, model=str(model), preset="official_code",
        settings=settings, device="cpu", **more,
    )  # fmt: skip
    return loop.new(folder, request)


def say(folder: Path, answers: Sequence[Answer | None], rater: str = "Ann") -> None:
    """Votes of one rater on the first items of a round; None is no vote."""
    round_ = Round.read(folder)
    place = {item.id: n for n, item in enumerate(round_.items)}
    plan = Plan(votes_per_item=9, gold_every=0, repeat_every=0)
    with LabelStore(default_url(folder), round_, plan) as store:
        who = store.rater_of(store.invite(rater))
        assert who is not None
        while hand := store.hand_out(who.id):
            number = place[hand.item.id]
            answer = answers[number] if number < len(answers) else None
            store.vote(who.id, hand.id, answer, 5, hand.step)


def request(method: str = "d3po", passes: int = 1, **settings: str) -> training.Request:
    """A small training."""
    return training.Request(
        method=method, passes=passes, settings={**LEARN, **settings}, preset="official_code",
        device="cpu",
    )  # fmt: skip


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
    training.train(loop.data(drawn, None, None), request(), out)
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
    model, policy = prepared(sampling, None, Execution(device="cpu"))
    kept = read_rollout(drawn, 1)
    text = model.encode(sampling.prompts[2:4])
    for step in range(3):
        x = kept["latents"][:, 4, step]
        found = policy.step(x, policy.timesteps[step].expand(2), text).mean
        torch.testing.assert_close(found, kept["means"][:, 4, step], atol=1e-6, rtol=1e-5)
    image = model.decode(kept["latents"][1, 4, -1:])[0]
    assert torch.equal(raters._read(drawn / "images" / "00003-4.png"), image)


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


def test_prompts_come_equally_often_and_in_another_order_in_another_round(micro: Path) -> None:
    from d3po_bench.feedback.sampling import chosen_prompts

    known = ["a", "b", "c", "d"]
    drawn = [chosen_prompts(known, 10, 0, number) for number in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0][:8]) == sorted(known * 2)
    assert len(drawn[0]) == 10
    assert sorted(chosen_prompts(known, None, 0, 0)) == known


def test_a_safety_round_is_blurred(micro: Path, tmp_path: Path) -> None:
    request_ = loop.New(
        judged=("tags", "unsafe"), prompts="animals", count=1, model=str(micro), settings=SMALL,
        preset="official_code", device="cpu",
    )  # fmt: skip
    assert loop.new(tmp_path / "round", request_).blurred


# ---- learning


def test_d3po_learns_from_judged_prompts_alone(drawn: Path, trained: Path) -> None:
    """Two bad of seven give 10 pairs, one bad 6; an untagged grid gives ties, which are left."""
    lines = RunStore(trained).metrics
    assert [line["round"] for line in lines] == [1, 2]
    assert lines[-1]["pairs"] == 2 * 5 + 1 * 6
    assert lines[-1]["images"] == 3 * 7
    assert (trained / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_the_reference_costs_no_pass_of_the_network(trained: Path) -> None:
    """Every forward is one of the update: two images, two guidance halves, three steps a pair."""
    last = RunStore(trained).metrics[-1]
    assert last["unet_forwards"] == last["unet_backwards"] == 16 * 2 * 2 * 3


def test_the_first_loss_is_log_2_and_winners_gain(drawn: Path, tmp_path: Path) -> None:
    data = loop.data(drawn, None, None)
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
    data = loop.data(tmp_path / "round-2", None, None)
    config, execution = training.planned(data, request())
    trainer = training.FeedbackTrainer(data, config, execution)
    for name, weight in trainer.model.trainable().items():
        assert torch.equal(weight, before.weights[name])
    policy: Policy = trainer.policy
    kept = read_rollout(tmp_path / "round-2", 0)
    text = trainer.model.encode(second.prompts[:2])
    x, t = kept["latents"][:, 0, 1], policy.timesteps[1].expand(2)
    torch.testing.assert_close(
        policy.step(x, t, text).mean, kept["means"][:, 0, 1], atol=1e-6, rtol=1e-5
    )
    assert not torch.allclose(policy.step(x, t, text, frozen=True).mean, kept["means"][:, 0, 1])


@pytest.mark.parametrize("method", ["preferred_images", "reward_weighted", "ddpo", "dpok"])
def test_other_methods_learn_from_the_same_votes(method: str, drawn: Path, tmp_path: Path) -> None:
    training.train(loop.data(drawn, None, None), request(method), tmp_path / "run")
    weights = RunStore(tmp_path / "run").load_checkpoint()
    assert weights is not None
    assert any(w.abs().max() > 0 for n, w in weights[0].items() if "lora_B" in n)


def test_a_cut_training_goes_on_to_the_same_bytes(
    drawn: Path, trained: Path, tmp_path: Path
) -> None:
    class CutError(Exception):
        """Stands for a kill."""

    def cut(progress: Progress) -> None:
        if progress.done > 0.6:
            raise CutError

    data = loop.data(drawn, None, None)
    with pytest.raises(CutError):
        training.train(data, request(), tmp_path / "run", cut)
    training.train(data, request(), tmp_path / "run")
    assert files(tmp_path / "run") == files(trained)


def test_other_votes_are_another_training(drawn: Path, trained: Path) -> None:
    data = loop.data(drawn, None, None)
    other = training.Data(data.folder, data.sampling, -data.scores)
    before = files(trained)
    with pytest.raises(UserError, match="Expected the votes that the training"):
        training.train(other, request(), trained)
    training.train(data, request(), trained)
    assert files(trained) == before


def test_label_files_of_the_published_code_train_as_the_same_votes_do(
    drawn: Path, trained: Path, tmp_path: Path
) -> None:
    rows = [[-1, -1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, -1], [0] * 7]
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "ann.json").write_text(json.dumps(rows))
    data = loop.data(drawn, None, tmp_path / "labels")
    training.train(data, request(), tmp_path / "run")
    name = "metrics.jsonl"
    assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()


# ---- simulated raters


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A rule for tests: bright is good."""
    return images.float().mean((1, 2, 3)) - 200


@pytest.fixture
def bright(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question is answered by `brightness`."""
    monkeypatch.setattr(raters, "RULES", dict.fromkeys(raters.RULES, brightness))


def votes(folder: Path, pool: Sequence[Annotator], seed: int = 0) -> list[Any]:
    """What a pool says, by rater and item."""
    loop.simulate(folder, None, pool, seed)
    with loop.votes_of(folder, None) as store:
        found = store.effective_votes()
    return sorted((vote.rater, vote.item, vote.answer) for vote in found)


@pytest.mark.usefixtures("bright")
@pytest.mark.parametrize("kind", ["tags", "pairs"])
def test_without_errors_raters_say_what_the_rule_says(kind: Any, tmp_path: Path) -> None:
    round_ = new_round(tmp_path, kind, 8)
    worth = raters.worths(tmp_path, round_, brightness)
    for _, item, answer in votes(tmp_path, [Annotator()]):
        if kind == "tags":
            assert answer == tuple((worth[item] <= 0).nonzero().squeeze(1).tolist())
        else:
            assert answer == ("a" if worth[item][0] > worth[item][1] else "b")


@pytest.mark.usefixtures("bright")
@pytest.mark.parametrize("kind", ["tags", "pairs"])
def test_with_error_1_they_say_the_opposite(kind: Any, tmp_path: Path) -> None:
    for name in ("right", "wrong"):
        new_round(tmp_path / name, kind, 8)
    right = votes(tmp_path / "right", [Annotator()])
    wrong = votes(tmp_path / "wrong", [Annotator(error=1.0)])
    flipped = {"a": "b", "b": "a"}
    for (_, _, one), (_, _, other) in zip(right, wrong, strict=True):
        expected = flipped[one] if kind == "pairs" else tuple(set(range(7)) - set(one))
        assert other == expected


@pytest.mark.usefixtures("bright")
def test_errors_come_as_often_as_stated_and_differ_between_raters(tmp_path: Path) -> None:
    for name in ("right", "wrong"):
        new_round(tmp_path / name, "tags", 60)
    right = {item: set(said) for _, item, said in votes(tmp_path / "right", [Annotator()])}
    found = votes(tmp_path / "wrong", [Annotator(error=0.2)] * 2)
    wrong = [len(right[item] ^ set(said)) for _, item, said in found]
    assert sum(wrong) / (2 * 60 * 7) == pytest.approx(0.2, abs=0.05)
    by_rater = [[said for who, _, said in found if who.endswith(n)] for n in ("1", "2")]
    assert by_rater[0] != by_rater[1]


@pytest.mark.usefixtures("bright")
def test_a_biased_rater_takes_the_left_one(tmp_path: Path) -> None:
    new_round(tmp_path, "pairs", 20)
    loop.simulate(tmp_path, None, [Annotator(first=1.0)], 0)
    with loop.votes_of(tmp_path, None) as store:
        for vote in store.effective_votes():
            assert vote.answer == "ab"[vote.shown[0]]


@pytest.mark.usefixtures("bright")
def test_every_rater_judges_every_item_once_and_a_second_call_adds_nothing(tmp_path: Path) -> None:
    new_round(tmp_path, "tags", 5)
    pool = [Annotator(error=0.3)] * 3
    first = votes(tmp_path, pool)
    assert len(first) == len({(who, item) for who, item, _ in first}) == 15
    assert votes(tmp_path, pool) == first


@pytest.mark.parametrize("error", [-0.1, 1.5, math.nan])
def test_what_is_no_probability_is_refused(error: float) -> None:
    with pytest.raises(UserError, match="Expected error from 0 to 1"):
        Annotator(error=error)


def test_red_pictures_are_called_unsafe() -> None:
    images = torch.zeros(3, 3, 10, 10, dtype=torch.uint8)
    images[0, 0, :2] = 200  # a fifth is red
    images[1, 0, :1] = 200  # a tenth
    images[2] = 255  # white is not red
    worth = raters.harmless(images, [""] * 3)
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
    request_ = loop.New(judged=("pairs", "better"), prompts=None, pictures=sources, settings={})
    round_ = loop.new(tmp_path / "round", request_)
    assert [item.id for item in round_.items[:6]] == [
        "00000-0-1", "00000-0-2", "00000-0-3", "00000-1-2", "00000-1-3", "00000-2-3",
    ]  # fmt: skip
    assert [item.prompt for item in round_.items] == ["cat"] * 6 + ["dog"] * 6
    shown = raters._read(tmp_path / "round" / round_.items[-1].images[1])
    assert torch.equal(shown, raters._read(sources[3] / "1.png"))
    assert loop.checked(tmp_path / "round") == round_


def test_first_choices_by_hand(tmp_path: Path) -> None:
    """Of three: Ann prefers the last in both its duels; Bob's wins go round, so all share."""
    sources = [source(tmp_path / name, ["cat", "dog"], 10 * n) for n, name in enumerate("abc")]
    folder = tmp_path / "round"
    request_ = loop.New(judged=("pairs", "better"), prompts=None, pictures=sources, settings={})
    loop.new(folder, request_)
    refused("feedback", "choices", folder, match="compared all pictures of a prompt")
    say(folder, ["a", "b", "b", "tie", "bad"], rater="Ann")  # the last pair of the dogs is skipped
    say(folder, ["a", "b", "a", "b", "b", "tie"], rater="Bob")
    with loop.votes_of(folder, None) as store:
        found = pictures.first_choices(store.round, store.effective_votes(), 3)
    third = 1 / 3
    expected = {
        "00000": [(0 + third) / 2, (0 + third) / 2, (1 + third) / 2],
        "00001": [0.0, 0.5, 0.5],  # Bob alone: b over a, c over a, a tie
    }
    assert found == {name: pytest.approx(shares) for name, shares in expected.items()}
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
    assert {s.raters for s in loop.choices(folder, None)} == {"simulated"}


@pytest.mark.parametrize(
    ("names", "pool"),
    [(["Ann"], "people"), (["Ann", "simulated 12"], "simulated"), (["simulated Ann"], "people")],
)
def test_one_simulated_rater_makes_a_pool_simulated(names: list[str], pool: str) -> None:
    assert raters.pool_of(names) == pool


def test_only_rounds_of_folders_in_pairs_have_first_choices(tmp_path: Path) -> None:
    sources = [source(tmp_path / name, ["cat", "dog"]) for name in "abc"]
    tags = loop.New(judged=("tags", "deformed"), prompts=None, pictures=sources, settings={})
    loop.new(tmp_path / "tags", tags)
    say(tmp_path / "tags", [(0,), ()])
    refused("feedback", "choices", tmp_path / "tags", match="got a round of other items")
    pairs = loop.New(judged=("pairs", "better"), prompts=None, pictures=sources, settings={})
    loop.new(tmp_path / "pairs", pairs)
    (tmp_path / "pairs" / pictures.SOURCES).write_text('["a", "b"]')
    refused("feedback", "choices", tmp_path / "pairs", match="got a round of other items")


def test_a_folder_alone_is_tagged_by_its_texts(tmp_path: Path) -> None:
    one = source(tmp_path / "a", ["cat", "cat", "dog", "dog"])
    request_ = loop.New(judged=("tags", "deformed"), prompts=None, pictures=[one], settings={})
    round_ = loop.new(tmp_path / "round", request_)
    assert [(item.prompt, len(item.images)) for item in round_.items] == [("cat", 2), ("dog", 2)]


# ---- bad input, on the command line


def refused(*arguments: object, match: str) -> None:
    """The command ends in one line that says `match`."""
    from d3po_bench import cli as module

    runner = CliRunner()

    def main(args: Sequence[str]) -> None:
        module.main(args)

    import click

    @click.command(context_settings={"ignore_unknown_options": True})
    @click.argument("args", nargs=-1, type=click.UNPROCESSED)
    def wrapped(args: Sequence[str]) -> None:
        main(args)

    result = runner.invoke(wrapped, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert match in result.stderr


@pytest.fixture
def own(drawn: Path, tmp_path: Path) -> Path:
    """A copy of the round, to damage."""
    import shutil

    shutil.copytree(drawn, tmp_path / "own", ignore=shutil.ignore_patterns("trained"))
    return tmp_path / "own"


def test_altered_or_missing_files_are_named(own: Path) -> None:
    image, stored = own / "images" / "00001-2.png", own / "rollout" / "00000.safetensors"
    before, kept = image.read_bytes(), stored.read_bytes()
    image.write_bytes((own / "images" / "00001-3.png").read_bytes())
    commands = ("train", "export", "serve", "status", "simulate")
    for command in commands:
        refused("feedback", command, own, match="00001-2.png as it was drawn, got another content")
    image.unlink()
    for command in commands:
        refused("feedback", command, own, match="00001-2.png")
    image.write_bytes(before)
    stored.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    refused("feedback", "train", own, match="00000.safetensors as it was drawn")


def test_labels_that_do_not_belong_to_the_round_are_refused(own: Path, tmp_path: Path) -> None:
    new_round(tmp_path / "other", "tags", 3)
    say(tmp_path / "other", [()])
    url = default_url(tmp_path / "other")
    refused("feedback", "train", own, "--labels", url, match="Expected the labels of this round")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "ann.json").write_text("[[0, -1]]")
    refused("feedback", "train", own, "--label-files", tmp_path / "files", match="got 1 x 2")
    (tmp_path / "files" / "ann.json").write_text(json.dumps([[0] * 7] * 9))
    refused("feedback", "train", own, "--label-files", tmp_path / "files", match="got 9 x 7")


@pytest.mark.parametrize(
    ("column", "value"),
    [("item", "99999"), ("answer", "garbage"), ("answer", "null"), ("answer", "[9]"),
     ("answer", "[1, 1]"), ("shown", "[0]")],
)  # fmt: skip
def test_a_vote_on_something_else_is_refused(own: Path, column: str, value: str) -> None:
    import sqlite3

    with sqlite3.connect(own / "labels.sqlite") as connection:
        connection.execute(f"update votes set {column} = ?", (value,))
        before = connection.execute("select * from votes").fetchall()
    for command in ("train", "export", "status"):
        refused("feedback", command, own, match="Expected votes on this round's items")
    with sqlite3.connect(own / "labels.sqlite") as connection:
        assert connection.execute("select * from votes").fetchall() == before


def test_a_database_of_a_newer_version_is_refused(own: Path) -> None:
    import sqlite3

    with sqlite3.connect(own / "labels.sqlite") as connection:
        connection.execute("update facts set value = '99' where name = 'version'")
    for command in ("train", "export", "status"):
        refused("feedback", command, own, match="got version 99")


def test_a_round_without_votes_cannot_be_learnt_from(own: Path) -> None:
    (own / "labels.sqlite").unlink()
    refused("feedback", "train", own, match="Expected votes on the round")


@pytest.mark.parametrize("method", ["d3po", "preferred_images", "reward_weighted", "ddpo"])
def test_ties_alone_teach_only_who_compares_with_the_round(
    method: str, own: Path, tmp_path: Path
) -> None:
    (own / "labels.sqlite").unlink()
    (tmp_path / "ann.json").write_text(json.dumps([[0] * 7, [-1] * 7]))
    train = ("feedback", "train", own, "--method", method, "--label-files", tmp_path)
    if method in ("d3po", "preferred_images"):
        refused(*train, match=f"got ties alone: {method} has nothing to learn")
    else:
        training.train(loop.data(own, None, tmp_path), request(method=method), tmp_path / "run")
        assert RunStore(tmp_path / "run").metrics[-1]["pairs"] > 0
    (tmp_path / "ann.json").write_text(json.dumps([[-1] * 7] * 2))
    refused(*train, "--out", tmp_path / "other", match="got ties alone")


@pytest.mark.parametrize("command", ["status", "export", "train"])
def test_labels_that_are_not_there_are_refused_and_not_made(
    command: str, own: Path, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'typo.sqlite'}"
    refused("feedback", command, own, "--labels", url, match="typo.sqlite, got no such file")
    assert not (tmp_path / "typo.sqlite").exists()


def test_rows_that_not_all_label_files_have_are_left_out_and_said_so(
    own: Path, tmp_path: Path
) -> None:
    rows = [[-1, -1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, -1], [0] * 7]
    (tmp_path / "ann.json").write_text(json.dumps(rows))
    (tmp_path / "bob.json").write_text(json.dumps(rows[:2]))
    said: list[str] = []
    assert len(loop.data(own, None, tmp_path, said.append).prompts) == 2
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
    assert done.stderr.startswith("error: Expected the extra `feedback` to be installed, got no")
    assert done.stderr.count("\n") == 1


def test_an_empty_round_and_no_round_are_refused(own: Path, tmp_path: Path) -> None:
    whole = json.loads((own / "round.json").read_text())
    (own / "round.json").write_text(json.dumps({**whole, "items": []}))
    refused("feedback", "status", own, match="at least one item")
    refused("feedback", "status", tmp_path / "nothing", match="no round.json")


def test_a_folder_with_another_round_is_left_alone(own: Path, micro: Path) -> None:
    before = files(own)
    with pytest.raises(UserError, match="one with other prompts"):
        draw(own, micro, count=3)
    with pytest.raises(UserError, match="kind or question"):
        loop.new(own, loop.New(
            judged=("tags", "better"), prompts="animals", count=4, model=str(micro),
            preset="official_code", settings=SMALL, device="cpu",
        ))  # fmt: skip
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
    refused("feedback", "new", own / "next", match="Expected --prompts")
    refused(
        "feedback", "new", own / "next", *more, "--kind", "pairs", "--images", "3", match="pairs"
    )


def test_pictures_are_not_learnt_from(tmp_path: Path) -> None:
    new_round(tmp_path, "tags", 2)
    say(tmp_path, [(0,), ()])
    refused("feedback", "train", tmp_path, match="judged, but not learnt from")


def test_pictures_with_bad_metadata_are_refused(tmp_path: Path) -> None:
    one, two = source(tmp_path / "a", ["cat"]), source(tmp_path / "b", ["dog"])
    command = ("feedback", "new", tmp_path / "round", "--kind", "pairs", "--pictures")
    refused(*command, one, "--pictures", two, match="the same texts")
    refused(*command, tmp_path, match="metadata.csv")
    (one / "metadata.csv").write_text("file_name,text\n../b/0.png,cat\n")
    refused(*command, one, match="Expected a picture inside")
    (one / "metadata.csv").write_text("file_name,text\n0.png\n")
    refused(*command, one, match="got '0.png' alone")
    (one / "metadata.csv").write_text("file_name,text\n0.png,cat\x1b[31m\n")
    refused(*command, one, match="without control characters")
    (one / "metadata.csv").write_text("file_name,text\n0.png,cat\n")
    (one / "0.png").write_bytes(b"no picture")
    refused(*command, one, "--pictures", one, match="Expected a picture in")
    assert not (tmp_path / "round" / "round.json").exists()


def test_votes_cannot_be_an_objective_of_a_run(tmp_path: Path) -> None:
    more = ("--method", "d3po", "--objective", "feedback", "--out", tmp_path)
    refused("run", *more, match="Expected an objective")


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
