"""Chat templates: conversations to text, and which message wrote what."""
