"""What people look at: the verbs `results` and `watch`, plots, pages. Reads records and the store, writes to neither."""
