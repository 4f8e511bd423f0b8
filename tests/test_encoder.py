"""Encoding many inputs: as plain ``encode``, once each, resumable, whatever the batches, workers
and processes.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from test_parallel import free_port

from rematch.data.images import load_image
from rematch.data.picto_tasks import evaluation_tasks
from rematch.encoding.encoder import Encoder, plan
from rematch.encoding.vector_store import VectorStore, describe, fingerprint
from rematch.errors import ImageError, RematchError
from rematch.evaluate.command import EvaluateOptions, run
from rematch.evaluate.rerank import Reranking
from rematch.evaluate.run import evaluate_task
from rematch.model import ReMatch

# float32 sums in another order: other batches, threads, or a CPU with other vector instructions. A
# sum of some hundred terms is off by up to 1e-5 of its parts, two normalised layers keep that, and
# the parts of a unit vector are below 1.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Short and long texts, pictures in memory and on disk, pictures with text, and doubles of all
    of them.
    """
    folder = tmp_path_factory.mktemp("pictures")
    documents = [d.as_input() for t in evaluation_tasks(queries=50)[5:9] for d in t.documents[:12]]
    for i in range(4):
        Image.effect_noise((200 + 90 * i, 150), 60).convert("RGB").save(folder / f"{i}.jpg")
    files = [{"image": folder / f"{i}.jpg", "text": "word " * (20 * i)} for i in range(4)]
    made = [*documents, *files, {"text": "word " * 300}, "plain text", folder / "0.jpg"]
    return made + made[::2]


def test_vectors_are_those_of_plain_encode_for_any_batch_and_workers(make_model, inputs):
    model = make_model(dtype=torch.float32)
    plain = model.encode_document(inputs, batch_size=4)
    tokens = model.encode_document(inputs, batch_size=4, multi_vector=True)
    found = {
        (b, w): Encoder(model, batch_tokens=b, workers=w).encode(inputs, "document")
        for b in (100, 3000)
        for w in (0, 2)
    }
    encoder = Encoder(model, batch_tokens=100)
    assert len(plan(encoder.measure(inputs, "document"), 100)) >= 2 * 8, (
        "too few batches for two workers"
    )
    for vectors in found.values():
        assert np.allclose(vectors, plain, atol=ROUNDING)
    for b in (100, 3000):
        assert np.allclose(found[b, 0], found[b, 2], atol=ROUNDING)
    both = Encoder(model, workers=0).encode(inputs, "document", multi_vector=True)
    assert np.allclose(both[:, 0], plain, atol=ROUNDING)
    assert np.allclose(both[:, 1:], tokens, atol=ROUNDING)
    queries = Encoder(model, workers=0).encode(inputs, "query")
    assert np.allclose(queries, model.encode_query(inputs, batch_size=4), atol=ROUNDING)


def test_each_distinct_input_is_encoded_once_by_its_content(make_model, inputs, tmp_path):
    model = make_model(dtype=torch.float32)
    encoder = Encoder(model, VectorStore(tmp_path, model), workers=0)
    first = encoder.encode(inputs, "document")
    assert encoder.encoded < len(inputs) * 0.7
    copy = tmp_path / "copy.jpg"
    path = next(x for x in inputs if isinstance(x, Path))
    copy.write_bytes(path.read_bytes())
    again = Encoder(model, VectorStore(tmp_path, model), workers=0)
    assert np.array_equal(again.encode([*inputs, copy], "document")[:-1], first)
    assert again.encoded == 0
    Image.new("RGB", (64, 64)).save(copy, "JPEG")
    changed = Encoder(model, VectorStore(tmp_path, model), workers=0)
    changed.encode([copy], "document")
    assert changed.encoded == 1, "the same path with another picture is another input"
    changed.encode(inputs[:3], "query")
    assert changed.encoded == 4, "queries are not documents"


def test_another_model_never_gets_anothers_vectors(make_model, tmp_path):
    model = make_model(dtype=torch.float32)
    base = VectorStore(tmp_path, model).path

    def changed(change):
        other = make_model(dtype=torch.float32)
        change(other)
        return VectorStore(tmp_path, other).path != base

    def weight(m):
        with torch.no_grad():
            next(m.fusion.projector.parameters()).flatten()[0] += 1e-3

    assert VectorStore(tmp_path, make_model(dtype=torch.float32)).path == base
    assert changed(weight)
    assert changed(
        lambda m: setattr(
            m.backbone.processor, "chat_template", m.backbone.processor.chat_template + " "
        )
    )
    assert changed(
        lambda m: setattr(
            m.backbone.processor.image_processor, "size", {"height": 32, "width": 32}
        )
    )
    assert changed(lambda m: m.prompts.update(query="q: "))
    assert changed(lambda m: m.to(torch.bfloat16))
    assert {"weights", "template", "pictures", "code", "libraries"} <= describe(model).keys()


