"""The model as an ordinary checkpoint: saved, loaded by both classes, merged; the same vectors
whatever the batch.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from sentence_transformers import SentenceTransformer

from rematch import ReMatch
from rematch.errors import ModelError, RematchError
from rematch.tokens import initial_rows
from rematch.train.collator import Collator
from rematch.train.loss import ReMatchLoss

SINGLE = torch.float32


def a_step(model, triplets, rate=0.5):
    """One plain SGD step on all three losses."""
    sum(ReMatchLoss(model)([Collator(model)(triplets[:4])["batch"]]).values()).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None and p.requires_grad:
                p -= rate * p.grad / p.grad.norm().clamp(min=1)
                p.grad = None


@pytest.fixture
def lora_model(make_model, triplets):
    model = make_model(dtype=SINGLE, lora=LoraConfig(r=4, lora_alpha=8))
    a_step(model, triplets)
    a_step(model, triplets)
    return model.eval()


def inputs(triplets):
    return [t[c] for t in triplets for c in ("query", "positive")]


def test_encode_gives_unit_vectors_of_every_kind_of_input(model, tmp_path):
    model = model.float()
    path = tmp_path / "a picture.png"
    Image.new("RGBA", (50, 30), (255, 0, 0, 128)).save(path)
    several = {"text": "compare", "image": [path, Image.new("L", (20, 20))]}
    vectors = model.encode_query(
        ["a dog", path, str(path), {"text": "red", "image": path}, several]
    )
    assert vectors.shape == (5, 32)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(5), abs=1e-6)
    assert vectors[1] == pytest.approx(vectors[2])
    assert model.encode_document("a dog").shape == (32,)
    assert model.encode_document(path).shape == (32,)


def test_queries_and_documents_have_tokens_of_their_own(model):
    q, d = model.encode_query("a dog"), model.encode_document("a dog")
    assert np.abs(q - d).max() > 1e-3
    assert model.encode("a dog") == pytest.approx(d)


def test_the_embedding_is_the_mean_of_the_token_vectors(model, triplets):
    features = model(model.preprocess(inputs(triplets)[:5], task="query"))
    mean = features["multi_vector"].mean(1)
    assert torch.allclose(
        features["sentence_embedding"], mean / mean.norm(dim=1, keepdim=True), atol=1e-12
    )
    vectors = model.encode_query(inputs(triplets)[:5], multi_vector=True)
    assert vectors.shape == (5, 4, 32)
    assert np.linalg.norm(vectors, axis=-1) == pytest.approx(np.ones((5, 4)), abs=1e-6)
    assert not model.fusion.flat_output


def test_the_vectors_are_the_last_hidden_states_after_the_final_norm(model):
    features = model.preprocess(["a dog above a pizza"], task="query")
    keys = ("input_ids", "attention_mask")
    whole = model.backbone.model(**{k: features[k] for k in keys}, output_hidden_states=True)
    logits = model.backbone.model.lm_head(model(features)["multi_vector"][0])
    assert torch.allclose(logits, whole.logits[0, -4:], atol=1e-10)


def test_vectors_do_not_depend_on_batch_size_or_padding_side(make_model, triplets):
    model = make_model(dtype=SINGLE)
    texts = inputs(triplets)
    single = model.encode_query(texts, batch_size=1)
    assert np.abs(model.encode_query(texts, batch_size=len(texts)) - single).max() <= 1e-5
    model.backbone.processor.tokenizer.padding_side = "right"
    assert np.abs(model.encode_query(texts, batch_size=len(texts)) - single).max() <= 1e-5


def test_long_text_keeps_the_learnable_tokens(model):
    model.backbone.tokenizer.model_max_length = 60
    features = model.preprocess(["a dog above a pizza, " * 40], task="query")
    names = model.backbone.tokenizer.convert_ids_to_tokens(features["input_ids"][0, -4:])
    assert names == [f"<|query_emb_{i}|>" for i in range(4)]
    assert features["input_ids"].shape[1] <= 60


def test_a_picture_and_too_long_a_text_is_an_error(model):
    model.backbone.tokenizer.model_max_length = 60
    long = {"text": "a dog above a pizza, " * 40, "image": Image.new("RGB", (96, 96))}
    with pytest.raises(RematchError, match="longer than the 60 tokens"):
        model.encode_query(["a dog", long])


def test_a_rematch_model_is_no_backbone():
    with pytest.raises(ModelError, match="is already a ReMatch model"):
        ReMatch.from_backbone("rematch-tiny")


def test_another_sentence_transformer_may_be_a_backbone(backbone_path, tmp_path):
    copy = shutil.copytree(backbone_path, tmp_path / "peer")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Pooling"}]
    (copy / "modules.json").write_text(json.dumps(modules))
    assert ReMatch.from_backbone(str(copy), 2).encode_query("a").shape == (32,)


def test_an_adapter_on_a_bfloat16_base_trains_in_float32_and_its_base_is_known_in_any_dtype(
    make_model,
):
    model = make_model(dtype=torch.bfloat16, lora=LoraConfig(r=2))
    assert {p.dtype for p in model.backbone.parameters() if p.requires_grad} == {torch.float32}
    assert model.backbone.fingerprint == make_model(dtype=SINGLE).backbone.fingerprint


def test_multi_vectors_refuse_what_would_break_their_shape(model):
    with pytest.raises(RematchError, match="truncate_dim"):
        model.encode_query(["a"], multi_vector=True, truncate_dim=3)


def test_text_that_holds_a_placeholder_is_an_error(model):
    with pytest.raises(
        RematchError,
        match="input 0: its text holds <image>, which the model reads as a control token",
    ):
        model.encode_query(["look at <image>"])


def test_save_and_load_through_both_classes(make_model, triplets, tmp_path):
    model = make_model(dtype=SINGLE)
    a_step(model, triplets)
    expected = [
        model.encode_query(inputs(triplets)),
        model.match([triplets[0]["query"]], [triplets[0]["positive"]], "feat-feat"),
    ]
    model.save_pretrained(str(tmp_path / "m"))
    loaded = ReMatch(tmp_path / "m")
    assert np.abs(loaded.encode_query(inputs(triplets)) - expected[0]).max() <= 1e-6
    assert loaded.match(
        [triplets[0]["query"]], [triplets[0]["positive"]], "feat-feat"
    ) == pytest.approx(expected[1], abs=1e-6)
    plain = SentenceTransformer(str(tmp_path / "m"), trust_remote_code=True)
    assert type(plain) is SentenceTransformer
    assert "trust_remote_code=True" in (tmp_path / "m/README.md").read_text()
    assert np.abs(plain.encode_query(inputs(triplets)) - expected[0]).max() <= 1e-6


def test_matching_refuses_attention_that_takes_no_mask(model):
    """On a GPU it would end in an assertion of the device, after which nothing runs."""
    model.backbone.model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="flash_attention_2 cannot take"):
        model.match(["a dog"], ["a cat"])


def test_an_adapter_is_saved_loaded_and_merged(lora_model, triplets, tmp_path):
    expected = lora_model.encode_query(inputs(triplets))
    lora_model.save_pretrained(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    for load in (ReMatch, lambda p: SentenceTransformer(p, trust_remote_code=True)):
        assert (
            np.abs(load(str(tmp_path / "adapter")).encode_query(inputs(triplets)) - expected).max()
            <= 1e-5
        )
    merged = ReMatch(tmp_path / "adapter").merge_lora()
    assert np.abs(merged.encode_query(inputs(triplets)) - expected).max() <= 1e-5
    merged.save_pretrained(str(tmp_path / "merged"))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert (
        np.abs(ReMatch(tmp_path / "merged").encode_query(inputs(triplets)) - expected).max()
        <= 1e-5
    )


def test_an_adapter_comes_from_the_revision_that_is_named(lora_model, triplets, tmp_path, publish):
    lora_model.save_pretrained(str(tmp_path / "main"))
    a_step(lora_model, triplets)
    lora_model.eval().save_pretrained(str(tmp_path / "v1"))
    publish("lab/rematch-tiny", tmp_path / "main")  # not to be taken for the packaged model
    publish("lab/rematch-tiny", tmp_path / "v1", "v1")
    for revision in ("main", "v1"):
        expected = ReMatch(tmp_path / revision).encode_query(inputs(triplets))
        vectors = ReMatch("lab/rematch-tiny", revision=revision).encode_query(inputs(triplets))
        assert np.abs(vectors - expected).max() <= 1e-6


def test_under_lora_the_learnable_rows_train_and_the_vocabulary_stays(make_model, triplets):
    model = make_model(dtype=SINGLE, lora=LoraConfig(r=4, lora_alpha=8))
    rows = torch.arange(model.backbone.model.get_input_embeddings().weight.shape[0])
    before = model.backbone.model.get_input_embeddings()(rows).detach().clone()
    a_step(model, triplets)
    changed = (
        (model.backbone.model.get_input_embeddings()(rows) != before)
        .any(1)
        .nonzero()
        .flatten()
        .tolist()
    )
    names = [f"<|{kind}_emb_{i}|>" for kind in ("query", "doc") for i in range(4)]
    assert changed == model.backbone.tokenizer.convert_tokens_to_ids(names)


def test_lora_reaches_the_language_model_and_the_vision_tower_only_if_asked(make_model):
    trained = lambda m: [n for n, p in m.named_parameters() if p.requires_grad and "lora_" in n]  # noqa: E731
    usual = trained(make_model(lora=LoraConfig(r=2)))
    leaves = {n.split(".lora_")[0].rpartition(".")[2] for n in usual}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all("language_model" in n for n in usual)
    assert any(
        "vision_tower" in n for n in trained(make_model(lora=LoraConfig(r=2), lora_vision=True))
    )


def test_no_learnable_tokens_means_the_last_token(make_model):
    model = make_model(num_tokens=0)
    features = model(model.preprocess(["a dog", "a longer text about a dog"], task="query"))
    assert torch.equal(features["multi_vector"][:, 0], features["token_embeddings"][:, -1])


@pytest.mark.parametrize("init", ["random", "small", "last", "mean"])
def test_learnable_tokens_start_as_chosen(make_model, init):
    model, plain = make_model(token_init=init), make_model(0)
    names = [f"<|{kind}_emb_{i}|>" for kind in ("query", "doc") for i in range(4)]
    ids = model.backbone.tokenizer.convert_tokens_to_ids(names)
    rows = model.backbone.model.get_input_embeddings().weight.detach()[ids].float()
    vocabulary = plain.backbone.model.get_input_embeddings().weight.detach().float()
    words = vocabulary[: len(plain.backbone.tokenizer)]
    scale = words.pow(2).mean().sqrt()
    last = plain.preprocess(["a dog"])["input_ids"][0, -1]
    centers = {"last": words[last], "mean": words.mean(0)}
    noise = (rows - centers.get(init, 0)) / scale
    assert noise.std().item() == pytest.approx(1.0 if init == "random" else 0.1, rel=0.15)
    cosines = torch.nn.functional.cosine_similarity(noise[:, None], noise, dim=-1)
    assert cosines.fill_diagonal_(0).abs().max() < 0.7, "each token has noise of its own"
    again = make_model(token_init=init).backbone.model.get_input_embeddings().weight[ids]
    assert torch.equal(again.float(), rows), "the seed decides"


def test_mixed_tokens_start_like_last_and_random_in_turn():
    words = torch.randn(50, 400)
    torch.manual_seed(0)
    mixed = initial_rows(words, 7, 6, "mixed")
    for init, rows in (("last", slice(0, None, 2)), ("random", slice(1, None, 2))):
        torch.manual_seed(0)
        assert torch.equal(mixed[rows], initial_rows(words, 7, 6, init)[rows])


def test_an_unknown_start_of_learnable_tokens_is_an_error(make_model):
    with pytest.raises(ModelError, match="token_init='zero' is unknown; choose one of random, sm"):
        make_model(token_init="zero")


def test_public_names():
    import rematch

    assert set(rematch.__all__) == {"Index", "ReMatch", "ReMatchLoss", "RematchError"}
    assert all(getattr(rematch, name) is not None for name in rematch.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Rematch'"):
        rematch.Rematch  # noqa: B018
