"""Anybody's data as LightningDataModules, and rows as batches."""
