"""Measurements against other systems, from the checkout alone; training steps without Ray. Each module prints its figures."""
