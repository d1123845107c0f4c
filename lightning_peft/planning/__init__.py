"""The plan of a configuration: what it would train and take, before anything is loaded."""
