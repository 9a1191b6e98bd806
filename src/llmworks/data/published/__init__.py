"""Published sets whose files are of no usual shape: one reader each, `rows(path, rejected)`, that gives chat rows."""
