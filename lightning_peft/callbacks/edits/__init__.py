"""The methods that compute an adapter without gradient descent, one file each."""
