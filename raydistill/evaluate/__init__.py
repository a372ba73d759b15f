"""Quality of finished models on held-out rows: KL to the teacher, perplexity, exact match; and honest PTQ baselines."""
