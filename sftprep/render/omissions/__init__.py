"""The check for content of a record that its rendered text lacks."""
