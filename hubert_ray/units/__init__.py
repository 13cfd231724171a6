"""Features, clusters and how good they are. torch, numpy and faiss; no Ray."""
