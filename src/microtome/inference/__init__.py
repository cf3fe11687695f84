"""An image of any size -> labels, in bounded memory."""
