"""Benchmarks: what a model draws and answers, graded by fixed rules, beside the floors and ceilings of each score."""
