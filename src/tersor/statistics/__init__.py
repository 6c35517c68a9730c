"""What is measured before planning: text as token ids, Gram matrices, sensitivities, rate-distortion curves."""
