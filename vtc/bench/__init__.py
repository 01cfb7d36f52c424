"""What `vtc bench` and the scripts in `benchmarks/` measure, and how; nothing here runs a method.

Nothing is timed unless it was equal before: a red check has no time and no speed-up.
"""
