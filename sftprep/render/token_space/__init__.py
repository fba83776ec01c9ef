"""The fast path to loss masks: regions found in token ids.

Regions are between added tokens of the template.
"""
