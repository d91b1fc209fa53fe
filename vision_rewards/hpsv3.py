"""HPSv3 (Ma et al., 2508.03789): a preference score with an uncertainty, read off Qwen2-VL.

Qwen2-VL reads the picture, a rubric and the prompt; the hidden state at one special token goes
through a small head to the mean and the log standard deviation of a Gaussian score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.assets import asset
from mmalign.registry import unknown
from mmalign.runtime.device import DTYPES
from vision_rewards.base import Context, PixelReward, Reading
from vision_rewards.cards import info_of
from vision_rewards.published import fill, find_weights, rename_weights, text_digest
from vision_rewards.qwen_pixels import QwenPatches
from vision_rewards.weights import digest, read_weights

HUB, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
BODY = "Qwen/Qwen2-VL-7B-Instruct"
REWARD_TOKEN, IMAGE_TOKEN = "<|Reward|>", "<|image_pad|>"
PROMPT_FIELD = "{text_prompt}"
AREA = 256 * 28 * 28  # pixels; every picture is brought to about this area
# Qwen2-VL's chat format with one picture; the template's text takes the place of {}.
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n<|vision_start|>{IMAGE_TOKEN}<|vision_end|>{{}}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
POSITIONS = ("sequential", "grid")


class RewardHead(nn.Sequential):
    """Hidden state ``(B, width)`` to mean and log standard deviation ``(B, 2)``, in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Linear(width, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )


class Hpsv3Network(nn.Module):
    """Qwen2-VL without its language-model head, and the reward head."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import Qwen2VLModel

        self.model = Qwen2VLModel(config)
        self.rm_head = RewardHead(config.text_config.hidden_size)


def rename(name: str) -> str:
    """A published name in terms of :class:`Hpsv3Network`.

    Until 4.51 transformers kept the towers under ``visual.`` and ``model.``, since then under
    ``model.visual.`` and ``model.language_model.``; files of both kinds are about.
    """
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model")):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name


def read_template(template: str | Path | None) -> str:
    """The rubric: text with ``{text_prompt}`` and ``<|Reward|>`` once each.

    Args:
        template: the text itself, or a file; ``None`` is the shipped wording.

    Raises:
        ValueError: one of the two is missing or given more than once.
        FileNotFoundError: a file that is not there.
    """
    if isinstance(template, str) and PROMPT_FIELD in template:
        text = template
    else:
        path = Path(template) if template is not None else asset("hpsv3/prompt.txt")
        text = path.expanduser().read_text(encoding="utf-8")
    for needed in (PROMPT_FIELD, REWARD_TOKEN):
        if text.count(needed) != 1:
            raise ValueError(
                f"the HPSv3 template holds {needed} {text.count(needed)} times; it needs it once"
            )
    return text


@dataclass(frozen=True)
class Batch:
    """Texts of one forward pass, padded on the right.

    Attributes:
        ids, mask: tokens and their attention mask, ``(B, L)``.
        reward_at: where the reward token stands, ``(B,)``.
    """

    ids: Tensor
    mask: Tensor
    reward_at: Tensor


class Hpsv3(PixelReward):
    """Mean of the Gaussian score; ``parts`` hold ``mu`` and ``sigma``. Differentiable.

    The published training and inference code runs the language model on embeddings alone, and so
    with plain sequential positions for picture tokens; that is the default here. ``grid`` gives
    Qwen2-VL's own three-axis positions.

    Args:
        checkpoint: hub name, file or folder with the weights; ``None`` is the published one.
        body: Qwen2-VL's configuration and tokenizer, by hub name or folder.
        template: the rubric, see :func:`read_template`. The shipped one is not the published
            wording: pass that one for published numbers.
        positions: ``sequential`` or ``grid``.
        max_pixels: area that pictures are brought to, in pixels.
        batch_size: samples of one forward pass.
        device: see :class:`PixelReward`.
        dtype: precision of Qwen2-VL, ``bf16``, ``fp32`` or ``fp16``; the head stays in fp32.

    Raises:
        OSError: weights, configuration or tokenizer are not there and cannot be fetched.
        ValueError: the weights do not fit, naming the keys.
        ValueError: an unusable template, or a tokenizer without Qwen2-VL's special tokens.
    """

    info = info_of("hpsv3")

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        body: str | Path = BODY,
        template: str | Path | None = None,
        positions: str = "sequential",
        max_pixels: int = AREA,
        batch_size: int = 8,
        device: str | None = None,
        dtype: str = "bf16",
    ) -> None:
        super().__init__(device)
        if dtype not in DTYPES:
            raise unknown("precision", dtype, DTYPES)
        if positions not in POSITIONS:
            raise unknown("positions of HPSv3", positions, POSITIONS)
        self.template, self.positions = read_template(template), positions
        self.batch_size = batch_size
        self.patches = QwenPatches(min_pixels=max_pixels, max_pixels=max_pixels)
        path = find_weights(checkpoint, HUB, FILE)
        self.tokenizer = _tokenizer(str(body))
        state = read_weights(path)
        self.network = _network(str(body), state, str(path), DTYPES[dtype])
        self.image_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.reward_id = self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        rows = self.network.model.get_input_embeddings().num_embeddings
        if self.reward_id >= rows:
            raise ValueError(
                f"{str(path)!r} embeds {rows} tokens, but {REWARD_TOKEN} of the tokenizer of "
                f"{str(body)!r} is number {self.reward_id}; give the body it was trained from"
            )
        rubric = f"{text_digest(self.template)}-{positions}-{dtype}"
        pixels = self.patches.fingerprint
        self._identity = f"{self.info.name}@{digest(state)}-{rubric}-{pixels}"

    @property
    def identity(self) -> str:
        """Name, digests of weights and template, positions, precision, picture size."""
        return self._identity

    def networks(self) -> Sequence[nn.Module]:
        """Qwen2-VL and the head."""
        return (self.network,)

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Score pixels ``(B, 3, H, W)``; prompts that hold a special token stay unscored."""
        try:
            self.patches.target(*pixels.shape[-2:])
        except ValueError as error:
            unscored = pixels.new_full((len(pixels),), torch.nan)
            return Reading(unscored, notes=[str(error)] * len(pixels))
        notes = [self._objection(p) for p in prompts]
        rows = [k for k, note in enumerate(notes) if not note]
        out = pixels.new_full((len(pixels), 2), torch.nan)
        for start in range(0, len(rows), self.batch_size):
            chunk = rows[start : start + self.batch_size]
            got = self._forward(pixels[chunk], [prompts[k] for k in chunk])
            out = out.index_copy(0, torch.tensor(chunk, device=out.device), got)
        mu, sigma = out[:, 0], out[:, 1].exp()
        return Reading(mu, {"mu": mu, "sigma": sigma}, notes)

    def _objection(self, prompt: str) -> str:
        """Why ``prompt`` cannot be put into the template; empty where it can."""
        specials = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        found = next((t for t in specials if t in prompt), None)
        return f"the prompt holds the special token {found}" if found else ""

    def _forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Mean and log standard deviation ``(B, 2)`` fp32 of one chunk."""
        patches, grid = self.patches(pixels)
        batch = self._texts(prompts, patches.shape[1] // self.patches.merge**2, pixels.device)
        grids = torch.tensor([[1, *grid]] * len(prompts), device=pixels.device)
        states = self.network.model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=self._position_ids(batch),
            pixel_values=patches.flatten(0, 1),
            image_grid_thw=grids,
            mm_token_type_ids=(batch.ids == self.image_id).int(),
            use_cache=False,
        ).last_hidden_state
        at_token = states[torch.arange(len(states), device=states.device), batch.reward_at]
        got: Tensor = self.network.rm_head(at_token.float())
        return got

    def _texts(self, prompts: Sequence[str], picture_tokens: int, device: torch.device) -> Batch:
        """Rubrics around the prompts, with room for each picture's tokens."""
        chat = CHAT.replace(IMAGE_TOKEN, IMAGE_TOKEN * picture_tokens)
        filled = [self.template.replace(PROMPT_FIELD, p) for p in prompts]
        rows = [self.tokenizer(chat.replace("{}", t, 1)).input_ids for t in filled]
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id, device=device)
        mask = torch.zeros_like(ids)
        # Padded on the right: with causal attention no token before it can tell.
        for k, row in enumerate(rows):
            ids[k, : len(row)] = torch.tensor(row, device=device)
            mask[k, : len(row)] = 1
        return Batch(ids, mask, (ids == self.reward_id).int().argmax(1))

    def _position_ids(self, batch: Batch) -> Tensor | None:
        if self.positions == "grid":
            return None  # the model counts them from the picture's grid
        plain = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        return plain.expand(3, *batch.ids.shape)


