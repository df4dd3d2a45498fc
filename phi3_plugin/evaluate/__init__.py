"""What a model does on data it is measured by, and what an adapter changes about it."""
