"""What tells models apart, and which of this package's code decides vectors."""

import ast
import shutil
from pathlib import Path

import pytest
import torch

import rematch
from rematch.encoding.fingerprint import (
    VECTOR_MODULES,
    code_digest,
    describe_model,
    model_fingerprint,
)
from rematch.model import ReMatch

PACKAGE = Path(rematch.__file__).parent
# Modules that those in VECTOR_MODULES import, but that no vector depends on.
IRRELEVANT = {
    "errors": "messages",
    "files": "how files are read and written",
    "console": "messages",
    "matching": "masks and positions of questions",
    "scoring": "scores from vectors and from the matching head",
    "backbone/questions": "questions",
    "backbone/checks": "errors about unusable models",
    "backbone/fingerprint": "which base an adapter belongs to",
    "backbone/memory": "default size of a batch, which an option can change too",
    "encoding/vector_store": "where vectors are stored",
}


def configure(model, name, value):
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
    described, comparable = describe_model(model), model_fingerprint(model)
    configure(model, name, value)
    assert describe_model(model) != described
    assert model_fingerprint(model) != comparable


def test_the_fingerprint_ignores_what_vectors_do_not_depend_on(make_model, saved_model):
    model = make_model(dtype=torch.float32)
    comparable = model_fingerprint(model)
    other = ReMatch(
        str(saved_model), model_kwargs={"attn_implementation": "eager", "dtype": torch.bfloat16}
    )
    assert model_fingerprint(other) == comparable, "the same, loaded in another way"
    for name, value in (
        ("_name_or_path", "elsewhere"),
        ("text_config.dtype", torch.bfloat16),
        ("architectures", ["Other"]),
        ("text_config.use_cache", not model.backbone.model.config.text_config.use_cache),
    ):
        configure(model, name, value)
        assert model_fingerprint(model) == comparable, name
    described = describe_model(model)
    model.backbone.model.set_attn_implementation("eager")  # other rounding, the same vectors
    assert describe_model(model) != described
    assert model_fingerprint(model) == comparable


def imports(module: str) -> set[str]:
    """Modules of this package that one of them imports."""
    imported = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rematch"):
            target = node.module.removeprefix("rematch").strip(".").replace(".", "/")
            for alias in node.names:
                inner = f"{target}/{alias.name}".strip("/")
                imported.add(inner if (PACKAGE / f"{inner}.py").exists() else target)
    return imported


def test_the_code_key_covers_every_module_that_vectors_depend_on():
    missing = [module for module in VECTOR_MODULES if not (PACKAGE / f"{module}.py").exists()]
    assert not missing, "in VECTOR_MODULES, but not in the package"
    for module in VECTOR_MODULES:
        unlisted = imports(module) - set(VECTOR_MODULES) - IRRELEVANT.keys()
        assert not unlisted, f"imported by {module}: add them to VECTOR_MODULES or IRRELEVANT"
    assert not IRRELEVANT.keys() & set(VECTOR_MODULES)


def test_only_edits_of_those_modules_change_the_code_key(tmp_path):
    package = tmp_path / "rematch"
    ignored = shutil.ignore_patterns("assets", "__pycache__")
    shutil.copytree(PACKAGE, package, ignore=ignored)
    before = code_digest(package)
    assert before == code_digest(PACKAGE)

    def edit(module):
        path = package / f"{module}.py"
        path.write_text(path.read_text() + "# edited\n")
        return code_digest(package)

    assert edit("losses") == edit("train/trainer") == edit("search/index") == before
    digests = [before, *map(edit, VECTOR_MODULES)]
    assert len(set(digests)) == len(digests)
