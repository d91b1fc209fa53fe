"""The network under a head: frozen or with LoRA, an embedding model or a vision-language model."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmalign.config import ConfigError
from mmalign.runtime.files import digest_of
from mmalign.types import Media
from vision_rewards.training.config import BackboneConfig

ADAPTER = "adapter"


class Backbone(Protocol):
    """Features of pictures and prompts.

    Attributes:
        network: everything with weights. width: of the features. digest: names the weights.
        joint: image features depend on the prompt; ``text`` is then not called.
        has_text: there are text features. differentiable: gradients reach the pixels.
    """

    network: Any
    width: int
    digest: str
    joint: bool
    has_text: bool
    differentiable: bool

    def image(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Pictures, each ``(3, H, W)`` in [0, 1] and of any size, to ``(B, width)`` fp32."""
        ...

    def image_batch(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Pictures of one size, ``(B, 3, H, W)``, to ``(B, width)`` fp32."""
        ...

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to ``(B, width)`` fp32."""
        ...

    def modules(self) -> Sequence[nn.Module]:
        """The networks, one by one: each may be shared with other scorers."""
        ...


def load_backbone(config: BackboneConfig, adapter: str | Path | None = None) -> Backbone:
    """Load the network a configuration names, with a trained adapter if there is one.

    With ``lora_rank`` above 0 the network is a copy of its own with LoRA layers in it.

    Raises:
        OSError: the checkpoint is not there. ConfigError: LoRA targets that match nothing.
    """
    made: Backbone
    made = VlmBackbone(config) if config.kind == "vlm" else EmbeddingBackbone(config)
    if config.lora_rank:
        add_lora(made.network, config)
        if adapter is not None:
            made.digest += "+" + load_adapter(made.network, adapter)
    return made


class EmbeddingBackbone:
    """CLIP, SigLIP, DINO or any other embedder, features of length 1 in fp32."""

    joint = False
    differentiable = True

    def __init__(self, config: BackboneConfig) -> None:
        from vision_rewards.embedding import load_embedder

        embedder = load_embedder(
            config.checkpoint, dtype=config.dtype, vision_only=config.vision_only
        )
        # Embedders are shared among scorers: one that is changed must be a copy.
        self.network: Any = copy.deepcopy(embedder) if config.lora_rank else embedder
        self.width, self.digest = int(embedder.dim), str(embedder.digest)
        self.digest += "-" + embedder.preprocess.fingerprint
        self.has_text = embedder.text_tower is not None

    def image(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Embed pictures of equal size together; ``prompts`` play no part."""
        sizes: dict[tuple[int, ...], list[int]] = {}
        for row, picture in enumerate(pictures):
            sizes.setdefault(tuple(picture.shape), []).append(row)
        parts = [self._embed([pictures[i] for i in rows]) for rows in sizes.values()]
        place = torch.tensor([i for rows in sizes.values() for i in rows]).argsort()
        return torch.cat(parts)[place]

    def _embed(self, pictures: Sequence[Tensor]) -> Tensor:
        return self.network.image(torch.stack(list(pictures)).to(device_of(self.network)))  # type: ignore[no-any-return]

    def image_batch(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Embed pixels ``(B, 3, H, W)``; other scorers may share the forward pass."""
        return self.network.image(pixels)  # type: ignore[no-any-return]

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts."""
        return self.network.text(list(prompts))  # type: ignore[no-any-return]

    def modules(self) -> Sequence[nn.Module]:
        """The towers."""
        return self.network.networks  # type: ignore[no-any-return]


class VlmBackbone:
    """A vision-language model read at its last token: the hidden state, or yes against no.

    The read-out is ``logsumexp`` over the spellings of yes minus that over the spellings of no,
    which is the log-odds of yes among the two.

    Raises:
        ConfigError: a spelling is not one token of the tokenizer and no other spelling is.
        BackendError: the checkpoint lacks weights of the model, or has others.
    """

    joint = True
    has_text = False
    differentiable = False

    def __init__(self, config: BackboneConfig) -> None:
        from transformers import AutoProcessor

        from vision_rewards.judge.local import load_model

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.dtype]
        self.config = config
        self.processor: Any = AutoProcessor.from_pretrained(config.checkpoint)
        self.network: Any = load_model(config.checkpoint, dtype)
        self.words = self._words() if config.readout == "yes_no" else None
        self.width = 1 if self.words else int(self.network.get_output_embeddings().weight.shape[1])
        self.digest = _digest(self.network, config.template, config.readout)

    def image(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Read each picture together with its prompt."""
        images = [Media(p[None].cpu()).to_pil()[0] for p in pictures]
        texts = [self._text(p) for p in prompts]
        batch = self.processor(
            images=[[i] for i in images], text=texts, padding=True, return_tensors="pt"
        ).to(device_of(self.network))
        base = getattr(self.network, self.network.base_model_prefix, self.network)
        hidden = base(**batch, use_cache=False).last_hidden_state
        state = last_token(hidden, batch["attention_mask"])
        return self._readout(state).float() if self.words else state.float()

    def image_batch(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Read each picture of ``(B, 3, H, W)`` together with its prompt."""
        return self.image(list(pixels), prompts)

    def modules(self) -> Sequence[nn.Module]:
        """The model."""
        return (self.network,)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Not there: the prompt is read together with the picture."""
        raise TypeError("a vision-language backbone has no text features of their own")

    def _text(self, prompt: str) -> str:
        from vision_rewards.judge.local import without_marks

        said = self.config.template.replace("{prompt}", without_marks(prompt, self.processor))
        if not getattr(self.processor, "chat_template", None):
            return f"{getattr(self.processor, 'image_token', '<image>')}{said}"
        content = [{"type": "image"}, {"type": "text", "text": said}]
        messages = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))

    def _words(self) -> tuple[list[int], list[int]]:
        return (
            _single_tokens(self.processor.tokenizer, "yes"),
            _single_tokens(self.processor.tokenizer, "no"),
        )

    def _readout(self, state: Tensor) -> Tensor:
        assert self.words is not None
        logits = self.network.get_output_embeddings()(state).float()
        yes, no = (torch.logsumexp(logits[:, ids], -1) for ids in self.words)
        return (yes - no)[:, None]


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The state ``(B, d)`` of the last token that is no padding, on whichever side padding is.

    Args:
        hidden: ``(B, L, d)``. mask: ``(B, L)``, 1 for tokens.

    Raises:
        ValueError: a row is all padding.
    """
    if not bool(mask.any(1).all()):
        raise ValueError("a row of the batch is all padding: its text and picture gave no token")
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (places * mask.bool()).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _single_tokens(tokenizer: Any, word: str) -> list[int]:
    found = set()
    for spelling in (word, word.capitalize(), word.upper(), f" {word}", f" {word.capitalize()}"):
        ids = tokenizer(spelling, add_special_tokens=False).input_ids
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            found.add(int(ids[0]))
    if not found:
        raise ConfigError(f"backbone.readout: {word!r} is not one token of this tokenizer")
    return sorted(found)


def device_of(network: nn.Module) -> torch.device:
    """Where the weights live."""
    return next(network.parameters()).device


def _digest(network: nn.Module, *settings: str) -> str:
    from vision_rewards.weights import digest

    text = hashlib.sha256("\x1f".join(settings).encode()).hexdigest()[:6]
    return f"{digest(network)}-{text}"


# --- LoRA -------------------------------------------------------------------------------------


def add_lora(network: nn.Module, config: BackboneConfig) -> None:
    """Put trainable low-rank layers into a frozen network, in place (Hu et al. 2021).

    Raises:
        ConfigError: no linear layer has one of the target names; names some that exist.
    """
    from peft import LoraConfig, inject_adapter_in_model

    # Exact type: the projection inside nn.MultiheadAttention is a subclass that is never called.
    linear = [n for n, m in network.named_modules() if type(m) is nn.Linear]
    endings = config.lora_targets
    targets = [n for n in linear if not endings or n.endswith(tuple(endings))]
    if config.kind == "vlm":
        targets = [n for n in targets if not n.endswith("lm_head")]
    if not targets:
        raise ConfigError(
            f"backbone.lora_targets {list(endings)} match no linear layer of the network; it has "
            f"{', '.join(sorted({n.rpartition('.')[2] for n in linear})) or 'none'}"
        )
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets)
    inject_adapter_in_model(lora, network)
    for name, parameter in network.named_parameters():
        if "lora_" in name:  # in fp32 whatever the network is: small updates vanish in bf16
            parameter.data = parameter.data.float()
        parameter.requires_grad_("lora_" in name)


def save_adapter(network: nn.Module, folder: str | Path) -> None:
    """Write the LoRA layers as a peft adapter folder (config and safetensors)."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(network).items()
    }
    save_file(state, folder / "adapter_model.safetensors")
    peft_config: Any = network.peft_config["default"]  # type: ignore[index,union-attr]
    peft_config.save_pretrained(folder)


def load_adapter(network: nn.Module, folder: str | Path) -> str:
    """Load what :func:`save_adapter` wrote; returns a digest of the weights.

    Raises:
        ValueError: keys that do not fit, by name.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    path = Path(folder) / "adapter_model.safetensors"
    state = load_file(path)
    wanted = get_peft_model_state_dict(network).keys()
    wrong = sorted(set(wanted) ^ set(state))
    if wrong:
        raise ValueError(f"{path} does not fit the backbone: {len(wrong)} keys, e.g. {wrong[:3]}")
    set_peft_model_state_dict(network, state)
    return adapter_digest(folder)


def adapter_digest(folder: str | Path) -> str:
    """A short SHA-256 of the adapter's file."""
    path = Path(folder) / "adapter_model.safetensors"
    return digest_of(path)[:8]
