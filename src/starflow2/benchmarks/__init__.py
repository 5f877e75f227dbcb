"""Published benchmarks: folders and files in their layouts, their arithmetic, reports beside the paper's numbers.

Judges are not in here: a detector or a language model reads what we draw and hands back a file, see `records`. Not here
either: the suites of the drawn world (`evals`), which have judges of their own.
"""
