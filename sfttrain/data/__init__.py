"""From records or packs to the batches of a training step."""
