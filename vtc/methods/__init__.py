"""Compression methods: one paper, one file, one frozen dataclass."""
