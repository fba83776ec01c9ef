"""The conversion of parsed records to examples, and checks of their quality."""
