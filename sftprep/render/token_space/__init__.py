"""The fast path to loss masks: regions between added tokens of the template, found in token ids."""
