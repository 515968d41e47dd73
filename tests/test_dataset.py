"""Preference data that exist already: read whole, or refused by the number of a row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from d3po_bench import pictures
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws, sample
from d3po_bench.errors import UserError
from d3po_bench.experience import dataset
from d3po_bench.experience.dataset import Dataset, Group, Table
from d3po_bench.feedback.handout import hand_out
from d3po_bench.feedback.invitations import find_rater, invite
from d3po_bench.feedback.store import HandoutSettings, open_labels
from d3po_bench.feedback.votes import cast_vote, rows_as
from d3po_bench.models.adapters import Training
from d3po_bench.models.sources import load, model_source
from d3po_bench.models.stable_diffusion import StableDiffusion
from d3po_bench.runs.store import RunStore
from tests.commands import Command, refused
from tests.conftest import CPU
from tests.feedback_round import new_source, new_study


def picture(number: int, side: int = 20) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fourteen pictures under the names that the layouts have for them."""
    (tmp_path / "images").mkdir()
    for n in range(4):
        picture(n).save(tmp_path / f"{n}.png")
    for n in range(14):
        picture(n).save(tmp_path / "images" / f"{n:05d}.png")
    return tmp_path


def table(path: Path, rows: list[Any]) -> Path:
    """Rows in a file, as its name says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


def told(found: Table) -> list[tuple[str, list[str], list[float]]]:
    return [(g.prompt, [p.name for p in g.pictures], [*g.scores]) for g in found.groups]  # type: ignore[union-attr]


PICK = [
    {"caption": "cat", "jpg_0": "0.png", "jpg_1": "1.png", "label_0": 1, "label_1": 0},
    {"caption": "dog", "jpg_0": "2.png", "jpg_1": "3.png", "label_0": 0.5, "label_1": 0.5},
]
HPD = [{"prompt": "cat", "image_path": ["0.png", "1.png"], "human_preference": [0, 1]}]
RANKED = [{"prompt": "cat", "image_path": ["0.png", "1.png", "2.png"], "rank": [3, 1, 2]}]
IMAGE_REWARD = [{"id": "1", "prompt": "cat", "generations": ["0.png", "1.png"], "ranking": [2, 1]}]
DB = [
    {"image_path": f"{n}.png", "prompt_id": key, "prompt": text, "rank": rank}
    for n, key, text, rank in ((0, "x", "cat", 1), (2, "y", "dog", 1), (1, "x", "cat", 2))
]


def studio(data: dict[str, str], *results: dict[str, Any]) -> dict[str, Any]:
    return {"id": 1, "data": data, "annotations": [{"result": [result]} for result in results]}


def chosen(side: str) -> dict[str, Any]:
    return {"type": "pairwise", "value": {"selected": side}}


def tag(word: str) -> dict[str, Any]:
    return {"type": "choices", "value": {"choices": [word]}}


TWO = {"prompt": "cat", "image1": "/data/upload/7/0.png", "image2": "/data/local-files/?d=1.png"}
PAIRWISE = [studio(TWO, chosen("left"), chosen("left"), chosen("right"))]
ONE = {"text": "cat", "image": "2.png"}
CHOICES = [studio(ONE, tag("Good"))]
TWICE = [studio(ONE, tag("Good"), tag("Bad"))]
PAGE = [
    {"prompt": "'=cat", "item": "0", "repeat": r, "answer": a, "images": "0.png 1.png"}
    for r, a in ((0, "b"), (0, "tie"), (1, "a"))
]
GRID = [
    {"prompt": "cat", "item": "0", "repeat": 0, "answer": a, "images": "0.png 1.png 2.png"}
    for a in ("", "0 2", "2")
]
LIKED = [
    {"file_name": "0.png", "text": "cat", "liked": "1"},
    {"file_name": "1.png", "text": "cat", "liked": "no"},
]

CAT = ("cat", ["0.png", "1.png"])


@pytest.mark.parametrize(
    ("name", "rows", "layout", "judged", "expected"),
    [
        ("t.csv", PICK, "Pick-a-Pic", "pairs",
         [(*CAT, [1, 0]), ("dog", ["2.png", "3.png"], [0.5, 0.5])]),
        ("t.jsonl", [PICK[0], {**PICK[1], "has_label": False}], "Pick-a-Pic", "pairs",
         [(*CAT, [1, 0])]),
        ("t.csv", [{**PICK[0], "has_label": "TRUE"}] + [
            {**PICK[1], "has_label": no} for no in ("FALSE", "0", "no")
        ], "Pick-a-Pic", "pairs", [(*CAT, [1, 0])]),
        ("t.json", HPD, "HPD", "pairs", [(*CAT, [0, 1])]),
        ("t.json", RANKED, "HPD", "pairs", [("cat", ["0.png", "1.png", "2.png"], [-3, -1, -2])]),
        ("t.json", IMAGE_REWARD, "ImageReward", "pairs", [(*CAT, [-2, -1])]),
        ("t.csv", DB, "ImageRewardDB", "pairs", [(*CAT, [-1, -2]), ("dog", ["2.png"], [-1])]),
        ("t.json", PAIRWISE, "Label Studio", "pairs", [(*CAT, [2 / 3, 1 / 3])]),
        ("t.json", CHOICES, "Label Studio", "tags", [("cat", ["2.png"], [1])]),
        ("t.json", TWICE, "Label Studio", "tags", [("cat", ["2.png"], [0])]),
        ("t.json", [studio(ONE), *CHOICES], "Label Studio", "tags", [("cat", ["2.png"], [1])]),
        ("t.csv", PAGE, "our page", "pairs", [("=cat", ["0.png", "1.png"], [0, 0.5])]),
        ("t.csv", GRID, "our page", "tags",
         [("cat", ["0.png", "1.png", "2.png"], [1 / 3, 1, -1 / 3])]),
        ("t.csv", LIKED, "tags", "tags", [("cat", ["0.png"], [1]), ("cat", ["1.png"], [-1])]),
    ],
)  # fmt: skip
def test_a_layout_is_known_by_its_columns(
    name: str, rows: list[Any], layout: str, judged: str, expected: Any, folder: Path
) -> None:
    found = dataset.read(table(folder / name, rows))
    assert (found.layout, found.judged) == (layout, judged)
    assert [(p, n) for p, n, _ in told(found)] == [(p, n) for p, n, _ in expected]
    for (_, _, ours), (_, _, theirs) in zip(told(found), expected, strict=True):
        assert ours == pytest.approx(theirs)


def test_the_authors_label_files_have_their_prompts_beside_the_pictures(folder: Path) -> None:
    path = table(folder / "ann.json", [[0, -1, 0, 0, 0, 0, -1], [0] * 7])
    with pytest.raises(UserError, match=r"need prompt.json with 2 prompts beside images/"):
        dataset.read(path)
    table(folder / "prompt.json", ["cat", "dog"])
    names = [f"{n:05d}.png" for n in range(14)]
    assert told(dataset.read(path)) == [
        ("cat", names[:7], [1.0, -1.0, 1.0, 1.0, 1.0, 1.0, -1.0]), ("dog", names[7:], [1.0] * 7),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*PICK, {**PICK[0], "jpg_1": "9.png"}], r"Row 3 .*'9.png' is not a .*--pictures"),
        ([PICK[0], {**PICK[0], "jpg_0": "../x.png"}], r"Row 2 .* is not a picture inside"),
        ([{**PICK[0], "jpg_0": "https://x/0.png"}], r"Row 1 .*is an address: save the picture"),
        ([PICK[0], {**PICK[0], "jpg_0": None}], r"Row 2 .*None names no picture"),
        ([{**PICK[0], "label_1": "yes"}], r"Row 1 .*label_1 is 'yes', not a number"),
        ([{**PICK[0], "label_1": 7}], r"Row 1 .*label_1 is 7, not from 0 to 1"),
        ([PICK[0], {**PICK[0], "caption": " "}], r"Row 2 .*caption is ' ', not a text"),
        ([{**HPD[0], "human_preference": [1]}], r"Row 1 .*human_preference is \[1\], not a list"),
        ([HPD[0], {"prompt": "cat"}], r"Row 2 of .* as HPD's: it has no 'image_path'"),
        ([PAIRWISE[0], studio(TWO, chosen("up"))], r"Row 2 .*'up' is none of left, "),
        ([studio({"prompt": "cat"}, chosen("left"))], r"Row 1 .*name 0 pictures, not one or two"),
        ([LIKED[0], {**LIKED[0], "liked": "meh"}], r"Row 2 .*'meh' is none of good"),
        ([GRID[0], {**GRID[0], "answer": "7"}], r"Row 2 .*answer is '7', of 3 images"),
        ([HPD[0], "cat"], r"Row 2 of "),
        ([{"a": 1}], r"has columns a, which is none of the layouts Pick-a-Pic, HPD, .*docs/"),
        ([], r"no columns, which is none of the layouts"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_named(rows: list[Any], said: str, folder: Path) -> None:
    with pytest.raises(UserError, match=said):
        dataset.read(table(folder / "t.json", rows))


def test_other_files_are_no_tables(folder: Path) -> None:
    with pytest.raises(UserError, match=r"0.png is no table of preference data \(.csv, "):
        dataset.read(folder / "0.png")
    with pytest.raises(UserError, match=r"Cannot read .*nowhere.csv"):
        dataset.read(folder / "nowhere.csv")


def test_pictures_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    path = table(other / "t.csv", PICK)
    assert len(dataset.read(path, folder).groups) == 2


def test_no_picture_is_opened_before_it_is_needed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: Any) -> Any:
        raise AssertionError(path)

    monkeypatch.setattr(pictures, "open_picture", opened)
    monkeypatch.setattr(dataset, "open_picture", opened)
    assert len(dataset.read(table(folder / "t.csv", PICK * 500)).groups) == 1000


@pytest.mark.parametrize("host", ["", "http://localhost:8080", "https://x.example/studio"])
@pytest.mark.parametrize("place", ["/data/upload/7/", "/data/local-files/?d="])
def test_label_studios_addresses_are_files(host: str, place: str, folder: Path) -> None:
    picture(0).save(folder / "a cat.png")
    row = studio({"text": "cat", "image": f"{host}{place}a%20cat.png"}, tag("Good"))
    assert told(dataset.read(table(folder / "t.json", [row]))) == [("cat", ["a cat.png"], [1])]
    out = studio({"text": "cat", "image": f"{host}{place}%2e%2e/x.png"}, tag("Good"))
    with pytest.raises(UserError, match="is not a picture inside"):
        dataset.read(table(folder / "t.json", [out]))


@pytest.mark.parametrize("kind", [".csv", ".json"])
def test_an_export_keeps_prompts_as_they_were(kind: str, folder: Path) -> None:
    prompts = ["=cat", "'=cat", "''- cat", "' cat", "cat"]
    rows = [
        {"prompt": prompt, "item": str(n), "repeat": 0, "answer": "a", "images": ("0.png", "1.png")}
        for n, prompt in enumerate(prompts)
    ]
    (folder / f"t{kind}").write_bytes(rows_as(rows, kind))
    assert [group.prompt for group in dataset.read(folder / f"t{kind}").groups] == prompts


# ---- what methods take


def test_groups_become_pairs_or_single_pictures() -> None:
    three = Group("cat", (Path("0"), Path("1"), Path("2")), (1.0, -1.0, 1.0))
    pairs = [([str(p) for p in g.pictures], g.scores) for g in dataset.pairs_of([three], "pairs")]
    assert pairs == [(["0", "1"], (1, -1)), (["0", "2"], (1, 1)), (["1", "2"], (-1, 1))]
    assert [g.scores for g in dataset.pairs_of([three], "tags")] == [(1, -1), (-1, 1)]
    assert [g.scores for g in dataset.singles_of([three])] == [(1,), (-1,), (1,)]


# ---- pictures as latents


def test_pictures_survive_the_way_to_latents_and_back() -> None:
    model = load(model_source("tiny"), CPU, Training())
    assert isinstance(model, dataset.EncodesPictures)
    policy = Policy(model, steps=5)
    latents = sample(policy, ["a cat", "a dog"], Draws(seed=0, round=0)).latents[:, 0, -1]
    drawn = model.decode(latents).float()
    again = model.decode(model.encode_pictures(drawn.to(torch.uint8))).float()
    assert (again - drawn).abs().mean() < 6 < 60 < (drawn[0] - drawn[1]).abs().mean()


def test_pictures_are_cut_to_the_models_size(folder: Path, micro_model: StableDiffusion) -> None:
    wide = Image.new("RGB", (60, 20))
    wide.paste(picture(5), (20, 0))
    wide.save(folder / "wide.png")
    group = Group("cat", (folder / "wide.png",), (1.0,))
    pixels = torch.from_numpy(np.array(picture(5).resize((16, 16), Image.Resampling.BICUBIC)))
    expected = micro_model.encode_pictures(pixels.permute(2, 0, 1).unsqueeze(0))
    found = Dataset("", [group]).stored(torch.tensor([0]), micro_model)
    assert found["latents"].shape == (1, 1, 1, *micro_model.latent_shape)
    assert found["means"].shape == (1, 1, 0, *micro_model.latent_shape)
    torch.testing.assert_close(found["latents"][0, 0], expected, atol=0.02, rtol=0)


def test_a_family_without_an_encoder_is_refused() -> None:
    from tests.points import Points

    with pytest.raises(UserError, match="Points has no encode_pictures"):
        Dataset("", []).stored(torch.tensor([0]), Points(CPU))


# ---- Parquet


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def test_parquet_with_the_bytes_of_its_pictures(
    tmp_path: Path, micro_model: StableDiffusion
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns: dict[str, list[Any]] = {
        "caption": ["cat", "dog", "bird"], "label_0": [1.0, 0.5, 0.0], "label_1": [0.0, 0.5, 1.0],
        "jpg_0": [jpeg(0), jpeg(2), jpeg(4)], "jpg_1": [jpeg(1), jpeg(3), jpeg(5)],
        "has_label": [True, False, True],
    }  # fmt: skip
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    found = dataset.read(path)
    assert [(g.prompt, g.scores) for g in found.groups] == [("cat", (1, 0)), ("bird", (0, 1))]
    stored = Dataset("", found.groups, path).stored(torch.tensor([1]), micro_model)
    for n in (4, 5):
        picture(n).save(tmp_path / f"{n}.png")
    own = Group("bird", (tmp_path / "4.png", tmp_path / "5.png"), (0, 1))
    expected = Dataset("", [own]).stored(torch.tensor([0]), micro_model)
    assert torch.equal(stored["latents"], expected["latents"])
    columns["jpg_1"][2] = None
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(UserError, match=r"Row 3 of .*None names no picture"):
        dataset.read(path)
    columns["jpg_1"][2] = b"no picture"
    parquet.write_table(pyarrow.table(columns), path)
    damaged = Dataset("", dataset.read(path).groups, path)
    with pytest.raises(UserError, match=r"jpg_1 in row 3 of .*t.parquet is not a picture"):
        damaged.stored(torch.tensor([1]), micro_model)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        dataset.read(path)


# ---- training


@pytest.fixture
def train(folder: Path, micro: Path, command: Command) -> Callable[..., Any]:
    settings = {
        "prompts_per_round": 1, "units_per_update": 2, "sampling_steps": 3, "dtype": "fp32",
        "learning_rate": 0.01,
    }  # fmt: skip
    sets = [f"--set={k}={v}" for k, v in settings.items()]

    def call(path: Path, method: str, *more: object) -> Any:
        given = ("--method", method, "--preset", "official_code", "--device", "cpu")
        return command("feedback", "train", path, *given, *sets, *map(str, more))

    return call


@pytest.mark.parametrize(
    ("rows", "method", "learned"),
    [
        (PICK, "diffusion_dpo", 1),  # the other is a tie
        pytest.param(PICK, "kto", 2, marks=pytest.mark.slow),
        (PICK, "preferred_images", 1),
        (PICK, "reward_weighted", 4),
        pytest.param(LIKED, "kto", 2, marks=pytest.mark.slow),
        pytest.param(LIKED, "preferred_images", 1, marks=pytest.mark.slow),
        pytest.param(
            GRID, "diffusion_dpo", 2, marks=pytest.mark.slow
        ),  # two good ones beside a bad one
        (GRID, "kto", 3),
        (GRID, "awm", 4),  # whose images are compared, in the same pairs
    ],
)
def test_methods_that_need_no_chain_learn_from_a_table(
    rows: list[Any], method: str, learned: int, folder: Path, micro: Path, train: Any
) -> None:
    done = train(table(folder / "t.csv", rows), method, "--model", micro, "--seed", 3)
    assert done.code == 0, done.err
    run = RunStore(folder / "t" / "trained" / method)
    assert run.metrics[-1]["pairs"] == learned
    state = run.load_checkpoint()
    assert state is not None
    assert any(w.abs().max() > 0 for n, w in state[0].items() if "lora_B" in n)


@pytest.mark.parametrize("method", ["d3po", "ddpo", "dpok"])
def test_methods_that_need_a_chain_say_so(method: str, folder: Path, train: Any) -> None:
    done = train(table(folder / "t.csv", PICK), method)
    refused(done, f"{method} learns from every denoising step")
    assert not (folder / "t").exists()


def test_what_teaches_nothing_is_refused(folder: Path, micro: Path, train: Any) -> None:
    path = table(folder / "t.csv", LIKED)
    refused(train(path, "diffusion_dpo"), "has nothing to compare. Use --method kto")
    refused(train(path, "awm"), "so awm has nothing to compare")
    refused(train(path, "kto", "--set=liked=above_mean"), "so kto has nothing to compare")
    tied = table(folder / "tied.csv", PICK[1:])
    refused(train(tied, "diffusion_dpo", "--model", micro), "are ties")
    refused(train(path, "kto", "--labels", "sqlite://"), "Leave out --labels")
    refused(train(path, "kto", "--set=images_per_prompt=7"), "images_per_prompt is 1 here")


# ---- our page's own export


def test_a_voted_round_its_export_and_pandas_say_the_same(
    folder: Path, micro: Path, command: Command, train: Any
) -> None:
    table(folder / "metadata.csv", [
        {"file_name": f"{n}.png", "text": "cat" if n < 2 else "dog"} for n in range(4)
    ])  # fmt: skip
    round_ = folder / "round"
    assert command("feedback", "new", round_, "--kind", "pairs", "--pictures", folder).code == 0
    assert command("feedback", "simulate", round_, "--raters", 3, "--error", "0.3").code == 0
    ends = []
    for out in ("labels.csv", "labels.json"):
        assert command("feedback", "export", round_, "--out", round_ / out).code == 0
        done = train(round_ / out, "diffusion_dpo", "--model", micro, "--out", folder / out)
        assert done.code == 0, done.err
        ends.append((folder / out / "metrics.jsonl").read_bytes())
    done = train(round_, "diffusion_dpo", "--model", micro)
    assert done.code == 0, done.err
    ends.append((round_ / "trained" / "diffusion_dpo" / "metrics.jsonl").read_bytes())
    assert len(set(ends)) == 1
    frame = pd.read_csv(round_ / "labels.csv")
    shares = (
        frame[frame["repeat"] == 0].groupby("item")["answer"].apply(lambda a: (a == "a").mean())
    )
    groups = dataset.read(round_ / "labels.csv").groups
    assert [g.scores[0] for g in groups] == pytest.approx(shares.tolist())


@pytest.mark.slow
def test_a_study_and_its_export_are_learned_from_by_every_method_that_takes_them(
    folder: Path, micro: Path, command: Command, train: Any
) -> None:
    """Two raters on two prompts: a pair and a scale of each picture."""
    sources = [new_source(folder / name, 2, first, size=8) for first, name in ((0, "a"), (2, "b"))]
    round_ = folder / "round"
    study = new_study(folder / "study", answers="answers = 9")
    given = [word for source in sources for word in ("--pictures", source)]
    assert command("feedback", "new", round_, "--study", study, *given).code == 0
    settings = HandoutSettings(votes_per_item=2, gold_every=0, repeat_every=0)
    with open_labels(round_, None, settings, new=True) as store:
        for name, said in (("x", (5, "a")), ("y", (4, "tie"))):
            rater = find_rater(store, token=invite(store, name))
            while rater and (hand := hand_out(store, rater.id)):
                first = hand.item.images[0].endswith("-0.png")
                rated = said[0] if first else 2
                answer: Any = said[1] if hand.item.question == "better" else rated
                cast_vote(store, rater.id, hand.id, answer, 2000, hand.step)
    table_ = round_ / "labels.csv"
    assert command("feedback", "export", round_).code == 0
    refused(train(table_, "kto"), "Choose one with --question")
    refused(train(round_, "kto"), "Choose one with --question")
    # pairs: two prompts, each with a winner. Scales: 2 pictures liked of 4, or two pairs.
    for place, question, method, learned in (
        (table_, "better", "preferred_images", 2), (table_, "real", "kto", 4),
        (table_, "real", "diffusion_dpo", 2), (round_, "real", "diffusion_dpo", 2),
    ):  # fmt: skip
        out = folder / f"{place.name}-{question}-{method}"
        done = train(place, method, "--model", micro, "--question", question, "--out", out)
        assert done.code == 0, done.err
        assert RunStore(out).metrics[-1]["pairs"] == learned, (question, method)
    frame = pd.read_csv(table_)
    real = frame[(frame.question == "real") & (frame.use == "main") & (frame.repeat == 0)]
    means = real.assign(rating=real.answer.astype(int)).groupby("images").rating.mean()
    assert sorted(means) == [2, 2, 4.5, 4.5]
