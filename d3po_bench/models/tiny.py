"""The embedded model: 45 animals at 32 pixels, no download (see embedded/CARD.md)."""

from pathlib import Path

from d3po_bench.models.sources import Source

HERE = Path(__file__).parent / "embedded"

SOURCE = Source(
    path=str(HERE / "tiny"),
    preset="quick",
    scorers="tiny",
    prompts="captions-held-out",
    small=True,
    pin=HERE / "tiny.sha256",
)