def _tokenizer(body: str) -> Any:
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(body)
    known = tokenizer.get_vocab()
    needed = (IMAGE_TOKEN, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
    missing = [t for t in needed if t not in known]
    if missing:
        raise ValueError(f"the tokenizer of {body!r} lacks {', '.join(missing)}: not Qwen2-VL's")
    tokenizer.add_tokens([AddedToken(REWARD_TOKEN, special=True)], special_tokens=True)
    return tokenizer


def _network(body: str, state: dict[str, Tensor], source: str, dtype: torch.dtype) -> Hpsv3Network:
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(body)
    renamed = rename_weights(state, rename, unused=("lm_head.",))
    words = renamed.get("model.language_model.embed_tokens.weight")
    if words is not None:  # resized when the reward token was added
        config.text_config.vocab_size = len(words)
    with init_empty_weights(include_buffers=False):
        network = Hpsv3Network(config)
    fill(network, renamed, source)
    for weight in network.model.parameters():
        weight.data = weight.data.to(dtype)
    network.rm_head.float()
    _round_frequencies(network)
    return network.eval().requires_grad_(False)


def _round_frequencies(network: nn.Module) -> None:
    """Round rotary frequencies to bf16, in whatever precision the network runs.

    The published code casts the whole module, buffers included, so that the model was trained and
    measured with rounded frequencies; exact ones would turn late positions by up to a radian.
    """
    for module in network.modules():
        if isinstance(getattr(module, "inv_freq", None), Tensor):
            module.inv_freq = module.inv_freq.bfloat16().float()
