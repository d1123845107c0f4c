"""The frozen blocks below the first trained one, and their results, kept from epoch to epoch."""