def configured(model, name, value):
    config = model.backbone.model.config
    for part in name.split(".")[:-1]:
        config = getattr(config, part)
    setattr(config, name.split(".")[-1], value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text_config.rope_parameters", {"rope_theta": 500_000.0, "rope_type": "default"}),
        ("text_config.rms_norm_eps", 1e-5),
        ("vision_config.hidden_act", "quick_gelu"),
        ("vision_feature_layer", -2),
    ],
)
def test_the_configuration_tells_models_of_the_same_weights_apart(make_model, name, value):
    model = make_model(dtype=torch.float32)
    described, comparable = describe(model), fingerprint(model)
    configured(model, name, value)
    assert describe(model) != described
    assert fingerprint(model) != comparable


def test_what_does_not_change_vectors_is_no_part_of_their_fingerprint(make_model, saved_model):
    model = make_model(dtype=torch.float32)
    comparable = fingerprint(model)
    other = ReMatch(
        str(saved_model), model_kwargs={"attn_implementation": "eager", "dtype": torch.bfloat16}
    )
    assert fingerprint(other) == comparable, "the same weights and settings, loaded otherwise"
    for name, value in (
        ("_name_or_path", "elsewhere"),
        ("text_config.dtype", torch.bfloat16),
        ("architectures", ["Other"]),
        ("text_config.use_cache", not model.backbone.model.config.text_config.use_cache),
    ):
        configured(model, name, value)
        assert fingerprint(model) == comparable, name
    described = describe(model)
    model.backbone.model.set_attn_implementation("eager")  # other rounding, the same vectors
    assert describe(model) != described
    assert fingerprint(model) == comparable


