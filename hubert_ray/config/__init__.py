"""What to run and how: plain immutable settings. Imports the standard library and msgspec only."""
