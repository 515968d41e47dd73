"""The embedded model, version 2: 45 animals at 64 pixels, alone, in groups and on cards."""

from pathlib import Path

from d3po_bench.models.sources import Source

HERE = Path(__file__).parent / "embedded" / "v2"

SOURCE = Source(
    path=str(HERE / "tiny2"),
    preset="weighted",
    scorers="tiny2",
    prompts="geneval-held-out",
    small=True,
    pin=HERE / "tiny2.sha256",
)
