"""Experiments: from configurations to finished run folders, and use of finished runs."""
