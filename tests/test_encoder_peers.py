"""The encoder and ``rematch evaluate`` with models that are not ReMatch's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from rematch.data.schema import Item, RetrievalTask
from rematch.encoding.encoder import Encoder
from rematch.encoding.vector_store import VectorStore
from rematch.errors import ModelError, RematchError
from rematch.evaluate.command import EvaluateOptions, load_model, run
from rematch.evaluate.run import evaluate_task
from rematch.model import ReMatch
from rematch.prompts import DOCUMENT_INSTRUCTIONS

ROUNDING = 1e-5  # of float32 sums in another order, as in test_encoder.py


@pytest.fixture(scope="module")
def text_model(saved_model):
    """A small text-only SentenceTransformer, as a peer's model would be."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = Path(saved_model).with_name("bert")
    words = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate(["[PAD]", "[UNK]", "word", "number", "text"])}, "[UNK]"
        )
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformer = Transformer(str(folder))
    model = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension())],
        prompts={"query": "number "},
        device="cpu",
    )
    path = folder.with_name("text-model")
    model.save_pretrained(str(path))
    return path


def test_any_sentence_transformer_is_encoded_with_its_own_prompts(text_model):
    model = SentenceTransformer(str(text_model), device="cpu")
    texts = [{"text": "word " * n} for n in range(1, 9)]
    plain = [x["text"] for x in texts]
    assert np.allclose(
        Encoder(model, workers=0).encode(texts, "query"), model.encode_query(plain), atol=ROUNDING
    )
    assert np.allclose(
        Encoder(model, workers=0).encode(texts, "document"),
        model.encode_document(plain),
        atol=ROUNDING,
    )
    with pytest.raises(RematchError, match=r"cannot take pictures.*--tasks"):
        Encoder(model, workers=0).encode([Image.new("RGB", (40, 40))], "document")
    with pytest.raises(RematchError, match="only ReMatch models"):
        Encoder(model, workers=0).encode(["a"], "document", multi_vector=True)


def test_a_peers_hub_name_is_enough(text_model, saved_model, publish):
    publish("example/peer", text_model)
    publish("example/retriever", saved_model)
    peer = load_model(EvaluateOptions("example/peer"))
    texts = ["word number"]
    expected = SentenceTransformer(str(text_model), device="cpu").encode_query(texts)
    assert np.allclose(peer.encode_query(texts), expected, atol=ROUNDING)
    assert isinstance(load_model(EvaluateOptions("example/retriever")), ReMatch)
    with pytest.raises(ModelError, match="example/none: no such directory"):
        load_model(EvaluateOptions("example/none"))


