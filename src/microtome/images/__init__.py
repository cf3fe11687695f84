"""A file on disk <-> Image(array, spacing, affine, axes)."""
