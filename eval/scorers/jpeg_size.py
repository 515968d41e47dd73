"""Size of each image as a quality-95 JPEG, in kB."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor

from d3po_bench.types import Scorer


class JpegSize:
    """Bytes / 1000 of a baseline JPEG at quality 95, Pillow's other defaults (4:2:0).

    The number depends on the libjpeg that Pillow was built with: runs record Pillow's version.
    """

    unit = "kB"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score `images`, [N, 3, h, w] uint8; the prompts are not looked at.

        Raises:
            TypeError: the images are not uint8 of that shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise TypeError(
                "jpeg_size scores uint8 images of shape [N, 3, h, w], got "
                f"{images.dtype} {tuple(images.shape)}. Multiply float images by 255 and round."
            )
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return torch.tensor([*pool.map(_kilobytes, images.cpu())])


def _kilobytes(image: Tensor) -> float:
    buffer = io.BytesIO()
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.tell() / 1000


def load(device: torch.device) -> Scorer:
    """JPEG encoding runs on the CPU whatever the device."""
    return JpegSize()
