"""The weights of nano, in the folder `model` beside this file."""
