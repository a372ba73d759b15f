"""A run's student out of the house: exported folders, their model card, a server and a chat on them."""
