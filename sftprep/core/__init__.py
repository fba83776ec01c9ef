"""The central types, and helpers that know nothing of the project's purpose."""
