"""Other people's models and formats in and out."""
