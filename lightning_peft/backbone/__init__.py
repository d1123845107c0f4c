"""Knowledge of any model by its structure: blocks, targets, heads, fingerprint, quantisation, window."""
