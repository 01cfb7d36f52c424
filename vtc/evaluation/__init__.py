"""Accuracy against visual tokens kept: the lmms-eval model `vtc`, the sweep, its report."""
