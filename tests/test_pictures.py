"""Pictures of other people's: read, or named for what they are."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo

from d3po_bench.errors import UserError
from d3po_bench.pictures import open_picture, read_pictures
from tests.commands import ROOT, Command, refused

RED = Image.new("RGB", (4, 4), (200, 40, 40))


def folder_of(folder: Path, **texts: str) -> Path:
    """Two pictures with texts of a program in them."""
    folder.mkdir()
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    for number in range(2):
        RED.save(folder / f"{number}.png", pnginfo=info)
    return folder


# ---- a picture


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_what_is_opened(kind: str, tmp_path: Path) -> None:
    RED.save(tmp_path / "picture.xyz", kind)
    found = open_picture(tmp_path / "picture.xyz")
    assert (found.mode, found.size) == ("RGB", (4, 4))
    near = Image.eval(ImageChops.difference(found, RED), lambda apart: max(0, apart - 8))
    assert near.getextrema() == ((0, 0),) * 3


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(side: int) -> bytes:
    """A grey PNG of side x side pixels, all of one value."""
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes((side + 1) * min(side, 10)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (POSTSCRIPT, "cannot identify image file"),
        (b"GIF89a" + bytes(100), "cannot identify image file"),
        (b"", "cannot identify image file"),
        (png(8)[:40], ""),
        (png(10_000), "decompression bomb"),
        (png(40_000), "decompression bomb"),
    ],
)
def test_what_is_refused(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(data)
    with pytest.raises(UserError, match=f"0.png is not a picture that can be read: .*{said}") as no:
        open_picture(tmp_path / "0.png")
    assert "\n" not in str(no.value)


def test_a_picture_of_16_bits_is_not_made_white(tmp_path: Path) -> None:
    Image.new("I;16", (4, 4), 1000).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="more than 8 bits a channel"):
        open_picture(tmp_path / "0.png")


def test_nothing_is_opened_by_another_way() -> None:
    """Without a list of formats, Pillow hands PostScript to Ghostscript."""
    places = [
        p for name in ("d3po_bench", "baselines", "eval") for p in (ROOT / name).rglob("*.py")
    ]
    opened = {path: re.findall(r"Image\.open\(.*", path.read_text()) for path in places}
    assert sum(map(len, opened.values())) >= 3
    assert [path for path, calls in opened.items() if any("formats=" not in c for c in calls)] == []


def test_no_table_is_read_by_what_its_cells_look_like() -> None:
    """pandas takes the prompts 1, 01 and 1.0 for one, and NA for none."""
    places = [*(ROOT / "eval").rglob("*.py"), *(ROOT / "d3po_bench").rglob("*.py")]
    assert [path for path in places if "pd.read_" in path.read_text()] == []


# ---- a folder of them


@pytest.mark.parametrize("field", ["text", "prompt", "caption"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_both_tables_of_image_folders_are_read(kind: str, field: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pictures")
    rows = [{"file_name": f"{n}.png", field: text} for n, text in enumerate(("NA", "a cat, red"))]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "csv":
        text = f'file_name,{field}\n0.png,NA\n1.png,"a cat, red"\n'
    (folder / f"metadata.{kind}").write_text(text)
    assert read_pictures(folder) == [("0.png", "NA"), ("1.png", "a cat, red")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "metadata.jsonl names no picture"),
        ("cat\n", "metadata.jsonl cannot be read as JSONL"),
        ('["0.png", "cat"]\n', "a file_name and a text for each picture, and row 1 is"),
        ('{"file_name": "0.png"}\n', "a file_name and a text for each picture, and row 1 is"),
        ('{"file_name": "0.png", "text": 3}\n', "a text for each picture, and row 1 is"),
        ('{"file_name": "0.png", "text": "a\\u0000"}\n', "holds the control character"),
        ('{"file_name": "../0.png", "text": "cat"}\n', "which is not a picture inside"),
    ],
)
def test_a_bad_table_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pictures")
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=said) as refusal:
        read_pictures(folder)
    assert "\n" not in str(refusal.value)


def test_pictures_as_the_authors_code_writes_them_are_scored(
    command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "d3po"
    (folder / "images").mkdir(parents=True)
    (folder / "prompt.json").write_text('["a cat", "a dog"]')
    for number in range(4):
        RED.save(folder / "images" / f"{number:05d}.png")
    assert command("evaluate", "d3po", "--scorers", "jpeg_size").code == 0
    scored = (folder / "evaluation" / "rows.csv").read_text().splitlines()[1:]
    assert [line.split(",")[0][-9:] for line in scored] == [f"0000{n}.png" for n in range(4)]
    assert [line.split(",")[2] for line in scored] == ["a cat", "a cat", "a dog", "a dog"]
    (folder / "images" / "00002.png").rename(folder / "images" / "00004.png")
    with pytest.raises(UserError, match=r"names 'images/00002\.png', which is not a picture"):
        read_pictures(folder)
    (folder / "images" / "00004.png").unlink()
    with pytest.raises(UserError, match="has 2 prompts for the 3 pictures in images/"):
        read_pictures(folder)
    (folder / "metadata.csv").write_text("file_name,text\nimages/00000.png,mine\n")
    assert read_pictures(folder) == [("images/00000.png", "mine")]


def test_two_tables_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pictures")
    for name in ("metadata.csv", "metadata.jsonl"):
        (folder / name).write_text("")
    with pytest.raises(UserError, match="has both metadata"):
        read_pictures(folder)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({}, "is a folder of 2 pictures without a metadata.csv or metadata.jsonl"),
        ({"parameters": "cat\nSteps: 20"}, "2 pictures (AUTOMATIC1111 kept how they were drawn"),
        ({"prompt": '{"3": {}}', "workflow": "{}"}, "2 pictures (ComfyUI kept how they were drawn"),
    ],
)
def test_pictures_alone_are_named_for_what_they_are(
    texts: dict[str, str], said: str, command: Command, tmp_path: Path
) -> None:
    folder_of(tmp_path / "pictures", **texts)
    refused(command("evaluate", "pictures", "--scorers", "jpeg_size"), said, "Write one there: ")
    told = ("feedback", "new", "round", "--kind", "pairs", "--pictures", "pictures")
    refused(command(*told), said, "Write one there: ")


def test_pictures_with_metadata_jsonl_are_scored(command: Command, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pictures")
    rows = [json.dumps({"file_name": f"{n}.png", "text": "cat"}) for n in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    done = command("evaluate", "pictures", "--scorers", "jpeg_size")
    assert done.code == 0
    assert "(2 images)" in done.out
    assert (folder / "evaluation" / "rows.csv").read_text().startswith("file,size,prompt,jpeg_size")


def test_a_photograph_is_turned_as_it_is_shown(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 4), "red")
    picture.paste("blue", (0, 0, 4, 4))  # the left half, which orientation 6 turns to the top
    orientation = Image.Exif()
    orientation[0x112] = 6
    for name in ("0.jpg", "0.png"):
        picture.save(tmp_path / name, exif=orientation)
        found = open_picture(tmp_path / name)
        assert found.size == (4, 8)
        assert found.getpixel((2, 1))[2] > 200  # type: ignore[index]  # blue


def test_pictures_without_one_look_are_refused(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("0.png", "0.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(UserError, match="it is an animation"):
            open_picture(tmp_path / name)
    for alpha, mode in ((0, "RGBA"), (254, "LA")):
        Image.new("RGBA", (4, 4), (255, 0, 0, alpha)).convert(mode).save(tmp_path / "1.png")
        with pytest.raises(UserError, match="it is transparent in places"):
            open_picture(tmp_path / "1.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 255)).save(tmp_path / "1.png")
    assert open_picture(tmp_path / "1.png").getpixel((0, 0)) == (255, 0, 0)


def test_a_row_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pictures")
    (folder / "metadata.csv").write_text("file_name,text\n0.png,cat\n0.png,dog\n0.png,cat\n")
    with pytest.raises(UserError, match=r"has '0\.png' twice with the same text.*Remove row 3"):
        read_pictures(folder)
