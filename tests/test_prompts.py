"""Files of prompts: every kind is read as what it is, or refused in one line."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from d3po_bench.errors import UserError
from d3po_bench.prompts import digest, read_prompts
from d3po_bench.runs.run import RunFolder
from d3po_bench.training.tools import spread
from eval.analysis import scored, table1
from eval.verify.folder import check_run
from tests.commands import Command, refused, run_of

ODD = ["NA", "null", "nan", "None", "", "1", "01", "1.0", "-0", "True", "1e3", "0x1", "2024-01-01"]
ODD.remove("")  # which is no prompt
"""Prompts that a reader of tables may take for something else."""


def objects(field: str, *texts: str) -> list[dict[str, Any]]:
    return [{"id": number, field: text} for number, text in enumerate(texts)]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


RED = "a cat, red"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", f"{RED}\n\n dog \n"),
        ("a", f"{RED}\ndog"),
        ("a.TXT", f"{RED}\r\ndog\r\n"),
        ("a.json", json.dumps([RED, "dog"])),
        ("a.json", json.dumps(objects("prompt", RED, "dog"), indent=1)),
        ("a.jsonl", lines(objects("text", RED, " dog "))),
        ("a.jsonl", "\n" + lines([RED, "dog"])),
        ("a.JSONL", "\ufeff" + lines(objects("Caption", RED, "dog"))),
        ("a.csv", f'prompt\n"{RED}"\ndog\n'),
        ("a.csv", f'id;x,Prompt,more\r\n1,"{RED}",2\r\n2,dog,3\r\n'),
        ("a.csv", f'\ufeffcaption,seed\n"{RED}",0\n" dog",1\n'),
        ("a.tsv", f"Prompt\tCategory\n{RED}\tx\ndog\ty\n"),
        ("a.csv:title", f'title,prompt\n"{RED}",no\ndog,no\n'),
        ("a.jsonl:a:b", lines(objects("a:b", RED, "dog"))),
        ("a.json:title", json.dumps(objects("title", RED, "dog"))),
    ],
)
def test_every_kind_of_file_gives_its_prompts(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name.partition(":")[0]).write_text(text, newline="")
    assert read_prompts(str(tmp_path / name)) == [RED, "dog"]


def test_a_line_break_within_a_prompt_becomes_a_space(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt\n"a cat\nin a hat\n"\ndog\n')
    found = read_prompts(str(tmp_path / "a.csv"))
    assert found == ["a cat in a hat", "dog"]
    assert digest(found) != digest(["a cat", "in a hat", "dog"])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", '["cat", "dog"]', "a.txt holds JSON, not a prompt on each line. Call it .json"),
        ("a.txt", '{"prompt": "cat"}\n{"prompt": "dog"}', "a.txt holds JSON"),
        ("a", '[\n "cat",\n "dog"\n]\n', "a holds JSON"),
        ("a.yaml", "- cat\n", "a.yaml is no file of prompts that is known here. Give .txt"),
        ("a.parquet", "PAR1", "a.parquet is no file of prompts"),
        ("a.json", "cat\ndog\n", "a.json cannot be read as JSON: Expecting value"),
        ("a.json", lines(objects("prompt", "cat", "dog")), "cannot be read as JSON: Extra data"),
        ("a.json", '{"prompts": ["cat"]}', "it holds one dict, not a list"),
        ("a.json", "[" * 100_000, "a.json cannot be read as JSON"),
        ("a.json", "[]", "a.json holds no prompt"),
        ("a.json", '["cat", 1]', "Say which field"),
        ("a.json", '["cat", ""]', "a.json has '' instead of a text in row 2"),
        ("a.jsonl", '{"prompt": "cat", "prompt": "dog"}', "two fields of an object have the same"),
        ("a.json", '["d\\u0000g"]', "holds the control character '\\x00'"),
        ("a.json", '["\\ud800"]', "holds the control character '\\ud800'"),
        ("a.jsonl", '{"prompt": "cat"}\n{"prompt": null}', "has None instead of a text in row 2"),
        ("a.jsonl", '{"prompt": "cat"}\n{"text": "dog"}', "has None instead of a text in row 2"),
        ("a.jsonl", '{"prompt": "cat"}\n"dog"', "has None instead of a text in row 2 as prompt"),
        ("a.jsonl", '{"prompt": 1}', "has 1 instead of a text in row 1 as prompt"),
        ("a.jsonl", '{"prompt": "cat"}\n{"prompt"', "cannot be read as JSONL"),
        ("a.jsonl", '{"prompt": "a", "text": "b"}', "has prompt and text. Say which field holds"),
        ("a.jsonl", '{"title": "a", "id": 3}', "has no prompt or text or caption but title, id."),
        ("a.csv:title", "prompt\ncat\n", "a.csv has no title but prompt. Say which field"),
        ("a.csv", "cat\ndog\n", "has no prompt or text or caption but cat."),
        ("a.csv", "prompt\na cat, red\n", "row 1 has more or fewer values than the header"),
        ("a.csv", "id,prompt\n1\n", "row 1 has more or fewer values than the header"),
        ("a.csv", "prompt,prompt\na,b\n", "two columns have the same name"),
        ("a.csv", 'prompt\n"a "cat"\n', "a.csv cannot be read as CSV"),
        ("a.csv", "prompt;id\ncat;1\n", "has no prompt or text or caption but prompt;id."),
        ("a.csv", "prompt,id\n,1\n", "has '' instead of a text in row 1"),
        ("a.csv", "prompt\n", "a.csv holds no prompt"),
        ("a.csv", "", "a.csv holds no prompt"),
        ("a.csv", "prompt\nd\0g\n", "a.csv"),
        ("a.csv", "prompt\n" + "x" * 200_000, "a.csv cannot be read as CSV: field larger"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_prompts_is_one_line(
    name: str, text: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / name.partition(":")[0]).write_text(text)
    with pytest.raises(UserError, match=re.escape(said)) as refusal:
        read_prompts(str(tmp_path / name))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


def test_prompts_that_look_like_json_are_prompts(tmp_path: Path) -> None:
    """As image boards write them: braces and brackets are weights."""
    texts = ["{best quality}, cat", "[cat:dog:0.5]", "1", '"cat"', "null"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    assert read_prompts(str(tmp_path / "a.txt")) == texts


# ---- on the command line


def test_prompts_have_an_option_of_their_own(command: Command, micro: Path) -> None:
    Path("a.csv").write_text('text\n"cat, red"\ndog\n')
    assert command(*run_of(micro, "--prompts", "a.csv", rounds=1)).code == 0
    (path,) = Path("runs").rglob("eval.csv")
    with path.open(newline="") as file:
        assert {row["prompt"] for row in csv.DictReader(file)} == {"cat, red", "dog"}
    (path,) = Path("runs").rglob("config.json")
    assert json.loads(path.read_text())["prompts"] == "a.csv"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prompts", "nowhere.csv"], "No prompt list is called 'nowhere.csv'"),
        (["--prompts", "animal"], "Did you mean 'animals'?"),
        (["--prompts", ""], "'--prompts': it is empty"),
        (["--prompts", "animals", "--set", "prompts=captions"], "--set prompts=captions"),
        (["--rounds", "5", "--set", "rounds=3"], "--set rounds=3"),
    ],
)
def test_bad_prompts_are_one_line_and_write_nothing(
    more: list[str], said: str, command: Command, micro: Path
) -> None:
    refused(command(*run_of(micro), *more), said)
    assert not Path("runs").exists()


def test_some_that_are_too_long_are_named_and_all_can_be_cut(command: Command, micro: Path) -> None:
    Path("a.txt").write_text("\n".join(["cat", "a " * 15, "dog", "dog " * 16]))
    args = run_of(micro, "--prompts", "a.txt", rounds=1)
    said = refused(command(*args), "2 of 4 prompts have more tokens than the text encoder reads: ")
    assert f"'{'a ' * 14}a' has 15 of 14, " in said
    assert "' has 16 of 14. Shorten them, or have them cut: --set long_prompts=cut" in said
    assert not Path("runs").exists()
    assert command(*args, "--set", "long_prompts=cut").code == 0
    (path,) = Path("runs").rglob("config.json")
    assert json.loads(path.read_text())["long_prompts"] == "cut"
    again = ("evaluate", path.parent, "--prompts", "a.txt", "--scorers", "jpeg_size")
    assert command(*again).code == 0  # as the run has it
    drawn = ("evaluate", micro, "--prompts", "a.txt", "--scorers", "jpeg_size", "--out", "out")
    no = command(*drawn)
    assert no.code == 2
    assert "error: 2 of 4 prompts have more tokens" in no.err
    assert not Path("out").exists()
    assert command(*drawn, "--long-prompts", "cut", "--steps", "2").code == 0


# ---- text is text


def test_odd_prompts_and_one_twice_train_and_can_be_plotted(command: Command, micro: Path) -> None:
    Path("a.txt").write_text("\n".join([*ODD, "cat", "cat"]))
    args = run_of(micro, "--prompts", "a.txt", rounds=1, eval_prompts=45)
    assert command(*args).code == 0
    (path,) = Path("runs").rglob("eval.csv")
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["sampler"] == "eta1"]
    assert [row["prompt"] for row in rows if row["round"] == "0"] == [*ODD, "cat"]
    assert command("plot", "runs", "--out", "plots").code == 0
    assert command("report", "runs").code == 0


def test_a_run_is_evaluated_on_other_prompts_and_from_another_noise(
    command: Command, micro: Path
) -> None:
    Path("seen.txt").write_text("a cat\na dog")
    Path("other.txt").write_text("a fox\na frog")
    sizes = []
    for noise in (0, 1):
        out = f"runs-{noise}"
        args = run_of(
            micro, "--prompts", "seen.txt", "--out", out, rounds=1, eval_list="other.txt",
            eval_noise=noise,
        )  # fmt: skip
        assert command(*args).code == 0
        (path,) = Path(out).rglob("eval.csv")
        rows = list(csv.DictReader(path.read_text().splitlines()))
        assert {row["prompt"] for row in rows} == {"a fox", "a frog"}
        assert not list(check_run(RunFolder(path.parent)))
        sizes.append([row["score"] for row in rows if row["round"] == "0"])
    assert sizes[0] != sizes[1]
    Path("other.txt").write_text("a fox\na bat")
    no = command(*args)
    assert no.code == 2
    assert "eval_prompts" in no.err


def test_each_prompt_is_evaluated_once() -> None:
    assert spread(["a", "b", "a", "c", "a", "d"], 2) == ["a", "c"]
    assert spread(["a", "a", "b"], 5) == ["a", "b"]


def test_odd_prompts_are_paired_in_table_1(tmp_path: Path) -> None:
    for name, gain in (("no-fine-tune", 0), ("d3po-0", 2)):
        path = tmp_path / "rows" / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        body = "".join(f"eta1,{p},0,{n + gain},\n" for n, p in enumerate(ODD))
        path.write_text("sampler,prompt,index,clip,animal\n" + body)
    rows = scored.rows_of(tmp_path)
    found = rows["d3po-0"]
    assert sorted(found.index) == sorted((prompt, "0") for prompt in ODD)
    assert found.loc[("01", "0"), "clip"] == 2 + ODD.index("01")
    assert found["animal"].isna().all()
    assert table1._cell([found], rows["no-fine-tune"], "clip") == "7.500 (+2.000)"
    assert table1._cell([found], rows["no-fine-tune"], "animal") == "", "no scorer said anything"
    assert list(scored.gained(tmp_path)) == [("d3po", "clip")]


@pytest.mark.parametrize("ending", ["\r", "\n", "\r\n"])
def test_each_line_break_within_a_prompt_is_one_space(ending: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([f" a{ending}cat{ending}"]))
    assert read_prompts(str(tmp_path / "a.json")) == ["a cat"]


@pytest.mark.parametrize("args", [["run", "--prompts"], ["sweep"]])
def test_a_pipe_is_refused_and_not_waited_for(args: list[str], command: Command) -> None:
    os.mkfifo("pipe.txt")
    more = ["--method", "d3po", "--objective", "incompress"] if args[0] == "run" else []
    refused(command(*args, "pipe.txt", *more), "pipe.txt is a pipe or a device")
