"""The thin runtime: specs, layers, the decoder, weights, tokenizer, cache, generation and the command line."""
