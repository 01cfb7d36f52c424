"""Functions that the task files beside this one name: lmms-eval looks for them in this folder."""

from vtc.testbed.scoring import blank, caption, clip, one_word, pictures, without_evidence

__all__ = ["blank", "caption", "clip", "one_word", "pictures", "without_evidence"]
