"""Feed malformed input to every door of the package and count what is not refused clearly; run by `make fuzz`.

`cases` says what a case is; `pictures`, `words`, `folders`, `documents`, `doors`, `flows`, `published` and `served`
make them; `harness` runs them.
The generators know what a right input is from the documentation; they import none of the checks.
"""
