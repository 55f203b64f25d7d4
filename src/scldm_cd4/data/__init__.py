"""From AnnData to validated, aligned, sparse batches."""
