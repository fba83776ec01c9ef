"""The compiler: a chat template as one Python function, made from its syntax tree."""
