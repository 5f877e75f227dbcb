"""Reading a recipe is quick: it loads torch, but neither transformers nor a tokenizer library."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("transformers", "tokenizers")  # transformers alone takes twice as long to import as torch
READ_RECIPE = "import starflow2.training.recipes as recipes; recipes.find_config('nano')"
COMMAND = "from starflow2.cli.app import main; main({arguments})"
CODES = {
    "train --help": COMMAND.format(arguments=["train", "--help"]),
    "the recipes": READ_RECIPE,
    "info nano --help": COMMAND.format(arguments=["info", "nano", "--help"]),
    "train nano --stage t2i --help": COMMAND.format(arguments=["train", "nano", "--stage", "t2i", "--help"]),
}
LOOK = f"""
import json, sys
for name, code in json.loads(sys.argv[1]).items():
    exec(code, {{}})
    print(json.dumps([name, [heavy for heavy in {HEAVY} if heavy in sys.modules]]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """The modules of HEAVY that one interpreter has loaded after each of the codes, run one after the other."""
    command = [sys.executable, "-c", LOOK, json.dumps(CODES)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(map(json.loads, ran.stderr.splitlines()))


@pytest.mark.parametrize("name", CODES)
def test_a_recipe_and_the_help_of_its_commands_load_no_language_model_library(loaded, name):
    assert loaded[name] == []
