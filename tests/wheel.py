"""What a user of the wheel does, with the interpreter that it is installed in: `nox -s wheel`.

    cd EMPTY && PYTHON -P .../tests/wheel.py

Runs the first commands of README, plots, tables, the page, an export and the labelling page in the
current folder, and exits with 1 at the first that fails.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, OpenerDirector, build_opener

COMMAND = str(Path(sysconfig.get_path("scripts"), "d3po-bench"))
RUNS = "first-look/tiny/incompress"
FIRST = "run --objective incompress --seeds 2 --rounds 2 --out first-look"
WALK = [
    "list",
    f"{FIRST} --method d3po",
    f"{FIRST} --method preferred_images",
    "plot first-look",
    "report first-look",
    "report first-look --out page.html",
    f"compare {RUNS}/d3po {RUNS}/preferred_images",
    f"show {RUNS}/d3po/seed-0",
    f"export {RUNS}/d3po/seed-0 --format comfyui --out lora.safetensors",
    "doctor",
    "feedback new round-1 --prompts animals --count 2",
]
MADE = ["first-look/plots/*.png", "page.html", "lora.safetensors", "round-1/images"]


def main() -> None:
    """All of it."""
    installed()
    for line in WALK:
        print(f"\n$ d3po-bench {line}", flush=True)
        subprocess.run([COMMAND, *line.split()], check=True)
    for pattern in MADE:
        if not list(Path().glob(pattern)):
            sys.exit(f"No command has made {pattern}.")
    labelling_page()


def installed() -> None:
    """Refuse a checkout in place of the wheel."""
    import d3po_bench

    home = Path(str(d3po_bench.__file__)).parent
    if home.parent != Path(sysconfig.get_path("purelib")):
        sys.exit(f"d3po_bench is that of {home.parent}, not an installed wheel.")


def labelling_page() -> None:
    """Start the server, and fetch its first page and everything that the page needs."""
    serve = [COMMAND, "feedback", "serve", "round-1", "--rater", "Ann", "--port", "0"]
    print(f"\n$ {' '.join(serve)}", flush=True)
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        try:
            address, token = invitation(server)
            browser = build_opener(HTTPCookieProcessor())
            page = read(browser, f"{address}/join")
            page += read(browser, f"{address}/join", urlencode({"token": token}).encode())
            for path in sorted({*re.findall(r'(?:src="|href="(?=/static))(/[^"]+)"', page)}):
                read(browser, f"{address}{path}")
            if 'name="hand"' not in page:
                sys.exit(f"There is nothing to judge on the page:\n{page}")
        finally:
            server.terminate()


def invitation(server: subprocess.Popen[str]) -> tuple[str, str]:
    """Where the server says that it listens, and the code in the rater's link."""
    for line in server.stdout or ():
        print(line, end="", flush=True)
        if found := re.search(r"(http://[\w.]+:\d+)\S*#(\S+)", line):
            return found[1], found[2]
    sys.exit("The server has ended without a link.")


def read(browser: OpenerDirector, address: str, sent: bytes | None = None) -> str:
    """What is there; an HTTP error ends the walk."""
    with browser.open(address, sent, timeout=60) as answer:
        content: bytes = answer.read()
    print(f"{address}  {answer.status}  {len(content)} bytes", flush=True)
    return content.decode(errors="replace")


if __name__ == "__main__":
    main()
