"""What is timed, with which limits it is compared, and how long real data take: `make bench`, `make bench-peers`."""
