"""Chat templates: rendering of conversations, and attribution of text to messages."""
