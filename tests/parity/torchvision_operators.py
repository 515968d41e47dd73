"""Lets torchvision load beside a torch that its compiled part does not fit.

Import it before torchvision. Only the Python part works then, which is all that resizing and
cropping need; where torchvision loads as it is, or is not there, this changes nothing.
"""

from __future__ import annotations

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def declare() -> torch.library.Library | None:
    """Declare the operators that torchvision looks for, if it does not bring them itself.

    Returns:
        What must stay alive for as long as they are needed.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            library.define(schema)
        return library
    return None


LIBRARY = declare()
