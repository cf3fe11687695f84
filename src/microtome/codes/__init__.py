"""What each error's code stands for: a title, why it happens, what to do. Plain data, which imports nothing heavy."""
