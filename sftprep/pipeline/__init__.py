"""The three passes of a build, and what each of them is made of."""
