"""A vision-language model in this process: any image-text-to-text model of transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vision_rewards.judge.backend import BackendError, Query, Reply, as_pil
from vision_rewards.judge.choices import canonical, verdict_index

_DTYPES = {
    "auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
_SAMPLED = 64  # values of each tensor that enter the digest of the weights


class LocalBackend:
    """Answers with a model of transformers, in batches padded on the left.

    Sampling adds Gumbel noise from a generator of each query's own and takes the largest logit,
    which is a draw from ``softmax(logits / temperature)``: an answer depends on its query and
    seed, not on what shares the batch.

    Args:
        checkpoint: hub name or folder of a model and its processor (or of a LoRA adapter that
            names its base model).
        device: where the model lives; ``None`` leaves it on the CPU until a judge moves it.
        dtype: ``auto`` (as stored), ``fp32``, ``bf16`` or ``fp16``.
        batch_size: queries answered at once, at least 1.
        processor: hub name or folder of the processor where the checkpoint has none.

    Raises:
        ValueError: an unknown ``dtype``, or ``batch_size`` below 1.
        OSError: nothing to load there.
        BackendError: the weights do not fit the model; names the tensors.
    """

    deterministic = True

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str = "auto",
        batch_size: int = 8,
        processor: str | Path | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; use {', '.join(_DTYPES)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self.batch_size = batch_size
        self.processor = _load_processor(str(processor or checkpoint))
        self.tokenizer = self.processor.tokenizer
        self.model = load_model(str(checkpoint), _DTYPES[dtype])
        if device is not None:
            self.model.to(device)
        name = Path(checkpoint).name if Path(checkpoint).exists() else str(checkpoint)
        self._identity = f"{name}-{weights_digest(self.model)}-{self.model.dtype}"
        self._spellings: dict[str, list[int]] = {}

    @property
    def identity(self) -> str:
        """Name of the checkpoint, digest of its weights, precision."""
        return self._identity

    def networks(self) -> Sequence[nn.Module]:
        """The model."""
        return (self.model,)

    @torch.no_grad()
    def ask(self, queries: Sequence[Query]) -> list[Reply]:
        """Answer in batches of queries with equally many pictures and equal ``max_tokens``.

        Raises:
            ValueError: a choice that is no single token of this model.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for i, query in enumerate(queries):
            groups.setdefault((len(query.images), query.max_tokens), []).append(i)
        replies = [Reply()] * len(queries)
        for group in groups.values():
            for at in range(0, len(group), self.batch_size):
                rows = group[at : at + self.batch_size]
                answered = self._answer([queries[i] for i in rows])
                for i, reply in zip(rows, answered, strict=True):
                    replies[i] = reply
        return replies

    def token_ids(self, choice: str) -> list[int]:
        """Tokens that spell ``choice``, whatever their case and space.

        Raises:
            ValueError: there is none.
        """
        if not self._spellings:
            count = len(self.tokenizer)
            texts = self.tokenizer.convert_ids_to_tokens(list(range(count)))
            for i, text in enumerate(texts):
                if text is not None:
                    self._spellings.setdefault(canonical(text), []).append(i)
        if canonical(choice) not in self._spellings:
            raise ValueError(f"choice {choice!r} is no single token of this model; choose another")
        return self._spellings[canonical(choice)]

    def _answer(self, queries: Sequence[Query]) -> list[Reply]:
        inputs = self._inputs(queries).to(self.model.device, self.model.dtype)
        lengths = inputs["attention_mask"].sum(1).tolist()
        room = self._room()
        short = [i for i, n in enumerate(lengths) if n < room]
        if len(short) < len(queries):
            said = f"the question takes {max(lengths)} tokens, the model holds {room}"
            answered = iter(self._answer([queries[i] for i in short]) if short else [])
            return [
                next(answered) if i in short else Reply(error=said) for i in range(len(queries))
            ]
        if len(queries) > 1 and room - max(lengths) < min(
            queries[0].max_tokens, room - min(lengths)
        ):  # padding to the longest question would cut the answers to the others
            return [self._answer([query])[0] for query in queries]
        return self._generate(queries, inputs, lengths, room)

    def _room(self) -> int:
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 2**31)

    def _inputs(self, queries: Sequence[Query]) -> Any:
        texts = [self._prompt(q) for q in queries]
        images = [[as_pil(p) for p in q.images] for q in queries]
        given = {"images": images} if queries[0].images else {}
        return self.processor(text=texts, padding=True, return_tensors="pt", **given)

    def _prompt(self, query: Query) -> str:
        pictures = [{"type": "image"} for _ in query.images]
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [*pictures, {"type": "text", "text": query.text}]}
        ]
        if query.system:
            system = {"role": "system", "content": [{"type": "text", "text": query.system}]}
            messages.insert(0, system)
        for part in (p for m in messages for p in m["content"] if "text" in p):
            part["text"] = without_marks(part["text"], self.processor)
        if getattr(self.processor, "chat_template", None):
            return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))
        marks = getattr(self.processor, "image_token", "<image>") * len(query.images)
        said = [part["text"] for m in messages for part in m["content"] if "text" in part]
        return f"{marks}{' '.join(said)}"

    def _generate(
        self, queries: Sequence[Query], inputs: Any, lengths: list[int], room: int
    ) -> list[Reply]:
        from transformers import GenerationConfig, LogitsProcessorList

        width = inputs["input_ids"].shape[1]
        ends = self._end_tokens()
        # A configuration of our own: that of a checkpoint may sample or penalise repetition.
        config = GenerationConfig(
            max_new_tokens=min(queries[0].max_tokens, room - width),
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        choices = sorted({c for q in queries for c in q.choices})
        recorder = ChoiceRecorder({c: self.token_ids(c) for c in choices})
        processors = LogitsProcessorList([recorder, GumbelNoise(queries)])
        output = self.model.generate(
            **inputs, generation_config=config, logits_processor=processors
        )
        return [
            self._reply(query, output[i, width:], lengths[i], ends, recorder, i)
            for i, query in enumerate(queries)
        ]

    def _end_tokens(self) -> list[int]:
        own = getattr(self.model.generation_config, "eos_token_id", None)
        own = own if isinstance(own, list) else [own]
        return sorted({i for i in (*own, self.tokenizer.eos_token_id) if i is not None})

    def _reply(
        self, query: Query, ids: Tensor, spent: int, ends: list[int], recorder: Any, row: int
    ) -> Reply:
        tokens = ids.tolist()
        stops = [k for k, t in enumerate(tokens) if t in ends]
        kept = tokens[: stops[0]] if stops else tokens
        index: int | None = 0
        if query.verdict_after:
            pieces = self.tokenizer.convert_ids_to_tokens(kept)
            index = verdict_index(pieces, query.verdict_after)
        return Reply(
            text=self.tokenizer.decode(kept, skip_special_tokens=True).strip(),
            truncated=not stops,
            choice_log_probs=recorder.read(index, row, query.choices),
            tokens_in=spent,
            tokens_out=len(kept),
        )


class ChoiceRecorder:
    """Log-probabilities of a few words at every step of a generation; changes nothing."""

    def __init__(self, spellings: dict[str, list[int]]) -> None:
        self.spellings = spellings
        self.steps: list[dict[str, list[float]]] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Record ``scores (B, V)``, the raw logits, and return them."""
        if self.spellings:
            logs = scores.float().log_softmax(-1)
            self.steps.append(
                {c: logs[:, t].logsumexp(-1).tolist() for c, t in self.spellings.items()}
            )
        return scores

    def read(self, step: int | None, row: int, choices: Sequence[str]) -> dict[str, float] | None:
        """What was recorded for ``row`` at ``step``; ``None`` without choices or step."""
        if not choices or step is None:
            return None
        return {c: self.steps[step][c][row] for c in choices}


class GumbelNoise:
    """Turns the largest logit into a draw from ``softmax(logits / temperature)``, row by row."""

    def __init__(self, queries: Sequence[Query]) -> None:
        self.rows = [
            (i, q.temperature, torch.Generator().manual_seed(q.seed))
            for i, q in enumerate(queries)
            if q.temperature > 0
        ]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Logits ``(B, V)``, with ``logits / temperature + Gumbel`` in the rows that sample."""
        if not self.rows:
            return scores
        scores = scores.float().clone()
        for row, temperature, generator in self.rows:
            uniform = torch.rand(scores.shape[1], generator=generator).clamp_min(1e-20)
            noise = -torch.log((-torch.log(uniform)).clamp_min(1e-20))
            scores[row] = scores[row] / temperature + noise.to(scores.device)
        return scores


def without_marks(text: str, processor: Any) -> str:
    """A text without a model's own marks: a prompt must not become structure."""
    tokenizer = processor.tokenizer
    added = tokenizer.added_tokens_decoder.values()
    special = {t.content for t in added if t.special} | set(tokenizer.all_special_tokens)
    special.add(getattr(processor, "image_token", ""))
    for mark in filter(str.strip, special):
        text = text.replace(mark, " ")
    return text


def weights_digest(model: nn.Module) -> str:
    """A digest of names, shapes and evenly spaced values of every tensor of a model.

    Reading a few values of each tensor tells fine-tuned models apart in milliseconds, where a
    hash of all of them would take longer than many answers.
    """
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLED)].float().cpu()
        state.update(f"{name}{tuple(tensor.shape)}{some.tolist()}".encode())
    return state.hexdigest()[:10]


def _load_processor(source: str) -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(source)
    if not hasattr(processor, "tokenizer"):
        raise BackendError(f"{source} has no processor for pictures and text; give processor=")
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def load_model(source: str, dtype: Any) -> Any:
    """An image-text-to-text model, frozen, every weight of it from the checkpoint.

    Raises:
        OSError: nothing to load there.
        BackendError: the weights do not fit the model; names the tensors.
    """
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        source, dtype=dtype, output_loading_info=True
    )
    wrong = {k: sorted(map(str, info.get(k) or ())) for k in ("missing_keys", "unexpected_keys")}
    if any(wrong.values()):
        said = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v)}" for k, v in wrong.items() if v)
        raise BackendError(f"the weights of {source} do not fit {type(model).__name__}: {said}")
    return model.eval().requires_grad_(False)
