"""Train, encode and match with a tiny model of each family.

    python tests/tiny_backbones.py DIRECTORY NAME …

writes DIRECTORY/NAME.json, the measurements of each family, or the error.

It is a program and not a test, because video processors need a torchvision, and the one on PyPI
does not fit a CPU build of this torch. It can be imported after two declarations, which the
process of the other tests must do without.
"""

import json
import sys
from inspect import signature
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    torch.library.define(
        "torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
    torch.library.define(
        "torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )

from PIL import Image
from tiny_families import FAMILIES

from rematch import ReMatch
from rematch.backbone.pictures import Pictures
from rematch.errors import RematchError
from rematch.interpretability import attention_maps
from rematch.matching import Question, View
from rematch.train.collator import Collator
from rematch.train.loss import ReMatchLoss
from rematch.train.recipe import load_recipe
from rematch.train.run import train


def training_data(directory):
    """Write twelve triplets of texts, pictures of several sizes, and both."""
    rng = np.random.default_rng(0)
    rows = []
    for i, (width, height) in enumerate([(56, 56), (90, 40), (40, 90)] * 4):
        for name in ("a", "b"):
            noise = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(noise).save(directory / f"{name}{i}.png")
        queries = [
            f"the cat {i}",
            {"text": "the red cat", "image": f"a{i}.png"},
            {"image": f"a{i}.png"},
        ]
        negative = f"a dog, number {i}"
        rows.append(
            {"query": queries[i % 3], "positive": {"image": f"b{i}.png"}, "negative": negative}
        )
    file = directory / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def train_adapter(path, directory):
    """Train an adapter with all losses for two steps; return it and its last losses."""
    settings = [
        f"model.backbone={path}",
        f"data.source={training_data(directory)}",
        f"train.output={directory / 'model'}",
        "model.num_tokens=4",
        "model.lora.r=4",
        "train.steps=2",
        "train.batch_size=6",
        "train.workers=0",
        "train.mini_batch_tokens=400",
        "loss.gradient_cache=true",
        "train.log_every=1",
    ]
    # the others scale pictures to a fixed size, or cut them into tiles
    if "qwen" in directory.name:
        settings += ["model.max_pixels=1568"]
    (directory / "recipe.yaml").write_text("{}")
    trained = train(load_recipe(directory / "recipe.yaml", settings), quiet=True)
    log = json.loads((directory / "model" / "log.json").read_text())
    last = [row for row in log if "loss" in row][-1]
    names = ("contrastive", "orthogonality", "matching", "grad_norm")
    return trained, {name: last[name] for name in names}


def readings(model, pictures):
    """For inputs of every kind, the tokens that training and ``encode`` read.

    Each value holds the ids of both, both as text, and the content as text.
    """
    kinds = {
        "text": "the red cat",
        "blanks": "  the red cat ",
        "lines": "\n\nthe red\n\ncat\n",
        "picture": pictures[0],
        "both": {"text": "the red cat", "image": pictures[0]},
        "both with lines": {"text": "\nthe red cat \n", "image": pictures[1]},
        "two pictures": {"image": pictures[:2]},
        "two and text": {"text": "the red cat", "image": pictures[1:]},
    }
    reader, rows = model.backbone.reader, {}
    for kind, value in kinds.items():
        reading = reader.read(value)
        for task in ("query", "document"):
            in_training = reader.with_learnable_tokens(reading, task).ids
            encoded = model.preprocess([value], task=task)["input_ids"][0]
            texts = [reader.decode(ids) for ids in (in_training, encoded, reading.content.ids)]
            rows[f"{kind}, {task}"] = [in_training.tolist(), encoded.tolist(), *texts]
    return rows


def question(model, query, document):
    """A matching question as text, without the prompt that its document sees."""
    reader = model.backbone.reader
    packed, _ = model.backbone.questions.pack(
        [(reader.read(query), [reader.read(document)])], [[Question(View.RAW_RAW, 0)]]
    )
    return reader.decode(packed.input_ids[0][packed.segments[0] > 0])


def control_tokens(model):
    """Put every special token into a text and every way of reading it.

    Returns all special tokens; those that were not refused, with the way; and the added tokens
    that are ordinary text.
    """
    backbone = model.backbone
    added = backbone.tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special]
    ways = {
        "train": lambda text: backbone.reader.read(text, 1),
        "preprocess": lambda text: backbone.preprocess(["a dog", text]),
        "prompt": lambda text: backbone.preprocess(["a dog"], prompt=text),
        "encode": lambda text: model.encode_query(["a dog", text]),
        "match": lambda text: model.match(["a dog", "a dog"], ["a dog", text]),
    }
    accepted = []
    for number, token in enumerate(special):
        # the last two are slow and go the way of the first two
        names = list(ways) if number == 0 else list(ways)[:3]
        for name in names:
            try:
                ways[name](f"the {token} cat")
                accepted.append([name, token])
            except RematchError as error:
                message = f"its text holds {token}, which the model reads as a control token"
                if message not in str(error):
                    accepted.append([name, token, str(error)])
    ordinary = [token.content for token in added if not token.special]
    model.encode_query(
        [f"the {token} cat" for token in [*ordinary, "a < b <| c |> <a href> [INST]"]]
    )
    return special, accepted, ordinary


def visual_tokens(path, trained, model):
    """Tokens of a picture: of the backbone, as trained, as loaded, and in ``encode``."""
    square = {"image": Image.new("RGB", (56, 56), "red")}
    untrained = ReMatch.from_backbone(str(path), 4)
    counts = [m.backbone.reader.read(square).visual_tokens for m in (untrained, trained, model)]
    picture_token_id = model.backbone.reader.picture_token_id
    encoded = model.preprocess([square])["input_ids"]
    return [*counts, int((encoded == picture_token_id).sum())]


def attention_shapes(path, pictures):
    """The shape of the attention map of one picture and of two, or the error."""
    model = ReMatch.from_backbone(str(path), 4)
    try:
        return [attention_maps(model, {"image": p}).shape for p in (pictures[:1], pictures)]
    except RematchError as error:
        return str(error)


def training_vectors(model, inputs):
    """The embeddings of queries that training computes from the frozen tower's features."""
    rows = [
        {"query": value, "positive": inputs[i - 1], "negative": "a dog"}
        for i, value in enumerate(inputs)
    ]
    batch = Collator(model, batch_tokens=300)(rows)["batch"]
    loss = ReMatchLoss(model)
    with torch.no_grad():
        steps = [loss.embed(step, loss.passes(batch))[0] for step in batch.embedding]
    embeddings = torch.cat(steps).mean(1)[batch.inputs[:, 0]]
    return torch.nn.functional.normalize(embeddings, dim=-1).numpy()


def match(model, query, documents):
    """P(yes) of documents in every view: of all together, and of each alone."""
    probabilities = {}
    for view in View:
        packed = model.match([query] * len(documents), documents, view)
        # many documents of the same query: the query is computed once, the documents after it
        shared = 1 / (1 + np.exp(-model.score(query, documents * 6, view)))
        assert np.allclose(shared, np.tile(packed, 6), atol=1e-5), (view, shared, packed)
        single = [float(model.match([query], [document], view)[0]) for document in documents]
        probabilities[view] = [packed.tolist(), single]
    return probabilities


def chat_probability(model, query, document):
    """P(yes) by the model's own forward pass of a joint question: no mask, no positions."""
    backbone = model.backbone
    readings = [backbone.reader.read(value) for value in (query, document)]
    packed, shown = backbone.questions.pack(
        [(readings[0], readings[1:])], [[Question(View.RAW_RAW, 0)]]
    )
    pictures = Pictures.collect([r.vision for r in shown], [r.visual_tokens for r in shown])
    features = dict(pictures.values, input_ids=packed.input_ids)
    features["mm_token_type_ids"] = (packed.input_ids == backbone.reader.picture_token_id).int()
    parameters = signature(backbone.model.forward).parameters
    with torch.no_grad():
        accepted = {name: value for name, value in features.items() if name in parameters}
        logits = backbone.model(**accepted).logits[0, -1]
    yes, no = backbone.answer_ids
    return torch.sigmoid(logits[yes] - logits[no]).item()


def measure(path, directory):
    """Train an adapter, load it, encode and match; return what test_backbones.py checks."""
    trained, losses = train_adapter(path, directory)
    model = ReMatch(directory / "model")
    pictures = [Image.open(directory / f"a{i}.png") for i in range(3)]
    inputs = [
        "the cat",
        {"text": "the red cat", "image": pictures[1]},
        {"image": pictures[2]},
        {"image": pictures[0]},
    ]
    vectors = model.encode_query(inputs)
    alone = np.stack([model.encode_query(value) for value in inputs])

    def difference(others):
        return float(np.abs(vectors - others).max())

    measurements = losses | {
        "loaded": difference(trained.encode_query(inputs)),
        "alone": difference(alone),
        "features": difference(training_vectors(model, inputs)),
        "readings": readings(model, pictures),
        "question": question(model, "the red cat", {"text": "a dog", "image": pictures[0]}),
        "control": control_tokens(model),
        "attention": attention_shapes(path, [pictures[1], pictures[0]]),
        "visual_tokens": visual_tokens(path, trained, model),
    }
    documents = ["a dog", {"image": pictures[0]}, {"image": pictures[1]}]
    measurements["match"] = match(model, inputs[1], documents)
    model.backbone.set_matching("unified", joint=True)
    measurements["match jointly"] = match(model, inputs[1], documents)
    measurements["chats"] = [chat_probability(model, inputs[1], d) for d in documents]
    return measurements


def main(output, names):
    for name in names:
        directory = output / name
        directory.mkdir(parents=True)
        torch.manual_seed(0)
        model, processor = FAMILIES[name]()
        path = directory / "backbone"
        model.save_pretrained(path)
        processor.save_pretrained(path)
        try:
            measurements = measure(path, directory)
        except RematchError as error:
            measurements = {"error": str(error)}
        (output / f"{name}.json").write_text(json.dumps(measurements))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
