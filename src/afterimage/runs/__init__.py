"""Run folders on disk: files, locks, states, results. No torch."""
