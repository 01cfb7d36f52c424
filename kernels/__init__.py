"""Triton kernels, installed as `vtc.kernels`.

A docstring only: transformers may import a folder called `kernels` under that name when the
repository root is on `sys.path`, so nothing may happen here.
"""
