"""The command behind every recorded try: `python results/search/commands.py [FOLDER]`.

Every setting is given, so that it does not matter what the presets were when a try was made. Many
tries were stopped by hand before their last round.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from d3po_bench import config, registry
from d3po_bench.config import RunConfig


def text(value: Any) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, list | tuple) else str(value)


def settings(recorded: dict[str, Any]) -> dict[str, str]:
    """KEY -> VALUE of all settings of a recorded config; what it does not name is the default."""
    method: Any = registry.method(recorded["method"])
    known = config.settings(recorded["method"])
    default = vars(RunConfig(method="d3po", objective="compress"))
    options = {f.name: getattr(method(), f.name) for f in fields(method)}
    everything = default | recorded | options | recorded["options"]
    return {key: text(everything[key]) for key in (*known["run"], *known["options"])}


def command(recorded: dict[str, Any]) -> list[str]:
    """The arguments of d3po-bench."""
    start = ["run", "--method", recorded["method"], "--objective", recorded["objective"]]
    pairs = [part for k, v in settings(recorded).items() for part in ("--set", f"{k}={v}")]
    return [*start, "--preset", "quick", "--seed-start", str(recorded["seed"]), *pairs]


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for path in sorted(folder.rglob("config.json")):
        out = f"runs/search/{path.relative_to(folder).parts[0]}"
        line = ["d3po-bench", *command(json.loads(path.read_text(encoding="utf-8")))]
        print(shlex.join([*line, "--out", out]))
