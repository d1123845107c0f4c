"""What a configuration would train and take, before anything is loaded."""
