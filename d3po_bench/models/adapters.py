"""A diffusers pipeline with a trainable network: what every model family shares.

A family subclasses `DiffusersModel` and says how prompts are encoded, how the network is called
and how latents become pictures. LoRA (peft), full training, the pretrained weights beside the
trained ones, counters and files are here.
"""

from __future__ import annotations

import inspect
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from d3po_bench.diffusion.seeding import stream
from d3po_bench.errors import RunError, UserError
from d3po_bench.models.lora import put_on
from d3po_bench.models.parts import complete, load_part, quieten, refused, require_followed
from d3po_bench.models.pictures import encoded
from d3po_bench.models.text_encoders import TEXT_ENCODER, lent, require_short
from d3po_bench.types import Conditions, Prediction, Process, Weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that change no picture drawn from a prompt."""

BASE = "base "
"""Before the names of conditions without the text encoders' LoRA, for the pretrained weights."""

ENCODED_TOGETHER, MOST_ENCODED = 64, 8192
"""Prompts in one pass of the text encoders, and those that are kept."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What trains and how it is computed."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    full: bool = False
    """Train the whole network instead of a LoRA."""
    lora_rank: int = 4
    lora_alpha: float | None = None
    """Scale times rank; None means scale 1."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    long_prompts: Literal["refuse", "cut"] = "refuse"
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    decode_batch: int = 16

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the network's weights: full training keeps them in float32, under autocast."""
        return torch.float32 if self.full else DTYPES[self.dtype]


