"""The embedded model: 45 animals at 32 pixels, no download (see embedded/CARD.md)."""

from pathlib import Path

from d3po_bench.models.stable_diffusion import Source

SOURCE = Source(
    path=str(Path(__file__).parent / "embedded" / "tiny"), preset="quick", scorers="tiny"
)
