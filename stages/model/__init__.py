"""The language model, its tokenizer's files, and its sparse autoencoders."""
