"""Descriptions of model families, installed as `vtc.adapters`. Only a docstring, see kernels/."""
