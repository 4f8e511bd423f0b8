"""The MLLM as the first module of a SentenceTransformer: loading and checking it, reading inputs,
running it.

:class:`Backbone` is sentence-transformers' ``Transformer`` with three differences: inputs may be
paths, pictures with transparency and several pictures at once, with errors that name the row; only
the base model runs (no LM head, hidden states after the final norm); and the same weights answer
packed matching questions (:mod:`rematch.matching`).
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    Cache,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import logging as transformers_logging

from rematch.backbone import lora
from rematch.backbone.key_values import KeyValues
from rematch.backbone.pictures import PictureFeatures, Pictures, picture_features
from rematch.backbone.questions import QuestionPacker
from rematch.backbone.reading import Reader, too_long
from rematch.backbone.turns import user_turn
from rematch.errors import ModelError, RematchError
from rematch.matching import Matching, additive, block_mask, unified_mask
from rematch.prompts import NO, YES

PACKAGED = {"rematch-base": "assets/base", "rematch-tiny": "assets/tiny"}


def resolve(name: str) -> str:
    """The directory of a packaged model (``rematch-base``, ``rematch-tiny``) or local model; a hub
    name unchanged.

    Raises:
        ModelError: If it is nearly a packaged model's name.
    """
    if name in PACKAGED:
        return str(files("rematch") / PACKAGED[name])
    if Path(name).is_dir():
        return str(Path(name).resolve())
    if near := get_close_matches(name, PACKAGED, 1, cutoff=0.85):
        raise ModelError(f"{name}: no such model. Did you mean {near[0]}?")
    return name


class Backbone(Transformer):  # type: ignore[misc]  # sentence-transformers ships no types
    """An image-text-to-text model that embeds and answers Yes/No questions.

    Args:
        model_name_or_path: A hub name, a directory, or the name of a packaged model.
        fingerprint: Of the base that a saved adapter belongs to; checked on load.
        adapter: Whether the checkpoint is an adapter, so that one that lost it is not taken for a
            whole model.
        answer_ids: Token ids of Yes and No; checked against the tokenizer on load.
        document_instructions: Whether documents were trained with their instruction; evaluation
            does as training did.
        matching: How it was trained to answer questions; scoring does as training did.
        kwargs: As for sentence-transformers' ``Transformer``.

    Raises:
        ModelError: If the backbone has no chat template, no pictures, no single-token Yes and No,
            if training would read other tokens than ``encode``, or if a checkpoint lacks its
            adapter or was made for another base.
    """

    config_keys = [
        *Transformer.config_keys,
        "fingerprint",
        "adapter",
        "answer_ids",
        "document_instructions",
        "matching",
    ]

    def __init__(
        self,
        model_name_or_path: str,
        *,
        fingerprint: str | None = None,
        adapter: bool = False,
        answer_ids: list[int] | None = None,
        document_instructions: bool = True,
        matching: Matching | str = Matching.UNIFIED,
        **kwargs: Any,
    ) -> None:
        path = resolve(str(model_name_or_path))
        if adapter and not Path(path).is_dir():
            path = snapshot_download(
                path
            )  # its files are checked below; the base is fetched by its own name
        self.saved_fingerprint = fingerprint
        if adapter and not any(
            (Path(path) / f).exists() for f in ("adapter_model.safetensors", "adapter_model.bin")
        ):
            raise ModelError(
                f"{path}: this checkpoint is an adapter, but adapter_model.safetensors is not "
                "there; without it the model would answer as its untrained base. Copy the file "
                "back or save the model again."
            )
        self.adapter = adapter
        kwargs = {
            "transformer_task": "any-to-any",
            "processing_kwargs": _GENERATION_PROMPT,
        } | kwargs
        try:
            super().__init__(path, **kwargs)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            if isinstance(error, RematchError):
                raise
            raise ModelError(
                f"{model_name_or_path}: cannot be loaded as an image-text-to-text model "
                f"({str(error).strip().splitlines()[0]}). Give a hub name, a directory that holds "
                f"such a model, or one of {', '.join(PACKAGED)}."
            ) from error
        self.module_output_name = "token_embeddings"
        self._check_processor(model_name_or_path)
        self._check_attention(model_name_or_path)
        self.reader = Reader(self.processor, self.base)
        self.questions = QuestionPacker(self.reader)
        self.check_reading(model_name_or_path)
        self.document_instructions = document_instructions
        self.matching = Matching(matching)
        self.answer_ids = [self._single_token(word) for word in (YES, NO)]
        if answer_ids is not None and answer_ids != self.answer_ids:
            raise ModelError(
                f"{path}: saved with the answer tokens {answer_ids}, but its tokenizer now gives "
                f"{self.answer_ids}. The tokenizer files were changed; restore those that belong "
                "to the checkpoint."
            )

    # ---- loading and saving ---------------------------------------------------------------------

    def _load_config(
        self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]
    ) -> tuple[Any, bool]:
        if not (Path(model_name_or_path) / "adapter_config.json").exists():
            config, is_adapter = super()._load_config(model_name_or_path, backend, config_kwargs)
            if not is_adapter:
                return config, False
        base = self._base_of_adapter(model_name_or_path)
        return AutoConfig.from_pretrained(
            base, **{k: v for k, v in config_kwargs.items() if k in _HUB_KEYS}
        ), True

    def _base_of_adapter(self, path: str) -> str:
        settings = json.loads((Path(path) / "adapter_config.json").read_text())
        return resolve(settings["base_model_name_or_path"])

    def _load_model(
        self, path: str, task: str, config: Any, backend: str, is_adapter: bool, **kwargs: Any
    ) -> PreTrainedModel:
        if not is_adapter:
            model, report = AutoModelForMultimodalLM.from_pretrained(
                path, config=config, output_loading_info=True, **kwargs
            )
            if lost := sorted(report["missing_keys"]):
                raise ModelError(
                    f"{path}: {len(lost)} weights are missing ({', '.join(lost[:3])}, …); they "
                    "would be random. The checkpoint is incomplete: download or save it again."
                )
            self.fingerprint = lora.base_fingerprint(model, path, kwargs.get("cache_dir"))
            lora.keep_scales(model)
            return model
        base = self._base_of_adapter(path)
        kwargs.pop("revision", None)
        model = AutoModelForMultimodalLM.from_pretrained(base, config=config, **kwargs)
        self.fingerprint = lora.base_fingerprint(model, base, kwargs.get("cache_dir"))
        former = lora.fingerprint(model)  # what version 0.1.0 stored
        if self.saved_fingerprint and self.saved_fingerprint not in (self.fingerprint, former):
            raise ModelError(
                f"{path}: this adapter was trained on another base than {base} (fingerprint "
                f"{self.saved_fingerprint}, found {self.fingerprint}). Point "
                "base_model_name_or_path in its adapter_config.json to the base it was trained on."
            )
        lora.keep_scales(model)
        tokenizer_size = json.loads((Path(path) / "rematch.json").read_text())["vocabulary"]
        resize_vocabulary(model, tokenizer_size)
        with _quiet():  # it reports the LM head's tied copy of the token rows as missing
            lost = lora.load(model, Path(path))
        if lost:
            raise ModelError(
                f"{path}: its adapter does not fit the base {base} ({', '.join(lost[:3])}, …). "
                "Point base_model_name_or_path in adapter_config.json to the base it was trained "
                "on."
            )
        return model

    @property
    def has_adapter(self) -> bool:
        """Whether there is a LoRA adapter on the model that is not merged."""
        return bool(getattr(self.model, "_hf_peft_config_loaded", False))

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        self.adapter = self.has_adapter
        super().save(output_path, *args, **kwargs)
        if self.adapter:
            settings_file = Path(output_path) / "adapter_config.json"
            settings = json.loads(settings_file.read_text())
            settings["base_model_name_or_path"] = self.base_name
            settings_file.write_text(json.dumps(settings, indent=2))
        size = self.model.get_input_embeddings().weight.shape[0]
        (Path(output_path) / "rematch.json").write_text(json.dumps({"vocabulary": size}) + "\n")

    @property
    def base_name(self) -> str:
        """Name or path of the base model; that of a packaged one stays a name, so that adapters
        can be moved.
        """
        path = str(self.model.config._name_or_path)
        return next((name for name in PACKAGED if resolve(name) == path), path)

    # ---- what the backbone must have ------------------------------------------------------------

    def _check_processor(self, name: str) -> None:
        if not isinstance(self.processor, ProcessorMixin) or not hasattr(
            self.processor, "image_processor"
        ):
            raise ModelError(
                f"{name}: its processor came back as {type(self.processor).__name__}, which reads "
                "no pictures. Either the model is text-only, or its image processor needs a "
                "package that is missing (often torchvision)."
            )
        if not getattr(self.processor, "chat_template", None):
            raise ModelError(
                f"{name}: has no chat template, but queries, documents and the Yes/No question "
                "are put as chat turns. Use the instruction-tuned variant of the model, or set "
                "processor.chat_template and save it."
            )

    def check_reading(self, name: str) -> None:
        """As :meth:`~rematch.backbone.reading.Reader.check`; again when the template or the
        tokenizer has been changed.
        """
        encode = super().preprocess
        self.reader.check(
            name, lambda x, task: encode([user_turn(*self.reader.parts(x, 0))], task=task)
        )

    def _check_attention(self, name: str) -> None:
        """Matching writes its own 4-D mask, and looks at pictures apart from the text."""
        text, accepted = (
            self.model.config.get_text_config(),
            signature(self.base.forward).parameters,
        )
        other = sorted(
            {kind for kind in getattr(text, "layer_types", None) or [] if kind != "full_attention"}
        )
        reason = ""
        if "token_type_ids" in accepted or getattr(text, "use_bidirectional_attention", None):
            reason = "lets the tokens of a picture see those behind them, which matching's causal mask does not"
        elif other:
            reason = f"has layers of {', '.join(other)}, which do not follow matching's 4-D attention mask"
        elif "mm_encoder_outputs" not in accepted:
            reason = "takes no picture features that were computed before (mm_encoder_outputs)"
        if reason:
            raise ModelError(
                f"{name}: {type(self.model).__name__} {reason}. Use one of another family, such "
                "as Qwen2-VL, Qwen3-VL, LLaVA-OneVision, SmolVLM or InternVL."
            )

    def _single_token(self, word: str) -> int:
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise ModelError(
                f"the tokenizer cuts {word!r} into {len(ids)} tokens; matching needs {YES} and "
                f"{NO} to be one token each. Use another backbone."
            )
        return int(ids[0])

    # ---- embedding ------------------------------------------------------------------------------

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Chat-template and tokenize inputs; see :func:`~rematch.data.inputs.as_parts` for what an
        input may be.
        """
        kwargs["task"] = kwargs.get("task") or "document"
        turns = [
            user_turn(*self.reader.parts(value, row, prompt or ""))
            for row, value in enumerate(inputs)
        ]
        features: dict[str, Any] = super().preprocess(turns, **kwargs)
        self._check_tokens(features, kwargs["task"])
        return features

    def _check_tokens(self, features: dict[str, Any], task: str) -> None:
        """An input that was cut must not have lost the learnable tokens at its end."""
        last = self.reader.learnable_ids(task)
        if not last:
            return
        for row, attended in enumerate(features["attention_mask"].bool()):
            if features["input_ids"][row][attended][-len(last) :].tolist() != last:
                raise too_long(row, self.tokenizer.model_max_length)

    def _verify_left_padding(self, *args: Any) -> None:
        """The learnable tokens are found from the attention mask: either padding side is right."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds ``token_embeddings`` (B, T, D), the base model's last hidden states after the final
        norm.
        """
        accepted = signature(self.base.forward).parameters
        inputs = {name: value for name, value in features.items() if name in accepted}
        features["token_embeddings"] = self.base(**inputs).last_hidden_state
        return features

    @property
    def base(self) -> nn.Module:
        """The model without its LM head."""
        base: nn.Module = self.model.base_model
        return base

    def _vision_parameters(self) -> list[nn.Parameter]:
        """All that pictures pass on their way to the language model."""
        language = {id(p) for p in self.model.get_decoder().parameters()}
        language |= {id(p) for p in self.model.get_output_embeddings().parameters()}
        return [p for p in self.model.parameters() if id(p) not in language]

    def freeze_vision(self) -> None:
        """Train neither the vision tower nor what joins it to the language model."""
        for parameter in self._vision_parameters():
            parameter.requires_grad_(False)

    @property
    def trains_vision(self) -> bool:
        """Whether anything that pictures pass on their way to the language model is being trained."""
        return any(p.requires_grad for p in self._vision_parameters())

    def limit_pixels(self, smallest: int | None, largest: int | None) -> None:
        """Scale pictures to sizes between these, in pixels; saved with the processor. ``None``
        leaves a limit as it is.

        Raises:
            ModelError: If the processor scales pictures to a fixed size, or the limits exclude
                each other.
        """
        limit_pixels(self.processor, smallest, largest)

    def picture_features(self, pictures: Pictures) -> list[PictureFeatures]:
        """Features of picture sets, each computed once by the vision tower."""
        return picture_features(self.base, pictures.to(self.model.device, self.model.dtype))

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    def feature_bytes(self, visual_tokens: int) -> int:
        """Size of the vision tower's features of so many visual tokens, with all levels that the
        model reads.
        """
        vision = getattr(self.model.config, "vision_config", None)
        levels = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or [])
        return int(visual_tokens * levels * self.width * self.model.dtype.itemsize)

    # ---- matching -------------------------------------------------------------------------------

    def answer_logits(
        self,
        features: dict[str, Any],
        embeddings: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Next-token logits over the vocabulary at every answer slot; the LM head runs there only.

        Args:
            features: The fields of :class:`~rematch.matching.Packed`, and the pictures as the base
                model takes them.
            embeddings: ``Z*`` for the placeholders in reading order, (number of placeholders, D).
            cache: Keys and values of the context, if there is any.

        Returns:
            (B, A, V); rows of absent slots (-1) hold no meaning.
        """
        logits: Tensor = self.model.get_output_embeddings()(
            self._answer_states(features, embeddings, cache)
        )
        return logits

    def answer_margins(
        self,
        features: dict[str, Any],
        embeddings: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logit of Yes minus logit of No at every answer slot, at least in float32.

        Rounded to bfloat16, most margins of a candidate list would be equal.

        Args:
            features: As for :meth:`answer_logits`, and so are the others.
            embeddings: Likewise.
            cache: Likewise.

        Returns:
            (B, A).
        """
        states = self._answer_states(features, embeddings, cache)
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        head = self.model.get_output_embeddings()
        yes, no = head.weight[self.answer_ids].to(states.dtype)
        with torch.autocast(states.device.type, enabled=False):
            margins: Tensor = states @ (yes - no)
        if getattr(head, "bias", None) is not None:
            yes, no = head.bias[self.answer_ids].to(states.dtype)
            margins = margins + (yes - no)
        return margins

    def _answer_states(
        self, features: dict[str, Any], embeddings: Tensor | None, cache: Cache | None
    ) -> Tensor:
        slots = features["slots"]
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        return self.run_packed(features, embeddings, cache)[rows, slots]

    def run_packed(
        self,
        features: dict[str, Any],
        embeddings: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Last hidden states of packed sequences, (B, T, D); arguments as for
        :meth:`answer_logits`.
        """
        positions = features["position_ids"]
        layout = features["segments"], features["attends"], features["context"].shape[1]
        flexible = self.model.config.get_text_config()._attn_implementation == "flex_attention"
        inputs = {
            "input_ids": features["input_ids"],
            "attention_mask": block_mask(*layout)
            if flexible
            else additive(unified_mask(*layout), self.model.dtype),
            "position_ids": positions[0] if len(positions) == 1 else positions,
        }
        pictures = {name: value for name, value in features.items() if name.startswith("mm_")}
        with self._replaced(features["placeholders"], embeddings):
            out = self.base(
                **inputs, **pictures, past_key_values=cache, use_cache=cache is not None
            )
        states: Tensor = out.last_hidden_state
        return states

    def embed_keeping(
        self, parts: Sequence[dict[str, Any]]
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Embed, and keep what attention has computed.

        Args:
            parts: Padded batches, as for :meth:`forward`.

        Returns:
            The last hidden states of each part, (B, L, D); and per layer the keys and the values
            of all their tokens one after the other, padding included, (sum of B · L, heads, head
            width) each.
        """
        accepted = signature(self.base.forward).parameters
        states, layers = [], []
        for part in parts:
            cache = KeyValues()
            inputs = {name: value for name, value in part.items() if name in accepted}
            states.append(
                self.base(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
            )
            layers.append(cache.new)

        def flat(found: list[Tensor]) -> Tensor:
            return torch.cat([one.transpose(1, 2).flatten(0, 1) for one in found])

        return states, [
            (flat([k for k, _ in level]), flat([v for _, v in level]))
            for level in zip(*layers, strict=True)
        ]

    @contextmanager
    def _replaced(self, where: Tensor, embeddings: Tensor | None) -> Iterator[None]:
        """Put ``embeddings`` in place of the input embeddings at ``where`` (B, T) while the block
        runs.
        """
        if embeddings is None:
            yield
            return

        def swap(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output.masked_scatter(where[..., None], embeddings.to(output.dtype))

        handle = self.model.get_input_embeddings().register_forward_hook(swap)
        try:
            yield
        finally:
            handle.remove()


def limit_pixels(processor: Any, smallest: int | None, largest: int | None) -> None:
    """As :meth:`Backbone.limit_pixels`, for the processor of any model."""
    if smallest is None and largest is None:
        return
    images = getattr(processor, "image_processor", None)
    size = {
        name: edge
        for name, edge in dict(getattr(images, "size", None) or {}).items()
        if edge is not None
    }
    # processors that merge patches give these two as numbers of pixels, others as lengths of edges
    if size.keys() != {"shortest_edge", "longest_edge"} or not hasattr(images, "merge_size"):
        raise ModelError(
            f"{type(images).__name__} scales pictures to a fixed size or by their edges ({size}), "
            "so limits of their pixels do not apply. Leave min_pixels and max_pixels out."
        )
    size = {
        "shortest_edge": smallest or size["shortest_edge"],
        "longest_edge": largest or size["longest_edge"],
    }
    if size["shortest_edge"] > size["longest_edge"]:
        raise ModelError(
            f"min_pixels={size['shortest_edge']} is more than max_pixels={size['longest_edge']}. "
            "Set both, or others."
        )
    assert images is not None
    images.size = type(images.size)(**size)


@contextmanager
def _quiet() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


_GENERATION_PROMPT = {"chat_template": {"add_generation_prompt": True}}
_HUB_KEYS = frozenset({"token", "cache_dir", "local_files_only", "trust_remote_code"})


def resize_vocabulary(model: PreTrainedModel, size: int) -> None:
    """Grow the input embedding to ``size`` rows; many released models have spare rows, and nothing
    changes then.
    """
    if size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(size, mean_resizing=False)
