"""The checks that the fast encoder gives the same token ids as the reference encoder."""
