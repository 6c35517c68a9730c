"""What a compressed model lost against its reference: divergence, perplexity, agreement, and text side by side."""
