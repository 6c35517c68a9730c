"""What runs a packed model in plain torch."""
