"""What lmms-eval expects of a plug-in, by its published files; lmms-eval need not be installed."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from megatron_vlm.evaluation.manifest import manifest
from tests.support.environments import LMMS_EVAL
from tests.support.launch import ROOT
from tests.support.published_source import PublishedModule, download_wheel

pytestmark = pytest.mark.full
REGISTRY = "lmms_eval.models.registry_v2"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return download_wheel(LMMS_EVAL, tmp_path_factory.mktemp("lmms-eval"))


@pytest.fixture
def registry(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """lmms-eval's registry of models, which imports nothing but the standard library."""
    module = ModuleType(REGISTRY)
    monkeypatch.setitem(sys.modules, REGISTRY, module)
    exec(PublishedModule(wheel, REGISTRY).text, vars(module))
    return module


def test_the_registry_finds_both_classes(registry: ModuleType) -> None:
    models = registry.ModelRegistryV2()
    (found,) = models._coerce_payload_to_manifests(manifest)
    models.register_manifest(found)
    classes = {}
    for force_simple in (False, True):
        resolved = models.resolve("instellavl", force_simple=force_simple)
        assert models.resolve("megatron_vlm", force_simple=force_simple).class_path == resolved.class_path
        classes[resolved.model_type] = resolved.class_path
    source = ast.parse((ROOT / "megatron_vlm" / "evaluation" / "lmms_model.py").read_text())
    is_simple = {
        f"megatron_vlm.evaluation.lmms_model.{node.name}": ast.unparse(statement.value)
        for node in source.body
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "is_simple"
    }
    assert is_simple == {classes["simple"]: "True", classes["chat"]: "False"}


def test_the_entry_point(wheel: Path) -> None:
    assert 'group: str = "lmms_eval.models"' in PublishedModule(wheel, REGISTRY).text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["instellavl"].partition(":")
    assert getattr(import_module(module), name) is manifest


def test_the_order_of_arguments(wheel: Path) -> None:
    """As InstellaVL and InstellaVLChat unpack them."""
    tasks = PublishedModule(wheel, "lmms_eval.api.task").text
    settings, where = "copy.deepcopy(self.config.generation_kwargs)", "doc_id, self.config.task, split"
    assert f"(ctx, self.doc_to_messages, {settings}, {where})" in tasks
    assert f"(ctx, {settings}, self.doc_to_visual, {where})" in tasks
    assert f'(ctx, f"{{target_delimiter}}{{cont}}", self.doc_to_visual, {where}) for cont in choices' in tasks
    assert "pred = np.argmin(lls)" in tasks, "the smallest value is no longer the best answer"


def test_results(wheel: Path) -> None:
    """A tuple becomes a text, unless it is the text of a result."""
    instance = PublishedModule(wheel, "lmms_eval.api.instance")
    found: dict[str, type] = {}
    for name in ("TokenCounts", "GenerationResult"):
        found[name] = type(name, (), dict.fromkeys(("input_tokens", "output_tokens", "text", "token_counts")))
    unwrap = instance.function("unwrap_generation_output", **found)
    result = found["GenerationResult"]()
    result.text = (0.5, True)  # type: ignore[attr-defined]
    assert unwrap(result)[0] == (0.5, True)
    assert unwrap((0.5, True))[0] == "(0.5, True)", "bare tuples are kept now: return them"
