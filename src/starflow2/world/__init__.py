"""The drawn world: scenes with exact ground truth, tasks and benchmark suites about them, and a detector.

From the bottom up: `scene` draws, `splits` decides what is held out, `words` and `sampling` are shared by the tasks
(`captions`, `questions`, `multiple_choice`, `riddles`, `several_images`, `conversations`, `edits`, `stories`,
`dense_prompts`). All of these need numpy and Pillow only; `detector`, which reads images back, also needs torch.
"""

from __future__ import annotations

__all__: list[str] = []
