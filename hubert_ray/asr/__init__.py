"""From CTC log-probabilities to words and their errors: letters, n-gram model, beam search, word error rate."""
