"""Stable Diffusion 1.5, from the mirror of the deleted original repository."""

from d3po_bench.models.sources import Source

SOURCE = Source(
    path="stable-diffusion-v1-5/stable-diffusion-v1-5",
    revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    preset="paper",
    size="5.5 GB",
)
