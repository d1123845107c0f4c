"""The part an adapter takes in `fit`: base classes, backbone, optimizers, strategies, precision, checkpoints."""
