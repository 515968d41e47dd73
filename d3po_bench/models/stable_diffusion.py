"""Any Stable-Diffusion-1.x-shaped diffusers folder or hub id as a trainable model.

UNet2DConditionModel, AutoencoderKL or AutoencoderTiny, a CLIP text encoder and tokenizer, and
any scheduler config with a discrete noise schedule. Text encoder and VAE are frozen; the UNet
trains through LoRA (peft) or in full. The embedded model goes through this same file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from d3po_bench.diffusion.seeding import stream
from d3po_bench.errors import UserError, is_out_of_memory
from d3po_bench.models.sources import Source, absent, commit, require_pinned

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Training:
    """What trains and how it is computed."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    full: bool = False
    """Train all of the UNet instead of a LoRA."""
    lora_rank: int = 4
    lora_alpha: float | None = None
    """Scale times rank; None means scale 1."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    decode_batch: int = 16


class StableDiffusion:
    """A Stable Diffusion 1.x model with a trainable adapter; implements `types.Model`."""

    def __init__(self, parts: dict[str, Any], device: torch.device, training: Training) -> None:
        """`parts`: unet, vae, text_encoder, tokenizer and scheduler, as diffusers loads them."""
        self.device, self.training = device, training
        self.unet, self.vae, self.text_encoder = (
            parts[name].to(device).requires_grad_(False).eval()
            for name in ("unet", "vae", "text_encoder")
        )
        self.tokenizer = parts["tokenizer"]
        scheduler = parts["scheduler"]
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod
        self.prediction = scheduler.config.prediction_type
        config = self.unet.config
        size = config.sample_size
        self.latent_shape = (config.in_channels, size, size)
        self.forwards = 0
        """Network forwards so far, in latents with one conditioning each."""
        self.backwards = 0
        self.commit: str | None = None
        """Of the hub id that it was loaded from."""
        self._embeddings: dict[str, Tensor] = {}
        self._network = self.unet
        self._pretrained: dict[str, Tensor] = {}
        self._configure()

    def _configure(self) -> None:
        t = self.training
        if t.full:
            self.unet.requires_grad_(True)
            self._pretrained = {n: p.detach().clone() for n, p in self.unet.named_parameters()}
        if t.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if t.channels_last:
            self.unet.to(memory_format=torch.channels_last)

    def add_adapter(self, seed: int) -> None:
        """Install the LoRA: down ~ N(0, 1/rank^2) from the stream "adapter", up = 0.

        The policy equals the pretrained model until the first optimizer step. Does nothing
        when the whole UNet trains.
        """
        t = self.training
        if not t.full:
            from peft import LoraConfig

            alpha = t.lora_alpha or t.lora_rank
            try:
                self.unet.add_adapter(
                    LoraConfig(r=t.lora_rank, lora_alpha=alpha, target_modules=list(t.lora_targets))
                )
            except ValueError as problem:
                raise UserError(
                    f"Expected lora_targets that name layers of the UNet, got "
                    f"{','.join(t.lora_targets)!r}. Use some of to_q,to_k,to_v,to_out.0."
                ) from problem
            for index, (name, weight) in enumerate(self.trainable().items()):
                weight.data = weight.data.float()
                if "lora_A" in name:
                    rng = stream(seed, "adapter", index=index)
                    weight.data.copy_(torch.randn(weight.shape, generator=rng) / t.lora_rank)
        self.unet.train()  # only gradient checkpointing looks at it: there is no dropout
        if t.compile:
            self._network = torch.compile(self.unet)

    # ---- types.Model

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [P, L, E], float32; each prompt is encoded once per process.

        Raises:
            UserError: a prompt has more tokens than the text encoder reads.
        """
        fresh = [p for p in dict.fromkeys(prompts) if p not in self._embeddings]
        for start in range(0, len(fresh), 64):
            batch = fresh[start : start + 64]
            for prompt, text in zip(batch, self._encode(batch), strict=True):
                self._embeddings[prompt] = text
        return torch.stack([self._embeddings[p] for p in prompts])

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Tensor:
        limit = self.tokenizer.model_max_length
        for prompt in prompts:
            count = len(self.tokenizer(prompt).input_ids)
            if count > limit:
                raise UserError(
                    f"Expected prompts of at most {limit - 2} tokens, got {count - 2} in "
                    f"{prompt[:60]!r}. Shorten it: the text encoder would not see the rest."
                )
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=limit, return_tensors="pt"
        ).input_ids
        text: Tensor = self.text_encoder(tokens.to(self.device))[0]
        return text.float()

    def noise(self, x_t: Tensor, t: Tensor, text: Tensor, *, frozen: bool = False) -> Tensor:
        """The UNet's output [N, C, H, W] in float32; `frozen`: of the pretrained UNet."""
        self.forwards += len(x_t)
        self.backwards += len(x_t) * torch.is_grad_enabled()
        dtype = DTYPES[self.training.dtype]
        with self._pretrained_weights() if frozen else nullcontext(), self._autocast():
            if not self.training.full:
                x_t, text = x_t.to(dtype), text.to(dtype)
            output: Tensor = self._network(x_t, t, text, return_dict=False)[0]
        return output.float()

    def _autocast(self) -> AbstractContextManager[None]:
        """Mixed precision where the trained weights themselves are float32."""
        t = self.training
        if t.full and t.dtype != "fp32":
            return torch.autocast(self.device.type, DTYPES[t.dtype])
        return nullcontext()

    @contextmanager
    def _pretrained_weights(self) -> Iterator[None]:
        """The UNet as it came: adapter off, or, where all of it was trained, the kept weights."""
        if self._pretrained:
            tuned = {name: p.data for name, p in self.unet.named_parameters()}
            self._put(self._pretrained)
            try:
                yield
            finally:
                self._put(tuned)
        elif getattr(self.unet, "_hf_peft_config_loaded", False):
            self.unet.disable_adapters()
            try:
                yield
            finally:
                self.unet.enable_adapters()
        else:  # nothing was put on it
            yield

    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.unet.named_parameters():
            p.data = weights[name]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [N, 3, h, w] uint8 on the CPU, rounded, a slice at a time."""
        slices = latents.split(self.training.decode_batch)
        return torch.cat([self._decode(x) for x in slices])

    def _decode(self, latents: Tensor) -> Tensor:
        x = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        pixels: Tensor = self.vae.decode(x, return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()

    def trainable(self) -> dict[str, Tensor]:
        """Name -> trainable parameter, sorted by name."""
        return dict(sorted((n, p) for n, p in self.unet.named_parameters() if p.requires_grad))

    # ---- weights on disk

    def load_trainable(self, state: dict[str, Tensor]) -> None:
        """Copy a checkpoint's tensors into the trainable parameters."""
        for name, parameter in self.trainable().items():
            parameter.data.copy_(state[name])

    def load_saved(self, folder: Path) -> None:
        """Put on what `save`, or another trainer, wrote: a LoRA or a whole UNet.

        Raises:
            UserError: the folder holds neither, or one of another model.
        """
        try:
            if (folder / "unet").is_dir():
                self._load_unet(folder / "unet")
            else:
                self._load_lora(folder)
        except Exception as problem:  # a damaged or strange file can raise anything
            if is_out_of_memory(problem):
                raise
            raise UserError(
                f"Expected a LoRA or UNet of this model in {folder}, got files that do not load: "
                f"{_first_line(problem)} Give --model the model that it was trained on."
            ) from problem
        self.unet.requires_grad_(False)

    def _load_unet(self, folder: Path) -> None:
        from diffusers import UNet2DConditionModel

        tuned = UNet2DConditionModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
        self._pretrained = {n: p.detach().clone() for n, p in self.unet.named_parameters()}
        self.unet.load_state_dict(tuned.state_dict())

    def _load_lora(self, folder: Path) -> None:
        from diffusers import StableDiffusionPipeline as Pipeline

        state, alphas = Pipeline.lora_state_dict(
            folder, local_files_only=True, use_safetensors=True
        )
        Pipeline.load_lora_into_unet(state, alphas, self.unet)
        # What the loader does not know it leaves out: that would be the pretrained model.
        placed = sum("lora_" in name for name, _ in self.unet.named_parameters())
        if placed == 0 or placed != len(state):
            raise ValueError(f"of its {len(state)} tensors the UNet takes {placed}.")

    def save(self, folder: Path) -> None:
        """Write what was trained, in the form that diffusers' own loaders read.

        A LoRA becomes `pytorch_lora_weights.safetensors` for `load_lora_weights`; a fully
        trained UNet becomes a folder `unet` for `from_pretrained`.
        """
        if self.training.full:
            self.unet.save_pretrained(folder / "unet")
            return
        from diffusers import StableDiffusionPipeline
        from peft.utils import get_peft_model_state_dict

        # The scale goes into the weights: written as metadata beside the format, the two would
        # land in the file in random order.
        t = self.training
        scale = (t.lora_alpha or t.lora_rank) / t.lora_rank
        layers = {
            name: weight * scale if "lora_B" in name else weight
            for name, weight in get_peft_model_state_dict(self.unet).items()
        }
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def load(source: Source, device: torch.device, training: Training) -> StableDiffusion:
    """Load a pipeline folder or hub id, without an adapter.

    Raises:
        UserError: it is not there, not of Stable Diffusion 1.x's shape, not what ships, or its
            weights are pickles.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    _quieten()
    require_pinned(source)
    index = _model_index(source)
    # All parts of a hub id come from one commit, whatever happens to its branch meanwhile.
    found = commit(source)
    source = replace(source, revision=found or source.revision)
    dtype = torch.float32 if training.full else DTYPES[training.dtype]
    vae = {"AutoencoderTiny": AutoencoderTiny, "AutoencoderKL": AutoencoderKL}[index["vae"][1]]
    classes = {"unet": UNet2DConditionModel, "vae": vae, "text_encoder": CLIPTextModel}
    where = {"pretrained_model_name_or_path": source.path, "revision": source.revision}
    weights = {**where, "use_safetensors": True}
    try:
        parts = {
            name: cls.from_pretrained(**weights, subfolder=name, dtype=dtype)
            if name == "text_encoder"
            else cls.from_pretrained(**weights, subfolder=name, torch_dtype=dtype)
            for name, cls in classes.items()
        }
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(
            source.path, revision=source.revision, subfolder="tokenizer"
        )
        parts["scheduler"] = DDIMScheduler.from_pretrained(**where, subfolder="scheduler")
        if parts["tokenizer"].model_max_length > 10**6:  # made up, for want of any file
            raise OSError("its tokenizer is not there.")
    except Exception as problem:  # a damaged file can raise anything on its way through loaders
        if is_out_of_memory(problem):
            raise
        raise UserError(
            f"Expected a whole Stable Diffusion pipeline in {source.path}, got a part that does "
            f"not load: {_first_line(problem)} Fetch or save the pipeline again, its weights as "
            ".safetensors: no others are loaded."
        ) from problem
    model = StableDiffusion(parts, device, training)
    model.commit = found
    return model


def _quieten() -> None:
    """Switch off the loaders' progress bars and notes: they say nothing that a run needs."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # diffusers passes on an argument that the hub client no longer knows.
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")


