"""Measurements against other systems, from the checkout alone and without Ray. Each module prints its figures."""
