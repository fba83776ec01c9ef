"""What a person sees: summaries of a build, and packs drawn in the terminal."""