def test_a_static_model_is_evaluated(tmp_path):
    """Its tokenizer is one of the library tokenizers, which cannot be called."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1, "number": 2}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    module = StaticEmbedding(words, embedding_weights=weights)
    SentenceTransformer(modules=[module], device="cpu").save_pretrained(str(tmp_path / "static"))
    model = SentenceTransformer(str(tmp_path / "static"), device="cpu")
    texts = ["word " * n + "number " * (8 - n) for n in range(9)]
    vectors = Encoder(model, batch_tokens=100, workers=0).encode(texts, "document")
    assert np.allclose(vectors, model.encode_document(texts), atol=ROUNDING)
    rows = [{"query": text, "positives": [text]} for text in texts]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = EvaluateOptions(
        str(tmp_path / "static"), benchmark=str(tmp_path / "own.jsonl"), output=tmp_path / "out"
    )
    assert run(options)["tasks"]["own"]["hit@1"] == 100


def test_a_peers_documents_get_the_instructions_of_the_data_alone(text_model):
    """What ReMatch adds for texts, other models have never seen."""
    added = Item("word", None, DOCUMENT_INSTRUCTIONS["answer"], "a")
    brought = Item("number", None, "text: ", "b")
    task = RetrievalTask("t", "vqa", [Item("word")], [added, brought], [[0, 1]])
    model = SentenceTransformer(str(text_model), device="cpu")
    for option, texts in {
        None: ["word", "text: number"],
        True: [DOCUMENT_INSTRUCTIONS["answer"] + "word", "text: number"],
        False: ["word", "number"],
    }.items():
        result = evaluate_task(Encoder(model, workers=0), task, document_instructions=option)
        expected = model.encode_document(texts)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        assert np.allclose(result.documents, expected, atol=ROUNDING)


def test_a_models_truncate_dim_counts_as_in_its_own_encode(text_model, tmp_path):
    whole = SentenceTransformer(str(text_model), device="cpu")
    SentenceTransformer(str(text_model), device="cpu", truncate_dim=6).save_pretrained(
        str(tmp_path / "short")
    )
    model = SentenceTransformer(str(tmp_path / "short"), device="cpu")
    texts = ["word " * n for n in range(1, 9)]
    for task, plain in (
        ("query", model.encode_query(texts)),
        ("document", model.encode_document(texts)),
    ):
        vectors = Encoder(model, workers=0).encode(texts, task)
        assert vectors.shape == plain.shape == (8, 6)
        assert np.allclose(vectors, plain, atol=ROUNDING)
    assert Encoder(model).encode([], "query").shape == (0, 6)
    assert VectorStore(tmp_path, model).path != VectorStore(tmp_path, whole).path
    rows = [{"query": f"word number {i % 3}", "positives": [f"number {i}"]} for i in range(9)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        EvaluateOptions(
            str(tmp_path / "short"),
            benchmark=str(tmp_path / "own.jsonl"),
            output=tmp_path / "out",
            save_vectors=True,
        )
    )
    assert np.load(tmp_path / "out/arrays/own.npz")["documents"].shape == (9, 6)


def test_a_peers_model_is_evaluated_by_the_same_command(text_model, tmp_path):
    rows = [{"query": f"word number {i % 3}", "positives": [f"number {i}"]} for i in range(9)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = run(
        EvaluateOptions(
            str(text_model), benchmark=str(tmp_path / "own.jsonl"), output=tmp_path / "out"
        )
    )
    assert content["tasks"]["own"].keys() >= {"hit@1", "mrr", "ndcg@10"}
    with pytest.raises(RematchError, match="need a ReMatch model"):
        run(EvaluateOptions(str(text_model), benchmark=str(tmp_path / "own.jsonl"), maxsim=True))


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
@pytest.mark.parametrize("whole_corpus", [True, False])
def test_a_peers_model_is_compared_by_its_own_similarity(
    text_model, monkeypatch, similarity, whole_corpus
):
    model = SentenceTransformer(str(text_model), similarity_fn_name=similarity, device="cpu")
    rng = np.random.default_rng(0)
    vectors = {
        "query": rng.normal(size=(6, 4)).astype(np.float32),
        # of very different lengths, which the similarities judge differently
        "document": (rng.normal(size=(20, 4)) * 10 ** rng.uniform(-1, 1, (20, 1))).astype("f"),
    }
    items = [Item(text=str(i), key=str(i)) for i in range(20)]
    candidates = [] if whole_corpus else [rng.permutation(20)[:9] for _ in range(6)]
    answers = [[int(c[0])] for c in candidates] or [[i] for i in range(6)]
    task = RetrievalTask("t", "own", items[:6], items, candidates, answers=answers)
    encoder = Encoder(model, workers=0)
    monkeypatch.setattr(encoder, "encode", lambda _, side, **__: vectors[side])
    result = evaluate_task(encoder, task)
    expected = model.similarity(vectors["query"], vectors["document"]).numpy()
    for i, best in enumerate(result.best):
        pool, _ = task.pool(i)
        order = np.argsort(-expected[i, pool])[:10]
        assert best.documents.tolist() == pool[order].tolist()
        assert np.allclose(best.scores, expected[i, pool[order]], rtol=1e-4, atol=ROUNDING)
