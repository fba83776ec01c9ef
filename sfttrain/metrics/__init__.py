"""What a run reports of its tokens and predictions."""
