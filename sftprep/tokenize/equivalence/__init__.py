"""The checks of the fast encoder's ids against the reference encoder's."""
