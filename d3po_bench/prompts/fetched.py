"""Prompt lists of the paper that do not ship with the package; see `eval.downloads`."""

from typing import Any

LISTS: dict[str, dict[str, Any]] = {
    "prompts-anime": {
        "summary": "442 anime prompts of the paper's image-distortion experiment",
        "licence": "MIT",
        "address": "https://raw.githubusercontent.com/yk7333/d3po/40d3175/d3po_pytorch/assets/",
        "files": {
            "anything_prompt.txt": (
                "cf89cb84ff9c1390c5294c852657a21c09f58ba8372bc2681c0ceff986d7854e",
                282_214,
            ),
        },
    },
    "prompts-image-reward": {
        "summary": "1,000 prompts of the paper's alignment experiment",
        "licence": "MIT",
        "address": "https://raw.githubusercontent.com/yk7333/d3po/40d3175/d3po_pytorch/assets/",
        "files": {
            "imagereward_prompt.txt": (
                "3fa2b388a0405873ff7fc73af0edfd217078adddb32aa725d0c1bebd2f0bb35b",
                137_926,
            ),
        },
    },
}
"""Name -> fields of `eval.downloads.Weights`."""
