"""Audit: what an attacker rebuilds from features, under which defences."""
