"""Accuracy against tokens kept, through stock lmms-eval: the model `vtc`, the sweep and its report."""
