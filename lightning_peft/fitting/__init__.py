"""How an adapter takes part in `fit`: base classes, backbone, optimizers, strategies, precision, checkpoints."""
