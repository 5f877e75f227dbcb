"""Entry point of the plug-in for lmms-eval, which loads it in every run: it imports neither torch nor the classes."""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """Entry of the harness's registry: the name starflow2, and where both classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    path = "starflow2.benchmarks.lmms"
    return ModelManifest("starflow2", simple_class_path=f"{path}.SimpleModel", chat_class_path=f"{path}.ChatModel")
