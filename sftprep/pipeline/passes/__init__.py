"""The three passes over a group: tokens, packs, shards."""
