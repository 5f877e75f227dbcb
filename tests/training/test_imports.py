"""Reading a recipe is quick: it loads torch, but neither transformers nor a tokenizer library."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("transformers", "tokenizers")  # transformers alone takes twice as long to import as torch
READ_RECIPE = "import starflow2.training.recipes as recipes; recipes.find_config('nano')"
COMMAND = "from starflow2.cli.app import main; main({arguments})"


@pytest.mark.parametrize(
    "code",
    [
        READ_RECIPE,
        COMMAND.format(arguments=["info", "nano", "--help"]),
        COMMAND.format(arguments=["train", "--help"]),
        COMMAND.format(arguments=["train", "nano", "--stage", "t2i", "--help"]),
    ],
    ids=["the recipes", "info nano --help", "train --help", "train nano --stage t2i --help"],
)
def test_a_recipe_and_the_help_of_its_commands_load_no_language_model_library(code):
    report = f"import sys; print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    assert ran.stderr.strip() == "[]"
