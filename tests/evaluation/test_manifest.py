"""The entry point: loaded at every start of lmms-eval, so it must cost nothing."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

pytestmark = pytest.mark.eval


def test_lmms_eval_finds_the_model_by_its_entry_point():
    (found,) = entry_points(group="lmms_eval.models", name="vtc")
    assert found.value == "vtc.evaluation.manifest:manifests"


def test_it_names_a_chat_class_that_exists():
    from vtc.evaluation.manifest import manifests
    from vtc.evaluation.model import Vtc

    (manifest,) = manifests()
    assert manifest.model_id == "vtc"
    assert manifest.chat_class_path == f"{Vtc.__module__}.{Vtc.__name__}"
    assert not Vtc.is_simple


def test_it_adds_no_import_to_those_of_lmms_eval():
    script = """
import sys
import lmms_eval.models.registry_v2
before = set(sys.modules)
# the package above is imported with torch; what counts is what the function does
for name in [n for n in sys.modules if n.partition(".")[0] in ("torch", "transformers")]:
    del sys.modules[name]
import importlib.util
spec = importlib.util.find_spec("vtc")
path = spec.submodule_search_locations[0] + "/evaluation/manifest.py"
module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("m", path))
module.__spec__.loader.exec_module(module)
assert module.manifests()
new = {n.partition(".")[0] for n in set(sys.modules) - before}
print(sorted(new - {"m", "typing"}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
