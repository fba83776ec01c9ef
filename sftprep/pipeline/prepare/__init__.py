"""What a build needs before its first pass: inputs, recipes, formats."""
