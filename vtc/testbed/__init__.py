"""Scenes with known evidence, small trained models that answer questions about them, and tasks.

Everything a machine without a network needs to see accuracy against the visual tokens kept.
"""

from vtc.testbed.examples import Example, evidence_tokens, examples
from vtc.testbed.model import FAMILIES, model_folder
from vtc.testbed.task_files import write_tasks
from vtc.testbed.vocabulary import CLIP_KINDS, KINDS, PAIR_KINDS

__all__ = [
    "CLIP_KINDS",
    "FAMILIES",
    "KINDS",
    "PAIR_KINDS",
    "Example",
    "evidence_tokens",
    "examples",
    "model_folder",
    "write_tasks",
]
