"""Floor 0: data contracts and small services. Imports nothing of ours."""
