"""Importing `vtc` has no effect on anything else and needs none of its optional friends."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(code, cwd, **environment):
    """Run in a fresh interpreter, with the current directory on its path as `python -c` has it."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    return subprocess.run(
        command,
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


UNTOUCHED = """
import logging, os, random, sys, threading, warnings
import torch, transformers
from torch.nn.modules import module
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers import CLIPVisionModel, GenerationMixin, LlavaForConditionalGeneration

CLASSES = PreTrainedModel, GenerationMixin, LlavaForConditionalGeneration, CLIPVisionModel

def functions(cls):
    return {name: id(member) for name, member in vars(cls).items()}

def state():
    return {
        "attention": {k: id(v) for k, v in ALL_ATTENTION_FUNCTIONS.items()},
        "masks": {k: id(v) for k, v in ALL_MASK_ATTENTION_FUNCTIONS.items()},
        "classes": [functions(c) for c in CLASSES],
        "hooks": [len(v) for k, v in vars(module).items() if k.endswith("hooks")],
        "path": list(sys.path),
        "environment": dict(os.environ),
        "filters": list(warnings.filters),
        "handlers": list(logging.getLogger().handlers),
        "threads": (torch.get_num_threads(), threading.active_count()),
        "random": (random.getstate(), torch.get_rng_state().tolist()),
        "dtype": torch.get_default_dtype(),
    }

before, modules = state(), set(sys.modules)
import vtc, vtc.adapters.registry, vtc.cli, vtc.kernels, vtc.viz, vtc.widget
vtc.methods()
after = state()
changed = [k for k in before if before[k] != after[k]]
assert not changed, changed
friends = {"matplotlib", "ipywidgets", "lmms_eval", "pandas", "scipy"}
assert not friends & (set(sys.modules) - modules)
"""


def test_importing_changes_nothing_elsewhere(tmp_path):
    done = run(UNTOUCHED, tmp_path)
    assert done.returncode == 0, done.stderr


BLOCKED = """
import sys

from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {blocked!r}
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
import vtc, vtc.cli, vtc.viz
from vtc.testbed.model import build_model, build_processor
from PIL import Image

processor = build_processor()
model = build_model(processor.tokenizer, small=True).eval()
prompt = "USER: <image>\\nwhat color is the star? ASSISTANT:"
picture = Image.new("RGB", (112, 112), "red")
inputs = processor(images=picture, text=prompt, return_tensors="pt")
with vtc.patch(model, "vtc_cls", 0.11, start=1) as handle:
    model.generate(**inputs, max_new_tokens=2)
    handle.plot(picture)
    print(handle.report().llm_tokens)
assert vtc.cli.main(["methods"]) == 0
status = vtc.cli.main(["sweep", "--model", "org/none", "--out", {out!r}])
assert status == 1, status
"""
OPTIONAL = {
    *("triton", "matplotlib", "lmms_eval", "datasets", "pandas", "pyarrow", "scipy", "rich"),
    *("loguru", "decord", "sklearn", "skimage", "IPython", "kernels"),
}


def test_core_needs_none_of_the_extras(tmp_path):
    code = BLOCKED.format(blocked=OPTIONAL, out=str(tmp_path / "out"))
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(22,)")
    assert "visual-token-compression[eval]" in done.stderr.splitlines()[-1]


# transformers asks for a top-level package called `kernels`, and the repository root has a folder
# of that name: the answers must be those it gives elsewhere
AVAILABILITY = """
import transformers, vtc
from transformers import LlavaForConditionalGeneration, LlavaConfig
from transformers.utils import is_flash_attn_2_available, is_kernels_available
from vtc.testbed.model import build_model, build_processor

print(is_flash_attn_2_available(), is_kernels_available())
config = build_model(build_processor().tokenizer, small=True).config
try:
    LlavaForConditionalGeneration._from_config(config, attn_implementation="flash_attention_2")
except Exception as error:
    print(type(error).__name__, str(error).partition("\\n")[0])
else:
    print("built")
"""


def test_transformers_is_not_confused_by_our_folders(tmp_path):
    here, elsewhere = run(AVAILABILITY, ROOT), run(AVAILABILITY, tmp_path)
    assert here.returncode == 0, here.stderr
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert here.stdout == elsewhere.stdout
    assert "InvalidVersion" not in here.stdout
