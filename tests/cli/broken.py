"""A user's module that fails while it is imported."""

model = 1 / 0
