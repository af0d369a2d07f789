"""One program per engine, each run by its own environment's Python; all speak `wire`."""
