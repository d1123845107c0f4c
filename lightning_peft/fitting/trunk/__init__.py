"""The frozen blocks below the first trained one, and what is kept of them from epoch to epoch."""
