"""What can be known of any model by its structure: blocks, targets, heads, fingerprint, quantisation, window."""
