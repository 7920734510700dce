"""The networks: tokenizer and transformers. Nothing here knows about training or files."""
