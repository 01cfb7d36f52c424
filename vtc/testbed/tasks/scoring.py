"""Functions that the task files beside this one name: lmms-eval looks for them in this folder."""

from vtc.testbed.scoring import blank, caption, one_word, without_evidence

__all__ = ["blank", "caption", "one_word", "without_evidence"]
