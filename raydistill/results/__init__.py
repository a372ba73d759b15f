"""Results: the run's own record, its delivery to MLflow, tables and plots. The only room that imports mlflow."""
