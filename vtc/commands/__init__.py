"""The commands of `vtc`, one module each; `vtc.cli` reads the arguments."""
