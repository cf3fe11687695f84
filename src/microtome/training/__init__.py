"""A Dataset and a Plan -> a trained model."""
