"""Audit: attack features behind defences, and measure what an attacker can rebuild."""
