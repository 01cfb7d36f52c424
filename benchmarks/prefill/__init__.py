"""Parts of `prefill_layers.py`."""
