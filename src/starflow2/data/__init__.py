"""Data: the drawn world, its tasks, readers of real corpora, and mixtures of all of them."""
