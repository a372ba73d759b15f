"""Results: the run's own record, its delivery to the store, queries, table rows. The only room that imports mlflow."""
