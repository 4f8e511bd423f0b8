"""Learnable tokens and their fusion (MEF, paper.md "Idea" 1).

1. K tokens ``L_q`` for queries and K tokens ``L_d`` for documents are vocabulary entries, appended
   by the template.
2. The last hidden states at those positions are the multi-vector representation ``e_1..e_K``.
3. Their mean is the embedding ``E*``; :class:`Projector` turns it into ``Z*``, an input embedding
   for matching.

Shapes: B inputs, T tokens, K learnable tokens, D width.
"""

from typing import Any, get_args

import torch
import torch.nn.functional as F
from sentence_transformers.base.modules import Module
from torch import Tensor, nn

from rematch.errors import ModelError
from rematch.prompts import TokenInit, document_token, query_token


def add_tokens_to_template(template: str, num_tokens: int) -> str:
    """A chat template that appends the learnable tokens when it is rendered for ``task="query"``
    or ``"document"``.

    >>> add_tokens_to_template("{{ x }}", 1).split("{% el")[0]
    "{{ x }}{% if task == 'query' %}<|query_emb_0|>"
    """
    queries = "".join(query_token(i) for i in range(num_tokens))
    documents = "".join(document_token(i) for i in range(num_tokens))
    for_query = f"{{% if task == 'query' %}}{queries}"
    for_document = f"{{% elif task == 'document' %}}{documents}{{% endif %}}"
    return template + for_query + for_document


def initial_rows(words: Tensor, last: int, count: int, init: TokenInit) -> Tensor:
    """Embeddings that learnable tokens start from; torch's seed decides the noise.

    Args:
        words: Embeddings of the vocabulary, (V, D).
        last: Index in ``words`` of the last token of a rendered turn.
        count: Number of learnable tokens.
        init: ``random`` is normal noise at the RMS of the words, ``small`` at a tenth of it;
            ``last`` and ``mean`` add ``small`` noise to the last token's embedding or to the mean
            of the words; ``mixed`` is ``last`` and ``random`` in turn.

    Returns:
        Embeddings in float32, (count, D).

    Raises:
        ModelError: If ``init`` is unknown.
    """
    if init not in get_args(TokenInit):
        raise ModelError(
            f"token_init={init!r} is unknown; choose one of {', '.join(get_args(TokenInit))}."
        )
    words = words.float()
    noise = torch.randn(count, words.shape[1]).to(words.device) * words.pow(2).mean().sqrt()
    if init == "random":
        return noise
    center = {"small": torch.zeros_like(words[0]), "mean": words.mean(0)}
    rows = center.get(init, words[last]) + 0.1 * noise
    if init == "mixed":
        rows[1::2] = noise[1::2]
    return rows


class Projector(nn.Module):
    """``Z* = MLP(E*)``: from the embedding's direction to an input embedding of the same MLLM.

    Only the direction of ``E*`` is used, so that stored unit vectors give the same ``Z*``. The
    paper leaves the MLP's shape open: two linear layers with a GELU between; the output starts at
    the scale of the input embeddings.
    """

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)
        with torch.no_grad():
            probe = self(torch.randn(256, width))
            self.linear_2.weight.mul_(scale / probe.pow(2).mean().sqrt())
            self.linear_2.bias.zero_()

    def forward(self, embedding: Tensor) -> Tensor:
        """(N, D) embeddings of any length → (N, D) input embeddings."""
        x = F.normalize(embedding, dim=-1) * embedding.shape[-1] ** 0.5
        out: Tensor = self.linear_2(F.gelu(self.linear_1(x.to(self.linear_1.weight.dtype))))
        return out


class MultiTokenFusion(Module):  # type: ignore[misc]  # sentence-transformers ships no types
    """Last hidden states at the learnable tokens → multi-vector → embedding.

    Writes into the features: ``multi_vector`` (B, K, D), the raw hidden states;
    ``sentence_embedding`` (B, D), their mean brought to unit length. ``num_tokens=0`` pools the
    last token instead, the usual recipe (K is 1 then).
    """

    config_keys = ["num_tokens", "width"]

    def __init__(self, num_tokens: int, width: int, embedding_scale: float = 1.0) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.width = width
        self.projector = Projector(width, embedding_scale)
        self.flat_output = False  # encode(multi_vector=True) sets it for the call

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        states, attended = features["token_embeddings"], features["attention_mask"]
        k = max(1, self.num_tokens)
        length = attended.shape[1]
        # (B,): one past the last attended position, for either padding side
        end = length - attended.flip(1).argmax(1)
        places = end[:, None] - k + torch.arange(k, device=states.device)  # (B, K)
        multi_vector = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
        multi_vector = multi_vector.to(torch.promote_types(multi_vector.dtype, torch.float32))
        features["multi_vector"] = multi_vector
        if self.flat_output:
            features["sentence_embedding"] = F.normalize(multi_vector, dim=-1).flatten(1)
        else:
            features["sentence_embedding"] = F.normalize(fuse(multi_vector), dim=-1)
        return features

    def get_embedding_dimension(self) -> int:
        return self.width

    def save(
        self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(
        cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any
    ) -> "MultiTokenFusion":
        hub = {
            k: kwargs[k]
            for k in ("token", "cache_folder", "revision", "local_files_only")
            if k in kwargs
        }
        config = cls.load_config(model_name_or_path, subfolder=subfolder, **hub)
        if not config:
            raise ModelError(
                f"{model_name_or_path}: the folder {subfolder} with the token fusion is missing; "
                "the checkpoint is incomplete. Copy it again."
            )
        module = cls(**config)
        cls.load_torch_weights(model_name_or_path, subfolder=subfolder, model=module, **hub)
        return module


def fuse(multi_vector: Tensor) -> Tensor:
    """``E* = (1/K) Σ e_i``: (B, K, D) → (B, D).

    >>> fuse(torch.tensor([[[1.0, 0.0], [3.0, 4.0]]]))
    tensor([[2., 2.]])
    """
    return multi_vector.mean(dim=1)
