"""What a crash leaves and how a run goes on from it: checkpoints, the ledger, resuming, freeing disk."""
