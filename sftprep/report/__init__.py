"""Reports for people: the summary of a build, and the view of a pack."""
