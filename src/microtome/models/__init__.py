"""The networks, one file a paper; nothing in here knows a device, a rank or a file."""
