"""From corpora to batches: audio, shards, the batch plan, and the arithmetic between samples and frames."""
