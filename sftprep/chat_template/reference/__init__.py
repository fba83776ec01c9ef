"""The reference path: chat templates run by Jinja, in a sandbox with size limits."""
