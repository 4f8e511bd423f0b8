"""Vectors on disk: another model's are never returned, damaged ones are computed again."""

import numpy as np
import torch

from rematch.encoding.encoder import Encoder
from rematch.encoding.fingerprint import describe_model
from rematch.encoding.vector_store import VectorStore

ROUNDING = 1e-5  # of float32 sums in another order, as in test_encoder.py


def test_vectors_of_another_model_are_never_returned(make_model, tmp_path):
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
    assert {"weights", "template", "pictures", "code", "libraries"} <= describe_model(model).keys()


def test_a_damaged_store_is_noticed(make_model, tmp_path):
    model = make_model(dtype=torch.float32)
    texts = [f"text {i}" for i in range(40)]
    store = VectorStore(tmp_path, model)
    whole = Encoder(model, store, workers=0).encode(texts, "document")
    store.database.execute("update vectors set vector = zeroblob(length(vector)) where rowid = 7")
    warnings = []
    encoder = Encoder(model, VectorStore(tmp_path, model, warnings.append), workers=0)
    assert np.allclose(encoder.encode(texts, "document"), whole, atol=ROUNDING)
    assert encoder.encoded == 1
    assert "a vector is damaged" in warnings[0]
    store.database.execute("pragma wal_checkpoint(truncate)")
    store.database.close()
    encoder.store.database.close()
    content = store.path.read_bytes()
    store.path.write_bytes(content[: len(content) // 2])
    warnings.clear()
    encoder = Encoder(model, VectorStore(tmp_path, model, warnings.append), workers=0)
    assert np.allclose(encoder.encode(texts, "document"), whole, atol=ROUNDING)
    assert encoder.encoded == 40
    assert "is damaged and was renamed" in warnings[0]
