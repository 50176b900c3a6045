"""The parity ladder: whether a head behaves where it is served as it did where it was trained. See `ladder`."""
