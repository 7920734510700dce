"""Training configs: get_config(spec) in tokenizer.py and hmar.py."""
