"""Floor 0": model files on disk and on the hub. Headers and metadata only; no weight is touched here."""
