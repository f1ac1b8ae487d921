"""The command line: what is typed, checked and handed on, and what people read."""