class DiffusersModel(ABC):
    """Implements `types.Model` for a pipeline that diffusers loads."""

    PIPELINES: ClassVar[tuple[str, ...]]
    """Pipeline classes of diffusers that this family loads; the first reads and writes LoRAs."""
    NETWORK: ClassVar[Literal["unet", "transformer"]]
    """The part that trains."""
    PARTS: ClassVar[Mapping[str, tuple[str, ...]]]
    """Subfolder of each part -> the classes that it may have; none named means any."""
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    """Parts that a pipeline can do without."""
    NOT_FOLLOWED: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """Part -> field of its config -> what a part that sets it expects, and the family lacks."""
    TOKENS: ClassVar[Mapping[str, int]] = {}
    """Tokens that are read of a tokenizer whose own limit is another."""

    process: Process
    prediction: Prediction

    def __init__(
        self, parts: Mapping[str, Any], index: Mapping[str, Any], device: torch.device,
        training: Training,
    ) -> None:  # fmt: skip
        """Take the parts as they are.

        Args:
            parts: of the pipeline, by name, as diffusers loads them.
            index: the pipeline's model_index.json, for families that have settings in it.
            device: where it computes.
            training: what trains.

        Raises:
            UserError: a part's config asks for what is not given to it here.
        """
        self.device, self.training = device, training
        self.parts = dict(parts)
        self.network: Any = self.parts[self.NETWORK]
        self.vae: Any = self.parts["vae"]
        self.pipeline = self._stock_pipeline()
        self.latent_shape = require_followed(self.parts, self.NETWORK, self.NOT_FOLLOWED)
        self._freeze()
        self.forwards = 0
        self.backwards = 0
        self.commit: str | None = None
        self._encoded: dict[str, Conditions] = {}
        self._called = self.network
        self._pretrained: dict[str, Tensor] = {}
        if training.full:
            self.network.requires_grad_(True)
            self._pretrained = self._copies()
        if training.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        if training.channels_last or device.type == "cuda":
            self.network.to(memory_format=torch.channels_last)

    @classmethod
    def load(
        cls, path: str, revision: str | None, index: Mapping[str, Any], device: torch.device,
        training: Training,
    ) -> Self:  # fmt: skip
        """The pipeline in a folder or of a hub id, without an adapter.

        Args:
            path: folder or hub id.
            revision: of a hub id.
            index: its model_index.json.
            device: where it computes.
            training: what trains.

        Raises:
            UserError: a part is missing, of another class, unknown, or does not load.
        """
        quieten()
        classes = {n: v[1] for n, v in index.items() if isinstance(v, list) and len(v) == 2}
        strange = [n for n, kind in classes.items() if kind and n not in {*cls.PARTS, *UNUSED}]
        if strange:
            raise UserError(
                f"The pipeline in {path} has a part that {cls.__name__} does not use: "
                f"{', '.join(strange)}. Give --model another folder or hub id."
            )
        parts: dict[str, Any] = {}
        for name, allowed in cls.PARTS.items():
            found = classes.get(name)
            if found is None and name in cls.OPTIONAL:
                continue
            if found is None or (allowed and found not in allowed):
                raise UserError(
                    f"The pipeline in {path} has {found or 'nothing'} as its {name}; "
                    f"{cls.__name__} needs {' or '.join(allowed) or 'one'}. Give --model another "
                    "folder or hub id."
                )
            # In half precision some VAEs overflow to black.
            dtype = torch.float32 if name == "vae" else training.stored_dtype
            parts[name] = load_part(found, path, revision, name, dtype)
        model = cls(parts, index, device, training)
        with torch.no_grad(), lent(parts, device):  # configs can hold anything
            model._encode([""])
            model._latents(torch.zeros(1, *model.latent_shape, device=device))
        model.process.squares(model.process.levels(2))
        return model

    def _stock_pipeline(self) -> Any:
        """Diffusers' own pipeline of the parts, which corrects outdated configs and reads LoRAs."""
        kind = self._pipeline_class()
        given = {
            name: self.parts.get(name)
            for name, parameter in inspect.signature(kind).parameters.items()
            if parameter.default is parameter.empty or name in self.parts
        }
        with warnings.catch_warnings():  # of outdated configs
            warnings.simplefilter("ignore", FutureWarning)
            return kind(**given)

    def _freeze(self) -> None:
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
                if not name.startswith(TEXT_ENCODER):  # these are lent to it
                    part.to(self.device)

    # ---- what a family says

    @abstractmethod
    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Named conditions of P prompts, batch first."""

    @abstractmethod
    def _call(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """The output of `self._called` for latents [N, C, H, W] and its timesteps [N]."""

    @abstractmethod
    def _latents(self, latents: Tensor) -> Tensor:
        """Latents as the VAE's decoder takes them, unscaled."""

    def unconditional(self) -> Conditions:
        """The empty prompt."""
        return self.encode([""])

    # ---- types.Model

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """Conditions of P prompts, float32; each is encoded once and then kept in host memory."""
        fresh = [p for p in dict.fromkeys(prompts) if p not in self._encoded]
        if self.training.long_prompts == "refuse":
            require_short(self.parts, self.TOKENS, fresh)
        for start in range(0, len(fresh), ENCODED_TOGETHER):
            batch = fresh[start : start + ENCODED_TOGETHER]
            with torch.no_grad(), lent(self.parts, self.device):
                tensors = self._encode(batch)
                if any(part is not self.network for part in self._adapted()):
                    with self._adapters_off():
                        tensors |= {BASE + n: t for n, t in self._encode(batch).items()}
            found = Conditions({n: t.float().cpu() for n, t in tensors.items()})
            self._encoded |= {p: found.take(slice(i, i + 1)) for i, p in enumerate(batch)}
        entries = [self._encoded[p] for p in prompts]
        self._encoded = dict([*self._encoded.items()][-MOST_ENCODED:])
        whole = {n: torch.cat([e[n] for e in entries]) for n in entries[0].tensors}
        return Conditions(whole).to(self.device)

    def output(
        self, x: Tensor, s: Tensor, conditions: Conditions, *, weights: Weights = "current"
    ) -> Tensor:
        """The network's output [N, C, H, W] in float32 at levels [N]."""
        self.forwards += len(x)
        self.backwards += len(x) * torch.is_grad_enabled()
        time, t = self.process.network_time(s), self.training
        # Mixed precision where the trained weights themselves are float32.
        mixed = t.full and t.dtype != "fp32"
        cast = torch.autocast(self.device.type, DTYPES[t.dtype]) if mixed else nullcontext()
        if weights == "base" and any(name.startswith(BASE) for name in conditions.tensors):
            own = conditions.tensors.items()
            conditions = Conditions({n.removeprefix(BASE): t for n, t in own if n.startswith(BASE)})
        with self._weights(weights), cast:
            if not t.full:
                x, conditions = x.to(DTYPES[t.dtype]), conditions.to(DTYPES[t.dtype])
            return self._call(x, time, conditions).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [N, 3, h, w] uint8 on the CPU, rounded, a slice at a time.

        Raises:
            RunError: the VAE gives NaN or infinity, which would be drawn black or white.
        """
        pictures = []
        for x in latents.to(self.device).float().split(self.training.decode_batch):
            pixels: Tensor = self.vae.decode(self._latents(x), return_dict=False)[0]
            if not bool(pixels.isfinite().all()):
                raise RunError(
                    f"The VAE of this model ({type(self.vae).__name__}) overflows: its pictures "
                    "have NaN or infinity in them. Give --model a pipeline with another VAE."
                )
            pictures.append((pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu())
        return torch.cat(pictures)

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Latents [N, C, H, W] of pictures [N, 3, h, w] uint8, of the size that `decode` gives."""
        slices = pictures.split(self.training.decode_batch)
        return torch.cat([encoded(self.vae, self._latents, x.to(self.device)) for x in slices])

    def add_adapter(self, seed: int) -> None:
        """Install the LoRA: down ~ N(0, 1/rank^2) from the stream "adapter", up = 0.

        The policy equals the pretrained model until the first optimizer step. Does nothing
        when the whole network trains.

        Raises:
            UserError: `lora_targets` name no layer.
        """
        t = self.training
        if not t.full:
            from d3po_bench.models.low_rank import install

            try:
                install(self.network, t.lora_targets, t.lora_rank, t.lora_alpha or t.lora_rank)
            except ValueError as problem:
                raise UserError(
                    f"lora_targets={problem} names no layer of the {self.NETWORK}. Use some of "
                    "to_q,to_k,to_v,to_out.0."
                ) from problem
            for index, (name, weight) in enumerate(self.trainable().items()):
                weight.data = weight.data.float()
                if "lora_A" in name:
                    rng = stream(seed, "adapter", index=index)
                    weight.data.copy_(torch.randn(weight.shape, generator=rng) / t.lora_rank)
        if t.compile:
            self._called = torch.compile(self.network)

    def trainable(self) -> dict[str, Tensor]:
        """Name -> trainable parameter, sorted by name."""
        return dict(sorted((n, p) for n, p in self.network.named_parameters() if p.requires_grad))

    # ---- pretrained weights beside the trained ones

    def _copies(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.network.named_parameters()}

    def _weights(self, weights: Weights) -> AbstractContextManager[None]:
        if weights == "current":
            return nullcontext()
        if self._pretrained:
            return self._pretrained_put_in()
        return self._adapters_off()

    def _adapted(self) -> list[Any]:
        """The parts that a LoRA has layers of."""
        return [p for p in self.parts.values() if getattr(p, "_hf_peft_config_loaded", False)]

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        for part in self._adapted():
            part.disable_adapters()
        try:
            yield
        finally:
            for part in self._adapted():
                part.enable_adapters()

    @contextmanager
    def _pretrained_put_in(self) -> Iterator[None]:
        parameters = dict(self.network.named_parameters())
        tuned = {name: p.data for name, p in parameters.items()}
        for name, p in parameters.items():
            p.data = self._pretrained[name]
        try:
            yield
        finally:
            for name, p in parameters.items():
                p.data = tuned[name]

    # ---- weights on disk

    def load_trainable(self, state: Mapping[str, Tensor]) -> None:
        """Copy a checkpoint's tensors into the trainable parameters."""
        for name, parameter in self.trainable().items():
            parameter.data.copy_(state[name])

    def load_saved(self, folder: Path) -> None:
        """Put on what `save`, or another trainer, wrote: a LoRA or a whole network.

        Args:
            folder: with either, or the file of a LoRA.

        Raises:
            UserError: there is neither, or one of another model.
        """
        with refused(
            f"The LoRA or {self.NETWORK} in {folder} does not fit this model:",
            "Give --model the model that it was trained on.",
        ):
            if (folder / self.NETWORK).is_dir():
                self._load_network(folder / self.NETWORK)
            else:
                put_on(self.pipeline, folder)
        self._encoded.clear()  # a LoRA can have layers of the text encoders
        self._freeze()

    def _load_network(self, folder: Path) -> None:
        tuned = complete(type(self.network), folder, local_files_only=True)
        ours, theirs = (json.loads(network.to_json_string()) for network in (self.network, tuned))
        changed = [n for n in ours if not n.startswith("_") and ours[n] != theirs.get(n)]
        if changed:
            raise ValueError(f"its config.json differs in {', '.join(changed)}.")
        self._pretrained = self._copies()
        self.network.load_state_dict(tuned.state_dict())

    def save(self, folder: Path) -> None:
        """Write what was trained, in the form that diffusers' own loaders read.

        A LoRA becomes `pytorch_lora_weights.safetensors` for `load_lora_weights`; a fully
        trained network becomes a folder of its name for `from_pretrained`.
        """
        if self.training.full:
            self.network.save_pretrained(folder / self.NETWORK)
            return
        from peft.utils import get_peft_model_state_dict

        # The scale goes into the weights: written as metadata beside the format, the two would
        # land in the file in random order.
        t = self.training
        scale = (t.lora_alpha or t.lora_rank) / t.lora_rank
        whole = get_peft_model_state_dict(self.network).items()
        layers = {n: weight * scale if "lora_B" in n else weight for n, weight in whole}
        self._pipeline_class().save_lora_weights(folder, **{f"{self.NETWORK}_lora_layers": layers})

    def _pipeline_class(self) -> Any:
        import diffusers

        return getattr(diffusers, self.PIPELINES[0])
