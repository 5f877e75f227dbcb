"""`python -m starflow2`: the same as the `starflow2` command."""

from __future__ import annotations

import sys

from starflow2.cli.app import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
