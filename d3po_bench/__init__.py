"""d3po-bench: fine-tune text-to-image diffusion models from preferences and rewards."""

__version__ = "0.1.0"
