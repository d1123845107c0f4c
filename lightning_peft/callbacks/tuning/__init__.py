"""The methods that train an adapter, one file each."""
