"""The files of an adapter, and models written with it: saved, merged, baked, compressed."""
