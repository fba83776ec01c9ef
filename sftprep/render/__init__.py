"""From rendered conversations to the tokens that are trained."""
