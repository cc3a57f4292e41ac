"""The page to walk through."""
