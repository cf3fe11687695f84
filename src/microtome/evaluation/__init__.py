"""Arrays -> numbers -> pictures; no torch."""
