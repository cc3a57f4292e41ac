"""Turn configurations into finished run folders."""
