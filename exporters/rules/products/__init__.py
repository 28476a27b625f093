"""Products with weights: packed, quantized, summed in whole vectors."""
