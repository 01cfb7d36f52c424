"""Descriptions of model families, installed as `vtc.adapters`. A docstring only, see `vtc.kernels`."""
