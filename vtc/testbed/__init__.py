"""Scenes with known evidence, a small trained model that answers questions about them, and tasks.

Everything a machine without a network needs to see accuracy against the visual tokens kept.
"""

from vtc.testbed.examples import Example, evidence_tokens, examples
from vtc.testbed.model import model_folder
from vtc.testbed.task_files import write_tasks
from vtc.testbed.vocabulary import KINDS

__all__ = ["KINDS", "Example", "evidence_tokens", "examples", "model_folder", "write_tasks"]
