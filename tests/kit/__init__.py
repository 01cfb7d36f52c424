"""Tiny random stock models of every family, prompts for them, and oracles for compressed ones."""
