"""A run's directory: who may write it, what stands in it, and how it is read back."""
