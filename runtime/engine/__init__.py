"""Many requests at a time over one paged cache: see docs/architecture/serving.md."""
