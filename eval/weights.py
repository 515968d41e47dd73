"""Checkpoints of scorers, and prompt lists: public address, checksum, and a local cache.

Nothing is fetched behind anybody's back: a scorer that needs a file asks `find`, which names what
is missing and the command that gets it. Every file is checked against its sha256 at each use.
"""

from __future__ import annotations

import io
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from d3po_bench.digests import sha256_of
from d3po_bench.errors import RunError, UserError

TIMEOUT = 20.0
"""Seconds without an answer after which a download is given up; it is not tried again."""

CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class File:
    """One file: its name in the cache, where it is public, and what it must be."""

    name: str
    url: str
    sha256: str
    """Hex; empty where nobody has published one: then that of the first fetch is kept."""
    size: int
    """Bytes; 0 where not known before it is fetched."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What is fetched and found as one."""

    summary: str
    licence: str
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes of all files whose size is known."""
        return sum(file.size for file in self.files)


_CLIP = "https://huggingface.co/openai/clip-vit-large-patch14/resolve/32bd64288804d66eefd0ccbe215aa642df71cc41/"
_D3PO = "https://raw.githubusercontent.com/yk7333/d3po/40d3175/d3po_pytorch/assets/"
_REWARD = (
    "https://huggingface.co/THUDM/ImageReward/resolve/7a9e21fc5c7873859f160173d502cc82f6709e33/"
)
_BLIP = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/"

_BERT = "https://huggingface.co/bert-base-uncased/resolve/86b5e0934494bd15c9632b12f734a8a67f723594/"


def _file(base: str, name: str, sha256: str, size: int = 0) -> File:
    """A file that is called the same in the cache and below `base`."""
    return File(name=name, url=base + quote(name), sha256=sha256, size=size)


WEIGHTS: dict[str, Weights] = {
    "clip": Weights(
        summary="CLIP ViT-L/14 of OpenAI (scorers clip and aesthetic)",
        licence="MIT",
        files=(
            _file(
                _CLIP,
                "config.json",
                "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a",
                size=4519,
            ),
            _file(
                _CLIP,
                "model.safetensors",
                "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
                size=1_710_540_580,
            ),
            _file(
                _CLIP,
                "tokenizer.json",
                "a83e0809aa4c3af7208b2df632a7a69668c6d48775b3c3fe4e1b1199d1f8b8f4",
            ),
            _file(
                _CLIP,
                "tokenizer_config.json",
                "deef455e52fa5e8151e339add0582e4235f066009601360999d3a9cda83b1129",
            ),
            _file(
                _CLIP,
                "vocab.json",
                "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69",
            ),
            _file(
                _CLIP,
                "merges.txt",
                "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
            ),
        ),
    ),
    "laion_aesthetic": Weights(
        summary="LAION's aesthetic head on CLIP ViT-L/14 (scorer aesthetic)",
        licence="Apache-2.0",
        files=(
            _file(
                _D3PO,
                "sac+logos+ava1-l14-linearMSE.pth",
                "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
                size=3_714_759,
            ),
        ),
    ),
    "blip": Weights(
        summary="BLIP ViT-B, image-text matching on COCO, as LAVIS takes it (scorer blip)",
        licence="BSD-3-Clause",
        files=(_file(_BLIP, "model_base_retrieval_coco.pth", ""),),
    ),
    "image_reward": Weights(
        summary="ImageReward-v1.0 (scorer image_reward)",
        licence="Apache-2.0",
        files=(
            _file(
                _REWARD,
                "ImageReward.pt",
                "d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
                size=1_786_880_927,
            ),
        ),
    ),
    "bert-base-uncased": Weights(
        summary="vocabulary of BERT (scorers blip and image_reward)",
        licence="Apache-2.0",
        files=(
            _file(
                _BERT,
                "vocab.txt",
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                size=231_508,
            ),
        ),
    ),
    "prompts-anime": Weights(
        summary="442 anime prompts of the paper's image-distortion experiment",
        licence="MIT",
        files=(
            _file(
                _D3PO,
                "anything_prompt.txt",
                "cf89cb84ff9c1390c5294c852657a21c09f58ba8372bc2681c0ceff986d7854e",
                size=282_214,
            ),
        ),
    ),
    "prompts-image-reward": Weights(
        summary="1,000 prompts of the paper's alignment experiment",
        licence="MIT",
        files=(
            _file(
                _D3PO,
                "imagereward_prompt.txt",
                "3fa2b388a0405873ff7fc73af0edfd217078adddb32aa725d0c1bebd2f0bb35b",
                size=137_926,
            ),
        ),
    ),
}


# ---- where they lie


def home() -> Path:
    """D3PO_BENCH_CACHE, or d3po-bench/ in the user's cache folder."""
    if own := os.environ.get("D3PO_BENCH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "d3po-bench"


def find(name: str) -> Path:
    """The folder that holds the checked files of `name`, a key of `WEIGHTS`.

    Raises:
        UserError: a file is absent, or is not what its checksum says.
    """
    folder, weights = home() / name, WEIGHTS[name]
    for file in weights.files:
        if not (folder / file.name).is_file():
            raise _absent(name, file)
        _check(folder / file.name, _expected(folder, file), f"d3po-bench weights fetch {name}")
    return folder


def find_all(*names: str) -> list[Path]:
    """The folders of several weights, which a scorer needs together.

    Raises:
        UserError: naming all that are absent; or as `find` does.
    """
    lacking = [name for name in names if not _present(name)]
    if len(lacking) > 1:
        said = ", ".join(f"{name} ({readable(WEIGHTS[name].size)})" for name in lacking)
        raise UserError(
            f"Expected the weights {said} in {home()}, got none of them. Run `d3po-bench weights "
            f"fetch {' '.join(lacking)}` where there is a network, or place the files that "
            "`d3po-bench weights list` names there."
        )
    return [find(name) for name in names]


def _present(name: str) -> bool:
    return all((home() / name / file.name).is_file() for file in WEIGHTS[name].files)


def state(name: str) -> str:
    """What `doctor` says of `name`: present, absent, or what is wrong with it."""
    try:
        find(name)
    except UserError as problem:
        absent = not any((home() / name / file.name).exists() for file in WEIGHTS[name].files)
        return "absent" if absent else str(problem)
    return "present"


def fingerprint(path: Path) -> str:
    """sha256 of a file, hex; read once while it does not change.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sha256_of(path)
    except OSError as problem:
        raise UserError(
            f"Expected to read {path}, got: {problem.strerror}. Correct its permissions."
        ) from problem


def _note(folder: Path, file: File) -> Path:
    """Where the checksum of a first fetch is kept, for files that nobody published one for."""
    return folder / (file.name + ".sha256")


def _expected(folder: Path, file: File) -> str:
    note = _note(folder, file)
    if file.sha256 or not note.exists():
        return file.sha256
    return note.read_text(encoding="utf-8").strip()


def _check(path: Path, sha256: str, command: str) -> None:
    found = fingerprint(path)
    if not sha256:
        raise UserError(
            f"Expected a recorded checksum for {path}, got none, and none is published. If you "
            f"trust this file, write {found} to {path}.sha256; or fetch it: `{command}`."
        )
    if found != sha256:
        raise UserError(
            f"Expected sha256 {sha256} for {path}, got {found}: the file is damaged or another. "
            f"Remove it and run `{command}`."
        )


def _absent(name: str, file: File) -> UserError:
    return UserError(
        f"Expected the weights {name} ({readable(WEIGHTS[name].size)}) on this machine, got no "
        f"{home() / name / file.name}. Run `d3po-bench weights fetch {name}` where there is a "
        f"network, or place the file of {file.url} there."
    )


def readable(size: int) -> str:
    """Bytes for people: 1.7 GB, 232 kB; 0 stands for a size that nobody published."""
    if not size:
        return "size not known"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


# ---- fetching

Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes that have come, and those of the whole (0: not known)."""


def fetch(name: str, progress: Progress = lambda name, done, total: None) -> Path:
    """Fetch what of `name` is not there yet; half a file goes on where it was.

    Returns:
        The folder that holds it.

    Raises:
        UserError: no network, or a file is not what its checksum says.
        RunError: the connection broke; what has come is kept.
    """
    folder = home() / name
    for file in WEIGHTS[name].files:
        path = folder / file.name
        if path.is_file():
            _check(path, _expected(folder, file), f"d3po-bench weights fetch {name}")
            continue
        part = _download(file, path, progress)
        if file.sha256:
            _accept(part, file, name)
        else:
            _note(folder, file).write_text(fingerprint(part) + "\n", encoding="utf-8")
        part.replace(path)
    return folder


def _accept(part: Path, file: File, name: str) -> None:
    """Throw away what is not the file that it should be: going on from it could not help."""
    try:
        _check(part, file.sha256, f"d3po-bench weights fetch {name}")
    except UserError:
        part.unlink()
        raise


def _download(file: File, path: Path, progress: Progress) -> Path:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = part.stat().st_size if part.exists() else 0
        with _opened(file, done) as (body, start, total), part.open("ab") as out:
            out.truncate(start)
            for come in _copied(body, out, start):
                progress(file.name, come, total)
            out.flush()
            os.fsync(out.fileno())
        if part.stat().st_size < total:  # urllib does not say so
            raise OSError(0, "the connection ended early")
    except OSError as problem:
        raise _broken(file, path, problem) from problem
    return part


@contextmanager
def _opened(file: File, done: int) -> Iterator[tuple[Any, int, int]]:
    """The bytes from `done` on; where they really start, and the size of the whole (0: not known).

    Raises:
        OSError: no network, or the server has no such file.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no"):
        raise OSError(0, "HF_HUB_OFFLINE, which forbids it")
    headers = {"User-Agent": "d3po-bench", **({"Range": f"bytes={done}-"} if done else {})}
    try:
        answer = urllib.request.urlopen(
            urllib.request.Request(file.url, headers=headers), timeout=TIMEOUT
        )
    except urllib.error.HTTPError as problem:
        if problem.code != 416 or not done:
            raise
        yield io.BytesIO(), done, done  # the whole file had come: nothing lies beyond it
        return
    with answer:
        start = done if answer.status == 206 else 0
        length = int(answer.headers.get("Content-Length") or 0)
        yield answer, start, start + length if length else file.size


def _copied(body: Any, out: Any, start: int) -> Iterator[int]:
    """Copy to the end, telling how many bytes have come."""
    while chunk := body.read(CHUNK):
        out.write(chunk)
        start += len(chunk)
        yield start


def _broken(file: File, path: Path, problem: OSError) -> UserError:
    reason = getattr(problem, "reason", None) or problem.strerror or problem
    kept = path.with_name(path.name + ".part")
    kind, rest = (UserError, "") if not kept.exists() else (RunError, " or run it again to go on")
    return kind(
        f"Expected {file.url}, got: {reason}. Connect this machine{rest}, or place that file at "
        f"{path} by hand."
    )