def _first_line(problem: BaseException) -> str:
    line = str(problem).strip().splitlines()[0] if str(problem).strip() else repr(problem)
    return line if line.endswith(".") else line + "."


def _model_index(source: Source) -> dict[str, Any]:
    """The pipeline's model_index.json, checked to be of the shape this file handles."""
    from diffusers import StableDiffusionPipeline

    try:
        index = StableDiffusionPipeline.load_config(source.path, revision=source.revision)
    except (OSError, ValueError) as problem:
        raise absent(source) from problem
    expected = {"UNet2DConditionModel", "CLIPTextModel", "CLIPTokenizer"}
    index = index if isinstance(index, dict) else {}
    found = {v[1] for v in index.values() if isinstance(v, list) and len(v) == 2}
    vae = index.get("vae", [None, None])[1]
    known = expected <= found and vae in {"AutoencoderKL", "AutoencoderTiny"}
    if not known or "text_encoder_2" in index:  # Stable Diffusion XL has two
        raise UserError(
            f"Expected a Stable-Diffusion-1.x-shaped pipeline ({', '.join(sorted(expected))}, "
            f"AutoencoderKL or AutoencoderTiny), got {sorted(filter(None, found))} in "
            f"{source.path}. Give another folder or hub id with --model."
        )
    return dict(index)
