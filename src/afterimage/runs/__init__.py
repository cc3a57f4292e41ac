"""Run folders on disk: files, locks, states and results. No torch."""
