"""Ways in for what others have: models of `transformers`, evaluation. Nothing here is imported by `import tritium`."""
