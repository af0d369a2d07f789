"""Floor 6: HTTP protocols. One `parse`/`render` file per protocol, one generic handler, one list of routes."""
