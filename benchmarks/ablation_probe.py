"""Three measurements that explain the ladder of docs/ablation.md.

    python benchmarks/ablation_probe.py

- Target instructions: the mean cosine between different documents in the untrained base, without
  and with the instruction before them. The nearer documents start to one another, the longer
  training takes to tell them apart.
- Matching: the gradient of each loss, with its weight, on the language model's weights, and its
  cosine to the contrastive one, at the start of training and in the packaged ``rematch-tiny``.
- Starts of the tokens: Hit@1 on the validation split of vectors that are the mean of all learnable
  tokens, of the copies of the last token, or of those that started at random; before training and
  in ``rematch-tiny``.

They are written to benchmarks/results/ablation/probe.json.
"""

import argparse
import json
from typing import Any

import numpy as np
import torch
from ablation import RESULTS, ROOT
from torch import Tensor
from torch.nn.functional import normalize

from rematch.data.picto_tasks import evaluation_tasks
from rematch.evaluate.metrics import hit_at, ranks_of_relevant
from rematch.files import write_json
from rematch.model import ReMatch
from rematch.train.build import build_collator, build_loss, build_model
from rematch.train.recipe import Recipe, load_recipe
from rematch.train.sources import build_dataset

TASKS = {
    "label": "Picto-Category",
    "answer": "Picto-LeftRight",
    "caption": "Picto-I2T",
    "picture": "Picto-T2I",
    "crop": "Picto-Grounding",
}
DOCUMENTS = 150
STYLE = "Picto-Style"  # untrained: the same scene in another style
STARTS = {"all": slice(None), "copies": slice(0, None, 2), "random": slice(1, None, 2)}


def document_cosines() -> dict[str, dict[str, float]]:
    """Mean cosine between different documents of a kind in the base, pooled by the last token."""
    model = ReMatch.from_backbone("rematch-base", 0).eval()
    tasks = {
        task.name: task
        for task in evaluation_tasks(TASKS.values(), split="validation", queries=100)
    }
    cosines: dict[str, dict[str, float]] = {}
    for kind, name in TASKS.items():
        documents = tasks[name].documents[:DOCUMENTS]
        cosines[kind] = {}
        for column, instruction in (("without", False), ("with", True)):
            inputs = [document.as_input(instruction) for document in documents]
            vectors = np.asarray(model.encode_document(inputs, show_progress_bar=False))
            others = (vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)]
            cosines[kind][column] = round(float(others.mean()), 3)
    return cosines


def gradients(recipe: Recipe, model: ReMatch, batches: int) -> dict[str, dict[str, float]]:
    """Norm of each loss' gradient and its cosine to the contrastive one, means over batches."""
    rows, collator = build_dataset(recipe), build_collator(recipe, model)
    loss, size = build_loss(recipe, model), recipe.train.batch_size
    weights = [w for w in model.backbone.model.get_decoder().parameters() if w.requires_grad]
    measured: dict[str, list[tuple[float, float]]] = {}
    for batch in range(batches):
        features = collator([rows[batch * size + i] for i in range(size)])["batch"]
        losses: dict[str, Tensor] = loss([features])
        by_loss = {}
        for name, value in losses.items():
            parts = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
            by_loss[name] = torch.cat([g.flatten() for g in parts if g is not None])
        reference = by_loss["contrastive"]
        for name, gradient in by_loss.items():
            cosine = torch.cosine_similarity(gradient, reference, dim=0)
            measured.setdefault(name, []).append((gradient.norm().item(), cosine.item()))
    return {
        name: {"norm": round(float(norm), 4), "cosine": round(float(cosine), 3)}
        for name, values in measured.items()
        for norm, cosine in [np.mean(values, axis=0)]
    }


def hits_by_start(model: ReMatch) -> dict[str, dict[str, float]]:
    """Hit@1 in percent of each task by the tokens that make the vectors."""
    hits: dict[str, dict[str, float]] = {}
    for task in evaluation_tasks([STYLE, *TASKS.values()], split="validation", queries=100):
        inputs = [query.as_input() for query in task.queries]
        queries = model.encode_query(inputs, multi_vector=True, show_progress_bar=False)
        inputs = [document.as_input() for document in task.documents]
        documents = model.encode_document(inputs, multi_vector=True, show_progress_bar=False)
        hits[task.name] = {}
        for name, tokens in STARTS.items():
            query_vectors, document_vectors = (
                normalize(torch.as_tensor(vectors)[:, tokens].mean(1))
                for vectors in (queries, documents)
            )
            cosines = (query_vectors @ document_vectors.T).numpy()
            ranks = [  # the relevant candidate comes first
                ranks_of_relevant(cosines[i, candidates])
                for i, candidates in enumerate(task.candidates)
            ]
            hits[task.name][name] = round(hit_at(ranks, 1), 1)
    return hits


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=8, help="of 16 samples")
    args = parser.parse_args()
    recipe = load_recipe(ROOT / "recipes" / "ladder-6-all.yaml", ["train.bf16=false"])
    models = {"start": build_model(recipe), "rematch-tiny": ReMatch("rematch-tiny")}
    result: dict[str, Any] = {
        "document_cosine": document_cosines(),
        "gradients": {
            name: gradients(recipe, model, args.batches) for name, model in models.items()
        },
        "batches": args.batches,
        "hits_by_start": {name: hits_by_start(model.eval()) for name, model in models.items()},
    }
    write_json(RESULTS / "probe.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
