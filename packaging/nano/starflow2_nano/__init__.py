"""The weights of nano, in the folder `model` beside this file, and those of nano-heldout in their own."""
