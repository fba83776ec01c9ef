"""Chat templates run by Jinja: in a sandbox, with limits, noting which message writes what."""
