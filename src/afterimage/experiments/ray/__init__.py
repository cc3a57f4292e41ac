"""Where a study's runs are trained: in this process (`local`, see `jobs`), or as tasks on a Ray cluster (`ray`)."""

from __future__ import annotations

EXECUTORS = ("local", "ray")
