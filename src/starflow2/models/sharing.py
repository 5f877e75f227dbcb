"""Upload of a model to the Hugging Face Hub, with its card. Imported when it is used: the Hub's client takes longer to
import than all of this package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin

__all__ = ["HubModel"]

MODEL_CARD = """---
{{ card_data }}
---

# {{ name }}

One causal model that reads, answers, draws and edits: a normalizing flow beside a language model, trained with
[starflow2](https://pypi.org/project/starflow2), after [STARFlow2](https://arxiv.org/abs/2605.08029).
Finished stages: {{ stages }}. It draws {{ size }} x {{ size }} pixels and has {{ parameters }} parameters.

```python
from starflow2 import StarFlow2

model = StarFlow2.from_pretrained("this folder or its id on the Hub")
model.generate("{{ prompt }}")[0].image
```

In transformers, after `import starflow2.hf`: `AutoModelForMultimodalLM.from_pretrained(...)` and
`AutoProcessor.from_pretrained(...)`.

What it was trained on, how good it is and under which licence it may be used: please fill in.
"""


class HubModel(
    ModelHubMixin,
    library_name="starflow2",
    pipeline_tag="any-to-any",
    tags=["normalizing-flow", "text-to-image", "image-to-image", "image-text-to-text", "arxiv:2605.08029"],
    paper_url="https://arxiv.org/abs/2605.08029",
    model_card_template=MODEL_CARD,
):
    """A model as the Hub's client sees it: it can be saved to a folder, and has a card.

    save: as `StarFlow2.save_pretrained`.
    """

    def __init__(self, save: Callable[..., object]) -> None:
        self._save = save

    def save_pretrained(
        self, save_directory: str | Path, *, model_card_kwargs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        self._save(save_directory, model_card_kwargs=model_card_kwargs)
