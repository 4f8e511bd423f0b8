"""Encoding many inputs: as plain ``encode``, once each, whatever the batches and workers."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rematch.data.images import load_image
from rematch.data.picto_tasks import TASKS, evaluation_tasks
from rematch.encoding.encoder import Encoder, _Preparation
from rematch.encoding.inputs import batches_by_length, content_key
from rematch.encoding.vector_store import VectorStore
from rematch.errors import ImageError, RematchError
from rematch.evaluate.rerank import Reranking
from rematch.evaluate.run import evaluate_task
from rematch.matching import View

# Sums in another order (batches, threads, vector instructions). In float32 a sum of a few hundred
# terms is off by up to 1e-5 of its terms, two normalised layers keep that, and the components of a
# unit vector are below 1.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Short and long texts, pictures in memory and on disk, both; half of them twice."""
    folder = tmp_path_factory.mktemp("pictures")
    tasks = evaluation_tasks(list(TASKS)[5:9], queries=50)
    documents = [d.as_input() for task in tasks for d in task.documents[:12]]
    for i in range(4):
        Image.effect_noise((200 + 90 * i, 150), 60).convert("RGB").save(folder / f"{i}.jpg")
    files = [{"image": folder / f"{i}.jpg", "text": "word " * (20 * i)} for i in range(4)]
    distinct = [*documents, *files, {"text": "word " * 300}, "plain text", folder / "0.jpg"]
    return distinct + distinct[::2]


def test_vectors_are_those_of_plain_encode_for_any_batch_and_workers(make_model, inputs):
    model = make_model(dtype=torch.float32)
    plain = model.encode_document(inputs, batch_size=4)
    tokens = model.encode_document(inputs, batch_size=4, multi_vector=True)
    vectors_of = {
        (b, w): Encoder(model, batch_tokens=b, workers=w).encode(inputs, "document")
        for b in (50, 3000)
        for w in (0, 2)
    }
    measured = {m.key: m for m in Encoder(model).measure(inputs, "document")}
    assert len(batches_by_length(measured.values(), 50)) >= 2 * 8, (
        "too few batches for two workers"
    )
    for vectors in vectors_of.values():
        assert np.allclose(vectors, plain, atol=ROUNDING)
    for b in (50, 3000):
        assert np.allclose(vectors_of[b, 0], vectors_of[b, 2], atol=ROUNDING)
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
    assert changed.encoded == 1, "another picture at the same path is another input"
    changed.encode(inputs[:3], "query")
    assert changed.encoded == 4, "queries are not documents"


def test_out_of_memory_halves_the_batch_and_says_so(make_model, inputs, monkeypatch):
    model = make_model(dtype=torch.float32)
    plain = Encoder(model, workers=0, batch_tokens=4000).encode(inputs, "document")
    forward = model.forward

    def tight(features, **kwargs):
        if len(features["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(features, **kwargs)

    monkeypatch.setattr(model, "forward", tight)
    warnings = []
    vectors = Encoder(model, workers=0, batch_tokens=4000, warn=warnings.append).encode(
        inputs, "document"
    )
    assert np.allclose(vectors, plain, atol=ROUNDING)
    assert any("out of memory with" in w and "at a time" in w for w in warnings)
    monkeypatch.setattr(model, "forward", fails(torch.OutOfMemoryError()))
    with pytest.raises(RematchError, match="out of memory with a single input"):
        Encoder(model, workers=0).encode(["a text"], "document")
    monkeypatch.setattr(model, "forward", fails(RuntimeError("other trouble")))
    with pytest.raises(RuntimeError, match="other trouble"):
        Encoder(model, workers=0).encode(["a text"], "document")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_input_that_does_not_fit_into_memory_fails_alone(make_model, monkeypatch, workers):
    model = make_model(dtype=torch.float32)
    texts = {b"short": "a dog", b"long": "a dog above a pizza, " * 20, b"other": "two cats"}
    plain = model.encode_document([texts[b"short"], texts[b"other"]])
    forward = model.forward

    def tight(features, **kwargs):
        if features["input_ids"].shape[1] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(features, **kwargs)

    monkeypatch.setattr(model, "forward", tight)
    encoder = Encoder(model, warn=lambda _: None)
    (result,) = encoder.stream([texts], "document", workers=workers)
    assert list(result.vectors) == [b"short", b"other"]
    assert np.allclose(np.stack(list(result.vectors.values())), plain, atol=ROUNDING)
    assert "single input" in str(result.errors[b"long"])
    # as on a GPU, where the main process computes
    values = list(texts.values())
    features = encoder._prepare(values, "document")
    vectors, errors = encoder._forward_or_errors(values, features, "document")
    assert np.allclose(vectors[:, 0], plain, atol=ROUNDING)
    assert list(errors) == [1]


def test_features_for_another_device_leave_workers_as_bytes(make_model, inputs):
    """Tensors would go through /dev/shm, which is small in containers."""
    encoder = Encoder(make_model(dtype=torch.float32))
    work = _Preparation(encoder, "document", compute=False, as_bytes=True)
    content, errors = work[inputs[:4]]
    assert not errors
    expected = encoder._prepare(inputs[:4], "document")
    features = torch.load(io.BytesIO(content), weights_only=False)
    assert features.keys() == expected.keys()
    tensors = [name for name, value in expected.items() if torch.is_tensor(value)]
    assert tensors
    assert all(torch.equal(features[name], expected[name]) for name in tensors)


def test_processes_of_one_machine_share_its_cores(make_model, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Encoder(make_model()).workers == 4


def fails(error):
    def forward(*args, **kwargs):
        raise error

    return forward


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
    [task] = evaluation_tasks(["Picto-Category"], queries=50)
    with pytest.raises(RematchError, match=r"truncate_dim=8\. Use --views raw-raw"):
        evaluate_task(Encoder(model), task, reranking=Reranking(3, (View.FEAT_RAW,)))


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


def test_inputs_have_the_same_content_key_only_with_the_same_content(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "c.png")
    a, b, c = (tmp_path / f"{name}.png" for name in "abc")
    assert content_key(a) == content_key(str(b)) == content_key({"image": [b]})
    assert content_key({"text": "x", "image": a}) == content_key({"image": b, "text": "x"})
    values = ["x", a, c, {"text": "x", "image": a}, {"image": [a, a]}, {"image": [a, c]}]
    assert len(set(map(content_key, values))) == len(values)


@pytest.mark.parametrize("fails_here", [True, False])
def test_an_unreadable_picture_of_one_process_is_an_error_in_all(
    make_model, tmp_path, monkeypatch, fails_here
):
    """Both sides of two processes; the other one is what it sends."""
    path = tmp_path / "torn.png"
    Image.effect_noise((90, 90), 60).save(path)
    if fails_here:
        path.write_bytes(path.read_bytes()[:2000])
    sent = []

    def all_gather(shares, share):
        sent.append(share)
        shares[:] = [share, {} if fails_here else ImageError("torn.png: broken or cut off")]

    module = "rematch.encoding.encoder"
    monkeypatch.setattr(f"{module}.get_world_size", lambda: 2)
    monkeypatch.setattr(f"{module}.get_rank", lambda: 0)
    monkeypatch.setattr(f"{module}.dist.barrier", lambda: None)
    monkeypatch.setattr(f"{module}.dist.all_gather_object", all_gather)
    encoder = Encoder(make_model(dtype=torch.float32), workers=0)
    with pytest.raises(ImageError, match=r"torn\.png: broken or cut off"):
        encoder.encode([path], "document")
    assert len(sent) == 1, "the other process would wait for it"
