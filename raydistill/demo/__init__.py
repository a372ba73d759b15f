"""The embedded world: a problem generator, a tokenizer and a tiny teacher, all made on this machine in minutes."""
