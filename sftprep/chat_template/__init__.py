"""Chat templates: rendering, and attribution of text to messages."""
