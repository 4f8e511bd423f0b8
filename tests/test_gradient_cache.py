"""The gradient cache against the plain loss, in value and gradient; pictures and documents
computed once.
"""

import pytest
import torch
from peft import LoraConfig
from shared_gradients import SMALL, assert_equal, both, gradients

from rematch.train.collator import MIN_FULL, Collator, split
from rematch.train.loss import ReMatchLoss


@pytest.mark.parametrize("joint", [False, True])
def test_cached_equals_plain_in_value_and_gradient(model, triplets, joint):
    """Text-only, picture-only and mixed columns; two batches accumulated; a loss scale as under
    fp16.
    """
    model.backbone.set_matching("unified", joint)
    collator = Collator(model, batch_tokens=SMALL)
    batches = [collator(triplets[:6])["batch"], collator(triplets[6:])["batch"]]
    assert all(len(b.embedding) > 3 and len(b.matching) > 2 for b in batches)
    assert_equal(*both(model, batches, scale=1024.0), 1e-9)


def test_cached_equals_plain_under_dropout(make_model, triplets):
    model = make_model(lora=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    batch = Collator(model, batch_tokens=SMALL)(triplets)["batch"]
    plain, cached = both(model, [batch])
    assert_equal(plain, cached, 1e-6)  # the adapter's weights are float32
    other = gradients(model, ReMatchLoss(model, gradient_cache=True), [batch], seed=1)
    assert other[0] != cached[0]  # dropout was on


def test_cached_is_as_exact_as_plain_in_single_precision(make_model, triplets):
    """Both round, each in its own order: over all weights together, neither is further from the
    float64 gradient.
    """
    exact, single = make_model(), make_model(dtype=torch.float32)
    batch = Collator(exact, batch_tokens=SMALL)(triplets)["batch"]
    _, truth = gradients(exact, ReMatchLoss(exact), [batch])
    plain, cached = both(single, [batch])
    assert truth.keys() == plain[1].keys() == cached[1].keys()

    def distance(gradients):
        errors = [(gradients[name].double() - truth[name]).flatten() for name in truth]
        return torch.cat(errors).norm()

    size = torch.cat([gradient.flatten() for gradient in truth.values()]).norm()
    assert distance(plain[1]) < 1e-3 * size
    assert distance(cached[1]) < 3 * distance(plain[1])


@pytest.mark.parametrize(
    "options",
    [
        {"w_qdm": 0},
        {"w_orth": 0, "views": ["raw-raw"]},
        {"learn_temperature": True, "symmetric": True, "mask_duplicates": True},
        {"hardness": 2.0, "matryoshka": [8, 16], "max_scores": 40},
    ],
)
def test_cached_equals_plain_with_options(model, triplets, options):
    batch = Collator(model, options.get("views", ["raw-raw", "feat-feat"]), SMALL)(triplets)[
        "batch"
    ]
    options = {"views": ["raw-raw", "feat-feat"]} | options
    assert_equal(*both(model, [batch], scale=8.0, **options), 1e-9)


def test_both_passes_have_the_same_precision(make_model, triplets):
    """A sharded model's forward has no autocast of its own, and the second pass runs later."""
    model = make_model(dtype=torch.float32)
    loss = ReMatchLoss(model, gradient_cache=True)
    precisions = []
    embed, match = loss.embed, loss.match

    def recorded(method):
        def call(*args):
            precisions.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return method(*args)

        return call

    loss.embed, loss.match = recorded(embed), recorded(match)
    batch = Collator(model, batch_tokens=SMALL)(triplets)["batch"]
    with torch.autocast("cpu", torch.bfloat16):
        losses = loss([batch])
    forward = len(precisions)
    sum(losses.values()).backward()
    assert len(precisions) == 2 * forward
    assert set(precisions) == {(True, torch.bfloat16)}


def test_the_split_into_mini_batches_changes_nothing(model, triplets):
    loss = ReMatchLoss(model)
    results = [
        gradients(model, loss, [Collator(model, batch_tokens=n)(triplets)["batch"]])
        for n in (SMALL, 100_000)
    ]
    assert_equal(*results, 1e-6)  # padding moves float32 rotary tables


def test_two_forwards_before_the_backwards(model, triplets):
    """The second forward must not spoil what the first one's backward needs."""
    collator = Collator(model, batch_tokens=SMALL)
    first, second = (collator(rows)["batch"] for rows in (triplets[:5], triplets[5:]))
    loss = ReMatchLoss(model, gradient_cache=True)
    model.zero_grad()
    totals = [torch.stack(list(loss([batch]).values())).sum() for batch in (first, second)]
    totals[0].backward()
    results = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    _, expected = gradients(model, loss, [first])
    assert all(torch.equal(results[n], g) for n, g in expected.items())


@pytest.mark.parametrize("cached", [False, True])
def test_gradient_checkpointing_changes_nothing(make_model, triplets, cached):
    """Of the language model and of a tower that trains."""
    results, ran = [], []
    for checkpointing in (False, True):
        model = make_model().train()
        language, vision = model.backbone.base.language_model, model.backbone.base.vision_tower
        norms = [
            *(layer.input_layernorm for layer in language.layers),
            *(layer.layer_norm1 for layer in vision.encoder.layers),
        ]
        if checkpointing:
            model.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = Collator(model, batch_tokens=SMALL)(triplets)["batch"]
        count = [0]
        for norm in norms:
            norm.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        results.append(gradients(model, ReMatchLoss(model, gradient_cache=cached), [batch]))
        ran.append(count[0])
    assert_equal(*results, 1e-9)
    assert ran[1] > ran[0]  # layers did run again in the backward pass


@pytest.mark.parametrize("joint", [False, True])
def test_a_frozen_tower_runs_once_on_each_distinct_picture(model, triplets, joint):
    model.backbone.set_matching("unified", joint)
    model.backbone.freeze_vision()
    batch = Collator(model, batch_tokens=SMALL)([*triplets, *triplets])["batch"]
    loss = ReMatchLoss(model, gradient_cache=True)
    passed = []
    tower = model.backbone.base.vision_tower
    handle = tower.register_forward_pre_hook(lambda _, args: passed.append(len(args[0])))
    once = gradients(model, loss, [batch])
    handle.remove()
    pictures = [
        t[c]["image"]
        for t in triplets
        for c in ("query", "positive", "negative")
        if "image" in t[c]
    ]
    assert sum(passed) == len({p.tobytes() for p in pictures}) == len(batch.pictures)

    class RunsTowerEachTime(ReMatchLoss):  # the obvious version
        def picture_features(self, batch):
            return None

    assert_equal(gradients(model, RunsTowerEachTime(model), [batch]), once, 1e-9)


@pytest.mark.parametrize("joint", [False, True])
def test_a_tower_in_training_runs_once_on_each_distinct_picture_of_a_pass(model, triplets, joint):
    """Although a joint document stands in the sequence once for each question."""
    model.backbone.set_matching("unified", joint)
    batch = Collator(model, batch_tokens=100_000)([*triplets, *triplets])["batch"]
    passed = []
    tower = model.backbone.base.vision_tower
    handle = tower.register_forward_pre_hook(lambda _, args: passed.append(len(args[0])))
    once = gradients(model, ReMatchLoss(model), [batch])
    handle.remove()
    shown = [step.picture_sets for step in (*batch.embedding, *batch.matching)]
    assert passed == [len(set(numbers)) for numbers in shown if numbers]
    assert sum(passed) < sum(map(len, shown))

    class RunsTowerForEachCopy(ReMatchLoss):  # the obvious version
        def _inputs(self, mini_batch, passes):
            inputs = super()._inputs(mini_batch, passes)
            if "pictures" in inputs:
                inputs["pictures"] = inputs["pictures"].take(inputs.pop("picture_order"))
            return inputs

    assert_equal(gradients(model, RunsTowerForEachCopy(model), [batch]), once, 1e-9)


def test_a_tower_in_training_switches_reuse_off(model, triplets):
    batch = Collator(model, batch_tokens=SMALL)(triplets)["batch"]
    assert ReMatchLoss(model).picture_features(batch) is None
    _, grads = gradients(model, ReMatchLoss(model, gradient_cache=True), [batch])
    assert any("vision_tower" in n for n in grads)
    model.backbone.freeze_vision()
    assert len(ReMatchLoss(model).picture_features(batch)) == len(batch.pictures)


def test_identical_inputs_are_embedded_once(model, triplets):
    once, twice = (
        Collator(model, ["feat-feat"], SMALL)(rows)["batch"]
        for rows in (triplets, [*triplets, *triplets])
    )
    assert (
        len(once.keys)
        == len(twice.keys)
        == sum(len(s.tensors["input_ids"]) for s in twice.embedding)
    )
    assert torch.equal(twice.inputs[:12], twice.inputs[12:])


def test_mini_batches_hold_their_budget_and_little_padding(model, triplets):
    batch = Collator(model, batch_tokens=2000)(triplets * 3)["batch"]
    for steps in (batch.embedding, batch.matching):
        for step in steps:
            assert step.tensors["input_ids"].numel() <= 2000
    real = sum(int(step.tensors["attention_mask"].sum()) for step in batch.embedding)
    padded = sum(step.tensors["input_ids"].numel() for step in batch.embedding)
    assert real / padded >= MIN_FULL
    last = [
        step.tensors["segments"] == step.tensors["attends"].shape[1] - 1 for step in batch.matching
    ]
    assert sum(int(m.sum()) for m in last) <= (1 - MIN_FULL) * sum(m.numel() for m in last)


def test_an_input_over_the_budget_is_a_mini_batch_of_its_own():
    assert [list(r) for r in split([5, 90], 40)] == [[0], [1]]


def test_training_reads_inputs_as_encoding_does(model, triplets):
    """Token for token: the collator's embedding batches are what ``encode`` feeds to the model."""
    for task, column in (("query", "query"), ("document", "positive")):
        for row in triplets:
            reading = model.backbone.reader.read(row[column])
            batch = model.backbone.reader.embedding_batch([reading], [task])
            assert (
                batch["input_ids"].tolist()
                == model.preprocess([row[column]], task=task)["input_ids"].tolist()
            )
