"""Where a study's runs are trained: in this process (`local`, see `experiments.queue`), or as tasks on a Ray cluster (`ray`)."""

from __future__ import annotations

EXECUTORS = ("local", "ray")
