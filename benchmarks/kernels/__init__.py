"""One file per operation: the question it answers, and its cases (`CASES` for a GPU, `SMOKE` for the interpreter)."""
