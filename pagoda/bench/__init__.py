"""Floor 7: what `pagoda bench` measures. One file per measurement; `workload` makes requests, `report` shows figures."""
