"""Loss masks from token ids alone: regions lie between added tokens that the template writes."""
