"""hubert_ray: HuBERT pretraining end to end on Ray, from raw speech to a word error rate."""

__version__ = "0.1.0"
