"""The shipped safety adapter: what it does to the model."""
