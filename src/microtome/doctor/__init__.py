"""What this machine has, whether the whole road works on it, and what to install for what is missing."""
