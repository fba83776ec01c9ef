"""The proof that the fast encoder gives the ids of the reference."""
