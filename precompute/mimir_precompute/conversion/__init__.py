"""A cache written once more: in another format, or as plain tars for other trainers."""
