"""Small versions of what the papers claim; they import the package, never the reverse. Reviewed with each release."""
