"""Executors: train a study's runs in this process (`local`) or as tasks on a Ray cluster (`ray`)."""

from __future__ import annotations

EXECUTORS = ("local", "ray")
