"""Everything that imports Ray, and in zero.py DeepSpeed: how work is spread, reduced, trained, searched and recovered."""
