"""QLoRA on bitsandbytes' CPU kernels: one base whatever it is loaded in; trained, loaded, merged,
resumed exactly.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from shared_training import Interrupt, assert_same_run, small_recipe
from test_gradient_cache import gradients
from transformers import BitsAndBytesConfig

from rematch import ReMatch
from rematch.backbone.lora import files_fingerprint, fingerprint
from rematch.errors import ModelError, RecipeError, TrainingError
from rematch.train.build import build_model
from rematch.train.collator import Collator
from rematch.train.loss import ReMatchLoss
from rematch.train.run import train


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums in the same order in every run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def four_bit(compute=torch.float32):  # what training chooses where bfloat16 is not native
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )
    return {"quantization_config": config}


def four_bit_recipe(path, output, **more):
    lora = {"r": 4, "alpha": 8, "dropout": 0.2}
    model = {"backbone": str(path), "num_tokens": 2, "lora": lora, "four_bit": True}
    return small_recipe(
        path,
        output,
        model=model,
        train={"steps": 3, "save_every": 1, "learning_rate": 1e-2} | more,
    )


def inputs():
    picture = Image.new("RGB", (96, 96), (200, 30, 30))
    return ["a dog above a pizza", picture, {"text": "the red one", "image": picture}]


def linears(model, kind):
    return [module for module in model.modules() if type(module).__name__ == kind]


@pytest.fixture(scope="module")
def whole(backbone_path, tmp_path_factory):
    """A run of three steps without interruption: the model as trained, and where it lies."""
    output = tmp_path_factory.mktemp("four_bit") / "model"
    return train(four_bit_recipe(backbone_path, output), quiet=True), output


def test_it_trains_all_losses_in_4_bits(whole, backbone_path):
    model, output = whole
    assert len(linears(model, "Linear4bit")) > 20
    log = [row for row in json.loads((output / "log.json").read_text()) if "loss" in row]
    assert len(log) == 3
    assert all(row["matching"] > 0 for row in log)
    assert not (output / "model.safetensors").exists()
    start = build_model(four_bit_recipe(backbone_path, output))
    before, after = dict(start.named_parameters()), dict(model.named_parameters())
    for name, parameter in after.items():
        trains = parameter.requires_grad and "lora_A" not in name  # A moves once B has left zero
        assert not (trains and torch.equal(parameter, before[name])), name
        assert parameter.dtype == torch.float32 or not parameter.requires_grad, name


def test_loaded_the_same_way_it_gives_the_same_vectors(whole):
    model, output = whole
    expected, scores = model.encode_query(inputs()), model.match(inputs(), inputs()[::-1])
    loaded = ReMatch(output, model_kwargs=four_bit())
    assert np.array_equal(loaded.encode_query(inputs()), expected)
    assert np.array_equal(loaded.match(inputs(), inputs()[::-1]), scores)


def test_loaded_plain_it_gives_vectors_near_them(whole):
    model, output = whole
    loaded = ReMatch(output)
    assert not linears(loaded, "Linear4bit")
    cosines = (loaded.encode_query(inputs()) * model.encode_query(inputs())).sum(1)
    assert cosines.min() > 0.9


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_merged_it_is_an_ordinary_checkpoint(whole, tmp_path, compute):
    _, output = whole
    model = ReMatch(output, model_kwargs=four_bit(compute))
    expected = model.encode_query(inputs())
    merged = model.merge_lora()
    tolerance = 1e-5 if compute is torch.float32 else 0.02
    assert np.abs(merged.encode_query(inputs()) - expected).max() <= tolerance
    merged.save_pretrained(str(tmp_path / "merged"))
    assert "quantization_config" not in json.loads(
        (tmp_path / "merged" / "config.json").read_text()
    )
    loaded = ReMatch(tmp_path / "merged")
    assert not linears(loaded, "Linear4bit")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert np.abs(loaded.encode_query(inputs()) - merged.encode_query(inputs())).max() <= 1e-6


def test_it_resumes_exactly(backbone_path, tmp_path, whole):
    output = tmp_path / "model"
    with pytest.raises(TrainingError, match="interrupted"):
        train(four_bit_recipe(backbone_path, output), callbacks=(Interrupt(2),), quiet=True)
    assert (tmp_path / "model.partial" / "checkpoint-1" / "complete.json").exists()
    resumed = train(four_bit_recipe(backbone_path, output), quiet=True)
    assert_same_run(output, whole[1])
    assert np.array_equal(resumed.encode_query(inputs()), whole[0].encode_query(inputs()))


@pytest.mark.parametrize("cached", [False, True])
def test_gradients_reach_the_learnable_rows_under_gradient_checkpointing(
    backbone_path, triplets, tmp_path, cached
):
    """The first layer starts from rows that train and others that do not; what it drops is drawn
    again.
    """
    results = []
    for checkpointing in (False, True):
        settings = four_bit_recipe(backbone_path, tmp_path, gradient_checkpointing=checkpointing)
        model = build_model(settings).train()
        batch = Collator(model, batch_tokens=300)(triplets[:6])["batch"]
        results.append(gradients(model, ReMatchLoss(model, gradient_cache=cached), [batch]))
    (losses, plain), (again, checkpointed) = results
    assert losses == again
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    rows = next(gradient for name, gradient in checkpointed.items() if "trainable_tokens" in name)
    assert rows.abs().sum(1).min() > 0


def test_an_evaluation_does_not_change_4_bit_weights(backbone_path):
    """bitsandbytes packs them anew, with rounded scales, on CPUs that have AVX-512 BF16."""
    model = ReMatch.from_backbone(str(backbone_path), 2, model_kwargs=four_bit()).eval()
    before = [
        (m.weight.data.clone(), m.weight.quant_state.absmax.clone())
        for m in linears(model, "Linear4bit")
    ]
    model.encode_query(inputs())
    for module, (data, scales) in zip(linears(model, "Linear4bit"), before, strict=True):
        assert torch.equal(module.weight.data, data)
        assert torch.equal(module.weight.quant_state.absmax, scales)


def test_without_bitsandbytes_it_says_what_to_install(backbone_path, tmp_path, monkeypatch):
    monkeypatch.setattr("rematch.train.build.is_bitsandbytes_available", lambda: False)
    with pytest.raises(RecipeError, match="pip install bitsandbytes"):
        build_model(four_bit_recipe(backbone_path, tmp_path))


def test_fsdp_is_refused(backbone_path, tmp_path, monkeypatch):
    """It would train to the end and then fail to put the model together."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match=r"four_bit does not work with FSDP.*torchrun"):
        train(four_bit_recipe(backbone_path, tmp_path / "model"), quiet=True)


