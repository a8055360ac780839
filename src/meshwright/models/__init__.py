"""Plain single-device reference models: a user's code, importing nothing of meshwright."""