def test_a_torn_store_is_noticed(make_model, tmp_path):
    model = make_model(dtype=torch.float32)
    texts = [f"text {i}" for i in range(40)]
    store = VectorStore(tmp_path, model)
    whole = Encoder(model, store, workers=0).encode(texts, "document")
    store.database.execute("update vectors set vector = zeroblob(length(vector)) where rowid = 7")
    said = []
    encoder = Encoder(model, VectorStore(tmp_path, model, said.append), workers=0)
    assert np.allclose(encoder.encode(texts, "document"), whole, atol=ROUNDING)
    assert encoder.encoded == 1
    assert "a vector is damaged" in said[0]
    store.database.execute("pragma wal_checkpoint(truncate)")
    store.database.close()
    encoder.store.database.close()
    content = store.path.read_bytes()
    store.path.write_bytes(content[: len(content) // 2])
    said.clear()
    encoder = Encoder(model, VectorStore(tmp_path, model, said.append), workers=0)
    assert np.allclose(encoder.encode(texts, "document"), whole, atol=ROUNDING)
    assert encoder.encoded == 40
    assert "torn, put aside" in said[0]


def test_out_of_memory_halves_the_batch_and_says_so(make_model, inputs, monkeypatch):
    model = make_model(dtype=torch.float32)
    plain = Encoder(model, workers=0, batch_tokens=4000).encode(inputs, "document")
    forward = model.forward

    def tight(features, **kwargs):
        if len(features["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(features, **kwargs)

    monkeypatch.setattr(model, "forward", tight)
    said = []
    vectors = Encoder(model, workers=0, batch_tokens=4000, warn=said.append).encode(
        inputs, "document"
    )
    assert np.allclose(vectors, plain, atol=ROUNDING)
    assert any("out of memory with" in s and "at a time" in s for s in said)
    monkeypatch.setattr(model, "forward", fails(torch.OutOfMemoryError()))
    with pytest.raises(RematchError, match="out of memory with a single input"):
        Encoder(model, workers=0).encode(["one"], "document")
    monkeypatch.setattr(model, "forward", fails(RuntimeError("other trouble")))
    with pytest.raises(RuntimeError, match="other trouble"):
        Encoder(model, workers=0).encode(["one"], "document")


def fails(error):
    def forward(*args, **kwargs):
        raise error

    return forward


@pytest.fixture(scope="module")
def text_model(saved_model):
    """A small text-only SentenceTransformer, as a peer's model would be."""
    from tokenizers import Tokenizer, models, pre_tokenizers
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
    with pytest.raises(RematchError, match="ReMatch models only"):
        Encoder(model, workers=0).encode(["a"], "document", multi_vector=True)


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


def test_truncate_dim_leaves_token_vectors_whole(make_model, inputs):
    model = make_model(dtype=torch.float32)
    whole = Encoder(model, workers=0).encode(inputs[:3], "document", multi_vector=True)
    model.truncate_dim = 8
    short = Encoder(model, workers=0).encode(inputs[:3], "document", multi_vector=True)
    assert np.array_equal(short[:, 0, :8], whole[:, 0, :8])
    assert not short[:, 0, 8:].any()
    assert np.array_equal(short[:, 1:], whole[:, 1:])
    assert Encoder(model).encode([], "document", multi_vector=True).shape == (0, *whole.shape[1:])
    assert np.allclose(
        model.encode_document(inputs[:3], multi_vector=True), whole[:, 1:], atol=ROUNDING
    )
    task = evaluation_tasks(queries=50)[0]
    with pytest.raises(RematchError, match=r"truncate_dim=8\. Use --views raw-raw"):
        evaluate_task(Encoder(model), task, reranking=Reranking(3, ("feat-raw",)))


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


def test_a_broken_picture_is_named_before_anything_is_encoded(make_model, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        load_image(broken)
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        Encoder(make_model(dtype=torch.float32)).encode(["a", {"image": broken}], "document")


def test_a_picture_that_is_cut_off_is_named_from_within_a_worker(make_model, tmp_path):
    Image.effect_noise((300, 200), 60).convert("RGB").save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:3000])
    texts = [f"text {i}" for i in range(40)]
    for workers in (0, 2):
        with pytest.raises(ImageError, match=r"cut\.jpg: broken or cut off"):
            Encoder(make_model(dtype=torch.float32), workers=workers, batch_tokens=5).encode(
                [*texts, {"image": tmp_path / "cut.jpg"}], "document"
            )


@pytest.fixture
def one_thread():
    """As the processes have that these tests start: rounding, and so the rank of near equals,
    depends on threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


COMMAND = [sys.executable, "-m", "rematch.cli", "evaluate"]
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def test_kill_9_in_the_middle_then_the_same_scores_and_nothing_twice(
    saved_model, tmp_path, one_thread
):
    settings = ["--limit", "25", "--batch-tokens", "400", "--workers", "0"]
    whole = run(
        EvaluateOptions(
            str(saved_model), limit=25, batch_tokens=400, workers=0, output=tmp_path / "whole"
        )
    )
    started = subprocess.Popen(
        [*COMMAND, str(saved_model), *settings, "--output", tmp_path / "cut"],
        env=os.environ | QUIET,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    rows = 0
    until = time.time() + 120
    while rows < 60 and time.time() < until and started.poll() is None:
        time.sleep(0.02)
        for file in tmp_path.glob("cut/vectors/*.sqlite"):
            try:
                with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
                    rows = database.execute("select count(*) from vectors").fetchone()[0]
            except sqlite3.OperationalError:
                pass  # not made yet
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    assert rows >= 60
    assert not (tmp_path / "cut" / "scores.json").exists()
    (file,) = tmp_path.glob("cut/vectors/*.sqlite")
    with sqlite3.connect(file) as database:
        before = database.execute("select count(*) from vectors").fetchone()[0]
    resumed = run(
        EvaluateOptions(
            str(saved_model), limit=25, batch_tokens=400, workers=0, output=tmp_path / "cut"
        )
    )
    assert 0 < before < whole["run"]["inputs_encoded"]
    assert resumed["run"]["inputs_encoded"] == whole["run"]["inputs_encoded"] - before
    assert {k: v for k, v in resumed.items() if k != "run"} == {
        k: v for k, v in whole.items() if k != "run"
    }


def test_two_processes_give_the_vectors_of_one(saved_model, tmp_path, one_thread):
    names = ["Picto-T2I", "Picto-Count"]
    settings = {"limit": 20, "save_vectors": True, "rerank": 3, "tasks": names, "maxsim": True}
    one = run(EvaluateOptions(str(saved_model), output=tmp_path / "one", **settings))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
    ]
    options = [
        "--limit",
        "20",
        "--save-vectors",
        "--rerank",
        "3",
        "--tasks",
        ",".join(names),
        "--maxsim",
    ]
    done = subprocess.run(
        [
            *launch,
            "-m",
            "rematch.cli",
            "evaluate",
            str(saved_model),
            *options,
            "--output",
            tmp_path / "two",
        ],
        env=os.environ | QUIET,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two/scores.json").read_text())
    assert {k: v for k, v in two.items() if k != "run"} == json.loads(
        json.dumps({k: v for k, v in one.items() if k != "run"})
    )
    for name in names:
        a, b = (np.load(tmp_path / run_ / "arrays" / f"{name}.npz") for run_ in ("one", "two"))
        assert np.allclose(a["queries"], b["queries"], atol=ROUNDING)
        assert np.allclose(a["documents"], b["documents"], atol=ROUNDING)
