"""Documents to rows of tokens, in the order of the walk: sources, tokenizer, fim and splitting, packing, pipeline."""