# ---- which base an adapter belongs to -----------------------------------------------------------


@pytest.fixture
def sibling(backbone_path, tmp_path):
    """The tiny base after a little training of one weight, as a merged adapter leaves it."""
    path = tmp_path / "sibling"
    shutil.copytree(backbone_path, path)
    weights = load_file(path / "model.safetensors")
    name = next(name for name in sorted(weights) if "q_proj.weight" in name)
    weights[name] *= 1.05
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_base_is_known_however_it_is_loaded(backbone_path, sibling, tmp_path):
    options = [{"dtype": torch.float32}, {"dtype": torch.bfloat16}, four_bit()]
    prints = {
        ReMatch.from_backbone(str(backbone_path), 2, model_kwargs=o).backbone.fingerprint
        for o in options
    }
    assert len(prints) == 1
    model = ReMatch.from_backbone(
        str(backbone_path), 0, model_kwargs={"dtype": torch.bfloat16}
    ).backbone.model
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert {files_fingerprint(str(tmp_path / "sharded"))} == prints
    assert files_fingerprint(str(sibling)) not in prints
    assert files_fingerprint(str(tmp_path)) is None


def test_a_base_from_the_hub_is_read_from_its_cache(backbone_path, tmp_path):
    commit = "0" * 40
    snapshot = tmp_path / "models--someone--base" / "snapshots" / commit
    shutil.copytree(backbone_path, snapshot)
    known = files_fingerprint("someone/base", cache_dir=str(tmp_path), revision=commit)
    assert known == files_fingerprint(str(backbone_path))


def redirected(adapter, base, **settings):
    """The adapter with another base, and other settings."""
    for file, changes in (
        ("adapter_config.json", {"base_model_name_or_path": str(base)}),
        ("sentence_bert_config.json", settings),
    ):
        (adapter / file).write_text(json.dumps(json.loads((adapter / file).read_text()) | changes))
    return adapter


@pytest.mark.parametrize("options", [None, four_bit()], ids=["plain", "4 bits"])
def test_an_adapter_does_not_go_onto_a_sibling_of_its_base(whole, sibling, tmp_path, options):
    adapter = tmp_path / "adapter"
    shutil.copytree(whole[1], adapter)
    redirected(adapter, sibling)
    with pytest.raises(ModelError, match="trained on another base"):
        ReMatch(adapter, model_kwargs=options)


def test_an_adapter_of_version_0_1_is_still_loaded(backbone_path, sibling, make_model, tmp_path):
    model = make_model(dtype=torch.float32, lora=LoraConfig(r=2))
    model.save_pretrained(str(tmp_path / "adapter"))
    base = ReMatch.from_backbone(str(backbone_path), 0).backbone.model
    adapter = redirected(tmp_path / "adapter", backbone_path, fingerprint=fingerprint(base))
    assert np.array_equal(ReMatch(adapter).encode_query(inputs()), model.encode_query(inputs()))
    with pytest.raises(ModelError, match="trained on another base"):
        ReMatch(redirected(adapter, sibling, fingerprint="0" * 12))
