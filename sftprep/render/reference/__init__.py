"""The reference path to loss masks: spans of characters."""
